"""The parts of the page, each from a run's records alone; a part without records is left out or says so."""

from pathlib import Path
from typing import Any

from slipstream.report.chart import Level, Line, chart, small_chart
from slipstream.report.heat import HeatMap, heat_map
from slipstream.report.markup import duration, escape, section, short, table
from slipstream.report.prediction import Prediction, peak_memory, usual_speed
from slipstream.report.records import Records

LOAD_BREAKS = (1.1, 1.25, 1.5, 2.0, 3.0, 5.0)  # tokens of the fullest expert over the mean's
DEAD_BREAKS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # experts


def tiles(records: Records) -> str:
    """The run in a few numbers."""
    held_out = records.points("eval_loss")
    training = records.points("loss")
    found = []
    if len(held_out) > 1:
        found.append(("held-out loss", f"{short(held_out[0][1])} → {short(held_out[-1][1])}"))
    elif held_out:
        found.append(("held-out loss", short(held_out[0][1])))
    elif training:
        found.append(("training loss", " → ".join(short(v) for _, v in dict.fromkeys((training[0], training[-1])))))
    found.append(("steps", f"{records.last_step:,}"))
    if tokens := records.points("tokens"):
        found.append(("tokens trained", short(tokens[-1][1])))
    if (speed := usual_speed(records)) is not None:
        found.append(("tokens/s", short(speed)))
    if mfu := records.points("mfu"):
        values = sorted(value for _, value in mfu)
        found.append(("MFU, median", f"{values[len(values) // 2]:.1%}"))
    if (memory := peak_memory(records)) is not None:
        found.append(("peak memory", f"{memory:.1f} GiB"))
    found.append(("time", duration(records.seconds)))
    cells = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in found)
    return f'<dl class="tiles">{cells}</dl>'


def loss(records: Records) -> str:
    lines = [
        Line("training", records.points("loss"), "s1"),
        Line("held out", records.points("eval_loss"), "s2", dots=True),
    ]
    drawn = chart("Loss", lines, "cross-entropy a trained token")
    small = [
        small_chart("Learning rate", [Line("learning rate", records.points("learning_rate"))], from_zero=True),
        small_chart("Gradient norm", [Line("gradient norm", records.points("grad_norm"), "s3")], "before clipping"),
        small_chart("Router gradient norm", [Line("routers", records.points("router_grad_norm"), "s3")]),
    ]
    if not drawn:
        return section("loss", "Loss", "<p>No step has been logged.</p>")
    return section("loss", "Loss", drawn, _grid(small))


def speed(records: Records, prediction: Prediction | str) -> str:
    measured_speed, memory = usual_speed(records), peak_memory(records)
    if measured_speed is None or memory is None:
        return section("speed", "Speed and memory", "<p>No step has been logged.</p>")
    fast = full = None
    words = ""
    if isinstance(prediction, str):
        words = f"<p>{escape(prediction)}</p>"
    else:
        share = prediction.filled if prediction.filled is not None else 1.0
        expected = prediction.tokens_per_second * share
        fast, full = Level("plan", expected), Level("plan", prediction.memory_gib)
        of_rows = f", rows {share:.0%} full" if prediction.filled is not None else ""
        words = f"<p>Plan: {escape(prediction.where)}.</p>" + table(
            [
                (f"tokens/s of all GPUs{of_rows}", f"{measured_speed:,.0f}", f"{expected:,.0f}",
                 f"{measured_speed / expected - 1:+.0%}"),
                ("peak memory of a GPU, GiB", f"{memory:.1f}", f"{prediction.memory_gib:.1f}",
                 f"{memory / prediction.memory_gib - 1:+.0%}"),
            ],
            ("", "measured", "plan", "off"),
        )  # fmt: skip
        parts = sorted(prediction.parts.items(), key=lambda part: -part[1])
        shown = ", ".join(f"{escape(name)} {gib:.1f}" for name, gib in parts if gib >= 0.05)
        words += f"<p>The plan's memory, in GiB: {shown}.</p>"
    charts = [
        small_chart("Tokens a second", [Line("all ranks", records.points("tokens_per_second"))], "no padding",
                    fast, from_zero=True),
        small_chart("Memory", [Line("fullest rank", records.points("memory_gib"), "s2")], "GiB", full, from_zero=True),
        small_chart("MFU", [Line("MFU", [(s, 100 * v) for s, v in records.points("mfu")], "s3")], "%", from_zero=True),
    ]  # fmt: skip
    return section("speed", "Speed and memory", words, _grid(charts))


