"""The trainer: TRL's `SFTTrainer` with the model's own loss."""

import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from slipstream.train.data import IGNORE
from slipstream.train.recipe import Recipe

# What TRL and Transformers set on a model's config for the time of training.
CHANGED_KEYS = ("output_router_logits", "router_aux_loss_coef", "use_cache")


class SlipstreamTrainer(SFTTrainer):
    """`SFTTrainer` on tokenized rows whose loss is the model's own, so that the logits are never built.

    TRL 1.16 puts a head of its own on the model (log-probabilities, entropy, accuracy), which would bypass the loss of
    an accelerated one. Held-out loss is the mean cross-entropy over all trained tokens, whatever the batch size, and
    has no load-balancing term. The config that is saved is the one that was loaded.

    Attributes:
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
        )
        self.remove_callback(PrinterCallback)
        # Undo what TRL and Transformers did to the model that was passed in: its forward and its config.
        del model.forward
        if own_forward is not None:
            model.forward = own_forward
        for owner, key, value in loaded:
            setattr(owner, key, value)
        self._router_kwarg = hasattr(config, "output_router_logits")
        self.tokens, self.seconds = 0, 0.0
        self._new_tokens = torch.zeros((), dtype=torch.long, device=args.device)
        self._clock = 0.0
        self._trained_per_row = 0.0

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

    def _model_kwargs(self, training: bool) -> dict[str, Any]:
        router = {"output_router_logits": training and self.aux_loss_enabled} if self._router_kwarg else {}
        return {"use_cache": False, **router}


def training_arguments(recipe: Recipe, has_eval: bool) -> SFTConfig:
    """TRL's arguments for a resolved recipe.

    Raises: ValueError for what Transformers does not know or this machine cannot do (`optim`, `report_to`, `bf16`).
    """
    values = recipe.train.model_dump()
    eval_steps = values.pop("eval_steps")
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
