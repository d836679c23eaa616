"""Does a fine-tune fit, how fast will it be, and which layout is best: from a recipe and a list of GPUs."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import log2
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from slipstream import hf, quantization
from slipstream.backend import BackendConfig
from slipstream.bench.presets import PRESETS, build_config
from slipstream.parallel.setup import CHECKPOINTING, DistributedSetup
from slipstream.planning.activations import Linear, Shape, model_shape
from slipstream.planning.flops import ForwardFlops, Parameters, count_parameters, forward_flops, meta_model
from slipstream.planning.gpus import PER_HOST, Gpu
from slipstream.planning.memory import Layout, Memory, step_memory
from slipstream.planning.speed import StepTime, step_time
from slipstream.train.checks import build_from_config, micro_batches
from slipstream.train.recipe import ALL_EXPERTS, AUTO, DEFAULT_MAX_LENGTH, LoraSection, ModelSection, Recipe

_MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_MOST_GPUS = 4096
# The model of speed is no more exact. Of layouts this close, less recomputation and smaller batches are better.
_SAME_SPEED = 0.1


@dataclass(frozen=True)
class Estimate:
    """A layout with its memory and its speed on a GPU."""

    layout: Layout
    memory: Memory
    time: StepTime
    gpu: Gpu

    @property
    def fits(self) -> bool:
        return self.memory.needed_gib <= self.gpu.memory_gib


@dataclass(frozen=True)
class Model:
    """What is known of a model before its weights are there."""

    name: str
    shape: Shape
    flops: ForwardFlops
    parameters: Parameters
    experts: int | None

    def estimate(self, layout: Layout, gpu: Gpu) -> Estimate:
        """Memory and speed of `layout`."""
        return Estimate(layout, step_memory(self.shape, layout), step_time(self.shape, self.flops, layout, gpu), gpu)


@dataclass(frozen=True)
class Plan:
    """The answer to a recipe.

    Attributes:
        given: the recipe as it is.
        modes: the same under each way of activation checkpointing.
        best: the fastest layout on these GPUs that fits, or None.
        nearest: where `given` does not fit, the one that changes least and does: on these GPUs, or on more.
        notes: what was taken otherwise than the recipe has it, and why.
    """

    model: Model
    given: Estimate
    modes: dict[str, Estimate]
    best: Estimate | None
    nearest: Estimate | None
    notes: tuple[str, ...] = ()


def make_plan(recipe: Recipe, gpus: int, gpu: Gpu) -> Plan:
    """Plan `recipe` on `gpus` of `gpu`. Reads a config and no weights; needs no GPU.

    Raises:
        ValueError: the recipe does not fit the model or the number of GPUs, or asks for what cannot be planned.
        OSError: the model's config cannot be had.
    """
    notes: list[str] = []
    config = model_config(recipe.model, notes)
    layout = layout_of(recipe, config, gpus, notes)
    model = describe_model(recipe.model.name_or_path or recipe.model.config or "", config, layout.seq_len)
    if recipe.lora is not None:
        shape = adapted(model.shape, recipe.lora)
        if recipe.lora.modules_to_save:
            shape = dataclasses.replace(shape, saved=_saved(config, recipe.lora.modules_to_save))
        model = dataclasses.replace(model, shape=shape)
    return dataclasses.replace(plan_layout(model, layout, gpu), notes=tuple(notes))


def plan_layout(model: Model, layout: Layout, gpu: Gpu) -> Plan:
    """Estimate `layout` and search for better ones."""
    layout = dataclasses.replace(layout, peer_access=gpu.peer_access)
    given = model.estimate(layout, gpu)
    modes = {
        mode: model.estimate(dataclasses.replace(layout, checkpointing=mode), gpu)
        for mode in sorted(CHECKPOINTING, key=CHECKPOINTING.index)
    }
    fitting = _fitting(model, layout, gpu)
    nearest = None
    if not given.fits:
        nearest = min(fitting, key=lambda found: _distance(found, layout), default=None)
        more = layout
        while nearest is None and more.gpus < _MOST_GPUS:
            more = dataclasses.replace(more, gpus=2 * more.gpus)
            larger = _fitting(model, more, gpu)
            nearest = min(larger, key=lambda found: _distance(found, layout), default=None)
    return Plan(model, given, modes, _fastest(fitting), nearest)


def describe_model(name: str, config: PretrainedConfig, seq_len: int, document: int | None = None) -> Model:
    """The model of `config` on rows of `seq_len` tokens, of documents of `document` tokens if they are packed."""
    return Model(
        name=name,
        shape=model_shape(config, seq_len),
        flops=forward_flops(config, seq_len, document),
        parameters=count_parameters(config),
        experts=hf.num_routed_experts(config),
    )


def model_config(section: ModelSection, notes: list[str]) -> PretrainedConfig:
    """The config that a recipe's `model` names: a folder's, the hub's, or that of the preset of its name.

    Raises:
        OSError: there is none.
    """
    if section.config is not None:
        return build_from_config(section)
    name = section.name_or_path or ""
    preset = Path(name).name.lower()
    kwargs = {"trust_remote_code": section.trust_remote_code}
    config: PretrainedConfig
    try:
        # Of a checkpoint on the hub whose shapes are known here, nothing has to be fetched.
        config = AutoConfig.from_pretrained(name, local_files_only=preset in PRESETS, **kwargs)
    except OSError as error:
        if preset not in PRESETS:
            raise OSError(
                f"model.name_or_path={name}: no config there, and none could be had from the hub; give a folder with a "
                f"config.json, or --model with one of {', '.join(PRESETS)}"
            ) from error
        notes.append(f"the shapes of {name} are those of the preset {preset}")
        return build_config(preset, 0, experts=0)
    return config


def layout_of(recipe: Recipe, config: PretrainedConfig, gpus: int, notes: list[str]) -> Layout:
    """How `recipe` trains on `gpus` GPUs; an `ep_size` that they do not allow becomes the largest that they do.

    Raises:
        ValueError: replicas that do not divide the GPUs, GPUs that do not divide the rows of a step, and tensor
            parallelism or offloading, which are not planned.
    """
    setup, train = DistributedSetup.of(recipe.distributed), recipe.train
    for name, off in (("tp_size", 1), ("cpu_offload", False)):
        if getattr(setup, name) != off:
            raise ValueError(f"distributed.{name}={getattr(setup, name)}: not planned yet; leave it out for a plan")
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
    dtype: str = recipe.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if recipe.model.config is not None else str(config.dtype or "bfloat16")
    short = dtype.removeprefix("torch.") in ("bfloat16", "float16")
    autocast = not short and train.bf16 is not False
    optimizer = train.optim
    if optimizer == "auto":
        optimizer = "slipstream_adamw" if short and recipe.lora is None else "adamw_torch_fused"
    rows = train.per_device_train_batch_size
    if isinstance(rows, str):
        notes.append(f"train.per_device_train_batch_size={rows}: planned with 1; the best layout says how many fit")
        rows = 1
    accumulation = micro_batches(train, gpus)
    fixed = train.global_batch_size is not None or train.per_device_train_batch_size == AUTO
    backend = recipe.model.backend
    mode = setup.activation_checkpointing
    if getattr(train, "activation_checkpointing", False) and mode == "none":
        mode = "full"
    layout = Layout(
        gpus=gpus,
        ep_size=setup.ep_size,
        dp_replicate=gpus if setup.strategy == "ddp" else setup.dp_replicate,
        micro_batch=rows,
        seq_len=recipe.data.max_length or min(DEFAULT_MAX_LENGTH, limit),
        checkpointing=mode,
        optimizer=optimizer,
        weight_bytes=2 if short else 4,
        compute_bytes=2 if short or autocast else 4,
        lora_rank=recipe.lora.r if recipe.lora else None,
        load_in_4bit=recipe.lora is not None and recipe.lora.load_in_4bit,
        accumulation=accumulation,
        step_rows=accumulation * rows * gpus if fixed else None,
        compiled=backend.get("compile", "auto") != "none",
        fused_loss=backend.get("loss", "auto") != "transformers",
        dispatcher=backend.get("dispatcher", "auto"),
        reshard_after_forward=setup.reshard_after_forward,
    )
    experts = hf.num_routed_experts(config)
    if layout.load_in_4bit:
        quantization.check(config, BackendConfig.of(backend), None)
    if gpus % layout.dp_replicate:
        raise ValueError(f"distributed.dp_replicate={layout.dp_replicate} does not divide {gpus} GPUs; use a divisor")
    works = list(_expert_parallel(experts, layout))
    if layout.ep_size not in works:
        if not works:
            raise ValueError(
                f"lora.load_in_4bit: each expert has one owner, so {gpus} GPUs take distributed.ep_size={gpus}, which "
                f"has to divide {experts} experts, and dp_replicate=1 (given {layout.dp_replicate})"
            )
        fits = max((size for size in works if size <= layout.ep_size), default=min(works))
        notes.append(
            f"distributed.ep_size={layout.ep_size} does not go with {experts or 'no'} routed experts on "
            f"{layout.shards} GPUs a replica (allowed: {', '.join(map(str, works))}); planned with {fits}"
        )
        layout = dataclasses.replace(layout, ep_size=fits)
    return layout


def adapted(shape: Shape, lora: LoraSection) -> Shape:
    """`shape` with only those linear layers that LoRA adapts, by PEFT's rules for `target_modules`; a layer's adapted
    experts count as one of them."""
    targets = lora.target_modules
    if targets == "all-linear":
        kept = list(shape.linears)
    elif isinstance(targets, str):
        kept = [linear for linear in shape.linears if re.fullmatch(targets, linear.name)]
    else:
        kept = [linear for linear in shape.linears if any(("." + linear.name).endswith("." + end) for end in targets)]
    parameters = lora.target_parameters or ()
    for number, layer in enumerate(shape.layers):
        experts = layer.experts
        pairs = 1 if lora.share_experts else experts.number
        for name, inputs, outputs in (("up", experts.hidden, experts.up), ("down", experts.inner, experts.hidden)):
            if parameters == ALL_EXPERTS or any(f"{name}_proj" in given for given in parameters):
                kept.append(Linear(f"{number}.experts.{name}_proj", pairs * inputs, pairs * outputs))
    if not kept:
        raise ValueError(f"lora.target_modules={targets}: matches no linear layer of the model")
    return dataclasses.replace(shape, linears=tuple(kept))


def _saved(config: PretrainedConfig, names: list[str]) -> int:
    """Parameters of the modules whose names end so, as PEFT finds `modules_to_save`."""
    found = {
        parameter: parameter.numel()
        for path, module in meta_model(config).named_modules()
        if any(path.endswith(name) for name in names)
        for parameter in module.parameters()
    }
    return sum(found.values())


def _expert_parallel(experts: int | None, layout: Layout) -> Iterator[int]:
    """Sizes that go with the model and the GPUs of a replica. Experts in 4 bits have one owner each."""
    shards = layout.shards
    for size in range(1, min(experts or 1, shards) + 1):
        divides = size == 1 or (experts is not None and experts % size == 0 and shards % size == 0)
        if divides and (not layout.load_in_4bit or size == layout.gpus):
            yield size


def _candidates(model: Model, layout: Layout) -> Iterator[Layout]:
    hosts = max(1, layout.gpus // PER_HOST)
    replicas = {size for size in range(1, hosts + 1) if hosts % size == 0} | {layout.dp_replicate}
    for replica in sorted(replicas):
        if layout.gpus % replica:
            continue
        for ep_size in _expert_parallel(model.experts, dataclasses.replace(layout, dp_replicate=replica)):
            for micro_batch in sorted({*_MICRO_BATCHES, layout.micro_batch}):
                accumulation = layout.accumulation
                if layout.step_rows is not None:
                    accumulation, left = divmod(layout.step_rows, layout.gpus * micro_batch)
                    if left or not accumulation:
                        continue
                for mode in CHECKPOINTING:
                    yield dataclasses.replace(
                        layout, dp_replicate=replica, ep_size=ep_size, micro_batch=micro_batch, checkpointing=mode,
                        accumulation=accumulation,
                    )  # fmt: skip


def _fitting(model: Model, layout: Layout, gpu: Gpu) -> list[Estimate]:
    """All that fit. Memory grows with the micro-batch: none larger than one that does not fit is looked at."""
    fitting = []
    full = set()
    for other in _candidates(model, layout):
        others = other.dp_replicate, other.ep_size, other.checkpointing, other.accumulation
        if others in full:
            continue
        found = model.estimate(other, gpu)
        if found.fits:
            fitting.append(found)
        else:
            full.add(others)
    return fitting


def _fastest(found: list[Estimate]) -> Estimate | None:
    if not found:
        return None
    top = max(estimate.time.tokens_per_second for estimate in found)
    near = [estimate for estimate in found if estimate.time.tokens_per_second >= top * (1 - _SAME_SPEED)]
    return min(near, key=lambda e: (CHECKPOINTING.index(e.layout.checkpointing), e.layout.micro_batch,
                                    e.layout.dp_replicate, -e.time.tokens_per_second))  # fmt: skip


def _distance(found: Estimate, layout: Layout) -> tuple[float, float]:
    """How far a layout is from the one asked for, the faster first among equals. Results stay the same for all but a
    micro-batch that changes the rows of a step."""
    other = found.layout
    changed = float(other.checkpointing != layout.checkpointing) + float(other.ep_size != layout.ep_size)
    changed += float(other.dp_replicate != layout.dp_replicate)
    if layout.step_rows is None:
        changed += 2 * abs(log2(other.micro_batch / layout.micro_batch))
    else:
        changed += float(other.micro_batch != layout.micro_batch)
    return changed, -found.time.tokens_per_second
