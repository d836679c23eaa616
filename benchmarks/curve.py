"""Loss over steps on real text at real shapes, one contender of `slipstream bench`: bytes of Python's standard library.

    torchrun --nproc-per-node=8 benchmarks/curve.py --model qwen3-30b-a3b --layers 8 --contender slipstream curves/ours.json
    torchrun --nproc-per-node=8 benchmarks/curve.py --model qwen3-30b-a3b --layers 8 --contender transformers curves/theirs.json
    python benchmarks/curve.py --compare curves/ours.json curves/theirs.json

Ranks read different text, contenders the same. Where `same_weights` is true in both files, they start from equal weights;
else (Transformers draws random weights that depend on the layout) only the shape of the curves compares.
"""  # noqa: E501

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from slipstream.bench.contenders import build, resolved_device
from slipstream.bench.measure import Step
from slipstream.bench.options import OURS, RIVALS, Job, Options

WINDOW = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="where to write; with --compare two to read")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--contender", choices=(OURS, *RIVALS), default=OURS)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if arguments.compare:
        compare(*arguments.files)
    elif arguments.files[0].exists():
        parser.error(f"{arguments.files[0]} exists already")
    else:
        train(arguments)


def train(arguments: argparse.Namespace) -> None:
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        from slipstream.parallel.setup import DistributedSetup, join_process_group

        join_process_group(DistributedSetup())
    options = Options(
        arguments.model, layers=arguments.layers, seq_len=arguments.seq_len, nproc=ranks, ep_size=ranks,
        tiny=arguments.tiny, device="cuda" if torch.cuda.is_available() else "cpu",
        optimizer="torch",  # ours rounds bf16 weights in a better way, which would show
    )  # fmt: skip
    device = resolved_device(options)
    contender = build(Job(options, arguments.contender, "learned"), device, ranks)
    losses = []
    for ids in itertools.islice(rows(options.seq_len, rank, ranks), arguments.steps):
        ids = ids.to(device)
        step = Step(contender, {"input_ids": ids, "labels": ids})
        for part in step.parts:
            part()
        losses.append(step.loss())
    if rank == 0:
        found = {"contender": arguments.contender, "same_weights": contender.same_weights, "losses": losses}
        arguments.files[0].parent.mkdir(parents=True, exist_ok=True)
        arguments.files[0].write_text(json.dumps(found))
        print(f"{arguments.contender}: loss {losses[0]:.4f} -> {statistics.mean(losses[-WINDOW:]):.4f}")
    if ranks > 1:
        dist.destroy_process_group()


def rows(length: int, rank: int, ranks: int) -> Iterator[torch.Tensor]:
    """Every `ranks`-th row of text from row `rank` on, `[1, length]`, over and over."""
    text = b"".join(file.read_bytes() for file in sorted(Path(os.__file__).parent.glob("*.py")))
    ids = torch.tensor(list(text), dtype=torch.long)
    ids = ids[: len(ids) // length * length].view(-1, 1, length)
    for row in itertools.count(rank, ranks):
        yield ids[row % len(ids)]


def compare(one: Path, other: Path) -> None:
    first, second = (json.loads(file.read_text()) for file in (one, other))
    pairs = list(zip(first["losses"], second["losses"], strict=True))
    starts = pairs[0]
    ends = [statistics.mean(losses) for losses in zip(*pairs[-WINDOW:], strict=True)]
    apart = [abs(a - b) for a, b in pairs]
    equal = first["same_weights"] and second["same_weights"]
    print(f"{len(pairs)} steps; {first['contender']} against {second['contender']}; equal start: {equal}")
    print(f"first loss {starts[0]:.4f} and {starts[1]:.4f}, mean of the last {WINDOW} {ends[0]:.4f} and {ends[1]:.4f}; "
          f"apart {statistics.mean(apart):.4f} on average, {max(apart):.4f} at most")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
