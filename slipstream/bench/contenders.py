"""Builds each side: a model with the same random weights, its optimizers and its loss.

Plain Transformers is built as anyone would, at its best settings: SDPA, `grouped_mm` experts, FSDP2 or its own expert
parallelism through `DistributedConfig`. Nothing of Slipstream runs inside a rival's step.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import nn

from slipstream.bench.options import OURS, Job, Options
from slipstream.cuda_graphs import GraphedStep

Batch = dict[str, torch.Tensor]
LEARNING_RATE = 1e-5


@dataclass
class Contender:
    """One side of the comparison, ready to step.

    Attributes:
        loss: a batch -> its loss, a scalar tensor that backward starts from.
        optimizers: one per device mesh (fused AdamW takes no mixture).
        experts: the modules called as `experts(x_TH, idx_TK, weights_TK)`, to look at their load.
        num_experts: routed experts of a layer in the whole job.
        settings: what it runs with, for the report.
        notes: what a reader has to know beside the figures.
        same_weights: whether its first weights are those of the other sides.
        graphed: runs forward and backward at once, instead of `loss` and its backward.
    """

    model: Any
    loss: Callable[[Batch], torch.Tensor]
    optimizers: list[torch.optim.Optimizer]
    experts: list[nn.Module] = field(default_factory=list)
    num_experts: int | None = None
    settings: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    same_weights: bool = True
    graphed: GraphedStep | None = None


def build(job: Job, device: torch.device, ranks: int) -> Contender:
    """The job's contender on `device`, in training mode.

    Raises:
        ValueError: the contender does not exist, or not for this model or number of ranks.
        ImportError: its package is not installed.
    """
    if job.contender == "nemo":
        if job.options.lora is not None:
            raise ValueError("nemo has adapters of its own, which are not PEFT's; leave --lora or nemo out")
        from slipstream.bench.nemo import build_nemo  # its environment may have an older Transformers

        return build_nemo(job, device, ranks)
    if job.contender == OURS:
        return _slipstream(job, device, ranks)
    if job.contender in ("transformers", "transformers-ep", "transformers-liger"):
        return _transformers(job, device, ranks)
    raise ValueError(f"no contender {job.contender!r}")


def adamw_by_mesh(model: nn.Module, make: Callable[..., torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """An optimizer per device mesh."""
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [make(parameters, lr=LEARNING_RATE) for parameters in by_mesh.values()]


def torch_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    """What every rival has: PyTorch's fused AdamW on bf16 weights, its states in bf16."""
    return adamw_by_mesh(model, partial(torch.optim.AdamW, fused=True))


def _slipstream(job: Job, device: torch.device, ranks: int) -> Contender:
    import slipstream
    from slipstream import hf

    options = job.options
    setup = {"ep_size": options.ep_size, "activation_checkpointing": options.activation_checkpointing}
    torch.manual_seed(0)
    with device:
        model = slipstream.AutoModelForCausalLM.from_config(
            options.config(), dtype=torch.bfloat16, backend={**options.backend, "gate": job.gate},
            distributed_setup=setup, load_in_4bit=options.load_in_4bit,
        )  # fmt: skip
    if ranks == 1:
        _as_loaded(model)
    described = slipstream.describe(model)
    modules = [module for _, module in hf.experts_modules(model)]
    adapted: dict[str, str] = {}
    if options.lora is not None:
        model, adapted = _with_adapters(model, options.lora)
    model.train()
    if options.optimizer == "torch" or options.lora is not None:
        optimizers = torch_adamw(model)
    else:
        from slipstream.optim import AdamW

        optimizers = adamw_by_mesh(model, AdamW)
    notes = ["the experts' own weights are in 4 bits, those of rivals in 16"] if options.load_in_4bit else []
    if options.cuda_graphs:
        notes.append("forward and backward are one CUDA graph; the time of both stands under forward")
    return Contender(
        model=model,
        loss=partial(_loss, model),
        optimizers=optimizers,
        experts=modules,
        num_experts=hf.num_routed_experts(model.config),
        settings={choice.operation: choice.chosen for choice in described.choices}
        | {"optimizer": f"{type(optimizers[0]).__module__}.{type(optimizers[0]).__name__}"}
        | adapted,
        notes=notes,
        same_weights=not options.load_in_4bit,
        graphed=GraphedStep(model) if options.cuda_graphs else None,
    )


def _as_loaded(model: Any) -> None:
    """`from_config` has all in one dtype; `from_pretrained` keeps some in fp32, as routers, which models rely on."""
    from slipstream import hf

    kept = hf.kept_in_float32(model, model.dtype)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if kept is not None and kept.search(name):
            tensor.data = tensor.data.float()


