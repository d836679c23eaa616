"""A fine-tuning run from recipe to saved model: check everything, load, train, publish."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from peft import LoraConfig
from rich.console import Console
from rich.text import Text
from torch.distributed.fsdp import FSDPModule
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from slipstream import AutoModelForCausalLM, DistributedSetup
from slipstream.checkpoint.output import INCOMPLETE, check_output_folder, holds_model, publish
from slipstream.checkpoint.resume import Checkpointer, checkpoint_name, read_info
from slipstream.hf import num_routed_experts
from slipstream.train.callbacks import MetricsFile, ProgressReport, metrics_until
from slipstream.train.checks import load_config, resolve
from slipstream.train.data import TokenizedData, jsonl_files, load_data, trained_segments
from slipstream.train.recipe import Recipe
from slipstream.train.recipe_file import dump_recipe
from slipstream.train.resume import (
    CHECKPOINTS,
    SaveAndStop,
    StoppedBySignal,
    agree,
    collective_timeout,
    find_checkpoint,
    identity,
    keep_rows_per_step,
    restart_note,
    rows_per_step,
)
from slipstream.train.trainer import SlipstreamTrainer, own_optimizer, training_arguments

RECIPE_FILE, METRICS_FILE = "recipe.resolved.yaml", "metrics.jsonl"


@dataclass(frozen=True)
class RunResult:
    """What a run came to. Losses are mean cross-entropy a token; None without held-out rows.

    `tokens_per_second` counts no padding and no evaluation time; answers are to `eval.sample_prompt`.
    """

    output_dir: Path
    steps: int
    eval_loss_before: float | None
    eval_loss_after: float | None
    tokens_per_second: float
    answer_before: str | None
    answer_after: str | None


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs but the weights; `checkpoint` is where it continues from, None at a new start."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    data: TokenizedData
    arguments: SFTConfig
    load_kwargs: dict[str, Any]
    lora: LoraConfig | None
    checkpoint: Path | None


def run(
    recipe: Recipe, *, overwrite: bool = False, dry_run: bool = False, file: TextIO | None = None
) -> RunResult | None:
    """Fine-tune as the recipe says; everything that can be checked is, before weights are loaded or a file is written.

    Writes into `train.output_dir`: model and tokenizer as Transformers saves them, `metrics.jsonl` line by line while
    it trains, `recipe.resolved.yaml`, and checkpoints below `checkpoints/`. An earlier model stays until the new one is
    complete. SIGTERM and SIGUSR1 end training after the step under way, with a checkpoint; the same call continues.

    Args:
        recipe: what to do.
        overwrite: replace a model that the output folder holds.
        dry_run: print the resolved recipe and the first row with its trained part marked; train and write nothing.
        file: where to print; default stdout. Only rank 0 prints and writes.

    Returns: what came of it, or None after a dry run.
    Raises:
        ValueError, TypeError, OSError or ImportError: what to change, when the run is refused.
        StoppedBySignal: on all ranks, when training ended early.
    """
    first_rank = int(os.environ.get("RANK", "0")) == 0
    console = Console(file=file, quiet=not first_rank, highlight=False, markup=False, soft_wrap=True)
    prepared = prepare(recipe, overwrite)
    _print_resolved(prepared, console, dry_run)
    if dry_run:
        return None
    agree(prepared.checkpoint)
    model = load_model(prepared)
    output = Path(prepared.recipe.train.output_dir)
    section, timeout = prepared.recipe.checkpoint, collective_timeout(prepared.recipe, prepared.arguments)
    checkpointer = Checkpointer(output / CHECKPOINTS, section.save_total_limit, timeout)
    stop = SaveAndStop(section.save_steps, timeout)
    # The records of a model that is being replaced stay beside it until its successor is complete.
    records = output / INCOMPLETE if holds_model(output) else output
    progress = ProgressReport(console)
    trainer = SlipstreamTrainer(
        model=model,
        args=prepared.arguments,
        train_dataset=prepared.data.train,
        eval_dataset=prepared.data.eval,
        processing_class=prepared.tokenizer,
        callbacks=[progress, stop],
        peft_config=prepared.lora,
        checkpointer=checkpointer,
        optimizer_cls_and_kwargs=own_optimizer(prepared.recipe),
        z_loss=prepared.recipe.train.z_loss,
    )
    trainer.run_info = {
        "identity": identity(prepared.recipe, prepared.data.counts),
        "rows_per_step": rows_per_step(prepared.recipe, prepared.arguments),
    }
    if prepared.lora:
        _print_trainable(trainer, console)
    before = read_info(prepared.checkpoint) if prepared.checkpoint else None
    if first_rank:
        earlier = metrics_until(records / METRICS_FILE, before["step"]) if before else None
        shutil.rmtree(output / INCOMPLETE, ignore_errors=True)  # of a run that was killed
        records.mkdir(parents=True, exist_ok=True)
        (records / RECIPE_FILE).write_text(dump_recipe(prepared.recipe), encoding="utf-8")
        trainer.add_callback(MetricsFile(records / METRICS_FILE, earlier))
        console.print(f"metrics: {records / METRICS_FILE}")
    examined = before["info"]["examined"] if before else _examine(trainer, prepared, console)
    trainer.run_info["examined"] = loss_before, answer_before = examined
    with stop:
        try:
            trainer.train(resume_from_checkpoint=str(prepared.checkpoint) if prepared.checkpoint else None)
        finally:
            progress.stop()
        if stop.stopped_by:
            checkpointer.close()
            step = trainer.state.global_step
            stopped = StoppedBySignal(stop.stopped_by, step, checkpointer.folder / checkpoint_name(step))
            # While signals are still caught: once another rank has ended, torchrun sends one to this rank.
            console.print(str(stopped))
            console.file.flush()
            raise stopped
        loss_after, answer_after = _examine(trainer, prepared, console)
        trainer.save_model(str(output / INCOMPLETE))
        checkpointer.close()
    if first_rank:
        # Trainer's pickle, which the recipe replaces, and PEFT's empty model card.
        for name in ("training_args.bin", "README.md"):
            (output / INCOMPLETE / name).unlink(missing_ok=True)
        publish(output)
        checkpointer.finish(keep=section.save_steps is not None)
        console.print(f"saved: {output}")
    return RunResult(
        output_dir=output,
        steps=trainer.state.global_step,
        eval_loss_before=loss_before,
        eval_loss_after=loss_after,
        tokens_per_second=trainer.tokens / trainer.seconds if trainer.seconds else 0.0,
        answer_before=answer_before,
        answer_after=answer_after,
    )


def prepare(recipe: Recipe, overwrite: bool) -> Prepared:
    """Check the recipe against the machine, the checkpoint and the data; raises as `run` does, writes nothing."""
    output, source = Path(recipe.train.output_dir), Path(recipe.model.name_or_path)
    check_output_folder(output, source, overwrite, "train.output_dir")
    jsonl_files([*recipe.data.train, *(recipe.data.eval or [])])
    config = load_config(recipe.model)
    recipe = resolve(recipe, config)
    section = recipe.model
    load_kwargs: dict[str, Any] = {"dtype": section.dtype, "trust_remote_code": section.trust_remote_code}
    if section.attn_implementation is not None:
        load_kwargs["attn_implementation"] = section.attn_implementation
    if section.backend:
        load_kwargs["backend"] = section.backend
    setup = DistributedSetup.of(recipe.distributed)
    if recipe.distributed or setup.ranks > 1:
        setup.check(num_routed_experts(config))
        load_kwargs["distributed_setup"] = recipe.distributed
    tokenizer = AutoTokenizer.from_pretrained(section.name_or_path, trust_remote_code=section.trust_remote_code)
    if recipe.data.chat_template is not None:
        tokenizer.chat_template = Path(recipe.data.chat_template).read_text(encoding="utf-8")
    assert recipe.data.max_length is not None
    data = load_data(recipe.data, tokenizer, recipe.data.max_length, config.get_text_config().vocab_size)
    lora = LoraConfig(task_type="CAUSAL_LM", **recipe.lora.model_dump()) if recipe.lora else None
    checkpoint = find_checkpoint(recipe, data.counts, overwrite)
    arguments = training_arguments(recipe, data.eval is not None)
    if checkpoint is not None and (note := keep_rows_per_step(checkpoint, recipe, arguments)):
        data.notes.append(note)
    if note := restart_note():
        data.notes.append(note)
    return Prepared(recipe, tokenizer, data, arguments, load_kwargs, lora, checkpoint)


def load_model(prepared: Prepared) -> PreTrainedModel:
    """The accelerated model, ready to train; ValueError when the checkpoint lacks some of its weights."""
    name = prepared.recipe.model.name_or_path
    model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **prepared.load_kwargs)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"model.name_or_path: {name} lacks {len(missing)} of the model's weights ({', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}), which would start out random; use a complete checkpoint"
        )
    return model


def _examine(trainer: SlipstreamTrainer, prepared: Prepared, console: Console) -> tuple[float | None, str | None]:
    """Held-out loss and the answer to the sample prompt, both printed; None for what the recipe does not ask for."""
    loss = answer = None
    if prepared.data.eval is not None:
        logged = trainer.state.log_history[-2:]  # a summary follows the last step's evaluation
        known = [entry for entry in logged if "eval_loss" in entry and entry["step"] == trainer.state.global_step]
        loss = (known[0] if known else trainer.evaluate())["eval_loss"]
    section = prepared.recipe.eval
    if section.sample_prompt is not None:
        answer = answer_prompt(trainer.model, prepared.tokenizer, section.sample_prompt, section.max_new_tokens)
        console.print(Text.assemble(("prompt: ", "bold"), section.sample_prompt))
        console.print(Text.assemble(("answer: ", "bold"), answer))
    # A forward without a backward leaves FSDP2's last group gathered, and an optimizer made then would hold tensors
    # that are thrown away: lm_head and the last norm would not train.
    assert trainer.model is not None
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return loss, answer


def answer_prompt(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> str:
    """The model's greedy answer, as a chat turn when the tokenizer has a chat template, else as a continuation."""
    if tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": prompt}]
        inputs: Any = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs["input_ids"].to(model.device),
            attention_mask=inputs["attention_mask"].to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    model.train(was_training)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def _print_resolved(prepared: Prepared, console: Console, dry_run: bool) -> None:
    recipe, data = prepared.recipe, prepared.data
    if dry_run:
        console.print(dump_recipe(recipe))
    for note in data.notes:
        console.print(f"note: {note}")
    counts = data.counts
    lines = [
        f"model: {recipe.model.name_or_path} ({recipe.model.dtype})",
        f"data: {counts.rows:,} rows, {counts.tokens:,} tokens, {counts.trained_tokens / counts.tokens:.0%} trained; "
        f"{len(data.train):,} rows to train on, {len(data.eval) if data.eval is not None else 0:,} held out",
        f"train: {_describe_steps(recipe)} of {recipe.train.per_device_train_batch_size} x "
        f"{recipe.train.gradient_accumulation_steps} rows a device, learning rate {recipe.train.learning_rate:g}, "
        f"max_length {recipe.data.max_length}{', bfloat16 autocast' if recipe.train.bf16 else ''}",
    ]
    if prepared.checkpoint:
        lines.append(f"continues from: {prepared.checkpoint}")
    if counts.cut_rows:
        lines.append(f"cut: {counts.cut_rows:,} rows to max_length, {counts.cut_tokens:,} tokens lost")
    if counts.masked_rows:
        lines.append(f"left out: {counts.masked_rows:,} rows without a token to train on")
    console.print("\n".join(lines))
    if dry_run:
        sample = Text("first row, trained part marked:\n", style="bold")
        for text, trained in trained_segments(data.train[0], prepared.tokenizer):
            sample.append(f"⟦{text}⟧" if trained else text, style="green" if trained else "not bold dim")
        console.print(sample)


def _print_trainable(trainer: SlipstreamTrainer, console: Console) -> None:
    """PEFT may or may not reach an architecture's experts; say which, since frozen experts look like bad learning."""
    assert trainer.model is not None
    sizes = [(name, weight.numel(), weight.requires_grad) for name, weight in trainer.model.named_parameters()]
    trainable = sum(size for _, size, trains in sizes if trains)
    experts = any(trains for name, _, trains in sizes if ".experts." in name)
    frozen = not experts and any(".experts." in name for name, _, _ in sizes)
    console.print(
        f"LoRA: {trainable:,} of {sum(size for _, size, _ in sizes):,} parameters train"
        f"{', experts included' * experts}{', experts stay frozen' * frozen}"
    )


def _describe_steps(recipe: Recipe) -> str:
    if recipe.train.max_steps > 0:
        return f"{recipe.train.max_steps} steps"
    return f"{recipe.train.num_train_epochs:g} epochs"
