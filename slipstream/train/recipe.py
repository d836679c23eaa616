"""The recipe of a fine-tuning run: its schema. `recipe_file` reads one from YAML and says what is wrong with it.

Names under `train`, `eval` and `log` are those of Transformers' `TrainingArguments` where it has the thing, names under
`lora` those of `peft.LoraConfig`, and `load_in_4bit`. `scripts/recipe_docs.py` writes the tables of docs/recipes.md and
docs/recipe.schema.json from this.
This module imports neither torch nor transformers, so a recipe is checked in milliseconds.
"""

import dataclasses
import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from slipstream.backend import CHOICES, BackendConfig
from slipstream.parallel.setup import CHECKPOINTING, DTYPES, STRATEGIES, DistributedSetup

DEFAULT_MAX_LENGTH = 2048  # tokens; the model's own limit when that is smaller
DEFAULT_BATCH_SIZE = 8
AUTO = "auto"
ALL_EXPERTS = "all-experts"
# The keys of sections that another class validates.
BACKEND_KEYS = tuple(field.name for field in dataclasses.fields(BackendConfig))
DISTRIBUTED_KEYS = tuple(field.name for field in dataclasses.fields(DistributedSetup))


def expand_path(value: str) -> str:
    """`~` and `$VAR` replaced; ValueError when the variable is not set (a folder called `$RUNS` helps nobody)."""
    expanded = os.path.expandvars(os.path.expanduser(value))
    if not expanded:
        raise ValueError("a path cannot be empty")
    if "$" in expanded:
        raise ValueError(f"{value!r} names an environment variable that is not set")
    return expanded


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


def _as_source(value: Any) -> Any:
    if not isinstance(value, str | dict | Source):
        raise ValueError(f"give a path, or a mapping with `path` and `weight` (given {value!r})")
    return {"path": value} if isinstance(value, str) else value


def _some_steps(value: int) -> int:
    if value == 0:
        raise ValueError("0 steps train nothing; give 1 or more, or -1 for num_train_epochs")
    return value


def _checked_backend(fields: dict[str, Any]) -> dict[str, Any]:
    BackendConfig.of(fields)
    return fields


def _checked_setup(fields: dict[str, Any]) -> dict[str, Any]:
    DistributedSetup.of(fields)
    return fields


def _distributed_schema() -> dict[str, Any]:
    """What an editor offers under `distributed`; `DistributedSetup` itself does the checking."""
    allowed = {"strategy": STRATEGIES, "activation_checkpointing": CHECKPOINTING, "param_dtype": DTYPES,
               "reduce_dtype": DTYPES}  # fmt: skip
    kinds = {"int": "integer", "bool": "boolean"}
    properties: dict[str, Any] = {}
    for field in dataclasses.fields(DistributedSetup):
        name = str(getattr(field.type, "__name__", field.type))
        kind = {"enum": list(allowed[field.name])} if field.name in allowed else {"type": kinds.get(name, "number")}
        properties[field.name] = {**kind, "default": field.default}
    return {"type": "object", "properties": properties, "additionalProperties": False}


_BACKEND_SCHEMA = {
    "type": "object",
    "properties": {name: {"enum": list(values)} for name, values in CHOICES.items()},
    "additionalProperties": False,
}
PathString = Annotated[str, AfterValidator(expand_path)]
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
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ModelSection(Section):
    name_or_path: PathString | None = Field(
        None, description="Checkpoint folder, or a name on the Hugging Face hub. Required unless `config` is given."
    )
    config: PathString | None = Field(
        None, description="Instead of a checkpoint: random weights for a `config.json`, its folder, or a bench preset."
    )
    config_overrides: dict[str, Any] = Field(
        default_factory=dict, description="Fields of the model's config that win over `config`'s."
    )
    tokenizer: PathString | None = Field(
        None, description="Default: the checkpoint's. 'bytes': UTF-8 bytes and ChatML, which needs no file."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="'auto': the checkpoint's; bfloat16 for random weights on a GPU."
    )
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    backend: Annotated[
        dict[str, Any], AfterValidator(_checked_backend), WithJsonSchema({**_BACKEND_SCHEMA, "default": {}})
    ] = Field(default_factory=dict, description="Fields of slipstream.BackendConfig.")

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSection":
        if self.name_or_path is None and self.config is None:
            raise ValueError("name_or_path: missing; give a checkpoint, or `config` for random weights")
        if self.name_or_path is not None and (self.config is not None or self.config_overrides):
            raise ValueError(
                "name_or_path and config: a checkpoint brings its own config; leave one out (name_or_path=null for "
                "random weights)"
            )
        return self


