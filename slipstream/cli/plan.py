"""`slipstream plan`: does it fit, how fast will it be, and which layout is best; from a config, without a GPU."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from slipstream.planning.plan import Estimate, Plan
    from slipstream.planning.records import Comparison


def plan(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE.yaml]", help="The recipe to plan for.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="section.key=value", help="Values that win over the recipe's.")
    ] = None,
    gpus: Annotated[str, typer.Option("--gpus", help="How many of what, such as 8xH100-80GB.")] = "8xH100-80GB",
    model: Annotated[
        str | None,
        typer.Option("--model", help="Instead of a recipe: a preset of `slipstream bench`, or a config.json."),
    ] = None,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens a row, with --model.")] = 4096,
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=1, help="Rows a GPU, with --model.")] = 1,
    ep_size: Annotated[
        int | None, typer.Option("--ep-size", min=1, help="With --model; default: as many as divide GPUs and experts.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Fewer layers than the model has, with --model.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as one JSON object.")] = False,
    sources: Annotated[bool, typer.Option("--sources", help="Show the measured constants and their runs.")] = False,
    check: Annotated[
        Path | None, typer.Option("--check", help="Compare with the benchmarks recorded in this folder, and end.")
    ] = None,
) -> None:
    """Memory of a GPU by part, step time and tokens per second of a fine-tune, and the best layout for it.

    Reads a config and no weights. Exit code 2 if it does not fit.
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if check is not None:
        return _check(check, console, as_json)
    from slipstream.planning.gpus import parse_gpus

    count, gpu = parse_gpus(gpus)  # before torch is loaded
    if (recipe is None) == (model is None):
        raise ValueError("slipstream plan: give a RECIPE.yaml, or --model with a preset's name or a config.json")
    from slipstream.train.recipe import Recipe

    if recipe is not None:
        from slipstream.train.recipe_file import load_recipe

        resolved, notes = load_recipe(recipe, overrides or ())
    else:
        changes = {} if layers is None else {"num_hidden_layers": layers}
        notes = []
        resolved = Recipe.model_validate(
            {
                "model": {"config": model, "config_overrides": changes, "dtype": "bfloat16"},
                "data": {"train": "-", "max_length": seq_len},
                "train": {"output_dir": "-", "per_device_train_batch_size": micro_batch},
                "distributed": {"ep_size": ep_size or count},
            }
        )
    from transformers.utils import logging

    from slipstream.planning.plan import make_plan

    logging.set_verbosity_error()  # Mamba's reference stands for mamba_ssm here
    made = make_plan(resolved, count, gpu)
    notes = [*notes, *(note for note in made.notes if recipe is not None or ep_size is not None)]
    if as_json:
        print(json.dumps(as_data(made, notes), indent=1))
    else:
        _render(made, notes, console)
        if sources:
            _render_sources(console)
    if not made.given.fits:
        raise typer.Exit(2)


def as_data(made: "Plan", notes: list[str]) -> dict[str, Any]:
    """The plan as JSON data."""

    def data(estimate: "Estimate | None") -> dict[str, Any] | None:
        if estimate is None:
            return None
        return {
            "layout": dataclasses.asdict(estimate.layout),
            "gpu": estimate.gpu.name,
            "memory_gib": estimate.memory.parts,
            "peak_gib": estimate.memory.peak_gib,
            "needed_gib": estimate.memory.needed_gib,
            "moment": estimate.memory.moment,
            "activations_gib": estimate.memory.activations_gib,
            "gradients_gib": estimate.memory.gradients_gib,
            "fits": estimate.fits,
            "step_ms": estimate.time.step_ms,
            "gpu_ms": estimate.time.parts,
            "host_ms": estimate.time.host_ms,
            "tokens_per_second_per_gpu": estimate.time.tokens_per_second,
            "tflops_per_gpu": estimate.time.tflops,
        }

    return {
        "model": made.model.name,
        "parameters": dataclasses.asdict(made.model.parameters),
        "given": data(made.given),
        "modes": {mode: data(estimate) for mode, estimate in made.modes.items()},
        "best": data(made.best),
        "nearest": data(made.nearest),
        "notes": notes,
    }


