"""A fine-tuning run from recipe to saved model: check everything, load, train, publish."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from peft import LoraConfig
from rich.console import Console
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from slipstream import AutoModelForCausalLM, BackendConfig, DistributedSetup, quantization, train_mtp
from slipstream.adapters import all_experts
from slipstream.checkpoint.output import INCOMPLETE, check_output_folder, check_writable, holds_model, publish
from slipstream.checkpoint.resume import Checkpointer, checkpoint_name, read_info
from slipstream.hf_models import is_incomplete
from slipstream.report.page import write_report
from slipstream.report.records import METRICS_FILE, RECIPE_FILE
from slipstream.train.arguments import own_optimizer, training_arguments
from slipstream.train.batch_size import find_batch_size
from slipstream.train.callbacks import MetricsFile, metrics_until
from slipstream.train.checks import check_experts, check_setup, load_config_and_tokenizer, lora_config, resolve
from slipstream.train.data import TokenizedData, load_data
from slipstream.train.guards import BadStepError, StepGuard
from slipstream.train.lock import check_free, held
from slipstream.train.packing import check_packing
from slipstream.train.progress import ProgressReport
from slipstream.train.recipe import ALL_EXPERTS, AUTO, Recipe
from slipstream.train.recipe_file import dump_recipe
from slipstream.train.record import write_records
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
from slipstream.train.samples import Samples
from slipstream.train.saving import check_room_for, keep, save_trained, written
from slipstream.train.settings import check_loggers, check_schedule
from slipstream.train.sources import check_sources
from slipstream.train.stopping import EarlyStopping
from slipstream.train.summary import print_resolved, print_trainable
from slipstream.train.trainer import SlipstreamTrainer


@dataclass(frozen=True)
class RunResult:
    """What a run came to. Losses are mean cross-entropy a token; None without held-out rows.

    `tokens_per_second` counts no padding and no evaluation time; answers are to the first `eval.sample_prompt`.
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
    config: PreTrainedConfig
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
    it trains, `recipe.resolved.yaml`, `environment.json`, `data.json`, checkpoints below `checkpoints/`, and however
    training ends, `report.html`. An earlier model stays until the new one is complete. SIGTERM, SIGUSR1 and SIGINT
    end training after the step under way, with a checkpoint; the same call continues.

    Args:
        recipe: what to do.
        overwrite: replace a model that the output folder holds.
        dry_run: print the resolved recipe and the first row with its trained part marked; train and write nothing.
        file: where to print; default stdout. Only rank 0 prints and writes.

    Returns: what came of it, or None after a dry run.
    Raises:
        ValueError, TypeError, OSError or ImportError: what to change, when the run is refused.
        OSError: on all ranks, when the trained model could not be saved; it says what to continue from.
        StoppedBySignal: on all ranks, when training ended early.
    """
    first_rank = int(os.environ.get("RANK", "0")) == 0
    console = Console(file=file, quiet=not first_rank, highlight=False, markup=False, soft_wrap=True)
    if first_rank and not dry_run:
        check_free(Path(recipe.train.output_dir))
    prepared = prepare(recipe, overwrite, dry_run)
    print_resolved(prepared, console, dry_run)
    if dry_run:
        return None
    agree(prepared.checkpoint)
    with held(Path(prepared.recipe.train.output_dir)):
        return _train(prepared, console)


def _train(prepared: Prepared, console: Console) -> RunResult:
    first_rank = not console.quiet
    model = load_model(prepared)
    if prepared.lora and prepared.lora.target_parameters == [ALL_EXPERTS]:
        prepared.lora.target_parameters = all_experts(model)
    output = Path(prepared.recipe.train.output_dir)
    section, timeout = prepared.recipe.checkpoint, collective_timeout(prepared.recipe, prepared.arguments)
    checkpointer = Checkpointer(output / CHECKPOINTS, section.save_total_limit, timeout, prepared.checkpoint)
    stop = SaveAndStop(section.save_steps, timeout)
    # The records of a model that is being replaced stay beside it until its successor is complete.
    records = output / INCOMPLETE if holds_model(output) else output
    progress, samples, stopping, guard = _observers(prepared, output, console)
    trainer = SlipstreamTrainer(
        model=model,
        args=prepared.arguments,
        train_dataset=prepared.data.train,
        eval_dataset=prepared.data.eval,
        processing_class=prepared.tokenizer,
        callbacks=[progress, stop, samples, *stopping],
        peft_config=prepared.lora,
        checkpointer=checkpointer,
        optimizer_cls_and_kwargs=own_optimizer(prepared.recipe),
        z_loss=prepared.recipe.train.z_loss,
        max_length=prepared.recipe.data.max_length or 0,
        guard=guard,
        freeze_router=prepared.recipe.train.freeze_router,
        router_bias_update_rate=prepared.recipe.train.router_bias_update_rate,
        row_length=prepared.data.counts.tokens / prepared.data.counts.rows,
        cuda_graphs=prepared.recipe.train.cuda_graphs,
    )
    trainer.run_info = {
        "identity": identity(prepared.recipe, prepared.data.counts),
        "rows_per_step": rows_per_step(prepared.recipe, prepared.arguments),
    }
    if prepared.lora:
        assert trainer.model is not None
        print_trainable(trainer.model, console)
    check_room_for(trainer.model, output)
    before = read_info(prepared.checkpoint) if prepared.checkpoint else None
    if prepared.recipe.train.per_device_train_batch_size == AUTO:
        found = before["info"].get("micro_batch") if before else None
        console.print(find_batch_size(trainer, prepared.recipe.data.max_length or 0, found))
    trainer.run_info["micro_batch"] = trainer.args.per_device_train_batch_size
    rows_of_all = rows_per_step(prepared.recipe, trainer.args)
    trainer.run_info["rows_at_once"] = rows_of_all // trainer.args.gradient_accumulation_steps
    if first_rank:
        earlier = metrics_until(records / METRICS_FILE, before["step"]) if before else None
        shutil.rmtree(output / INCOMPLETE, ignore_errors=True)  # of a run that was killed
        records.mkdir(parents=True, exist_ok=True)
        (records / RECIPE_FILE).write_text(dump_recipe(prepared.recipe), encoding="utf-8")
        keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
        write_records(records, prepared.data, {key: getattr(trainer.args, key) for key in keys})
        metrics = MetricsFile(records / METRICS_FILE, earlier)
        trainer.add_callback(metrics)
        samples.record = lambda step, pairs: metrics.write(step, {"samples": pairs})
        console.print(f"metrics: {records / METRICS_FILE}")
    examined = before["info"]["examined"] if before else _examine(trainer, samples)
    trainer.run_info["examined"] = loss_before, answer_before = examined
    for callback in stopping:
        callback.first_loss = loss_before
    with stop:
        try:
            trainer.train(resume_from_checkpoint=str(prepared.checkpoint) if prepared.checkpoint else None)
            if guard is not None and 0 < trainer.state.global_step == guard.bad_in_a_row and not stop.stopped_by:
                raise BadStepError(
                    f"none of {trainer.state.global_step} steps was fit to be applied: nothing was trained"
                )
        except BadStepError:
            _report(output, console)
            raise
        finally:
            progress.stop()
        if stop.stopped_by:
            checkpointer.close()
            step = trainer.state.global_step
            stopped = StoppedBySignal(stop.stopped_by, step, checkpointer.folder / checkpoint_name(step))
            # While signals are still caught: once another rank has ended, torchrun sends one to this rank.
            console.print(str(stopped))
            _report(output, console)
            console.file.flush()
            raise stopped
        step = trainer.state.global_step
        continued = prepared.checkpoint if before and before["step"] == step else None
        if stop.received() and not continued and checkpointer.saved_step != step:
            keep(trainer)  # there may be no time for what follows
        loss_after, answer_after = _examine(trainer, samples)
        try:
            save_trained(trainer, output, continued)
        except OSError:
            _report(output, console)
            raise
        if error := written(checkpointer):
            console.print(f"{error}; the model is complete")
        checkpointer.close()
        if first_rank:
            # Trainer's pickle, which the recipe replaces, and PEFT's empty model card.
            for name in ("training_args.bin", "README.md"):
                (output / INCOMPLETE / name).unlink(missing_ok=True)
            publish(output)
            checkpointer.finish(keep=section.save_steps is not None)
            console.print(f"saved: {output}")
            _report(output, console)
    return RunResult(
        output_dir=output,
        steps=trainer.state.global_step,
        eval_loss_before=loss_before,
        eval_loss_after=loss_after,
        tokens_per_second=trainer.tokens / trainer.seconds if trainer.seconds else 0.0,
        answer_before=answer_before,
        answer_after=answer_after,
    )


def prepare(recipe: Recipe, overwrite: bool, dry_run: bool = False) -> Prepared:
    """Check the recipe against the machine, the checkpoint and the data; raises as `run` does, writes nothing.

    A dry run takes the shapes of a model on the hub that cannot be had here from the preset of its name.
    """
    section = recipe.model
    output, source = Path(recipe.train.output_dir), Path(section.name_or_path or section.config or "")
    check_output_folder(output, [source], overwrite, "train.output_dir")
    if not dry_run:  # which may be on another machine
        check_writable(output, "train.output_dir")
        check_loggers(recipe.log)
    check_sources(recipe.data)
    config, tokenizer, notes = load_config_and_tokenizer(recipe, stand_in=dry_run)
    recipe = resolve(recipe, config)
    check_schedule(recipe.train)
    section = recipe.model
    if recipe.data.packing:
        check_packing(config)
    load_kwargs: dict[str, Any] = {"dtype": section.dtype, "trust_remote_code": section.trust_remote_code}
    if section.attn_implementation is not None:
        load_kwargs["attn_implementation"] = section.attn_implementation
    if section.backend:
        load_kwargs["backend"] = section.backend
    setup = DistributedSetup.of(recipe.distributed)
    if dry_run and setup.ranks == 1:
        check_experts(setup, config)  # the ranks are not here yet
    elif recipe.distributed or setup.ranks > 1:
        check_setup(setup, config)
        load_kwargs["distributed_setup"] = recipe.distributed
    if recipe.lora is not None and recipe.lora.load_in_4bit:
        quantization.check(config, BackendConfig.of(section.backend), setup)
        load_kwargs["load_in_4bit"] = True
    lora = lora_config(recipe.lora, config, setup, notes)
    assert recipe.data.max_length is not None
    data = load_data(recipe.data, tokenizer, recipe.data.max_length, config.get_text_config().vocab_size)
    data.notes[:0] = notes
    checkpoint = find_checkpoint(recipe, data.counts, overwrite)
    arguments = training_arguments(recipe, data.eval is not None)
    if checkpoint is not None and (note := keep_rows_per_step(checkpoint, recipe, arguments)):
        data.notes.append(note)
    if note := restart_note():
        data.notes.append(note)
    return Prepared(recipe, config, tokenizer, data, arguments, load_kwargs, lora, checkpoint)


def load_model(prepared: Prepared) -> PreTrainedModel:
    """The accelerated model, ready to train; ValueError when the checkpoint lacks some of its weights, or they do not
    fit its config."""
    name = prepared.recipe.model.name_or_path
    if name is None:
        # Every rank draws the same weights.
        torch.manual_seed(prepared.recipe.train.seed)
        kwargs = {**prepared.load_kwargs, "dtype": getattr(torch, prepared.recipe.model.dtype)}
        # Drawn where it trains: on a host, ten billion weights take minutes.
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        with torch.device(device):
            made: PreTrainedModel = AutoModelForCausalLM.from_config(prepared.config, **kwargs)
        return made
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **prepared.load_kwargs
        )
    except RuntimeError as error:
        if not is_incomplete(error):
            raise
        raise ValueError(
            f"model.name_or_path: {name} lacks weights of some layers, or has them in other shapes (the report above "
            "names the layers); use a complete checkpoint"
        ) from error
    if info["mismatched_keys"]:
        key, there, here = min(info["mismatched_keys"])
        raise ValueError(
            f"model.name_or_path: {name} does not fit its config.json: {key} is {[*there]} there, and the config makes "
            f"it {[*here]}; use the config that belongs to the weights"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"model.name_or_path: {name} lacks {len(missing)} of the model's weights ({', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}), which would start out random; use a complete checkpoint"
        )
    if weight := prepared.recipe.train.mtp_loss_weight:
        train_mtp(model, weight)
    return model


def _observers(
    prepared: Prepared, output: Path, console: Console
) -> tuple[ProgressReport, Samples, list[EarlyStopping], StepGuard | None]:
    """Who watches the run, as the recipe asks."""
    train, section = prepared.recipe.train, prepared.recipe.eval
    samples = Samples(section.sample_prompt or [], section.max_new_tokens, prepared.tokenizer, console)
    stopping, guard = [], None
    if section.early_stopping_patience is not None:
        stopping = [EarlyStopping(section.early_stopping_patience, section.early_stopping_threshold, console)]
    if train.on_bad_step != "ignore":
        guard = StepGuard(train.on_bad_step, train.max_loss_spike, output, prepared.tokenizer, console.print)
    return ProgressReport(console), samples, stopping, guard


def _report(output: Path, console: Console) -> None:
    """Write the report, on rank 0; a run is not worth less for the lack of one."""
    if console.quiet:
        return
    try:
        console.print(f"report: {write_report(output)}")
    except OSError as error:
        console.print(f"no report: {error}")


def _examine(trainer: SlipstreamTrainer, samples: Samples) -> tuple[float | None, str | None]:
    """Held-out loss and the answer to the first sample prompt; None for what the recipe does not ask for."""
    loss = None
    if trainer.eval_dataset is not None:
        logged = trainer.state.log_history[-2:]  # a summary follows the last step's evaluation
        known = [entry for entry in logged if "eval_loss" in entry and entry["step"] == trainer.state.global_step]
        loss = (known[0] if known else trainer.evaluate())["eval_loss"]
    answers = samples.answer(trainer.model, trainer.state.global_step)
    # A forward without a backward leaves FSDP2's last group gathered, and an optimizer made then would hold tensors
    # that are thrown away: lm_head and the last norm would not train.
    assert trainer.model is not None
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return loss, answers[0] if answers else None
