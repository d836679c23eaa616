"""Memory of a training step on one GPU, by part, from a model's shape alone.

Three moments can be the fullest: the loss (all activations are there, and the head's gradient in fp32), a layer's
backward (the activations up to it, the gradients behind it, what the layer needs in between), and the end of backward
(all gradients). Bytes are those that PyTorch's allocator hands out; CUDA's own memory and fragmentation come on top.

Dims: T tokens of a GPU's step, H hidden, V vocabulary, K experts per token.
"""

from dataclasses import dataclass, replace
from math import comb

from slipstream.kernels.nf4 import BLOCK, BYTES
from slipstream.kernels.nvlink_window import half_size
from slipstream.linear_cross_entropy import CHUNK_TOKENS
from slipstream.moe.dispatch.nvlink_experts import WORST_CASE_BYTES
from slipstream.parallel.units import frees_after_forward, joined
from slipstream.planning.activations import Experts, Layer, Shape

GIB = 2**30
NF4_BYTES = BYTES / BLOCK  # of a weight, the blocks' magnitudes included

# Bytes of state a parameter, for weights of 2 and of 4 bytes. By Transformers' names for `optim`, and ours.
OPTIMIZERS: dict[str, tuple[float, float]] = {
    "slipstream_adamw": (4, 8),
    "slipstream_adamw_master": (6, 8),
    "adamw_torch_fused": (4, 8),
    "adamw_torch": (4, 8),
    "adamw_torch_8bit": (2.06, 2.06),  # torchao: a scale for every 256 values
    "adamw_torch_4bit": (1.06, 1.06),
    "adamw_8bit": (2.06, 2.06),
    "adamw_bnb_8bit": (2.06, 2.06),
    "adafactor": (0, 0),  # a row and a column of each matrix
    "sgd": (0, 0),
    "lion_32bit": (4, 4),
    "lion_8bit": (1.03, 1.03),
}
# Bytes a logit where the loss is Transformers': bf16, fp32 and their gradients. Measured: 32.5 GiB at 16,384 x 151,936
# (benchmarks/NOTES.md, "linear cross-entropy without wasted passes").
BYTES_A_LOGIT = 14
# CUDA's context and NCCL's buffers, and the share that the allocator cannot use. Not measured.
CONTEXT_GIB, FRAGMENTATION = 1.5, 0.03


@dataclass(frozen=True)
class Layout:
    """How a job of `gpus` trains: what of `Recipe` and `DistributedSetup` its memory and speed depend on.

    Attributes:
        weight_bytes: of a stored weight, 2 or 4.
        compute_bytes: of an activation, 2 or 4.
        lora_rank: of the adapters where they alone train.
        load_in_4bit: the experts are stored in NF4.
        accumulation: micro-batches of an optimizer step.
        step_rows: rows of a step on all GPUs where the recipe fixes them, whatever the micro-batch.
        compiled: the decoder layers are.
        dispatcher: as in `BackendConfig`; "auto" is what `exchange` says.
        per_host: GPUs of one host.
        peer_access: they reach each other's memory.
    """

    gpus: int = 1
    ep_size: int = 1
    dp_replicate: int = 1
    micro_batch: int = 1
    seq_len: int = 4096
    checkpointing: str = "none"
    optimizer: str = "slipstream_adamw"
    weight_bytes: int = 2
    compute_bytes: int = 2
    lora_rank: int | None = None
    load_in_4bit: bool = False
    accumulation: int = 1
    step_rows: int | None = None
    compiled: bool = True
    fused_loss: bool = True
    dispatcher: str = "auto"
    reshard_after_forward: bool | None = None
    per_host: int = 8
    peer_access: bool = True

    @property
    def exchange(self) -> str:
        """The dispatcher that runs."""
        if self.dispatcher != "auto":
            return self.dispatcher
        if self.ep_size > self.per_host > 1 and self.ep_size % self.per_host == 0:
            return "hierarchical"
        return "nvlink" if self.peer_access and self.per_host % self.ep_size == 0 else "all_to_all"

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.seq_len

    @property
    def shards(self) -> int:
        """GPUs that a weight is split over."""
        return self.gpus // self.dp_replicate

    @property
    def efsdp(self) -> int:
        """GPUs of a replica that hold the same experts."""
        return self.shards // self.ep_size


