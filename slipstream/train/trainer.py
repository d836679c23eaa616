"""The trainer: TRL's `SFTTrainer` with the model's own loss, and checkpoints that any number of ranks can continue."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from slipstream import hf
from slipstream.checkpoint.resume import Checkpointer, Resumed, load
from slipstream.loss import deferred_causal_lm_loss
from slipstream.optim import AdamW
from slipstream.train.data import IGNORE
from slipstream.train.recipe import Recipe

TRAINER_STATE = "trainer_state.json"
# Our optimizers' names in a recipe, and how they round.
ROUNDINGS = {"slipstream_adamw": "stochastic", "slipstream_adamw_master": "master"}
# What TRL and Transformers set on a model's config for the time of training.
CHANGED_KEYS = ("output_router_logits", "router_aux_loss_coef", "use_cache")


class SlipstreamTrainer(hf.CheckpointHooks, SFTTrainer):
    """`SFTTrainer` on tokenized rows whose loss is the model's own, so that the logits are never built.

    TRL 1.16 puts a head of its own on the model (log-probabilities, entropy, accuracy), which would bypass the loss of
    an accelerated one. Held-out loss is the mean cross-entropy over all trained tokens, whatever the batch size, and
    has neither load-balancing term nor z-loss. The config that is saved is the one that was loaded.

    A callback that sets `control.should_save` has `checkpointer` save, also what was sharded at load time, for which
    Transformers has no checkpoints; `train(resume_from_checkpoint=folder)` continues from there.

    Attributes:
        run_info: JSON data that every checkpoint carries.
        tokens: tokens trained on so far on all ranks, padding not counted.
        seconds: the time these took, evaluation not counted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        processing_class: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
        peft_config: LoraConfig | None = None,
        checkpointer: Checkpointer | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        z_loss: float = 0.0,
    ) -> None:
        config = model.config.get_text_config()
        loaded = [(c, key, getattr(c, key)) for c in (config, model.config) for key in CHANGED_KEYS if hasattr(c, key)]
        if args.router_aux_loss_coef is None and not getattr(config, "output_router_logits", False):
            args.router_aux_loss_coef = 0.0  # TRL would turn it on wherever the config has a coefficient
        elif args.router_aux_loss_coef is not None:
            if not hasattr(model, "router_aux_loss_coef"):
                raise ValueError(
                    f"train.router_aux_loss_coef={args.router_aux_loss_coef}: {type(model).__name__} has no "
                    "load-balancing loss; leave it out"
                )
            # The config is read only when the model is built.
            model.__dict__["router_aux_loss_coef"] = args.router_aux_loss_coef
        if z_loss and model.loss_function is not deferred_causal_lm_loss:
            raise ValueError(
                f"train.z_loss={z_loss}: only the fused loss has it, and {type(model).__name__} keeps Transformers' "
                "(slipstream.describe says why); leave it out"
            )
        own_forward = model.__dict__.get("forward")
        pad, eos = processing_class.pad_token_id, processing_class.eos_token_id
        super().__init__(
            model=model,
            args=args,
            data_collator=DataCollatorForLanguageModeling(
                pad_token_id=next((i for i in (pad, eos) if i is not None), 0)
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            peft_config=peft_config,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.remove_callback(PrinterCallback)
        # Undo what TRL and Transformers did to the model that was passed in: its forward and its config.
        del model.forward
        if own_forward is not None:
            model.forward = own_forward
        for owner, key, value in loaded:
            setattr(owner, key, value)
        self._router_kwarg = hasattr(config, "output_router_logits")
        self.z_loss = z_loss
        self.tokens, self.seconds = 0, 0.0
        self._new_tokens = torch.zeros((), dtype=torch.long, device=args.device)
        self._clock = 0.0
        self._trained_per_row = 0.0
        self.checkpointer = checkpointer
        self.run_info: dict[str, Any] = {}
        self._resumed: Resumed | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, TRAINER_STATE)))
            if state.global_step >= state.max_steps:
                # Trainer would make one step more.
                assert self.model is not None
                load(Path(resume_from_checkpoint), self.model)
                self.state = state
                return None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_checkpoint(self) -> None:
        assert self.checkpointer is not None
        assert self.model is not None
        self.store_flos()
        self.checkpointer.save(
            self.state.global_step,
            self.model,
            self._bare_optimizer(),
            self.lr_scheduler,
            info={**self.run_info, "tokens": self.tokens, "seconds": self.seconds},
            rank_info={"new_tokens": int(self._new_tokens), **hf.unlogged_loss(self)},
            files={TRAINER_STATE: json.dumps(dataclasses.asdict(self.state), indent=2)},
        )

    def load_checkpoint(self, path: str) -> None:
        assert self.model is not None
        self._resumed = load(Path(path), self.model, self._bare_optimizer(), self.lr_scheduler)

    def continue_training(self) -> None:
        assert self._resumed is not None
        self.tokens, self.seconds = self._resumed.info["tokens"], self._resumed.info["seconds"]
        ranks = self._resumed.rank_infos
        # A log takes the mean of the ranks' losses and the sum of their tokens.
        hf.set_unlogged_loss(self, sum(rank["loss"] for rank in ranks) / len(ranks), ranks[0]["logged_step"])
        if self._resumed.same_ranks or self.args.process_index == 0:
            self._new_tokens += sum(rank["new_tokens"] for rank in ranks)
        self._resumed.restore_rng()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self._clock:
            self._clock = time.perf_counter()
        return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Transformers' training loss (scalar), with the load-balancing term a mean over ranks and micro-batches."""
        self._new_tokens += inputs["attention_mask"].sum()
        loss, outputs = Trainer.compute_loss(
            self, model, {**inputs, **self._model_kwargs(training=True)}, True, num_items_in_batch
        )
        if self.aux_loss_enabled and num_items_in_batch is not None:
            # The model adds the term whole to each micro-batch, and Trainer multiplies the sum by the number of ranks.
            ranks = (
                self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
            )
            share = 1 / self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss * (share - ranks)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss alone. Trainer weighs batches by their rows, so dividing by rows × (tokens / row) gives the mean."""
        inputs = self._prepare_inputs(inputs)
        kwargs = self._model_kwargs(training=False)
        if self.model_accepts_loss_kwargs:
            kwargs["num_items_in_batch"] = torch.tensor(len(inputs["labels"]) * self._trained_per_row)
        with torch.no_grad(), self.compute_loss_context_manager():
            return model(**inputs, **kwargs).loss.detach(), None, None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        started = time.perf_counter()
        if not self._trained_per_row:
            assert isinstance(self.eval_dataset, Dataset)
            rows = self.eval_dataset["labels"]
            self._trained_per_row = sum(label != IGNORE for row in rows for label in row[1:]) / len(rows)
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if self._clock:
            self._clock += time.perf_counter() - started
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            new = int(self.accelerator.reduce(self._new_tokens.clone(), "sum"))
            self._new_tokens.zero_()
            logs["tokens_per_second"] = round(new / (now - self._clock), 1)
            self.tokens, self.seconds, self._clock = self.tokens + new, self.seconds + now - self._clock, now
            logs["tokens"] = self.tokens
        super().log(logs, start_time)

    def _bare_optimizer(self) -> torch.optim.Optimizer:
        assert isinstance(self.optimizer, AcceleratedOptimizer)
        return self.optimizer.optimizer  # type: ignore[no-any-return]

    def _model_kwargs(self, training: bool) -> dict[str, Any]:
        router = {"output_router_logits": training and self.aux_loss_enabled} if self._router_kwarg else {}
        z_loss = {"z_loss": self.z_loss} if training and self.z_loss else {}
        return {"use_cache": False, **router, **z_loss}


def training_arguments(recipe: Recipe, has_eval: bool) -> SFTConfig:
    """TRL's arguments for a resolved recipe.

    Raises: ValueError for what Transformers does not know or this machine cannot do (`optim`, `report_to`, `bf16`).
    """
    values = recipe.train.model_dump()
    if values["optim"] in ROUNDINGS:
        del values["optim"]  # Transformers knows its own only, and `own_optimizer` goes before its default
    eval_steps = values.pop("eval_steps")
    del values["z_loss"]  # ours, not TRL's: it goes to SlipstreamTrainer
    return SFTConfig(
        **values,
        eval_strategy="steps" if eval_steps and has_eval else "no",
        eval_steps=eval_steps,
        save_strategy="no",
        max_length=None,  # rows come cut to length
        dataset_kwargs={"skip_prepare_dataset": True},
        use_cpu=not torch.accelerator.is_available(),  # without it torchrun's ranks train apart on a CPU
        dataloader_pin_memory=torch.accelerator.is_available(),
        disable_tqdm=True,
    )


def own_optimizer(recipe: Recipe) -> tuple[type[AdamW], dict[str, Any]] | None:
    """Our optimizer and its arguments where the recipe names it, as `Trainer` takes them, else None."""
    section = recipe.train
    if section.optim not in ROUNDINGS:
        return None
    return AdamW, {
        "lr": section.learning_rate,
        "betas": (section.adam_beta1, section.adam_beta2),
        "eps": section.adam_epsilon,
        "rounding": ROUNDINGS[section.optim],
        "seed": section.seed,
    }
