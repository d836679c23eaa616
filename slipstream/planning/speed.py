"""Time of a training step: each part at the share of the chip's peak that it reached when measured.

Two clocks run side by side, the GPU's kernels and the host that launches them. Where one is far slower the step takes
its time; where they are close they hold each other up, so that the step is the p-norm of both.
"""

from dataclasses import dataclass

from slipstream.planning.activations import Layer, Shape
from slipstream.planning.flops import ForwardFlops
from slipstream.planning.gpus import Gpu
from slipstream.planning.measured import CONSTANTS
from slipstream.planning.memory import (
    NF4_BYTES,
    OPTIMIZERS,
    Layout,
    adapter_parameters,
    dequantised_bytes,
    foreign_slots,
    frees_gathered,
    ranks_a_token,
    spreads_embedding,
)

_USED = {name: constant.value for name, constant in CONSTANTS.items()}
_ALL_TO_ALL = "all-to-all in a host"


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of one optimizer step.

    Attributes:
        parts: of the GPU, by what it does.
        host_ms: what the host needs to launch it all.
        tokens: of a GPU's step.
        flops: of a GPU's step, recomputation not counted.
    """

    parts: dict[str, float]
    host_ms: float
    tokens: int
    flops: float

    @property
    def step_ms(self) -> float:
        power = _USED["overlap of host and GPU"]
        return float((sum(self.parts.values()) ** power + self.host_ms**power) ** (1 / power))

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.tokens / self.step_ms * 1e3

    @property
    def tflops(self) -> float:
        return self.flops / self.step_ms / 1e9


def step_time(shape: Shape, flops: ForwardFlops, layout: Layout, gpu: Gpu) -> StepTime:
    """The step of `layout` on `gpu`s.

    Args:
        flops: of one token's forward.
    """
    tokens, peak, bandwidth = layout.tokens, gpu.peak_tflops * 1e9, gpu.bandwidth * 1e9  # a ms
    frozen = layout.lora_rank is not None
    passes = 2 if frozen else 3  # forward, input gradient, weight gradient
    again = 1 if layout.checkpointing == "full" else 0
    sparse = _USED["device memory"] * bandwidth
    parts = {
        "dense GEMMs": (passes + again) * flops.dense * tokens / (_USED["dense GEMM"] * peak),
        "attention": (3 + again) * flops.attention * tokens / (_USED["attention"] * peak),
        "experts": _experts_ms(shape, flops, layout, peak, sparse, frozen, again),
        "scan": (3 + again) * flops.scan * tokens / (_USED["scan"] * peak),
        "head and loss": passes * flops.head * tokens / (_USED["dense GEMM"] * peak),
        "experts out of 4 bits": sum(_dequantise_bytes(layer, layout) for layer in shape.layers) * (2 + again) / sparse,
        "norms, activations, rows": _elementwise_bytes(shape, layout) / sparse,
        "optimizer": _optimizer_ms(shape, layout, bandwidth),
    }
    exchange = sum(_exchange_ms(layer, layout, gpu) for layer in shape.layers)
    if exchange:
        parts["exchange of tokens"] = exchange * (1.5 if again else 1)
    hidden = (sum(parts.values()) - parts["optimizer"]) * _USED["hidden under computation"]
    # FSDP2 copies what it gathers to its place, and gradients into the buffer that is reduced: read and written.
    parts["sharding's copies"] = 2 * _gathered_bytes(shape, layout) / sparse
    parts["waiting for weights"] = max(0.0, _sharding_ms(shape, layout, gpu) - hidden)
    repeats = layout.accumulation
    return StepTime(
        {name: ms * (1 if name == "optimizer" else repeats) for name, ms in parts.items() if ms},
        host_ms=_host_ms(shape, layout) * repeats,
        tokens=tokens * repeats,
        flops=passes * flops.total * tokens * repeats,
    )


def least_ms(flops: ForwardFlops, parameters: int, tokens: int, gpu: Gpu) -> float:
    """GEMMs, attention and AdamW alone, on bf16 weights, at the rates that were measured: what a step of `tokens` would
    take if all else were free."""
    peak, bandwidth = gpu.peak_tflops * 1e9, gpu.bandwidth * 1e9
    gemms = (flops.dense + flops.head) / _USED["dense GEMM"] + flops.experts / _USED["expert GEMM"]
    # AdamW reads weight, gradient and two moments, and writes three of them.
    optimizer = 14 * parameters / (_USED["device memory"] * bandwidth)
    return 3 * tokens * (gemms + flops.attention / _USED["attention"]) / peak + optimizer


def _experts_ms(
    shape: Shape, flops: ForwardFlops, layout: Layout, peak: float, bandwidth: float, frozen: bool, again: int
) -> float:
    if not flops.experts:
        return 0.0
    one = next(layer.experts for layer in shape.layers if layer.experts.number)
    rate = _USED["expert GEMM"] * peak
    # The sum runs over hidden, inner, and in the input gradients over hidden and up: two short ones of four.
    up_share = one.up / (one.up + one.inner)
    forward = up_share / _length_factor(one.hidden) + (1 - up_share) / _length_factor(one.inner)
    backward = up_share / _length_factor(one.up) + (1 - up_share) / _length_factor(one.hidden)
    work = flops.experts * layout.tokens / rate
    ms = work * (forward * (1 + again) + backward)
    if not frozen:
        # The weight gradient's GEMM writes every expert's: sums and bytes both count (fits 128, 64, 16 experts).
        ms += work + layout.weight_bytes * shape.routed / layout.ep_size / bandwidth
    return ms


def _dequantise_bytes(layer: Layer, layout: Layout) -> float:
    """Read in 4 bits and written for the GEMMs, once."""
    written = dequantised_bytes(layer, layout)
    return written * (1 + NF4_BYTES / layout.compute_bytes)


def _length_factor(length: int) -> float:
    """The share of the full rate that a GEMM reaches when it sums over `length`; 2048 is full."""
    half = _USED["expert GEMM, short sums"]
    return min(1.0, length / (length + half) * (2048 + half) / 2048)


def _elementwise_bytes(shape: Shape, layout: Layout) -> float:
    kept = sum(layer.kept if layout.compiled else layer.kept_eager for layer in shape.layers)
    passes = _USED["passes over kept activations" if layout.compiled else "passes, not compiled"]
    foreign = sum(foreign_slots(layer.experts, layout) * layer.experts.up for layer in shape.layers)
    more = 1.25 if layout.checkpointing == "full" else 1.0
    return passes * (kept * layout.tokens / 2 + foreign) * layout.compute_bytes * more


def _optimizer_ms(shape: Shape, layout: Layout, bandwidth: float) -> float:
    width, (of_2, of_4) = layout.weight_bytes, OPTIMIZERS[layout.optimizer]
    parameters: float = shape.dense + shape.routed
    if layout.lora_rank is not None:
        parameters, width = adapter_parameters(shape, layout.lora_rank) + shape.saved, 4
    state = of_2 if width == 2 else of_4
    # Read and write weight and state, read the gradient.
    moved = parameters / layout.shards * (3 * width + 2 * state)
    ours = layout.optimizer.startswith("slipstream")
    return moved / (_USED["slipstream AdamW" if ours else "torch AdamW"] * bandwidth)


def _exchange_ms(layer: Layer, layout: Layout, gpu: Gpu) -> float:
    """Rows out and back, forward and backward, as if nothing ran under them."""
    if layout.ep_size == 1 or not layer.experts.number:
        return 0.0
    spread = ranks_a_token(layer.experts, layout.ep_size)
    if layout.exchange == "all_gather":
        spread = layout.ep_size
    row = layer.experts.hidden * layout.compute_bytes
    here = min(layout.per_host, layout.gpus, layout.ep_size)
    rows_inside = spread * (here - 1) / layout.ep_size
    rows_outside = spread * (layout.ep_size - here) / layout.ep_size
    if layout.exchange == "hierarchical":
        hosts = layout.ep_size // here
        rows_inside, rows_outside = (
            spread * (here - 1) / here,
            ranks_a_token(layer.experts, hosts) * (hosts - 1) / hosts,
        )
    kind = {"all_gather": "all-gather in a host", "nvlink": "stores over NVLink"}.get(layout.exchange, _ALL_TO_ALL)
    seconds = rows_inside / (gpu.link * _USED[kind]) + rows_outside / (gpu.network * _USED["exchange between hosts"])
    return float(4 * layout.tokens * row * seconds / 1e6)


def _gathered_bytes(shape: Shape, layout: Layout) -> float:
    """Weights that FSDP2 puts together on a GPU, and whole gradients that it reduces, in a micro-batch."""
    if layout.shards == 1:
        return 0.0
    gathers = 2 if frees_gathered(shape, layout) else 1
    reductions = 0 if layout.lora_rank is not None else 1
    split: float = shape.dense
    if spreads_embedding(shape, layout):
        split -= shape.embedding
    if layout.efsdp > 1:
        split += shape.routed / layout.ep_size
    return split * layout.weight_bytes * (gathers + reductions)


def _sharding_ms(shape: Shape, layout: Layout, gpu: Gpu) -> float:
    """FSDP2's gathers of weights and reductions of gradients, were nothing else running."""
    one_host = layout.gpus <= layout.per_host
    link = gpu.link * _USED["all-gather in a host"] if one_host else gpu.network * _USED["exchange between hosts"]
    moved = _gathered_bytes(shape, layout) * (layout.shards - 1) / layout.shards
    if not one_host:
        moved /= layout.per_host  # NCCL's rings cross to the next host on as many cards as it has GPUs
    if layout.dp_replicate > 1 and layout.lora_rank is None:
        mine = (shape.dense + shape.routed) * layout.weight_bytes / layout.shards
        moved += 2 * mine * (layout.dp_replicate - 1) / layout.dp_replicate
    return float(moved / link / 1e6)


def _host_ms(shape: Shape, layout: Layout) -> float:
    total = _USED["host, rest"]
    for layer in shape.layers:
        total += _USED["host, compiled layer" if layout.compiled else "host, layer"] + _USED["host, optimizer"]
        if not layer.experts.number:
            total -= _USED["host, experts and router"]
            continue
        if layout.ep_size > 1:
            total += _USED["host, exchange over NVLink" if layout.exchange == "nvlink" else "host, exchange"]
        if layout.efsdp > 1:
            total += _USED["host, experts under FSDP2"]
    if layout.checkpointing == "full":
        total *= 1.35
    return total
