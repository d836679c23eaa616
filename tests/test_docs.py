"""The pages say what the code does: every piece of a recipe in them is valid, and every command they name exists."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from slipstream.cli import app
from slipstream.train.recipe_file import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
# What a recipe needs, for those that show a section only.
BASE: dict[str, Any] = {"model": {"name_or_path": "m"}, "data": {"train": "t.jsonl"}, "train": {"output_dir": "o"}}


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_recipes_on_pages_are_valid(page: Path, tmp_path: Path) -> None:
    for text in blocks(page):
        values = yaml.safe_load(text)
        if "output_dir" not in text and "checkpoint_dir" not in text:
            for section, keys in BASE.items():
                values[section] = {**keys, **values.get(section, {})}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        load_recipe(path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_on_pages_exist(page: Path) -> None:
    verbs = {command.callback.__name__ for command in app.registered_commands if command.callback} | {"bench"}
    code = re.findall(r"^```bash\n(.*?)^```|`(slipstream [^`]*)`", page.read_text(encoding="utf-8"), re.DOTALL | re.M)
    named = re.findall(r"^slipstream ([a-z]+)", "\n".join(part for pair in code for part in pair), re.MULTILINE)
    assert set(named) <= verbs


def test_recorded_ratios_on_the_page_are_those_of_the_records() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| \[.*?\]\(\.\./(benchmarks/results/.*?)\.md\).*\| ([\d.]+) \u00d7 \| ([\d.]+) \u00d7 \|$", text, re.M
    )
    assert len(rows) >= 8
    for name, step, memory in rows:
        record = json.loads((ROOT / f"{name}.json").read_text(encoding="utf-8"))
        of = {row["contender"]: row for row in record["rows"] if row["gate"] == "learned"}
        peak = of["slipstream"]["peak_gib"] / of["transformers"]["peak_gib"]
        # A run that is recorded anew may differ by a little.
        assert float(step) == pytest.approx(of["slipstream"]["speedup_step"], abs=0.05), name
        assert float(memory) == pytest.approx(peak, abs=0.02), name


def test_hook_lets_lists_and_tables_begin_below_a_paragraph() -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("the docs extra is not installed")
    specification = importlib.util.spec_from_file_location("docs_hook", ROOT / "scripts" / "docs_hook.py")
    assert specification is not None
    assert specification.loader is not None
    hook = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hook)
    assert hook.spaced("three:\n- one\n  more\n- two\n\nend") == "three:\n\n- one\n  more\n- two\n\nend"
    assert hook.spaced("# a\n| b |\n|---|\ntext\n| c |") == "# a\n| b |\n|---|\ntext\n\n| c |"
    assert hook.spaced("```\nls:\n- a\n```\n1. b") == "```\nls:\n- a\n```\n\n1. b"