@dataclass(frozen=True)
class Memory:
    """GiB of one GPU at the fullest moment.

    Attributes:
        parts: name -> GiB; their sum is the peak that `torch.cuda.max_memory_allocated` would give.
        moment: when that is.
        activations_gib: of all layers, with the rows that came from other ranks, whether all are there then or not.
        gradients_gib: of all parameters, the same.
    """

    parts: dict[str, float]
    moment: str
    activations_gib: float = 0.0
    gradients_gib: float = 0.0

    @property
    def peak_gib(self) -> float:
        return sum(self.parts.values())

    @property
    def needed_gib(self) -> float:
        """What the GPU must have: the peak, CUDA's own memory and what fragmentation wastes."""
        return self.peak_gib * (1 + FRAGMENTATION) + CONTEXT_GIB


def step_memory(shape: Shape, layout: Layout) -> Memory:
    """Memory of the fullest moment of a step.

    Raises:
        ValueError: an optimizer that is not in `OPTIMIZERS`.
    """
    if layout.optimizer not in OPTIMIZERS:
        raise ValueError(f"train.optim={layout.optimizer}: its memory is not known; use one of {', '.join(OPTIMIZERS)}")
    tokens, shards, width = layout.tokens, layout.shards, layout.weight_bytes
    steady = {
        "dense weights": shape.dense * width / shards,
        "expert weights": shape.routed * (NF4_BYTES if layout.load_in_4bit else width) / shards,
        "optimizer": _optimizer_bytes(shape, layout) / shards,
    }
    if layout.ep_size > 1 and (experts := _widest_experts(shape)) is not None:
        if layout.exchange == "nvlink":
            size = half_size(layout.ep_size, tokens, experts.hidden, experts.top_k, layout.compute_bytes)
            steady["exchange areas"] = 2 * size
        if layout.exchange == "deepep":
            # What DeepEP says it wants within a node, for 10 channels of 256 rows, and its workspace.
            row = experts.hidden * layout.compute_bytes + 128 * (8 + 4 + 4)
            steady["exchange areas"] = 10 * min(layout.ep_size, 8) * 256 * row + (32 << 20)
    if layout.lora_rank is not None:
        steady["adapters"] = _adapter_bytes(shape, layout) / shards
    if width > layout.compute_bytes:
        # Autocast's copies, which backward needs: an expert's of its owner, a dense weight's whole.
        copied = 0 if layout.load_in_4bit else shape.routed / layout.ep_size
        steady["16-bit copies"] = layout.compute_bytes * (shape.dense + copied)
    frees = frees_gathered(shape, layout)
    if shards > 1 and not frees:
        steady["gathered weights"] = width * sum(layer.dense for layer in shape.layers)

    gradients = [_gradient_bytes(layer.dense + layer.routed, layout) / shards for layer in shape.layers]
    # The head's comes first and the embedding's last, unless they are one.
    last = _gradient_bytes(shape.embedding if shape.head else 0, layout) / shards
    first = _gradient_bytes((shape.head or shape.embedding) + shape.rest, layout) / shards
    if layout.lora_rank is not None:
        first = _adapter_bytes(shape, layout) / shards
    every_gradient = first + sum(gradients) + last
    kept = [_kept(layer, layout) for layer in shape.layers]
    sent = [_received_rows(layer.experts, layout) for layer in shape.layers]
    outside = shape.kept_outside * tokens * layout.compute_bytes / 2
    head_bytes = width * shape.vocabulary * shape.hidden

    moments = [
        _moment(
            "the loss",
            steady,
            {
                "gradients": every_gradient if layout.accumulation > 1 else 0,
                "activations": sum(kept) + outside,
                "dispatched rows": sum(sent),
                "loss": loss_bytes(shape, layout),
                "gathered weights": head_bytes if shards > 1 else 0,
            },
        )
    ]
    units = _unit_parameters(shape)
    after_loss = tokens * shape.hidden * layout.compute_bytes
    for number, layer in enumerate(shape.layers):
        following = max(0, number - 1)
        moments.append(
            _moment(
                f"the backward of layer {number}",
                steady,
                {
                    "gradients": every_gradient if layout.accumulation > 1 else first + sum(gradients[number:]),
                    "activations": sum(kept[: number + 1]) + outside,
                    "dispatched rows": sum(sent[: number + 1]),
                    "loss": after_loss,
                    "gathered weights": _gathered(shape, units, frees, number, following, layout),
                    "backward of a layer": _in_between(layer, layout),
                    "dequantised experts": dequantised_bytes(layer, layout),
                },
            )
        )
    embedding = 2 * _gradient_bytes(shape.embedding, layout) if shards > 1 or layout.accumulation > 1 else 0
    if spreads_embedding(shape, layout):
        embedding /= shards
    moments.append(
        _moment("the end of backward", steady, {"gradients": every_gradient, "backward of a layer": embedding})
    )
    fullest = max(moments, key=lambda moment: moment.peak_gib)
    return replace(fullest, activations_gib=(sum(kept) + sum(sent) + outside) / GIB, gradients_gib=every_gradient / GIB)


