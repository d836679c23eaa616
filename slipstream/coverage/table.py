"""The table of architectures: for the terminal, as JSON and as Markdown."""

import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from slipstream.coverage.checks import Row

AIM = 1.3
CHECKS = ("parity", "save", "ep2", "packing", "lora")
_INTRODUCTION = """# Coverage

Every causal-LM architecture of Transformers {transformers}, as `slipstream coverage --output docs/coverage` found it.

- **parity**, **EP=2**, **LoRA**: error of the loss and of the worst gradient against plain Transformers with `eager`
  experts on one process, at tiny sizes in fp32. EP=2 is two ranks, which also save the model again: the same tensors.
- **save**: `save_pretrained` writes what Transformers writes, and it loads again unchanged.
- **packing**: documents in one row don't see each other; *refused* is an error that says so before anything runs.
- **step**, **memory**: Transformers' time of a training step over ours, and our peak memory over theirs, by
  `slipstream coverage --speed` at the shapes of the architecture's default config, fewer layers and experts where one
  GPU has no room for them. A row below {aim} says why: what GEMMs, attention and AdamW alone, at the rates of
  [planning](planning.md), would leave as the most that any kernel around them could gain; which layers mix tokens by
  something for which that is not counted; that no fused attention knows its scores; or that the host sets the pace of
  so short a step, and how fast it is as [a CUDA graph](performance.md#cuda-graphs), or what in the model keeps it
  from being one. Indexed and compressed attention is Transformers' PyTorch code on both sides, but for Qwen4-Exp's
  indexer.
"""


def read(path: Path) -> dict[str, Row]:
    """The rows of an earlier run; none if there is no such file.

    Raises: ValueError for a file of another kind.
    """
    if not path.exists():
        return {}
    try:
        rows = [Row.of(row) for row in json.loads(path.read_text(encoding="utf-8"))["architectures"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"--output: {path} is no table of slipstream coverage; name another file") from error
    return {row.model_type: row for row in rows}


def write(output: Path, rows: Iterable[Row]) -> None:
    """`output`.json and `output`.md, each put in place whole."""
    rows = list(rows)
    for suffix, text in ((".json", as_json(rows)), (".md", as_markdown(rows))):
        path = output.with_name(output.name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)


def as_json(rows: list[Row]) -> str:
    """All of the rows and the versions they were found with."""
    versions = {name: version(name) for name in ("transformers", "torch")}
    return json.dumps({"versions": versions, "architectures": [row.as_dict() for row in rows]}, indent=1) + "\n"


def as_markdown(rows: list[Row]) -> str:
    """The page `docs/coverage.md`."""
    checked = [row for row in rows if not row.why_not]
    parts = [_INTRODUCTION.format(transformers=version("transformers"), aim=AIM)]
    for title, moe in (("Mixture of experts", True), ("Dense", False)):
        part = [row for row in checked if row.moe == moe]
        if not part:
            continue
        timed = any(row.speed for row in part)
        head = ["architecture", *(["experts"] if moe else []), "attention", "loss", "parity", "save"]
        head += [*(["EP=2"] if moe else []), "packing", "LoRA", *(["step", "memory", "timed at"] if timed else [])]
        parts.append(f"\n## {title}\n")
        parts += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        parts += ["| " + " | ".join(_cells(row, moe, timed)) + " |" for row in part]
    if skipped := [row for row in rows if row.why_not]:
        parts += ["\n## Not built\n", "| architecture | why |", "|---|---|"]
        parts += [f"| {row.model_type} | {_plain(row.why_not)} |" for row in skipped]
    return "\n".join(parts) + "\n"


def _cells(row: Row, moe: bool, timed: bool) -> list[str]:
    checks = {name: _plain(str(row.checks[name])) if name in row.checks else "" for name in CHECKS}
    experts = [f"{row.passes.get('experts', '')}: {_plain(row.flavour)}"] if moe else []
    cells = [row.model_type, *experts, row.passes.get("attn", ""), row.passes.get("loss", "")]
    cells += [checks["parity"], checks["save"], *([checks["ep2"]] if moe else []), checks["packing"], checks["lora"]]
    return cells + (list(speed_cells(row.speed)) if timed else [])


def speed_cells(speed: dict[str, Any]) -> tuple[str, str, str]:
    """Ratio of the steps, ratio of the memory, and at what shapes; or why there are none."""
    if not speed:
        return "", "", ""
    if "error" in speed:
        return _plain(speed["error"]), "", speed.get("shapes", "")
    tokens = f", {speed['of']['tokens']} tokens" if "of" in speed else ""
    conditions = [f"{speed['shapes']}{tokens}", speed["device"], *_why(speed), *map(_plain, speed.get("notes", ()))]
    return f"{speed['step']:.2f} x", f"{speed['memory']:.2f}", ", ".join(conditions)


def _why(speed: dict[str, Any]) -> list[str]:
    """Why a step is not `AIM` times as fast, where that is known."""
    if speed["step"] >= AIM:
        return []
    if graphed := speed.get("graphed"):
        return [f"**{graphed:.2f} x as a CUDA graph: the host sets the pace**"]
    if others := speed.get("others"):
        return [f"**{', '.join(others)}: not counted what it takes at least**"]
    if speed.get("attention") == "eager":
        return ["**its attention is Transformers' code on both sides, with whole scores**"]
    if reason := speed.get("no_graph"):
        return [f"**no CUDA graph: {_plain(reason)}**"]
    known = speed.get("limit", 0) > speed["step"]
    return [f"**at most {speed['limit']:.2f} x: GEMMs, attention, AdamW**"] if known else []


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def as_table(rows: list[Row]) -> Table:
    """For the terminal."""
    table = Table(title="coverage")
    for heading in ("architecture", "experts", *CHECKS, "step", "memory"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        if row.why_not:
            cells = [row.model_type, row.why_not]
        else:
            step, memory, _ = speed_cells(row.speed)
            checks = [str(row.checks.get(name, "")) for name in CHECKS]
            cells = [row.model_type, row.passes.get("experts", "") if row.moe else "dense", *checks, step, memory]
        table.add_row(*map(Text, cells))
    return table
