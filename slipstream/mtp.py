"""Training the modules for multi-token prediction that come with a checkpoint (DeepSeek-V3, arXiv 2412.19437, 2.2).

Module k sees a token's hidden state and the embedding of the token k places on, runs a decoder layer of its own, and
predicts, through the model's own head, the token after that. Its loss is added to the model's. Transformers leaves
these modules out; here they are loaded beside the model, train with it, and are saved under their original names.

Dims: B rows, S tokens in a row, H hidden.
"""

import functools
import re
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from slipstream import hf, hf_models
from slipstream.attention.interface import rows_known
from slipstream.checkpoint import passthrough
from slipstream.checkpoint.export import install_save
from slipstream.compilation import compile_layers
from slipstream.deferred_logits import DeferredLogits
from slipstream.description import acceleration_of, unwrap
from slipstream.loss import deferred_causal_lm_loss
from slipstream.parallel.activations import checkpoint_activations
from slipstream.parallel.setup import DistributedSetup, failing_together
from slipstream.parallel.shard import average_whole, shard_added

NAME = passthrough.MODULE
IGNORE = -100
# What a module has beside its decoder layer: our name -> that in checkpoints with layers behind the last one, and in
# those with a section of its own (Qwen3-Next, Mellum), which has these once.
_BEHIND = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "post_norm": "shared_head.norm"}
_SECTION = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "post_norm": "norm"}
_COPIES = ("embed_tokens.weight", "shared_head.head.weight")  # of the model's own, in DeepSeek's checkpoints


