"""One training step on one device, plain Transformers beside Slipstream: time of its parts and peak memory.

    python benchmarks/step.py --layers 8                        # Qwen3-30B-A3B's layers on a GPU
    python benchmarks/step.py --model qwen3-8b --layers 8       # a dense model
    python benchmarks/step.py --tiny --device cpu               # that it runs at all

Random weights and tokens, real layer shapes. Both sides have the same weights, gate, loss, optimizer (fused AdamW) and
dtype; each run is a process of its own, in alternation, and the medians over all runs are reported. Transformers runs
at its best settings: SDPA attention, `grouped_mm` experts.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time

import torch
from transformers import PretrainedConfig, Qwen3Config, Qwen3MoeConfig

MODELS: dict[str, tuple[type[PretrainedConfig], dict[str, object]]] = {
    "qwen3-30b-a3b": (
        Qwen3MoeConfig,
        {
            "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32,
            "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
            "norm_topk_prob": True, "max_position_embeddings": 40960,
        },
    ),
    "qwen3-8b": (
        Qwen3Config,
        {
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        },
    ),
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
PARTS = ("forward", "backward", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--gate", choices=["learned", "balanced"], default="learned")
    parser.add_argument("--repeats", type=int, default=2, help="processes per side")
    parser.add_argument("--steps", type=int, default=8, help="timed steps per process, after 4 to warm up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny widths and 64 tokens, to try the script")
    parser.add_argument("--side", choices=["transformers", "slipstream"], help="measure one side in this process")
    options = parser.parse_args()
    if options.tiny:
        options.seq_len = 64
    if options.side:
        print(json.dumps(measure(options)))
        return
    runs: dict[str, list[dict[str, float]]] = {"transformers": [], "slipstream": []}
    for _ in range(options.repeats):
        for side, results in runs.items():
            command = [sys.executable, *sys.argv, "--side", side]
            results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    report(options, runs)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Medians in milliseconds, peak memory in GiB, and the first step's loss, of one side."""
    device = torch.device(options.device)
    config_class, sizes = MODELS[options.model]
    if options.tiny:
        sizes = {**sizes, **{name: size for name, size in TINY.items() if name in sizes}}
    config = config_class(**sizes, num_hidden_layers=options.layers, use_cache=False)
    keywords: dict[str, object] = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    torch.manual_seed(0)
    with device:
        if options.side == "slipstream":
            from slipstream import AutoModelForCausalLM as Ours

            model = Ours.from_config(config, backend={"gate": options.gate}, **keywords)
        else:
            from transformers import AutoModelForCausalLM as Theirs

            model = Theirs.from_config(config, **keywords)
            if options.gate == "balanced":
                balance(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(0, config.vocab_size, (options.micro_batch, options.seq_len), device=device)
    steps = [timed_step(model, optimizer, ids) for _ in range(4 + options.steps)]
    result = {part: statistics.median(step[part] for step in steps[4:]) for part in PARTS}
    result["step"] = sum(result.values())
    result["tokens_per_second"] = ids.numel() / result["step"] * 1e3
    result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    result["loss"] = steps[0]["loss"]
    return result


def balance(model: torch.nn.Module) -> None:
    """Overwrite the router's choice with the uniform one that Slipstream's gate='balanced' makes."""
    for module in model.modules():
        if hasattr(module, "is_transposed"):

            def uniform(hidden, index, weights, forward=module.forward, experts=module.num_experts):
                slots = torch.arange(index.numel(), device=index.device)
                return forward(hidden, (slots % experts).view_as(index), weights)

            module.forward = uniform


def timed_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> dict[str, float]:
    marks = []

    def mark() -> None:
        if ids.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        else:
            marks.append(time.perf_counter())

    mark()
    loss = model(input_ids=ids, labels=ids).loss
    mark()
    loss.backward()
    mark()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mark()
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]
    else:
        times = [(end - start) * 1e3 for start, end in itertools.pairwise(marks)]
    return {**dict(zip(PARTS, times, strict=True)), "loss": loss.item()}


def report(options: argparse.Namespace, runs: dict[str, list[dict[str, float]]]) -> None:
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(
        f"{options.model}{' (tiny)' * options.tiny}, {options.layers} layers, "
        f"{options.micro_batch} x {options.seq_len} tokens, {options.gate} gate, bf16, AdamW fused; "
        f"{device}, torch {torch.__version__}; median of "
        f"{options.repeats} processes x {options.steps} steps, ms"
    )
    print("| | forward + loss | backward | optimizer | step | tokens/s | peak GiB | first loss |")
    print("|---|---|---|---|---|---|---|---|")
    medians = {}
    for side, results in runs.items():
        medians[side] = {key: statistics.median(run[key] for run in results) for key in results[0]}
        parts = " | ".join(f"{medians[side][part]:.1f}" for part in (*PARTS, "step"))
        m = medians[side]
        print(f"| {side} | {parts} | {m['tokens_per_second']:,.0f} | {m['peak_gib']:.1f} | {m['loss']:.4f} |")
    theirs, ours = medians["transformers"], medians["slipstream"]
    both = [sum(m[part] for part in PARTS[:2]) for m in (theirs, ours)]
    memory = f"; memory {ours['peak_gib'] / theirs['peak_gib']:.2f} x" if theirs["peak_gib"] else ""
    print(f"forward + backward {both[0] / both[1]:.2f} x, step {theirs['step'] / ours['step']:.2f} x{memory}")


if __name__ == "__main__":
    main()