class Source(Section):
    path: PathString = Field(description="A file, a folder of files, or a name on the Hugging Face hub.")
    weight: float | None = Field(
        None, gt=0, description="Its share of the rows that are drawn; give it to every source or to none."
    )
    split: str = Field("train", description="Of a data set on the hub.")
    subset: str | None = Field(None, description="Of a data set on the hub.")


SourceLike = str | Source
Sources = Annotated[
    list[Annotated[Source, BeforeValidator(_as_source, json_schema_input_type=SourceLike)]],
    BeforeValidator(_as_list, json_schema_input_type=SourceLike | list[SourceLike]),
    Field(min_length=1),
]
MAP_KEYS: tuple[tuple[str, ...], ...] = (
    ("text",),
    ("prompt", "completion"),
    ("user", "assistant"),
    ("system", "user", "assistant"),
)


class DataSection(Section):
    train: Sources = Field(
        description="JSONL, JSON, Parquet, CSV or text files, folders of these, or names on the Hugging Face hub."
    )
    eval: Sources | None = Field(None, description="Held-out data; without it, `eval_fraction` of `train` is held out.")
    eval_fraction: float = Field(0.05, ge=0, lt=1, description="0: no held-out loss.")
    max_length: int | None = Field(
        None, ge=2, description=f"Tokens a row; default {DEFAULT_MAX_LENGTH} or the model's limit, if smaller."
    )
    excess_length: Literal["truncate", "split", "drop"] = Field(
        "truncate", description="What becomes of a longer row; 'split' makes several of it."
    )
    packing: bool = Field(
        False, description="Fill each row of a batch up to `max_length` with documents, which don't see each other."
    )
    map: dict[str, str] | None = Field(
        None, description="For data in a form of its own: what a row says, as Jinja templates over its columns."
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="'skip': leave malformed rows out, count them and list them in data.json."
    )
    streaming: bool = Field(
        False, description="Read and tokenize while training, for data that does not fit; needs `train.max_steps`."
    )
    chat_template: PathString | None = Field(None, description="A Jinja file that replaces the tokenizer's template.")
    seed: int = Field(0, ge=0, description="Chooses the held-out rows, and the order of weighted sources.")

    @model_validator(mode="after")
    def _fits_together(self) -> "DataSection":
        if self.map is not None and set(self.map) not in [set(keys) for keys in MAP_KEYS]:
            allowed = "; ".join(" and ".join(keys) for keys in MAP_KEYS)
            raise ValueError(f"map: has {', '.join(self.map) or 'no key'}; give one of these: {allowed}")
        weighted = [source.weight is not None for source in self.train]
        if any(weighted) and not all(weighted):
            raise ValueError(f"train: {sum(weighted)} of {len(weighted)} sources with a weight; give all one, or none")
        if any(source.weight is not None for source in self.eval or ()):
            raise ValueError("eval: held-out data has no weights; leave them out")
        if self.streaming and self.eval is None and self.eval_fraction > 0:
            raise ValueError(
                "streaming: the number of rows is not known, so none can be held out; name data.eval, or set "
                "data.eval_fraction: 0"
            )
        return self