def _transformers(job: Job, device: torch.device, ranks: int) -> Contender:
    from slipstream import hf, hf_models
    from slipstream.parallel.initialize import build_sharded
    from slipstream.parallel.setup import DistributedSetup

    options, config = job.options, job.options.config()
    parallel = DistributedSetup(ep_size=options.ep_size if job.contender == "transformers-ep" else 1)
    if job.contender == "transformers-ep" and parallel.ep_size == 1:
        raise ValueError("with ep_size=1 transformers-ep is transformers; give --nproc 2 or more")
    parallel.check(hf.num_routed_experts(config))
    has_interface = hf.num_routed_experts(config) is not None and hf_models.takes_experts_implementation(config)
    experts = {"experts_implementation": "grouped_mm"} if has_interface else {}
    # "sdpa" is what Transformers takes by itself where the architecture has it; asked for, it refuses the others.
    attention = {} if options.rival_attn == "sdpa" else {"attn_implementation": options.rival_attn}
    from_config = partial(
        transformers.AutoModelForCausalLM.from_config,
        copy.deepcopy(config),
        dtype=torch.bfloat16,
        **experts,
        **attention,
    )
    torch.manual_seed(0)
    with device:
        if ranks == 1:
            model = from_config()
            _as_loaded(model)
        else:
            # Transformers' own sharding; only the values come from us, the same on every layout.
            distributed = hf.distributed_config(parallel, "all_to_all")
            model = build_sharded(from_config, partial(hf.distribute, config=distributed))
    notes = []
    if (found := hf.attention_implementation(model)) != options.rival_attn:
        notes.append(f"attention: {found} ({type(model).__name__} has no {options.rival_attn} in Transformers)")
    if options.activation_checkpointing != "none":
        hf.checkpoint_layers(model)
        if options.activation_checkpointing == "selective":
            notes.append("activation checkpointing: full (Transformers has no selective one)")
    if job.contender == "transformers-liger":
        notes.append(_apply_liger(model, keep_experts=parallel.ep_size > 1))
    modules = [module for _, module in hf.experts_modules(model)]
    if job.gate == "balanced":
        _balance(modules, hf.num_routed_experts(config) or 0)
    adapted: dict[str, str] = {}
    if options.lora is not None:
        model, adapted = _with_adapters(model, options.lora)
    model.train()
    return Contender(
        model=model,
        loss=partial(_loss, model),
        optimizers=torch_adamw(model),
        experts=modules,
        num_experts=hf.num_routed_experts(config),
        settings={"attn": found, **({"experts": hf.experts_implementation(model)} if experts else {}),
                  "parallel": _layout(ranks, parallel.ep_size), "optimizer": "torch.optim.AdamW(fused=True)"}
        | adapted,
        notes=notes,
    )  # fmt: skip


def _with_adapters(model: Any, rank: int) -> tuple[Any, dict[str, str]]:
    """PEFT's adapters on all linear layers but the head and on all experts of `model`, the same first values on every
    side, and what to say of them. None starts at zero, so that the first losses show whether the sides compute the
    same."""
    from peft import LoraConfig, get_peft_model

    from slipstream.adapters import all_experts

    # By name: "all-linear" doubles the rank of some architectures' experts.
    head = model.get_output_embeddings()
    linear = {name.rpartition(".")[2] for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and module is not head}  # fmt: skip
    torch.manual_seed(1)
    linear.discard("out_proj")  # Mamba's, which PEFT refuses
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(linear), init_lora_weights=False,
                        target_parameters=all_experts(model) or None)  # fmt: skip
    model = get_peft_model(model, config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return model, {"lora": f"r={rank}, {trained / 1e6:.1f} M parameters train"}


def _loss(model: Any, batch: Batch) -> torch.Tensor:
    return model(**batch).loss


def _layout(ranks: int, ep_size: int) -> str:
    if ranks == 1:
        return "one GPU"
    return f"FSDP2 over {ranks}" + (f", EP={ep_size} all_to_all" if ep_size > 1 else "")


def _balance(experts: list[nn.Module], num_experts: int) -> None:
    """Overwrite the router's choice with the uniform one that our gate="balanced" makes, among all experts."""
    from slipstream.moe.routing import balanced_index

    for module in experts:

        def uniform(x_TH: Any, idx_TK: Any, weights_TK: Any, forward: Any = module.forward) -> Any:
            return forward(x_TH, balanced_index(idx_TK, num_experts), weights_TK)

        module.forward = uniform


def _apply_liger(model: Any, *, keep_experts: bool) -> str:
    """Liger Kernel's own patch of `model`: norms, RoPE, fused linear cross-entropy, and its fused MoE where no exchange
    stands around the experts. Returns what it did."""
    if find_spec("liger_kernel") is None:
        raise ImportError("transformers-liger needs the package liger_kernel: pip install liger-kernel")
    from liger_kernel.transformers import monkey_patch

    model_type = model.config.model_type
    if model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"Liger Kernel has no kernels for the architecture {model_type!r}")
    monkey_patch._apply_liger_kernel_to_instance(model=model, **({"swiglu": False} if keep_experts else {}))
    return "Liger: norms, RoPE, fused linear cross-entropy" + (
        "; experts stay Transformers' (its fused MoE would bypass the exchange)" if keep_experts else ", SwiGLU/MoE"
    )


def resolved_device(options: Options) -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