def adapter_parameters(shape: Shape, rank: int) -> int:
    """LoRA's (Hu et al. 2021, arXiv 2106.09685): two matrices a linear layer."""
    return rank * sum(module.inputs + module.outputs for module in shape.linears)


def ranks_a_token(experts: Experts, ep_size: int) -> float:
    """To how many of `ep_size` ranks a token's K experts spread, on average, if any K are as likely.

    >>> round(ranks_a_token(Experts(128, 8), 8), 2)
    5.31
    """
    here = experts.number // ep_size
    none_here = comb(experts.number - here, experts.top_k) / comb(experts.number, experts.top_k)
    return ep_size * (1 - none_here)


def _widest_experts(shape: Shape) -> Experts | None:
    """Of the layers with experts, those with the widest rows."""
    return max((layer.experts for layer in shape.layers if layer.experts.number), key=lambda e: e.hidden, default=None)


def _moment(name: str, *parts: dict[str, float]) -> Memory:
    total: dict[str, float] = {}
    for group in parts:
        for key, value in group.items():
            total[key] = total.get(key, 0) + value / GIB
    return Memory({key: value for key, value in total.items() if value}, name)


def _optimizer_bytes(shape: Shape, layout: Layout) -> float:
    of_2, of_4 = OPTIMIZERS[layout.optimizer]
    of_weight = of_2 if layout.weight_bytes == 2 else of_4
    if layout.lora_rank is not None:
        return of_4 * adapter_parameters(shape, layout.lora_rank) + of_weight * shape.saved
    return of_weight * (shape.dense + shape.routed)


def _adapter_bytes(shape: Shape, layout: Layout) -> float:
    """PEFT keeps LoRA's factors in fp32 and copies of whole modules in the dtype that they have."""
    assert layout.lora_rank is not None
    return 4 * adapter_parameters(shape, layout.lora_rank) + layout.weight_bytes * shape.saved


def _gradient_bytes(parameters: float, layout: Layout) -> float:
    return 0.0 if layout.lora_rank is not None else parameters * layout.weight_bytes


def _kept(layer: Layer, layout: Layout) -> float:
    if layout.checkpointing == "full":
        a_token = layer.came_in
    elif layout.checkpointing == "selective" or layout.compiled:
        a_token = layer.kept
    else:
        a_token = layer.kept_eager
    more = 0.0 if layout.checkpointing == "full" else foreign_slots(layer.experts, layout) * layer.experts.up
    return a_token * layout.tokens * layout.compute_bytes / 2 + more * layout.compute_bytes


def foreign_slots(experts: Experts, layout: Layout) -> int:
    """Rows that the experts' buffers hold for other ranks' experts: all-gather brings every choice to every rank, and
    over NVLink there is room for every choice while that is not much."""
    others = (layout.ep_size - 1) * layout.tokens * experts.top_k
    if layout.exchange == "nvlink":
        room = (others + layout.tokens * experts.top_k) * experts.up * layout.compute_bytes
        return others if room <= WORST_CASE_BYTES else 0
    return others if layout.exchange == "all_gather" else 0