class TrainSection(Section):
    output_dir: PathString
    max_steps: Annotated[int, AfterValidator(_some_steps)] = Field(
        -1, ge=-1, description="Optimizer steps; -1: `num_train_epochs` decides."
    )
    num_train_epochs: float = Field(1.0, gt=0)
    per_device_train_batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        DEFAULT_BATCH_SIZE,
        description="Rows of a micro-batch. 'auto': the largest power of two that fits, found by trial steps; the rows "
        f"of a step stay `global_batch_size`, or {DEFAULT_BATCH_SIZE} a device times `gradient_accumulation_steps`.",
    )
    gradient_accumulation_steps: int = Field(1, gt=0, description="Micro-batches of an optimizer step.")
    global_batch_size: int | None = Field(
        None, gt=0, description="Rows of an optimizer step on all ranks; instead of `gradient_accumulation_steps`."
    )
    learning_rate: float | None = Field(None, gt=0, description="Default 2e-5, with LoRA 2e-4.")
    lr_scheduler_type: Scheduler = "cosine"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    warmup_steps: float = Field(
        0.03,
        ge=0,
        description="Steps; below 1, a fraction of all steps. Less than a step is none; a run of one step has none.",
    )
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    optim: str = Field(
        "auto",
        description="Transformers' names, or `slipstream_adamw` (stochastic rounding) or `slipstream_adamw_master` "
        "(exact fp32 weights). 'auto': `slipstream_adamw` for 16-bit weights on a GPU, else `adamw_torch_fused`.",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    seed: int = Field(0, ge=0)
    bf16: bool | None = Field(None, description="bfloat16 autocast; default: on a GPU when the weights are float32.")
    activation_checkpointing: bool = False
    cuda_graphs: bool = Field(
        False,
        description="Forward and backward as one CUDA graph, for hosts that cannot keep their GPUs busy: LoRA, short "
        "rows. Batches need one shape: set `data.packing`.",
    )
    router_aux_loss_coef: float | None = Field(
        None, ge=0, description="Load-balancing loss of an MoE; default: what the model's config says."
    )
    router_bias_update_rate: float = Field(
        0.0,
        ge=0,
        description="Balances experts through the routers' bias for choosing them, without a loss (DeepSeek-V3, "
        "GLM-4.5, Nemotron-H, …); try 1e-3.",
    )
    freeze_router: bool = Field(False, description="Train everything but the routers of an MoE.")
    z_loss: float = Field(0.0, ge=0, description="Coefficient of logsumexp(logits)², which keeps them small; try 1e-4.")
    mtp_loss_weight: float = Field(
        0.0,
        ge=0,
        description="Trains the checkpoint's modules for multi-token prediction too (DeepSeek-V3, GLM-4.5, "
        "Qwen3-Next), their loss times this added; try 0.1. Without it they are saved as they came.",
    )
    on_bad_step: Literal["stop", "skip", "ignore"] = Field(
        "stop",
        description="What to do about a loss or gradient that is not finite, or a jump of the loss, before the update "
        "is applied. 'stop' and 'skip' save the batch.",
    )
    max_loss_spike: float | None = Field(
        None, gt=1, description="A loss over so many times the median of the last 50 steps is a bad step; try 4."
    )
    dataloader_num_workers: int = Field(0, ge=0)

    @property
    def rows_together(self) -> int:
        """Rows of a micro-batch, before a trial has found how many fit."""
        size = self.per_device_train_batch_size
        return size if isinstance(size, int) else DEFAULT_BATCH_SIZE

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainSection":
        if self.global_batch_size is not None and self.gradient_accumulation_steps != 1:
            raise ValueError("global_batch_size: gradient_accumulation_steps follows from it; leave one out")
        if self.freeze_router and self.router_bias_update_rate:
            raise ValueError("freeze_router: router_bias_update_rate changes the routers; leave one out")
        return self


class LoraSection(Section):
    r: int = Field(16, gt=0)
    lora_alpha: float = Field(32, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = Field(
        "all-linear", description="PEFT says what that includes; of some architectures experts and routers too."
    )
    target_parameters: Literal["all-experts"] | list[str] | None = Field(
        None, description="Ends of parameters' names, such as experts.down_proj; or 'all-experts'."
    )
    exclude_modules: str | list[str] | None = None
    rank_pattern: dict[str, int] = Field({}, description="Name -> a rank of its own.")
    alpha_pattern: dict[str, float] = Field({}, description="Name -> a lora_alpha of its own.")
    modules_to_save: list[str] | None = Field(None, description="On one rank only.")
    bias: Literal["none", "all", "lora_only"] = "none"
    share_experts: bool = Field(
        False, description="One pair of factors for all experts of a projection, instead of one for each."
    )
    use_rslora: bool = False
    use_dora: bool = False
    load_in_4bit: bool = Field(
        False, description="QLoRA: the experts' own weights are stored in NF4; everything else keeps its dtype."
    )


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
    eval_steps: int | None = Field(None, gt=0, description="Default: held-out loss only before and after training.")
    per_device_eval_batch_size: int = Field(8, gt=0)
    early_stopping_patience: int | None = Field(
        None, gt=0, description="Stop after so many evaluations in a row without a new lowest held-out loss."
    )
    early_stopping_threshold: float = Field(0.0, ge=0, description="By how much a new lowest has to be lower.")
    sample_prompt: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None,
        BeforeValidator(_as_list, json_schema_input_type=str | list[str] | None),
    ] = Field(None, description="A prompt or several, answered greedily at each evaluation.")
    max_new_tokens: int = Field(30, gt=0, description="Of such an answer.")

    @model_validator(mode="after")
    def _can_stop_early(self) -> "EvalSection":
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise ValueError("early_stopping_patience: nothing is evaluated while training; set eval_steps")
        return self


class LogSection(Section):
    logging_steps: int = Field(1, gt=0)
    report_to: Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])] = Field(
        ["none"], description="Transformers' loggers: tensorboard, wandb, mlflow, trackio, …"
    )
    run_name: str | None = None


