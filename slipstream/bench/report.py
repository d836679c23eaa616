"""From the runs to the figures, and the figures as data, a table in the terminal, Markdown and files."""

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from rich.table import Table

from slipstream.bench.measure import PARTS
from slipstream.bench.options import OURS, Options
from slipstream.bench.plot import step_plot
from slipstream.bench.presets import PRESETS
from slipstream.planning.devices import peak_bf16_tflops
from slipstream.planning.flops import count_parameters, training_flops

# How far first losses may lie apart, relatively: bf16 rounding, and other draws of the same weights' distribution.
LOSS_BOUND, LOSS_BOUND_OWN_WEIGHTS = 3e-3, 2e-2
_COLUMNS = ("gate", "load", "contender", "forward + loss", "backward", "optimizer", "step ms",
            "back to back", "tokens/s/GPU", "TFLOP/s/GPU",
            "MFU", "peak GiB (with warm-up)", "first loss", "cold start s",
            "fwd + bwd x", "step x", "back to back x")  # fmt: skip


def build_report(
    runs: list[dict[str, Any]], options: Options, contenders: Sequence[str], command: str
) -> dict[str, Any]:
    """All that is known of one benchmark, ready for JSON.

    Keys: `date`, `command`, `device`, `options`, `model` (sizes and operations per token), `rows` (see `_row`),
    `problems` (sentences: disagreeing losses, failures) and `runs` as they came.
    """
    config = options.config()
    parameters = count_parameters(config)
    per_token = training_flops(config, options.seq_len, options.packed)
    if options.lora is not None:
        per_token *= 2 / 3  # no gradients of frozen weights; the adapters' own operations are left out
    done = [run for run in runs if "error" not in run]
    device = done[0]["device_name"] if done else options.device
    rows: list[dict[str, Any]] = []
    for gate in dict.fromkeys(run["gate"] for run in runs):
        by_name = {name: [r for r in runs if (r["gate"], r["contender"]) == (gate, name)] for name in contenders}
        # A benchmark that was stopped has none of some.
        of_gate = [_row(found, options, per_token, device) for found in by_name.values() if found]
        base = next((row for row in of_gate if row["contender"] == contenders[0] and "error" not in row), None)
        for row in of_gate:
            if base is not None and "error" not in row:
                row["speedup_step"] = base["step"]["median"] / row["step"]["median"]
                row["speedup_back_to_back"] = base["back_to_back_ms"] / row["back_to_back_ms"]
                row["speedup_forward_backward"] = _both(base) / _both(row)
                row["memory_ratio"] = row["peak_gib"] / base["peak_gib"] if base["peak_gib"] else None
        rows += of_gate
    note = PRESETS[options.model].note
    return {
        "date": date.today().isoformat(),
        "command": command,
        "device": f"{options.nproc} x {device}",
        "options": asdict(options),
        "model": {
            "layers": config.num_hidden_layers,
            "parameters": parameters.total,
            "active_parameters": parameters.active,
            "gflop_per_token": per_token / 1e9,
            **({"note": note} if note else {}),
        },
        "rows": rows,
        "problems": _problems(rows),
        "runs": runs,
    }