class MultiTokenPrediction(nn.Module):
    """The modules, and the loss that they add.

    Attributes:
        loss_weight: what the mean of their losses is multiplied by.
        loss: that mean in the last forward pass, detached; for a log.
        section: whether the checkpoint keeps them under `mtp.`.
        copies: tensors of the checkpoint that repeat the embedding or the head.
    """

    def __init__(self, layers: nn.ModuleList, first: int, loss_weight: float, section: bool, copies: list[str]) -> None:
        super().__init__()
        self.layers = layers
        self.first, self.loss_weight, self.section, self.copies = first, loss_weight, section, copies
        self.loss: torch.Tensor | None = None

    def under_source_names(self, model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`tensors` of `model` as its checkpoint names them, those of these modules and the copies included."""
        named = {self._source(name): tensor for name, tensor in tensors.items()}
        for name in self.copies:
            whole = model.get_input_embeddings() if "embed_tokens" in name else model.get_output_embeddings()
            named[name] = whole.weight.detach().clone()  # safetensors refuses two names for one memory
        return named

    def _source(self, name: str) -> str:
        match = re.fullmatch(rf"{NAME}\.layers\.(\d+)\.([^.]+)\.(.+)", name)
        if match is None:
            return name
        number, part, rest = int(match[1]), match[2], match[3]
        if self.section:
            return f"mtp.layers.{number}.{rest}" if part == "mtp_block" else f"mtp.{_SECTION[part]}.{rest}"
        layer = f"model.layers.{self.first + number}"
        return f"{layer}.{rest}" if part == "mtp_block" else f"{layer}.{_BEHIND[part]}.{rest}"


def train_mtp(model: Any, loss_weight: float = 0.1) -> Any:
    """Load the checkpoint's modules for multi-token prediction and train them with `model`, in place; returns it.

    They are spread over ranks as the layers of `model` are, each rank reading its part; call this on all of them.

    Args:
        model: from `slipstream.AutoModelForCausalLM.from_pretrained`, before an optimizer is made.
        loss_weight: of the mean over the modules' losses; 0.3, later 0.1 in DeepSeek-V3's training.

    Raises:
        ValueError: a weight below 0, a checkpoint without such modules or of a form that is not known here, or a model
            with tensor parallelism or one that Transformers spread over the ranks by itself; on all ranks together.
    """
    core = unwrap(model)
    if loss_weight < 0:
        raise ValueError(f"loss_weight={loss_weight}: give 0 or more, for instance 0.1")
    if hasattr(core, NAME):
        getattr(core, NAME).loss_weight = loss_weight
        return model
    together = failing_together if hf.is_distributed(core) else nullcontext
    with ExitStack() as stack:
        kept = passthrough.open_kept(core, stack)
        with together():
            form = _Form.of(core, kept)
        try:
            with together():
                _load(core, kept, form, loss_weight)
        except ValueError:
            core._modules.pop(NAME, None)
            raise
    setattr(core, passthrough.KEPT, {})
    core.forward = MethodType(_with_prediction(core.forward.__func__), core)
    install_save(core)
    return model


@dataclass(frozen=True)
class _Form:
    """How a checkpoint keeps the modules.

    Attributes:
        first, section, copies: see `MultiTokenPrediction`.
        places: name in the checkpoint -> ours.
    """

    first: int
    section: bool
    copies: list[str]
    places: dict[str, str]

    @classmethod
    def of(cls, core: Any, kept: dict[str, Any]) -> "_Form":
        """That of the tensors `kept`; raises as `train_mtp`."""
        if not kept:
            raise ValueError(
                f"train_mtp: the checkpoint of this {type(core).__name__} has no modules for multi-token prediction, "
                "or it was not loaded with slipstream.AutoModelForCausalLM.from_pretrained"
            )
        if hf.is_distributed(core):
            _check_layout(core, _setup(core))
        first = core.config.get_text_config().num_hidden_layers
        section = any(name.startswith("mtp.") for name in kept)
        ours = {name: _internal(name, first, section) for name in kept}
        copies = [name for name in kept if name.endswith(_COPIES)]
        places = {name: target for name, target in ours.items() if target is not None and name not in copies}
        if any(target is None for target in ours.values()) or not any(".eh_proj." in name for name in places.values()):
            odd = next((name for name, target in ours.items() if target is None), next(iter(kept)))
            raise ValueError(
                f"train_mtp knows the form of DeepSeek-V3, GLM-4 and Qwen3-Next, not that of {odd}; without it these "
                "tensors stay as they are and are saved again"
            )
        return cls(first, section, copies, places)


def _load(core: Any, kept: dict[str, Any], form: _Form, loss_weight: float) -> None:
    """Make the modules and read them from the slices `kept`; raises as `train_mtp`."""
    count = 1 + max(int(target.split(".")[2]) for target in form.places.values())
    layers = hf_models.prediction_layers(core, count)
    module = MultiTokenPrediction(layers, form.first, loss_weight, form.section, form.copies)
    core.add_module(NAME, module)
    setup, applied = _setup(core), acceleration_of(core)
    if hf.is_distributed(core):
        shard_added(core, NAME, setup)
    missing = hf_models.load_into(core, {target: kept[name] for name, target in form.places.items()})
    if lacking := sorted(name for name in missing if name.startswith(f"{NAME}.")):
        raise ValueError(f"train_mtp: the checkpoint lacks {', '.join(lacking[:3])}")
    average_whole(core)
    checkpoint_activations(core, setup.activation_checkpointing)
    if applied is not None and any(choice.chosen == "layers" for choice in applied.choices):
        compile_layers(module, gpu_only=applied.backend.compile == "auto")
    module.train(core.training)


def _setup(core: Any) -> DistributedSetup:
    applied = acceleration_of(core)
    return DistributedSetup() if applied is None else applied.setup


def _check_layout(core: Any, setup: DistributedSetup) -> None:
    """Refuse a layout of `core` that the modules cannot be given."""
    config = core.config.distributed_config
    if config.tp_size > 1:
        raise ValueError(
            f"train_mtp does not work with tensor parallelism (tp_size={config.tp_size}); use FSDP2, with ep_size for "
            "the experts"
        )
    asked = setup.fsdp_size, setup.ep_size, setup.replicas
    if asked != (config.fsdp_size, config.ep_size, config.dp_replicate_size):
        raise ValueError(
            "train_mtp: this model was spread over the ranks by a distributed_config; give "
            "slipstream.AutoModelForCausalLM.from_pretrained a distributed_setup instead"
        )


def _internal(name: str, first: int, section: bool) -> str | None:
    """Our name for a tensor of the checkpoint, None if it has no place."""
    if section:
        if match := re.fullmatch(r"mtp\.layers\.(\d+)\.(.+)", name):
            return f"{NAME}.layers.{match[1]}.mtp_block.{match[2]}"
        own = {theirs: mine for mine, theirs in _SECTION.items()}
        part, _, rest = name.removeprefix("mtp.").partition(".")
        return f"{NAME}.layers.0.{own[part]}.{rest}" if part in own else None
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return None
    layer, rest = f"{NAME}.layers.{int(match[1]) - first}", match[2]
    for mine, theirs in _BEHIND.items():
        if rest.startswith(f"{theirs}."):
            return f"{layer}.{mine}{rest.removeprefix(theirs)}"
    return f"{layer}.mtp_block.{rest}"


@functools.cache
def _with_prediction(original: Any) -> Any:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        module: MultiTokenPrediction = getattr(self, NAME)
        labels = kwargs.get("labels")
        if not self.training or labels is None or not module.loss_weight:
            return original(self, *args, **kwargs)
        seen: dict[str, Any] = {}

        def remember(decoder: nn.Module, inputs: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
            seen.update(hidden=output.last_hidden_state, given=given)

        def remember_embedded(embedding: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            seen.update(embedded=output)

        hooks = [
            self.get_decoder().register_forward_hook(remember, with_kwargs=True),
            self.get_input_embeddings().register_forward_hook(remember_embedded),
        ]
        try:
            output = original(self, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        loss = predictions_loss(self, module, labels=labels, num_items=kwargs.get("num_items_in_batch"), **seen)
        module.loss = loss.detach()
        output.loss = output.loss + module.loss_weight * loss
        return output

    return forward


def predictions_loss(
    model: Any, module: MultiTokenPrediction, hidden: torch.Tensor, given: dict[str, Any], labels: torch.Tensor,
    num_items: Any, embedded: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The mean over the modules of their losses.

    Args:
        hidden: `[B, S, H]` of the last layer, behind its norm.
        given: what the decoder was called with.
        labels: `[B, S]`, not shifted.
        num_items: what to divide the sums by, as in `deferred_causal_lm_loss`.
        embedded: `[B, S, H]` of the tokens, where they were looked up: a second time would gather the weights again.

    Raises: ValueError without `input_ids`, whose embeddings the modules need.
    """
    ids = given.get("input_ids")
    if ids is None or embedded is None:
        raise ValueError("training multi-token prediction needs input_ids; inputs_embeds don't say which token is next")
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
    positions = positions.expand(ids.shape)
    head, losses, hidden_BSH = model.get_output_embeddings(), [], hidden
    rotated = hf_models.rotary_embedding(model, hidden_BSH, positions)
    with rows_known(model, given):
        mask = hf_models.causal_mask(model, hidden_BSH, given.get("attention_mask"), positions)
        for depth, layer in enumerate(module.layers, start=1):
            hidden_BSH = layer(
                embedded.roll(-depth, 1), hidden_BSH, position_embeddings=rotated, attention_mask=mask,
                position_ids=positions, past_key_values=None,
            )  # fmt: skip
            # Only where the token that is embedded and the one to predict belong to this token's document.
            shifted, places = (F.pad(x, (0, depth + 1), value=IGNORE)[:, depth + 1 :] for x in (labels, positions))
            shifted = shifted.masked_fill(places != positions + depth + 1, IGNORE)
            logits = DeferredLogits(hidden_BSH, head) if isinstance(head, nn.Linear) else head(hidden_BSH)
            losses.append(
                deferred_causal_lm_loss(
                    logits, labels, model.config.get_text_config().vocab_size, num_items, shift_labels=shifted
                )
            )
    return torch.stack(losses).mean()
