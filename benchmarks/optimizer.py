"""Time of an optimizer step beside torch's fused AdamW, and the share of a plain copy's bandwidth that it reaches.

`python benchmarks/optimizer.py [--layers 8] [--ranks 1]`: weights of Qwen3-30B-A3B's shapes in bf16, as one rank of
expert parallelism over `--ranks` holds them. Needs a GPU with 10 bytes a parameter.
"""

import argparse
import json
import time

import torch

from slipstream.optim import AdamW

HIDDEN, INTERMEDIATE, EXPERTS, VOCABULARY = 2048, 768, 128, 151936


def parameters(layers: int, ranks: int) -> list[torch.nn.Parameter]:
    """Experts whole on their owner, everything else in equal parts."""
    dense = [(VOCABULARY, HIDDEN), (HIDDEN, VOCABULARY), (HIDDEN,)]
    shapes = [(rows // ranks, *rest) for rows, *rest in dense]
    for _ in range(layers):
        shapes += [(EXPERTS // ranks, 2 * INTERMEDIATE, HIDDEN), (EXPERTS // ranks, HIDDEN, INTERMEDIATE)]
        attention = [(4096, HIDDEN), (512, HIDDEN), (512, HIDDEN), (HIDDEN, 4096), (128,), (128,)]
        shapes += [(rows // ranks, *rest) for rows, *rest in (*attention, (EXPERTS, HIDDEN), (HIDDEN,), (HIDDEN,))]
    params = [torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return params


def milliseconds(optimizer: torch.optim.Optimizer, steps: int = 20) -> tuple[float, float]:
    """The median of a step's time on the device, and of the host's alone."""
    for _ in range(3):
        optimizer.step()
    device, host = [], []
    for _ in range(steps):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        began = time.perf_counter()
        optimizer.step()
        host.append((time.perf_counter() - began) * 1e3)
        end.record()
        torch.cuda.synchronize()
        device.append(start.elapsed_time(end))
    return sorted(device)[steps // 2], sorted(host)[steps // 2]


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 4 GiB."""
    source = torch.empty(1 << 31, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * source.nbytes / (sorted(times)[5] * 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    copied = copy_bandwidth()
    torch.cuda.empty_cache()
    params = parameters(options.layers, options.ranks)
    count = sum(param.numel() for param in params)
    print(f"{torch.cuda.get_device_name()}: {count / 1e9:.2f} B parameters in {len(params)} tensors; "
          f"a copy moves {copied / 1e12:.2f} TB/s")  # fmt: skip
    candidates = {
        "torch fused": (14, lambda: torch.optim.AdamW(params, lr=1e-5, fused=True)),
        "nearest": (14, lambda: AdamW(params, lr=1e-5, rounding="nearest")),
        "stochastic": (14, lambda: AdamW(params, lr=1e-5)),
        "master": (18, lambda: AdamW(params, lr=1e-5, rounding="master")),
    }
    for name, (moved, make) in candidates.items():
        device, host = milliseconds(make())
        share = moved * count / (device * 1e-3) / copied
        print(
            json.dumps(
                {"optimizer": name, "ms": round(device, 2), "host_ms": round(host, 2), "of_copy": round(share, 3)}
            )
        )
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