def experts(records: Records) -> str:
    """Of an MoE alone."""
    logs = [line for line in records.lines if isinstance(line.get("moe"), dict) and line["moe"].get("layer")]
    if not logs:
        return ""
    layers = [str(layer) for layer in logs[-1]["moe"]["layer"]]
    words = (
        "<p>How evenly tokens spread over the experts of each layer: those of the fullest expert over the mean's "
        "(1 is even), since the log before.</p>"
    )
    maps = [heat_map(_map("Tokens of the fullest expert over the mean's", "load_max_over_mean", layers, logs,
                          LOAD_BREAKS))]  # fmt: skip
    if any(value for _, value in records.points("moe_dead_experts")):
        maps.append(heat_map(_map("Experts without a token", "dead_experts", layers, logs, DEAD_BREAKS)))
    curves = [
        small_chart("Worst layer's load", [Line("fullest over mean", records.points("moe_load_max_over_mean"))]),
        small_chart("Least even layer's entropy", [Line("entropy", records.points("moe_load_entropy"), "s2")],
                    "1: even"),
    ]  # fmt: skip
    return section("experts", "Experts", words, *maps, _grid(curves))


def _map(title: str, name: str, layers: list[str], logs: list[dict[str, Any]], breaks: tuple[float, ...]) -> HeatMap:
    columns = []
    for line in logs:
        values = line["moe"].get(name) or []
        columns.append(dict(zip(map(str, line["moe"]["layer"]), values, strict=False)))
    values = [[_known(column.get(layer)) for column in columns] for layer in layers]
    return HeatMap(title, layers, [line["step"] for line in logs], values, breaks)


