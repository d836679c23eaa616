"""What a resolved recipe means in TRL's terms: the trainer's arguments, and our optimizer."""

from typing import Any

import torch
from trl import SFTConfig

from slipstream.optim import AdamW
from slipstream.train.batch_size import set_rows_per_step
from slipstream.train.recipe import AUTO, Recipe

# Our optimizers' names in a recipe, and how they round.
ROUNDINGS = {"slipstream_adamw": "stochastic", "slipstream_adamw_master": "master"}
# What of a recipe's `train` is not TRL's.
OURS = (
    "z_loss",
    "global_batch_size",
    "router_bias_update_rate",
    "freeze_router",
    "mtp_loss_weight",
    "cuda_graphs",
    "on_bad_step",
    "max_loss_spike",
)


class Arguments(SFTConfig):
    """TRL's arguments, but for a warm-up that would take all there is to train.

    Transformers rounds it up to whole steps, and the first of them is trained at a rate of 0.
    """

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of the warm-up: none where it is less than one, or where there is only one to train."""
        if num_training_steps <= 1 or (self.warmup_steps < 1 and self.warmup_steps * num_training_steps < 1):
            return 0
        steps: int = super().get_warmup_steps(num_training_steps)
        return steps


def training_arguments(recipe: Recipe, has_eval: bool) -> SFTConfig:
    """TRL's arguments for a resolved recipe.

    Raises: ValueError for what Transformers does not know or this machine cannot do (`optim`, `report_to`, `bf16`).
    """
    values = {**recipe.train.model_dump(), **recipe.log.model_dump()}
    if values["optim"] in ROUNDINGS:
        del values["optim"]  # Transformers knows its own only, and `own_optimizer` goes before its default
    eval_steps = recipe.eval.eval_steps
    for name in OURS:
        del values[name]
    if values["per_device_train_batch_size"] == AUTO:
        values["per_device_train_batch_size"] = 1  # until find_batch_size has found more
    args = Arguments(
        **values,
        eval_strategy="steps" if eval_steps and has_eval else "no",
        eval_steps=eval_steps,
        per_device_eval_batch_size=recipe.eval.per_device_eval_batch_size,
        save_strategy="no",
        max_length=None,  # rows come cut to length
        dataset_kwargs={"skip_prepare_dataset": True},
        # Every rank reads a stream itself. A blocking copy of a batch would wait for all that the device has to do.
        accelerator_config={"dispatch_batches": False, "non_blocking": torch.accelerator.is_available()},
        use_cpu=not torch.accelerator.is_available(),  # without it torchrun's ranks train apart on a CPU
        dataloader_pin_memory=torch.accelerator.is_available(),
        disable_tqdm=True,
        logging_nan_inf_filter=False,  # it waits for the device in every micro-batch, and hides what the guard wants
    )
    set_rows_per_step(recipe, args)
    return args


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
