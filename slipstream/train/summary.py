"""What a run says about itself before it begins."""

from typing import TYPE_CHECKING

from datasets import Dataset
from rich.console import Console
from rich.text import Text
from torch import nn

from slipstream.moe.packed import Placeholder
from slipstream.train.masking import trained_segments
from slipstream.train.packing import LENGTHS
from slipstream.train.recipe import AUTO, Recipe
from slipstream.train.recipe_file import dump_recipe

if TYPE_CHECKING:
    from slipstream.train.run import Prepared


def print_resolved(prepared: "Prepared", console: Console, dry_run: bool) -> None:
    """Model, data and steps in a line each, with what a user should know; in a dry run the recipe and a row as well."""
    recipe, data, counts = prepared.recipe, prepared.data, prepared.data.counts
    if dry_run:
        console.print(dump_recipe(recipe))
    for note in data.notes:
        console.print(f"note: {note}")
    held_out = len(data.eval) if data.eval is not None else 0
    to_train = "a stream to train on"
    if isinstance(data.train, Dataset):
        documents = sum(map(len, data.train[LENGTHS])) if counts.packed_rows else len(data.train)
        to_train = f"{documents:,} to train on"
    autocast = ", bfloat16 autocast" if recipe.train.bf16 else ""
    weights: str = "random weights" if recipe.model.config is not None else recipe.model.dtype
    if recipe.lora is not None and recipe.lora.load_in_4bit:
        weights += ", experts in 4 bits"
    lines = [
        f"model: {recipe.model.name_or_path or recipe.model.config} ({weights})",
        f"data: {counts.rows:,} {'first ' * recipe.data.streaming}rows, {counts.tokens:,} tokens, "
        f"{counts.trained_tokens / counts.tokens:.0%} trained; {to_train}, {held_out:,} held out",
        f"train: {_describe_steps(recipe)} of {_describe_batch(prepared)} rows a device, "
        f"learning rate {recipe.train.learning_rate:g}, "
        f"{recipe.train.optim}, max_length {recipe.data.max_length}{autocast}",
    ]
    if prepared.checkpoint:
        lines.append(f"continues from: {prepared.checkpoint}")
    if counts.packed_rows:
        filled = sum(map(len, data.train["input_ids"])) / (counts.packed_rows * (recipe.data.max_length or 1))
        lines.append(f"packed: {counts.packed_rows:,} rows of {recipe.data.max_length} tokens, {filled:.1%} filled")
    if counts.cut_rows:
        lines.append(f"cut: {counts.cut_rows:,} rows to max_length, {counts.cut_tokens:,} tokens lost")
    if counts.split_rows:
        lines.append(f"split: {counts.split_rows:,} rows longer than max_length")
    if counts.dropped_rows:
        lines.append(f"dropped: {counts.dropped_rows:,} rows longer than max_length")
    if counts.masked_rows:
        lines.append(f"left out: {counts.masked_rows:,} rows without a token to train on")
    console.print("\n".join(lines))
    if dry_run:
        console.print(first_row(prepared))


def first_row(prepared: "Prepared") -> Text:
    """The first document to train on, its trained part marked."""
    row = next(iter(prepared.data.train))
    if LENGTHS in row:
        row = {key: row[key][: row[LENGTHS][0]] for key in ("input_ids", "labels")}
    sample = Text("first row, trained part marked:\n", style="bold")
    for text, trained in trained_segments(row, prepared.tokenizer):
        sample.append(f"⟦{text}⟧" if trained else text, style="green" if trained else "not bold dim")
    return sample


def print_trainable(model: nn.Module, console: Console) -> None:
    """PEFT may or may not reach an architecture's experts; say which, since frozen experts look like bad learning."""
    sizes = [(name, weight.numel(), weight.requires_grad) for name, weight in model.named_parameters()]
    trainable = sum(size for _, size, trains in sizes if trains)
    experts = any(trains for name, _, trains in sizes if ".experts." in name)
    frozen = not experts and any(".experts." in name for name, _, _ in sizes)
    short = any(isinstance(weight, Placeholder) for weight in model.parameters())
    console.print(
        f"LoRA: {trainable:,} of {sum(size for _, size, _ in sizes):,} parameters train"
        f"{', experts included' * experts}{', whose own weights are stored in 4 bits' * (experts and short)}"
        f"{', experts stay frozen (lora.target_parameters=all-experts adapts them)' * frozen}"
    )


def _describe_steps(recipe: Recipe) -> str:
    if recipe.train.max_steps > 0:
        return f"{recipe.train.max_steps} steps"
    return f"{recipe.train.num_train_epochs:g} epochs"


def _describe_batch(prepared: "Prepared") -> str:
    args = prepared.arguments
    if prepared.recipe.train.per_device_train_batch_size == AUTO:
        return f"{args.gradient_accumulation_steps}"
    return f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps}"