def _known(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and value == value else None


def data(records: Records) -> str:
    found, recipe = records.data, records.section("data")
    if not found and not recipe:
        return ""
    rows = [("trained on", _sources(recipe.get("train")) or "unknown")]
    fraction = recipe.get("eval_fraction")
    if recipe.get("eval"):
        rows.append(("held out", _sources(recipe["eval"])))
    elif fraction:
        rows.append(("held out", f"{fraction:.1%} of the rows above"))
    if found:
        tokens, trained = found.get("tokens", 0), found.get("trained_tokens", 0)
        share = f" ({trained / tokens:.0%} of their tokens are trained)" if tokens else ""
        stream = "of the first rows of the stream: " * bool(recipe.get("streaming"))
        rows.append(("rows", f"{stream}{found.get('rows', 0):,}, {tokens:,} tokens{share}"))
        for key, name in (("held_out_rows", "rows held out"), ("packed_rows", "packed rows"),
                          ("cut_rows", "rows cut to max_length"), ("cut_tokens", "tokens lost by that"),
                          ("split_rows", "rows split"), ("dropped_rows", "rows too long, left out"),
                          ("masked_rows", "rows without a token to train on"), ("bad_rows", "bad rows")):  # fmt: skip
            if found.get(key):
                rows.append((name, f"{found[key]:,}"))
    if recipe.get("max_length"):
        rows.append(("max_length", f"{recipe['max_length']:,} tokens"))
    seen = records.points("tokens")
    if seen and found.get("tokens") and not recipe.get("streaming"):
        rows.append(("tokens trained on", f"{seen[-1][1]:,.0f}, padding not counted"))
    bad = [row for row in found.get("bad") or () if isinstance(row, dict)]
    listed = ""
    if bad:
        listed = _folded(
            "Bad rows", table([(escape(row.get("place", "")), escape(row.get("reason", ""))) for row in bad[:50]])
        )
    return section("data", "Data", table(rows), listed)


def _sources(sources: Any) -> str:
    return "<br>".join(map(_source, sources if isinstance(sources, list) else [sources] if sources else []))


def _source(source: Any) -> str:
    if not isinstance(source, dict):
        return escape(source)
    named = {key: source.get(key) for key in ("subset", "split", "weight")}
    more = [
        f"{key} {value:g}" if key == "weight" else f"{key} {value}"
        for key, value in named.items()
        if value is not None and (key, value) != ("split", "train")
    ]
    return f"<code>{escape(source.get('path', ''))}</code> {escape(', '.join(more))}".rstrip()


def samples(records: Records) -> str:
    """Each prompt with its first and its last answer; those in between folded away."""
    by_prompt: dict[str, list[tuple[int, str]]] = {}
    for line in records.lines:
        for pair in line.get("samples") or ():
            if isinstance(pair, dict) and "prompt" in pair:
                by_prompt.setdefault(str(pair["prompt"]), []).append((line["step"], str(pair.get("answer", ""))))
    if not by_prompt:
        return section("samples", "Samples", "<p>The recipe has no <code>eval.sample_prompt</code>.</p>")
    parts = []
    for prompt, answers in by_prompt.items():
        cards = [_answer("before", *answers[0])]
        if len(answers) > 1:
            cards.append(_answer("after" if records.finished else "latest", *answers[-1]))
        between = "".join(_answer("", *answer) for answer in answers[1:-1])
        parts.append(
            f'<div class="sample"><p class="prompt" dir="auto">{escape(prompt)}</p>'
            f'<div class="answers">{"".join(cards)}</div>'
            f"{_folded(f'{len(answers) - 2} answers in between', between) if between else ''}</div>"
        )
    return section("samples", "Samples", *parts)


def _answer(when: str, step: int, text: str) -> str:
    title = ", ".join(part for part in (when, f"step {step:,}") if part)
    return f'<div class="answer"><h3>{title}</h3><p dir="auto">{escape(text) or "<em>nothing</em>"}</p></div>'


def recipe(records: Records) -> str:
    if not records.recipe_text:
        return ""
    shown = f'<pre tabindex="0" role="region" aria-label="recipe">{escape(records.recipe_text)}</pre>'
    words = "<p>With every default written out; <code>slipstream finetune</code> takes it as it is.</p>"
    return section("recipe", "Recipe", words, _folded("recipe.resolved.yaml", shown))


def environment(records: Records) -> str:
    found = records.environment
    if not found:
        return ""
    devices = found.get("devices") or []
    rows = [
        ("command", f"<code>{escape(' '.join(map(str, found.get('command', ()))))}</code>"),
        ("folder", f"<code>{escape(found.get('folder', ''))}</code>"),
        ("ranks", escape(found.get("ranks", ""))),
        ("GPUs", escape(", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices)) or "none")),
        ("system", escape(f"Python {found.get('python')}, CUDA {found.get('cuda')}, {found.get('platform')}")),
        ("packages", escape(", ".join(f"{name} {version}" for name, version in (found.get("packages") or {}).items()))),
    ]
    if batch := found.get("batch"):
        rows_each, times = batch.get("per_device_train_batch_size"), batch.get("gradient_accumulation_steps")
        rows.append(("a step", escape(f"{times} micro-batch{'es' * (times != 1)} of {rows_each} rows a rank")))
    for key, name in (("git", "revision"), ("slipstream_git", "Slipstream's revision")):
        if found.get(key):
            changed = ", with changes" * bool(found[key].get("changes"))
            rows.append((name, f"<code>{escape(found[key].get('revision', ''))}</code>{changed}"))
    return section("environment", "Environment", table(rows))


def title(records: Records) -> str:
    """What the run is called: its own name, or its model's."""
    model = records.section("model")
    name = records.section("log").get("run_name") or model.get("name_or_path") or model.get("config")
    return Path(str(name)).name if name else records.folder.name


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _grid(figures: list[str]) -> str:
    inside = "".join(figures)
    return f'<div class="grid">{inside}</div>' if inside else ""