def _rows(experts: Experts, layout: Layout) -> float:
    """Rows that a GPU receives from all of its group, itself included."""
    if layout.ep_size == 1 or not experts.number:
        return 0.0
    if layout.exchange in ("all_gather", "nvlink"):  # NVLink: room for all of every rank's tokens
        return float(layout.ep_size * layout.tokens)
    return ranks_a_token(experts, layout.ep_size) * layout.tokens


def _received_rows(experts: Experts, layout: Layout) -> float:
    """What the experts' backward keeps of the rows that came from other ranks."""
    return 0.0 if layout.checkpointing == "full" else _rows(experts, layout) * experts.hidden * layout.compute_bytes


def _in_between(layer: Layer, layout: Layout) -> float:
    """What a layer's backward needs besides what it reads and leaves."""
    experts, tokens, width = layer.experts, layout.tokens, layout.compute_bytes
    slots = tokens * experts.top_k + foreign_slots(experts, layout)
    # Gathered gradient and input rows, the pre-activation's gradient and the weighted activation.
    mlp: float = slots * (2 * experts.hidden + experts.up + experts.inner) * width
    mlp += 2 * _rows(experts, layout) * experts.hidden * width
    largest = max(mlp, layer.widest * tokens * width / 2)
    if layout.checkpointing == "full":
        kept = layer.kept if layout.compiled else layer.kept_eager
        largest += kept * tokens * width / 2 + _rows(experts, layout) * experts.hidden * width
    return largest


def dequantised_bytes(layer: Layer, layout: Layout) -> float:
    """The experts of a layer in the dtype of its GEMMs, where they are stored in 4 bits."""
    return layout.compute_bytes * layer.routed / layout.ep_size if layout.load_in_4bit else 0.0


def spreads_embedding(shape: Shape, layout: Layout) -> bool:
    """Whether rows of the embedding stay on their GPUs (`slipstream/parallel/embedding.py`)."""
    return 1 < layout.shards <= shape.embedding_ranks and layout.dp_replicate == 1


def frees_gathered(shape: Shape, layout: Layout) -> bool:
    """Whether FSDP2 frees layers' gathered weights between forward and backward."""
    every_layer = sum(layer.dense for layer in shape.layers)
    return frees_after_forward(layout.reshard_after_forward, every_layer * layout.weight_bytes)


def _unit_parameters(shape: Shape) -> list[float]:
    """Of each layer, the dense parameters of the unit that FSDP2 gathers it with."""
    sizes = [layer.dense for layer in shape.layers]
    totals = [(unit, sum(sizes[position] for position in unit)) for unit in joined(sizes)]
    return [total for unit, total in totals for _ in unit]


def _gathered(shape: Shape, units: list[float], frees: bool, number: int, following: int, layout: Layout) -> float:
    """FSDP2's buffers: the weights of a layer's unit and the next, the unit's whole gradients, and their copy to be
    reduced."""
    if layout.shards == 1:
        return 0.0
    weights = units[number] + units[following] if frees else 0.0
    gradients = units[number]
    if layout.efsdp > 1:
        layers = shape.layers
        weights += (layers[number].routed + layers[following].routed) / layout.ep_size
        gradients += layers[number].routed / layout.ep_size
    return weights * layout.weight_bytes + 2 * _gradient_bytes(gradients, layout)


def loss_bytes(shape: Shape, layout: Layout) -> float:
    """The most that the loss needs: a chunk's logits and the head's gradient (`linear_cross_entropy`)."""
    tokens, head = layout.tokens, shape.vocabulary * shape.hidden
    if not layout.fused_loss:
        return float(BYTES_A_LOGIT * tokens * shape.vocabulary)
    logits = min(tokens, CHUNK_TOKENS) * shape.vocabulary * layout.compute_bytes
    hidden = tokens * shape.hidden * layout.compute_bytes
    if layout.lora_rank is not None:
        return float(logits + hidden)
    if tokens <= CHUNK_TOKENS:
        return float(logits + hidden + head * layout.compute_bytes)
    # Summed in fp32 over the chunks; its copy in 16 bits comes when the logits are gone.
    return float(hidden + max(4 * head + logits, (4 + layout.compute_bytes) * head))
