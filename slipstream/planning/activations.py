"""What a forward pass keeps for backward, found by running the model on fake tensors: shapes without memory.

Autograd tells what each layer saves, so that no architecture needs a formula. A layer compiled by `torch.compile` keeps
less: what its GEMMs, attention and experts read and wrote, and what came in; all between is computed again in backward.
(Checked against the partitioner's own choice for Qwen3-MoE: the same tensors but for a norm's root a token.)
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import slipstream.moe.experts  # noqa: F401  (registers the expert path)
from slipstream import hf, hf_recurrent
from slipstream.moe.activation import activation_name
from slipstream.parallel.embedding import most_ranks
from slipstream.planning.flops import meta_model, top_k
from slipstream.recurrent.install import without_loops
from slipstream.recurrent.selective_scan import channels_first

# What a compiled layer neither fuses nor computes again.
_HEAVY = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "convolution", "experts", "planned_attention", "planned_scan",
          "selective_scan", "linear_recurrence")  # fmt: skip


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer: how many, how many a token goes to, and their widths. Zeros where it has none.

    Attributes:
        hidden: width of the rows that travel to the experts.
        up: width of the first projection's output, gate and up together where they are fused.
        inner: width of what the second one reads.
    """

    number: int = 0
    top_k: int = 0
    hidden: int = 0
    up: int = 0
    inner: int = 0


