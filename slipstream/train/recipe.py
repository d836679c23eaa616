"""The recipe of a fine-tuning run: its schema. `recipe_file` reads one from YAML and says what is wrong with it.

Names under `train` are those of Transformers' `TrainingArguments` (`z_loss` is ours), names under `lora` those of
`peft.LoraConfig`.
This module imports neither torch nor transformers, so a recipe is checked in milliseconds.
"""

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from slipstream.backend import BackendConfig
from slipstream.parallel.setup import DistributedSetup

DEFAULT_MAX_LENGTH = 2048  # tokens; the model's own limit when that is smaller


def expand_path(value: str) -> str:
    """`~` and `$VAR` replaced; ValueError when the variable is not set (a folder called `$RUNS` helps nobody)."""
    expanded = os.path.expandvars(os.path.expanduser(value))
    if not expanded:
        raise ValueError("a path cannot be empty")
    if "$" in expanded:
        raise ValueError(f"{value!r} names an environment variable that is not set")
    return expanded


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _checked_backend(fields: dict[str, Any]) -> dict[str, Any]:
    BackendConfig.of(fields)
    return fields


def _checked_setup(fields: dict[str, Any]) -> dict[str, Any]:
    DistributedSetup.of(fields)
    return fields


PathString = Annotated[str, AfterValidator(expand_path)]
Paths = Annotated[list[PathString], BeforeValidator(_as_list), Field(min_length=1)]
Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelSection(Section):
    name_or_path: PathString = Field(description="Checkpoint folder, or a name on the Hugging Face hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="'auto': the checkpoint's.")
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    backend: Annotated[dict[str, Any], AfterValidator(_checked_backend)] = Field(
        default_factory=dict, description="Fields of slipstream.BackendConfig."
    )


class DataSection(Section):
    train: Paths = Field(description="JSONL files, or folders of them.")
    eval: Paths | None = Field(None, description="Held-out JSONL; without it, `eval_fraction` of `train` is held out.")
    eval_fraction: float = Field(0.05, ge=0, lt=1, description="0: no held-out loss.")
    max_length: int | None = Field(
        None, ge=2, description=f"Tokens a row; default {DEFAULT_MAX_LENGTH} or the model's limit, if smaller."
    )
    chat_template: PathString | None = Field(None, description="A Jinja file that replaces the tokenizer's template.")
    seed: int = Field(0, ge=0, description="Chooses the held-out rows.")


class TrainSection(Section):
    output_dir: PathString
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps; -1: `num_train_epochs` decides.")
    num_train_epochs: float = Field(1.0, gt=0)
    per_device_train_batch_size: int = Field(8, gt=0)
    per_device_eval_batch_size: int = Field(8, gt=0)
    gradient_accumulation_steps: int = Field(1, gt=0)
    learning_rate: float | None = Field(None, gt=0, description="Default 2e-5, with LoRA 2e-4.")
    lr_scheduler_type: Scheduler = "cosine"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    warmup_steps: float = Field(0.03, ge=0, description="Steps; below 1, a fraction of all steps.")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    optim: str = Field(
        "adamw_torch_fused",
        description="Transformers' names, or `slipstream_adamw` (stochastic rounding) or `slipstream_adamw_master` "
        "(exact fp32 weights).",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    seed: int = Field(0, ge=0)
    bf16: bool | None = Field(None, description="bfloat16 autocast; default: on a GPU when the weights are float32.")
    activation_checkpointing: bool = False
    router_aux_loss_coef: float | None = Field(
        None, ge=0, description="Load-balancing loss of an MoE; default: what the model's config says."
    )
    z_loss: float = Field(0.0, ge=0, description="Coefficient of logsumexp(logits)², which keeps them small; try 1e-4.")
    logging_steps: int = Field(1, gt=0)
    eval_steps: int | None = Field(None, gt=0, description="Default: held-out loss only before and after training.")
    dataloader_num_workers: int = Field(0, ge=0)
    report_to: Annotated[list[str], BeforeValidator(_as_list)] = ["none"]
    run_name: str | None = None


class LoraSection(Section):
    r: int = Field(16, gt=0)
    lora_alpha: float = Field(32, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = Field("all-linear", description="PEFT says which experts that includes.")
    modules_to_save: list[str] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False


class CheckpointSection(Section):
    save_steps: int | None = Field(
        None, gt=0, description="Optimizer steps between checkpoints; default: only when a signal stops the run."
    )
    save_total_limit: int = Field(2, gt=0, description="How many to keep, the newest.")
    resume_from_checkpoint: PathString = Field(
        "latest",
        description="'latest': continue an unfinished run that the output folder holds; 'never': start anew; or the "
        "folder of a checkpoint.",
    )


class EvalSection(Section):
    sample_prompt: str | None = Field(None, min_length=1, description="Answered greedily before and after training.")
    max_new_tokens: int = Field(30, gt=0)


class Recipe(Section):
    """A fine-tuning run. Required: `model.name_or_path`, `data.train`, `train.output_dir`; the rest has defaults."""

    model: ModelSection
    data: DataSection
    train: TrainSection
    distributed: Annotated[dict[str, Any], AfterValidator(_checked_setup)] = Field(
        default_factory=dict, description="Fields of slipstream.DistributedSetup: strategy, ep_size."
    )
    lora: LoraSection | None = None
    checkpoint: CheckpointSection = Field(default_factory=lambda: CheckpointSection.model_validate({}))
    eval: EvalSection = Field(default_factory=lambda: EvalSection.model_validate({}))
