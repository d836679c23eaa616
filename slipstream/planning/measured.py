"""How much of a GPU's data sheet the step's parts reach, as measured, and where that stands.

All from H200 machines. For another GPU the same shares are assumed; nothing was measured there.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """A figure and the run that it comes from; `source` begins with "assumed" where there is none."""

    value: float
    unit: str
    source: str


_NOTES, _CEILINGS = "benchmarks/NOTES.md", "project notes MEASURED.md, table of ceilings, 2 x H200, 21 Nov 2026"
_EXCHANGE = "benchmarks/results/2026-11-22-2xh200-exchange.md"
_COMPILED = "benchmarks/results/2026-11-22-1xh200-first-compiled-step.md"

CONSTANTS = {
    "dense GEMM": Measured(0.66, "of peak", f"{_NOTES}, compiled layers: 650 TFLOP/s sustained"),
    "attention": Measured(0.39, "of peak", f"{_NOTES}, compiled layers: 8.5 ms for 8 layers, 3 x forward counted"),
    "expert GEMM": Measured(0.66, "of peak", f"{_CEILINGS}: 666-698 TFLOP/s from 512 rows an expert on"),
    "expert GEMM, short sums": Measured(554, "length", f"{_CEILINGS}: 515 TFLOP/s over 768, 698 over 2048"),
    "scan": Measured(0.15, "of peak", "assumed, for a fused one"),
    "device memory": Measured(0.88, "of peak", f"{_CEILINGS}: copy at 4.3 TB/s of 4.8"),
    "passes over kept activations": Measured(
        8, "reads and writes", f"fitted to the rest of 46 ms of kernels, {_NOTES}, compiled layers"
    ),
    "passes, not compiled": Measured(
        24, "reads and writes", "fitted to 297 ms at 4 x 4096 tokens, benchmarks/results/2026-11-22-h200-step.md"
    ),
    "slipstream AdamW": Measured(0.79, "of memory peak", f"{_COMPILED}: 19.0 ms for 5.61 B parameters"),
    "torch AdamW": Measured(0.45, "of memory peak", f"{_COMPILED}: 37 ms for 5.61 B parameters"),
    "all-to-all in a host": Measured(0.45, "of link", f"{_CEILINGS}: 202 GB/s at 32 MB, of 450"),
    "all-gather in a host": Measured(0.54, "of link", f"{_CEILINGS}: 245 / 230 GB/s at 128 MB, of 450"),
    "stores over NVLink": Measured(0.31, "of link", f"{_EXCHANGE}: 0.48 ms for 67 MB out and back, twice"),
    "exchange between hosts": Measured(0.7, "of network", "assumed"),
    "hidden under computation": Measured(0.3, "of its time", "assumed, for FSDP2's gathers and reductions"),
    "host, compiled layer": Measured(4.1, "ms", f"{_COMPILED}: 22 forward + 19 backward, of 8 layers, less 8"),
    "host, layer": Measured(8.4, "ms", f"{_COMPILED}: 77.7 ms, not compiled, the host sets the pace, less 10"),
    "host, experts and router": Measured(
        2.1,
        "ms",
        "fitted: Llama-3.2-1B, 16 dense layers, 69.5 ms, waits for no host; 0.58 ms of a forward is the operator",
    ),
    "host, exchange": Measured(2.5, "ms", "benchmarks/results/2026-11-22-2xh200-expert-parallel.md: 190 of 227 ms"),
    "host, exchange over NVLink": Measured(0.35, "ms", f"{_EXCHANGE}: 0.28-0.35, forward and backward"),
    "host, experts under FSDP2": Measured(3.9, "ms", f"{_NOTES}, experts with one owner: 288.7 to 227.0 ms, 16 layers"),
    "host, optimizer": Measured(0.75, "ms a layer", f"{_COMPILED}: 6 ms for 8 layers"),
    "host, rest": Measured(8, "ms", f"{_COMPILED}: embedding, head and loss"),
    "overlap of host and GPU": Measured(3, "exponent", f"fitted to 73.5 ms of 65 and 47, {_COMPILED}"),
}