class Linear(NamedTuple):
    """A linear layer, which LoRA can adapt."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Layer:
    """One decoder layer; bytes are those of bf16 activations, a token.

    Attributes:
        dense, routed: parameters of everything but the routed experts, and of these.
        came_in: what entered it, all that full checkpointing keeps.
        kept: what backward finds, where the layer is compiled.
        kept_eager: the same where it is not.
        widest: the most that one operation reads and writes.
    """

    dense: int
    routed: int
    came_in: float
    kept: float
    kept_eager: float
    widest: float
    experts: Experts


@dataclass(frozen=True)
class Shape:
    """A model as the planner sees it.

    Attributes:
        layers: in order.
        embedding, head: parameters of the input embedding, and of the output head if it is not the same.
        embedding_ranks: over how many GPUs the embedding's rows lie for good; FSDP2 gathers it on more.
        rest: all other parameters outside the layers.
        kept_outside: bytes a token kept outside the layers, fp32 logits not counted.
        hidden, vocabulary: widths.
        linears: the linear layers, but for the output head.
        saved: parameters of the modules that train in whole beside adapters.
    """

    layers: tuple[Layer, ...]
    embedding: int
    head: int
    rest: int
    kept_outside: float
    hidden: int
    vocabulary: int
    linears: tuple[Linear, ...]
    embedding_ranks: int = 1
    saved: int = 0

    @property
    def dense(self) -> int:
        return sum(layer.dense for layer in self.layers) + self.embedding + self.head + self.rest

    @property
    def routed(self) -> int:
        return sum(layer.routed for layer in self.layers)


def model_shape(config: PretrainedConfig, seq_len: int) -> Shape:
    """The shape of the model that `config` describes, by a forward over one row of `seq_len` tokens.

    Layers of a kind (the same class and parameters) run once.

    Raises:
        ValueError: the architecture has no layers that Transformers marks as such.
    """
    config = copy.deepcopy(config)
    config.use_cache = False
    model = meta_model(config).train()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no decoder layers that Transformers marks as such: cannot plan it"
        )
    routed = [module for _, module in hf.experts_modules(model)]
    for module in routed:
        activation_name(module)  # looks at numbers, which fake tensors do not have
    if routed:
        model.set_experts_implementation("slipstream")
    model.set_attn_implementation(_ATTENTION)
    without_loops(model)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied, total = head is embedding, sum(parameter.numel() for parameter in model.parameters())
    watched: dict[Any, _Watched] = {}
    kinds = [_watch(layer, watched) for layer in layers]
    run = {entry.layer for entry in watched.values()}
    idle = {module for layer in layers if layer not in run for module in layer.modules()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():  # unties what was tied
            if module not in idle:
                module.to_empty(device="cpu", recurse=False)
        trace = _Trace(model.parameters(), watched.values())
        ids = torch.zeros(1, seq_len, dtype=torch.long)
        saving = torch.autograd.graph.saved_tensors_hooks(trace.save, lambda saved: saved)
        with hf_recurrent.scanning_by(model, _SCANS), trace, saving:
            model.get_decoder()(input_ids=ids, use_cache=False)
    by_kind = {kind: _layer(entry, trace, seq_len, config) for kind, entry in watched.items()}
    found = tuple(by_kind[kind] for kind in kinds)
    inside = sum(layer.dense + layer.routed for layer in found)
    outer = embedding.numel() + (0 if tied else head.numel())
    return Shape(
        layers=found,
        embedding=embedding.numel(),
        embedding_ranks=1 if tied else most_ranks(model.get_input_embeddings()),
        head=0 if tied else head.numel(),
        rest=total - inside - outer,
        kept_outside=trace.bytes_of(trace.saved[None]) / seq_len,
        hidden=head.shape[1],
        vocabulary=head.shape[0],
        linears=tuple(
            Linear(name, module.in_features, module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
        ),
    )


@dataclass
class _Watched:
    """The first layer of a kind, and what its forward returned."""

    layer: nn.Module
    came_in: int | None = None
    output: Any = None


def _watch(layer: nn.Module, watched: dict[Any, _Watched]) -> Any:
    kind = (type(layer), tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()))
    if kind in watched:
        # Shapes are all that matters: a layer of a kind that has run returns what the first one did.
        layer.forward = lambda *args, entry=watched[kind], **kwargs: entry.output
    else:
        watched[kind] = _Watched(layer)
    return kind


def _layer(entry: _Watched, trace: "_Trace", tokens: int, config: PretrainedConfig) -> Layer:
    modules = [module for _, module in hf.experts_modules(entry.layer)]
    routed = sum(parameter.numel() for module in modules for parameter in module.parameters())
    eager = trace.saved[entry.layer]
    assert entry.came_in is not None
    kept = trace.materialized(eager)
    return Layer(
        dense=sum(parameter.numel() for parameter in entry.layer.parameters()) - routed,
        routed=routed,
        came_in=trace.sizes[entry.came_in] / tokens,
        kept=trace.bytes_of(kept) / tokens,
        kept_eager=trace.bytes_of(eager) / tokens,
        widest=trace.widest[entry.layer] / tokens,
        experts=_experts(modules, config),
    )


def _experts(modules: list[Any], config: PretrainedConfig) -> Experts:
    if not modules:
        return Experts()
    module = modules[0]
    up = module.gate_up_proj if module.has_gate else module.up_proj
    number, rows, columns = up.shape
    hidden, width = (rows, columns) if module.is_transposed else (columns, rows)
    return Experts(number, top_k(config), hidden, width, module.down_proj[0].numel() // hidden)


class _Trace(TorchDispatchMode):
    """Which memory each operation reads and writes, and which of it autograd saves, by the layer that runs.

    Memory goes by the number of its storage. `materialized` leaves what a compiled layer keeps of what was saved.
    """

    def __init__(self, parameters: Iterable[Tensor], watched: Iterable[_Watched]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.saved: dict[nn.Module | None, set[int]] = {None: set()}
        self.widest: dict[nn.Module, int] = {}
        self._alive: list[Any] = []  # so that no number is given twice
        self._sources: dict[int, set[int]] = {}
        self._solid: set[int] = set()  # what GEMMs and the like read and write, and what enters a layer
        self._made_in: dict[int, nn.Module | None] = {}
        self._current: nn.Module | None = None
        self._known = {self._number(parameter) for parameter in parameters}  # weights are no activations
        for entry in watched:
            self.saved[entry.layer], self.widest[entry.layer] = set(), 0
            entry.layer.forward = self._observed(entry, entry.layer.forward)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = {self._number(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)} - self._known
        written = {self._number(x) for x in tree_leaves(out) if isinstance(x, Tensor)} - self._known
        heavy = func._opname in _HEAVY
        for number in written:
            if number not in read:
                self._sources.setdefault(number, set()).update(read)
                self._made_in.setdefault(number, self._current)
        if heavy:
            self._solid |= read | written
            if self._current is not None:
                size = self.bytes_of(read | written)
                self.widest[self._current] = max(self.widest[self._current], size)
        return out

    def save(self, tensor: Tensor) -> Tensor:
        number = self._number(tensor)
        if number not in self._known:
            # What all layers read alike, such as the rotary angles, is made outside and there once.
            came_in = number in self._solid
            outside = self._made_in.get(number) is None and not came_in
            self.saved[None if outside else self._current].add(number)
        return tensor

    def materialized(self, numbers: Iterable[int]) -> set[int]:
        """The memory behind `numbers` that a compiled layer has anyway."""
        found, todo, seen = set(), list(numbers), set()
        while todo:
            number = todo.pop()
            if number in seen:
                continue
            seen.add(number)
            if number in self._solid:
                found.add(number)
            else:
                todo += self._sources.get(number, ())
        return found

    def bytes_of(self, numbers: Iterable[int]) -> int:
        return sum(self.sizes[number] for number in numbers)

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        number = storage._cdata
        if number not in self.sizes:
            self._alive.append(storage)
            self.sizes[number] = storage.nbytes()
        return number

    def _observed(self, entry: _Watched, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if entry.output is not None:
                return entry.output
            hidden = args[0] if args else kwargs["hidden_states"]
            entry.came_in = self._number(hidden)
            self._solid.add(entry.came_in)
            self._current = entry.layer
            try:
                entry.output = forward(*args, **kwargs)
            finally:
                self._current = None
            return entry.output

        return run


# A fused attention and Mamba2 scan, by what they read, return and save; they are never computed.
@torch.library.custom_op("slipstream::planned_attention", mutates_args=())
def _planned_attention(query_BHSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("for fake tensors only")


@_planned_attention.register_fake
def _(query_BHSD, key_BGSD, value_BGSD):  # type: ignore[no-untyped-def]
    B, H, S, _ = query_BHSD.shape
    return query_BHSD.new_empty(B, S, H, value_BGSD.shape[-1]), query_BHSD.new_empty(B, H, S, dtype=torch.float32)


@torch.library.custom_op("slipstream::planned_scan", mutates_args=())
def _planned_scan(x_BSHD: Tensor, dt_BSH: Tensor, b_BSGN: Tensor, c_BSGN: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("for fake tensors only")


@_planned_scan.register_fake
def _(x_BSHD, dt_BSH, b_BSGN, c_BSGN):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_BSHD), torch.empty_like(dt_BSH, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _no_backward(ctx: Any, *grads: Tensor) -> Any:
    raise NotImplementedError("a plan has no backward")


_planned_attention.register_autograd(_no_backward, setup_context=_save)
_planned_scan.register_autograd(_no_backward, setup_context=_save)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return _planned_attention(query, key, value)[0], None


def _scan(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *args: Any, **kwargs: Any) -> Any:
    out = _planned_scan(hidden_states, dt, B, C)[0]
    return (out, None) if kwargs.get("return_final_states") else out


_SCANS: dict[str, Any] = {hf_recurrent.MAMBA_SCAN: _scan, hf_recurrent.SELECTIVE_SCAN: channels_first}
_ATTENTION = "slipstream_planned"
hf.register_attention(_ATTENTION, _attention, lambda *args, **kwargs: None)
