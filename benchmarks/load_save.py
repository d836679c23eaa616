"""Loading and saving a sharded MoE checkpoint, Slipstream beside plain Transformers: seconds, GB/s, peak memory.

    torchrun --nproc-per-node=2 benchmarks/load_save.py --make /data/ckpt --layers 24     # random weights, real shapes
    torchrun --nproc-per-node=2 benchmarks/load_save.py --side slipstream /data/ckpt
    torchrun --nproc-per-node=2 benchmarks/load_save.py --side transformers /data/ckpt

Each side loads the same files with FSDP2 and experts split over all ranks, then saves them in the Hugging Face layout.
Host memory is what the process owns (anonymous pages); mapped pages of the checkpoint's files are not counted.
"""

import argparse
import os
import shutil
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig

SIZES = {
    "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
}  # fmt: skip
TINY = {"vocab_size": 512, "hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4, "head_dim": 16}
GIB = 2**30


class HostPeak:
    """The most memory this process owned while the block ran, in GiB, sampled every 20 ms."""

    def __enter__(self) -> "HostPeak":
        self.start = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--make", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--side", choices=["slipstream", "transformers"], default="slipstream")
    parser.add_argument("--no-save", action="store_true", help="only load")
    options = parser.parse_args()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if options.make:
        make(options, ranks, cuda)
    else:
        measure(options, rank, ranks, cuda)
    dist.barrier()
    dist.destroy_process_group()


def make(options: argparse.Namespace, ranks: int, cuda: bool) -> None:
    from slipstream import AutoModelForCausalLM

    config = Qwen3MoeConfig(**{**SIZES, **(TINY if options.tiny else {})}, num_hidden_layers=options.layers)
    torch.manual_seed(0)
    started = time.perf_counter()
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, distributed_setup={"ep_size": ranks})
    made = time.perf_counter()
    model.save_pretrained(options.make)
    if dist.get_rank() == 0:
        size = sum(file.stat().st_size for file in options.make.glob("*.safetensors")) / 1e9
        print(f"made {size:.1f} GB: random weights {made - started:.1f} s, save {time.perf_counter() - made:.1f} s")


def measure(options: argparse.Namespace, rank: int, ranks: int, cuda: bool) -> None:
    if options.side == "slipstream":
        from slipstream import AutoModelForCausalLM

        extra = {"distributed_setup": {"ep_size": ranks}}
    else:
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig

        setup = DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation="all_to_all")
        extra = {"distributed_config": setup}
    size = sum(file.stat().st_size for file in options.folder.glob("*.safetensors")) / 1e9
    output = options.folder.with_name(f"{options.folder.name}-{options.side}")
    results = []
    dist.barrier()
    with HostPeak() as host:
        started = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.bfloat16, **extra)
        dist.barrier()
        results.append(("load", time.perf_counter() - started))
    own = sum(getattr(p, "to_local", lambda p=p: p)().numel() * 2 for p in model.parameters()) / GIB
    peaks = [host.peak - host.start]
    device = [torch.cuda.max_memory_allocated() / GIB if cuda else 0.0]
    if not options.no_save:
        with HostPeak() as host:
            started = time.perf_counter()
            model.save_pretrained(output)
            dist.barrier()
            results.append(("save", time.perf_counter() - started))
        peaks.append(host.peak - host.start)
        device.append(torch.cuda.max_memory_allocated() / GIB if cuda else 0.0)
    for (name, seconds), host_peak, device_peak in zip(results, peaks, device, strict=True):
        worst = torch.tensor([host_peak, device_peak])
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if rank == 0:
            print(
                f"{options.side:12s} {name}: {seconds:6.1f} s, {size / seconds:5.2f} GB/s; largest rank: host "
                f"{worst[0]:.1f} GiB more than before, device {worst[1]:.1f} GiB (its weights: {own:.1f} GiB)",
                flush=True,
            )
    if rank == 0 and not options.no_save:
        shutil.rmtree(output)


if __name__ == "__main__":
    main()
