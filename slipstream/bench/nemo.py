"""NeMo AutoModel from PyPI wheels as a rival, in its own folder of packages (`--rival-env nemo=DIR`).

It pins another Transformers, so this file imports nothing of Slipstream that needs ours. Read against nemo-automodel
0.7.0. Its models return logits, and its parameters have names and layouts of their own: the loss is written out here
as Transformers defines it, and the weights are drawn from the same distribution, not the same draws.
"""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from slipstream.bench.contenders import Batch, Contender, torch_adamw
from slipstream.bench.options import Job

# The best that runs without what has to be compiled at install time.
BACKEND = {"attn": "sdpa", "linear": "torch", "rms_norm": "torch_fp32", "rope_fusion": False, "experts": "torch_mm",
           "dispatcher": "torch"}  # fmt: skip
_COMPILED = {"TransformerEngine": "transformer_engine", "DeepEP": "deep_ep"}


def build_nemo(job: Job, device: torch.device, ranks: int) -> Contender:
    """NeMo's model of the job on `ranks` GPUs.

    Raises:
        ImportError: nemo_automodel is not there.
        ValueError: the job runs without a GPU, or wants checkpointing that NeMo does not have.
    """
    if device.type != "cuda":
        raise ValueError("nemo: NeMo AutoModel needs a GPU (it reads torch.cuda.current_device() while it builds)")
    if find_spec("nemo_automodel") is None:
        raise ImportError("nemo needs the package nemo_automodel: give its folder with --rival-env nemo=DIR")
    from nemo_automodel import NeMoAutoModelForCausalLM
    from nemo_automodel.components.models.common.utils import BackendConfig
    from nemo_automodel.recipes._dist_utils import create_distributed_setup_from_config

    options, config = job.options, job.options.config()
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    fields: dict[str, Any] = {**BACKEND, **options.nemo_backend, "fake_balanced_gate": job.gate == "balanced"}
    setup = None
    if ranks > 1:
        checkpointing = {"none": False, "full": True, "selective": "selective"}[options.activation_checkpointing]
        setup = create_distributed_setup_from_config(
            {"strategy": "fsdp2", "ep_size": options.ep_size, "activation_checkpointing": checkpointing}
        )
    elif options.activation_checkpointing != "none":
        raise ValueError("nemo: its activation checkpointing is part of a distributed setup; give --nproc 2 or more")
    keywords = {"moe_overrides": {"aux_loss_coeff": 0.0}} if _is_moe(config) else {}
    torch.manual_seed(0)
    model: Any = NeMoAutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation="sdpa", backend=BackendConfig(**fields),
        distributed_setup=setup, **keywords,
    )  # fmt: skip
    model = model.to(device).train()
    draw_weights(model)

    def loss(batch: Batch) -> torch.Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        out = model(**inputs)
        logits = getattr(out, "logits", out)
        shifted = F.pad(batch["labels"], (0, 1), value=-100)[..., 1:]
        return F.cross_entropy(logits.float().flatten(0, 1), shifted.flatten(), ignore_index=-100)

    missing = [name for name, package in _COMPILED.items() if find_spec(package) is None]
    notes = ["random weights of its own draw", "loss: torch's cross-entropy in fp32, as in Transformers"]
    if missing:
        notes.insert(0, f"without {' and '.join(missing)}, which pip alone does not install")
    if job.gate == "balanced":
        notes.append("its balanced gate also drops the router's weights (1/k each)")
    return Contender(
        model=model,
        loss=loss,
        optimizers=torch_adamw(model),
        settings={key: str(value) for key, value in fields.items()}
        | {"parallel": "one GPU" if ranks == 1 else f"FSDP2 over {ranks}, EP={options.ep_size}"},
        notes=notes,
        same_weights=False,
    )  # fmt: skip


@torch.no_grad()
def draw_weights(model: torch.nn.Module) -> None:
    """The distribution of the other sides: norms 1, vectors 0, matrices normal with a deviation of 0.02."""
    for name, parameter in model.named_parameters():
        local: Any = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if "norm" in name and parameter.ndim == 1:
            local.fill_(1.0)
        elif parameter.ndim > 1:
            local.normal_(0, 0.02)
        elif name.endswith("bias"):
            local.zero_()


def _is_moe(config: Any) -> bool:
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