def _render(made: "Plan", notes: list[str], console: "Console") -> None:
    from rich.table import Table

    given, parameters = made.given, made.model.parameters
    layout, gpu = given.layout, given.gpu
    for note in notes:
        console.print(f"note: {note}", markup=False)
    console.print(
        f"{made.model.name}: {parameters.total / 1e9:.1f} B parameters, {parameters.active / 1e9:.1f} B active, on "
        f"{layout.gpus} x {gpu.name} ({gpu.memory_gib:.0f} GiB, {gpu.peak_tflops:.0f} TFLOP/s bf16)\n"
        f"{_words(layout)}, {layout.seq_len} tokens a row, {layout.optimizer}",
        markup=False,
    )
    modes = list(made.modes.items())
    table = Table("GiB a GPU", title="Memory, by activation checkpointing", title_justify="left")
    for mode, _ in modes:
        table.add_column(f"{mode} (given)" if mode == layout.checkpointing else mode, justify="right")
    names = dict.fromkeys(name for _, estimate in modes for name in estimate.memory.parts)
    for name in names:
        table.add_row(name, *(f"{estimate.memory.parts.get(name, 0):.1f}" for _, estimate in modes))
    table.add_section()
    table.add_row("peak", *(f"{estimate.memory.peak_gib:.1f}" for _, estimate in modes))
    table.add_row("fullest in (rows above)", *(estimate.memory.moment.removeprefix("the ") for _, estimate in modes))
    table.add_row("activations of all layers", *(f"{estimate.memory.activations_gib:.1f}" for _, estimate in modes))
    table.add_row("gradients of all weights", *(f"{estimate.memory.gradients_gib:.1f}" for _, estimate in modes))
    table.add_row("needed, CUDA's own included", *(f"{estimate.memory.needed_gib:.1f}" for _, estimate in modes))
    table.add_row("fits", *("yes" if estimate.fits else "no" for _, estimate in modes))
    table.add_row("step, ms", *(f"{estimate.time.step_ms:.0f}" for _, estimate in modes))
    table.add_row("tokens/s a GPU", *(f"{estimate.time.tokens_per_second:,.0f}" for _, estimate in modes))
    console.print(table)

    times = Table("part", "ms", title=f"The step as given: {given.time.step_ms:.0f} ms", title_justify="left")
    times.columns[1].justify = "right"
    for name, ms in given.time.parts.items():
        if ms >= 0.05:
            times.add_row(name, f"{ms:.1f}")
    times.add_section()
    times.add_row("GPU, all of it", f"{sum(given.time.parts.values()):.1f}")
    times.add_row("host, beside it", f"{given.time.host_ms:.1f}")
    console.print(times)
    for line in verdict(made):
        console.print(line, markup=False)


def verdict(made: "Plan") -> list[str]:
    """What the plan comes to, in sentences."""
    given = made.given
    lines = []
    if given.fits:
        lines.append(f"fits: {_speed(given)}")
    else:
        largest = sorted(given.memory.parts.items(), key=lambda part: -part[1])[:2]
        because = " and ".join(f"{name} {gib:.1f}" for name, gib in largest)
        lines.append(
            f"does not fit, because a GPU needs {given.memory.needed_gib:.1f} GiB in {given.memory.moment} and has "
            f"{given.gpu.memory_gib:.1f} ({because})"
        )
        if made.nearest is None:
            lines.append("nothing that fits was found: train adapters (a section `lora:`), or shorten data.max_length")
        else:
            layout = made.nearest.layout
            where = "" if layout.gpus == given.layout.gpus else f"{layout.gpus} x {given.gpu.name}, "
            lines.append(f"the nearest that fits is {where}{_words(layout)}: {_speed(made.nearest)}")
    if made.best is not None:
        if given.fits and made.best.time.tokens_per_second <= 1.1 * given.time.tokens_per_second:
            lines.append("no layout of these GPUs is faster by more than the plan's own error")
        else:
            lines.append(f"best found on these GPUs: {_words(made.best.layout)}: {_speed(made.best)}")
    return lines


def _words(layout: Any) -> str:
    return (
        f"ep_size {layout.ep_size}, dp_replicate {layout.dp_replicate}, micro-batch {layout.micro_batch}, "
        f"checkpointing {layout.checkpointing}"
    )


def _speed(estimate: "Estimate") -> str:
    whole = estimate.time.tokens_per_second * estimate.layout.gpus
    return (
        f"{estimate.memory.needed_gib:.1f} of {estimate.gpu.memory_gib:.1f} GiB, {estimate.time.step_ms:,.0f} ms "
        f"a step, {estimate.time.tokens_per_second:,.0f} tokens/s a GPU, {whole:,.0f} in all"
    )


def _render_sources(console: "Console") -> None:
    from rich.table import Table

    from slipstream.planning.measured import CONSTANTS

    table = Table("constant", "value", "from", title="Measured shares, H200", title_justify="left")
    for name, constant in CONSTANTS.items():
        table.add_row(name, f"{constant.value:g} {constant.unit}", constant.source)
    console.print(table)


def _check(folder: Path, console: "Console", as_json: bool) -> None:
    from rich.table import Table

    from slipstream.planning.records import compare

    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"--check {folder}: no *.json there; give the folder of recorded benchmarks")
    found: list[Comparison] = [comparison for path in files for comparison in compare(path)]
    if as_json:
        print(json.dumps([dataclasses.asdict(comparison) for comparison in found], indent=1))
        return
    table = Table("run", "peak GiB", "plan", "off", "step ms", "plan", "off")
    for one in found:
        memory, time = one.predicted_gib / one.peak_gib - 1, one.predicted_ms / one.step_ms - 1
        table.add_row(one.run, f"{one.peak_gib:.1f}", f"{one.predicted_gib:.1f}", f"{memory:+.1%}",
                      f"{one.step_ms:.1f}", f"{one.predicted_ms:.1f}", f"{time:+.1%}")  # fmt: skip
    console.print(table)