def _row(runs: list[dict[str, Any]], options: Options, flops_per_token: float, device: str) -> dict[str, Any]:
    """One contender under one gate: medians over all timed steps of all its processes, with their span."""
    row: dict[str, Any] = {"gate": runs[0]["gate"], "contender": runs[0]["contender"]}
    done = [run for run in runs if "error" not in run]
    row["failures"] = [run["error"] for run in runs if "error" in run]
    if not done:
        return row | {"error": row["failures"][0]}
    times = {part: [ms for run in done for ms in run["times"][part]] for part in PARTS}
    times["step"] = [sum(parts) for parts in zip(*times.values(), strict=True)]
    for name, values in times.items():
        row[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    row["back_to_back_ms"] = statistics.median(run["back_to_back_ms"] for run in done)
    row["tokens_per_second"] = options.tokens / row["step"]["median"] * 1e3
    row["tflops"] = row["tokens_per_second"] * flops_per_token / 1e12
    peak = peak_bf16_tflops(device)
    row["mfu"] = None if peak is None else row["tflops"] / peak
    for key in ("peak_gib", "peak_gib_with_warmup", "cold_start_s"):
        row[key] = max(run[key] for run in done)
    row["first_loss"] = done[0]["first_loss"]
    row["last_loss"] = done[0]["last_loss"]
    for key in ("imbalance", "settings", "notes", "same_weights", "versions"):
        row[key] = done[0][key]
    if profiles := [run["profile"] for run in done if "profile" in run]:
        row["profile"] = profiles[-1]
    return row


def _both(row: dict[str, Any]) -> float:
    return row["forward"]["median"] + row["backward"]["median"]


def _problems(rows: list[dict[str, Any]]) -> list[str]:
    problems = []
    for row in rows:
        who = f"{row['contender']}, {row['gate']} gate"
        problems += [f"{who}: {error}" for error in row["failures"]]
        if "error" in row:
            continue
        base = next(r for r in rows if r["gate"] == row["gate"] and "error" not in r)
        bound = LOSS_BOUND if row["same_weights"] and base["same_weights"] else LOSS_BOUND_OWN_WEIGHTS
        if not abs(row["first_loss"] - base["first_loss"]) <= bound * abs(base["first_loss"]):
            problems.append(
                f"{who}: first loss {row['first_loss']:.4f}, but {base['first_loss']:.4f} in {base['contender']}: "
                "they do not compute the same, so their times do not compare"
            )
        if not math.isfinite(row["last_loss"]):
            problems.append(f"{who}: the last loss is {row['last_loss']}: steps of that do not compare")
    return problems


def failed(report: dict[str, Any]) -> bool:
    """Whether the run proves nothing: Slipstream failed, or losses disagree or are not finite."""
    ours = any(row["failures"] for row in report["rows"] if row["contender"] == OURS)
    return ours or any("do not compare" in problem for problem in report["problems"])


def _cells(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        error = f"failed: {row['error'].split(':')[0]}"
        return [row["gate"], "", row["contender"], error, *[""] * (len(_COLUMNS) - 4)]
    load = row["imbalance"]
    step = row["step"]
    return [
        row["gate"],
        "" if load is None else f"{load['mean']:.2f} / {load['worst']:.2f}",
        row["contender"],
        *(f"{row[part]['median']:.1f}" for part in PARTS),
        f"{step['median']:.1f} ({step['min']:.1f}-{step['max']:.1f})",
        f"{row['back_to_back_ms']:.1f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['tflops']:.1f}",
        "" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %",
        f"{row['peak_gib']:.1f} ({row['peak_gib_with_warmup']:.1f})" if row["peak_gib"] else "",
        f"{row['first_loss']:.4f}",
        f"{row['cold_start_s']:.1f}",
        f"{row['speedup_forward_backward']:.2f}" if "speedup_step" in row else "",
        f"{row['speedup_step']:.2f}" if "speedup_step" in row else "",
        f"{row['speedup_back_to_back']:.2f}" if "speedup_step" in row else "",
    ]


def terminal_table(report: dict[str, Any]) -> Table:
    """The figures as a table for the terminal."""
    table = Table(*_COLUMNS, title=_headline(report), title_justify="left")
    for row in report["rows"]:
        table.add_row(*_cells(row))
    return table


def _headline(report: dict[str, Any]) -> str:
    options, model = report["options"], report["model"]
    packed = f" packed with documents of {options['packed']}" if options["packed"] else ""
    lora = f"{'Q' * options['load_in_4bit']}LoRA r={options['lora']}, " if options["lora"] else ""
    fp8 = "".join(f"our {name} in FP8, " for name in Options(**options).fp8)
    graphs = "ours as a CUDA graph, " * Options(**options).cuda_graphs
    return (
        f"{options['model']}{' (tiny)' if options['tiny'] else ''}, {model['layers']} layers, "
        f"{_count(model['parameters'])} parameters, {lora}{fp8}{graphs}"
        f"{options['micro_batch']} x {options['seq_len']} tokens{packed} on {report['device']}"
    )


def markdown(report: dict[str, Any], plot: str | None = None) -> str:
    """The figures, how they came about, and the profiles, as Markdown. `plot` names the picture beside it."""
    options, model = report["options"], report["model"]
    done = [run for run in report["runs"] if "error" not in run]
    lines = [f"# {_headline(report)}", "", f"{report['date']}. `{report['command']}`", ""]
    lines += [
        f"{_count(model['active_parameters'])} parameters active, {model['gflop_per_token']:.2f} GFLOP a token "
        "(forward and backward; causal attention counted once, recomputation not). "
        "bf16, AdamW, activation checkpointing "
        f"{options['activation_checkpointing']}. Medians over {options['steps']} steps of each process after "
        f"{options['warmup']} to warm up, in brackets the least and the most; times in ms. Each timed step ends in a "
        "synchronisation; back to back is a step of a run without any, as in training. Load: tokens of the busiest "
        "expert over the mean, averaged over the layers / in the worst. Peak memory of the timed steps, in brackets of "
        "all. Ratios are to the first row of each gate.",
        "",
    ]
    if "note" in model:
        lines += [f"The shapes are {model['note']}.", ""]
    lines += _table(_COLUMNS, [_cells(row) for row in report["rows"]])
    if plot:
        lines += ["", f"![the step's parts side by side]({plot})"]
    if report["problems"]:
        lines += ["", "## Problems", "", *(f"- {problem}" for problem in report["problems"])]
    lines += ["", "## What ran", ""]
    for name in dict.fromkeys(run["contender"] for run in done):
        run = next(run for run in done if run["contender"] == name)
        settings = {**run["versions"], **run["settings"]}
        lines.append(f"- **{name}**: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
        lines += [f"  - {note}" for note in run["notes"]]
    for row in report["rows"]:
        if "profile" in row:
            lines += [
                "",
                f"## Profile: {row['contender']}, {row['gate']} gate",
                "",
                *_profile(row["profile"], row["back_to_back_ms"]),
            ]
    return "\n".join(lines) + "\n"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"


def _profile(profile: dict[str, Any], back_to_back_ms: float) -> list[str]:
    layers, host = profile["layers"], profile["host_ms"]
    lines = [
        f"Kernels {profile['kernel_ms']:.1f} ms, busy {profile['busy_ms']:.1f} of the step's {profile['step_ms']:.1f}: "
        f"**{profile['idle_percent']:.1f} % idle** ({profile['idle_percent_profiled']:.1f} % under the profiler), "
        f"{max(0.0, 100 * (1 - profile['busy_ms'] / back_to_back_ms)):.1f} % of a step back to back. "
        f"{profile['launches']} kernels and copies, {profile['launches'] / layers:.0f} a layer, from "
        f"{profile['host_launches']} launches. Host: "
        + ", ".join(f"{part} {host[part]:.1f} ms" for part in PARTS)
        + f"; forward {host['forward'] / layers:.2f} ms a layer.",
        "",
        *_table(("category", "ms", "%", "launches"), [
            [c["name"], f"{c['ms']:.2f}", f"{c['percent']:.1f}", str(c["launches"])] for c in profile["categories"]
        ]),
        "",
    ]  # fmt: skip
    if profile["syncs"]:
        lines += ["The host waits for the device in forward and backward at:", ""]
        lines += [f"- `{sync['place']}` ({sync['count']} x)" for sync in profile["syncs"]]
    else:
        lines.append("No synchronisation found in forward and backward.")
    rows = [[f"`{_one_line(k['name'])}`", k["category"], f"{k['ms']:.2f}", str(k["count"])] for k in profile["kernels"]]
    return [*lines, "", *_table(("kernel", "category", "ms", "launches"), rows)]


def _one_line(name: str) -> str:
    return re.sub(r"[`|\s]+", " ", name)[:120]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def write_results(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write NAME.md, NAME.json and NAME.svg into `folder`, under a name that is free, and return their paths."""
    options = report["options"]
    device = report["device"].split(" x ")[-1].removeprefix("NVIDIA ")
    parts = [report["date"], f"{options['nproc']}x{device}", options["model"] + "-tiny" * options["tiny"],
             f"{report['model']['layers']}l", f"{options['micro_batch']}x{options['seq_len']}"]  # fmt: skip
    if options["packed"]:
        parts.append(f"packed{options['packed']}")
    if options["lora"]:
        parts.append(f"{'q' * options['load_in_4bit']}lora{options['lora']}")
    parts += [f"{name}-fp8" for name in Options(**options).fp8]
    parts += ["graphs"] * Options(**options).cuda_graphs
    stem = re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower())
    folder.mkdir(parents=True, exist_ok=True)
    name, number = stem, 1
    while any((folder / f"{name}.{ending}").exists() for ending in ("md", "json", "svg")):
        number += 1
        name = f"{stem}-{number}"
    paths = [folder / f"{name}.{ending}" for ending in ("md", "json", "svg")]
    for path, text in zip(
        paths, (markdown(report, f"{name}.svg"), json.dumps(report, indent=1) + "\n", step_plot(report)), strict=True
    ):
        with path.open("x") as file:
            file.write(text)
    return paths