class Recipe(Section):
    """A fine-tuning run. Required: `model.name_or_path`, `data.train`, `train.output_dir`; the rest has defaults."""

    model: ModelSection
    data: DataSection
    train: TrainSection
    distributed: Annotated[
        dict[str, Any], AfterValidator(_checked_setup), WithJsonSchema({**_distributed_schema(), "default": {}})
    ] = Field(
        default_factory=dict, description=f"Fields of slipstream.DistributedSetup: {', '.join(DISTRIBUTED_KEYS)}."
    )
    lora: LoraSection | None = None
    eval: EvalSection = Field(default_factory=lambda: EvalSection.model_validate({}))
    checkpoint: CheckpointSection = Field(default_factory=lambda: CheckpointSection.model_validate({}))
    log: LogSection = Field(default_factory=lambda: LogSection.model_validate({}))

    @model_validator(mode="after")
    def _streams_end(self) -> "Recipe":
        if self.data.streaming and self.train.max_steps < 1:
            raise ValueError("data.streaming: the number of rows is not known; set train.max_steps")
        return self

    @model_validator(mode="after")
    def _trains_predictions_whole(self) -> "Recipe":
        if self.train.mtp_loss_weight and (self.lora or self.distributed.get("tp_size", 1) > 1):
            other = "lora" if self.lora else "distributed.tp_size"
            raise ValueError(f"train.mtp_loss_weight does not go together with {other} yet; leave one out")
        return self

    @model_validator(mode="after")
    def _batches_can_be_graphed(self) -> "Recipe":
        if not self.train.cuda_graphs:
            return self
        if not self.data.packing:
            raise ValueError("train.cuda_graphs: padded rows have many shapes; set data.packing: true, or leave it out")
        if self.train.activation_checkpointing or self.distributed.get("activation_checkpointing", "none") != "none":
            raise ValueError("train.cuda_graphs does not go together with activation checkpointing; leave one out")
        if self.distributed.get("strategy") == "ddp":
            raise ValueError("train.cuda_graphs does not go together with distributed.strategy: ddp; use fsdp2")
        return self

    @model_validator(mode="after")
    def _has_held_out_data(self) -> "Recipe":
        if self.eval.early_stopping_patience is not None and self.data.eval is None and not self.data.eval_fraction:
            raise ValueError("eval.early_stopping_patience: no data is held out; set data.eval or data.eval_fraction")
        return self
