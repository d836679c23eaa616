"""The page as a browser would take it: whole, self-contained, escaped, and right where records are missing."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from slipstream.cli import main
from slipstream.report.chart import MOST_POINTS, Level, Line, chart, small_chart
from slipstream.report.findings import findings
from slipstream.report.heat import HeatMap, heat_map
from slipstream.report.markup import duration, escape, short, ticks
from slipstream.report.page import page, write_report
from slipstream.report.prediction import Prediction, filled, predict
from slipstream.report.records import read_records
from tests.report.made_run import NASTY, make_run

VOID = {"meta", "link", "br"}
SECTIONS = ["warnings", "loss", "speed", "experts", "data", "samples", "recipe", "environment"]


class Page(HTMLParser):
    """Elements and text; fails on an element that is closed twice, never, or in the wrong place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    @property
    def sections(self) -> list[str | None]:
        return [attrs["id"] for tag, attrs in self.elements if tag == "section"]


def made(folder: Path, **changes: Any) -> Page:
    return Page(page(read_records(make_run(folder, **changes))))


def test_every_part_is_there_and_nothing_is_loaded(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path, steps=8, layers=3))
    text = path.read_text()
    found = Page(text)
    assert found.sections == SECTIONS
    assert {tag for tag, _ in found.elements}.isdisjoint({"script", "img", "iframe", "object", "embed"})
    loads = [value for _, attrs in found.elements for key, value in attrs.items() if key in ("src", "href", "srcset")]
    assert all(value is not None and value.startswith(("#", "data:,")) for value in loads)
    links = [value for value in loads if value and value.startswith("#")]
    assert links == [f"#{name}" for name in SECTIONS]
    assert not re.search(r"https?://|@import|url\(", text)
    drawings = [attrs for tag, attrs in found.elements if tag == "svg"]
    assert len(drawings) >= 10
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawings)
    assert not [key for _, attrs in found.elements for key in attrs if key.startswith("on")]


def test_what_users_wrote_is_text(tmp_path: Path) -> None:
    found = made(tmp_path, steps=4, layers=2)
    assert "</pre><script>alert('x')</script>&\ufffd?" in found.words  # the control character and the half pair
    assert escape("a\x00<\ud800>\n") == "a\ufffd&lt;?&gt;\n"


def test_figures_of_the_run(tmp_path: Path) -> None:
    words = made(tmp_path, steps=8, layers=2).words
    for part in ("2.31 → 1.268", "488k", "63.4 GiB", "51,200, 88,000,000 tokens (59%", "weight 3", "chats.jsonl:17",
                 "By step 8 the sea is calm.", "3 answers in between", "torch 2.11.0", "with changes",
                 "1 micro-batch of 2 rows a rank", "full fine-tune, finished"):  # fmt: skip
        assert part in words, part


@pytest.mark.parametrize("kept", [(), ("recipe.resolved.yaml",), ("metrics.jsonl",)])
def test_records_may_be_missing(tmp_path: Path, kept: tuple[str, ...]) -> None:
    whole = make_run(tmp_path / "whole", steps=4)
    part = tmp_path / "part"
    part.mkdir()
    (part / "metrics.jsonl").touch()
    for name in kept:
        shutil.copy(whole / name, part)
    found = Page(page(read_records(part)))
    assert "not finished" in found.words
    assert ("No step has been logged." in found.words) == ("metrics.jsonl" not in kept)
    assert ("recipe" in found.sections) == ("recipe.resolved.yaml" in kept)
    assert ("experts" in found.sections) == ("metrics.jsonl" in kept)
    assert "environment" not in found.sections


def test_one_step_nan_and_a_line_cut_short(tmp_path: Path) -> None:
    make_run(tmp_path, steps=1, layers=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "elapsed": 3, "loss": NaN, "grad_norm": Infinity}\n{"step": 3, "el')
    records = read_records(tmp_path)
    assert records.points("loss") == [(1.0, pytest.approx(1.25, abs=0.1))]
    found = Page(page(records))
    assert "The loss was not finite in 1 logs, first at step 2." in found.words
    assert not re.search(r"\bnan\b", found.words.lower())
    assert not [
        value for _, attrs in found.elements for value in attrs.values() if value and re.search(r"\bnan\b", value)
    ]


def test_a_run_that_replaces_a_model_has_its_records_apart(tmp_path: Path) -> None:
    old = make_run(tmp_path, steps=4)
    new = make_run(tmp_path / ".incomplete", steps=2)
    (old / "report.html").write_text("the old model's")
    assert write_report(tmp_path) == new / "report.html"
    assert not read_records(tmp_path).finished
    assert (old / "report.html").read_text() == "the old model's"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "no metrics.jsonl there; give the folder" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    make_run(tmp_path, steps=1)
    with pytest.raises(SystemExit, match="0"):
        main(["report", str(tmp_path)])
    assert capsys.readouterr().out == f"written: {tmp_path}/report.html\n"


def test_the_plan_beside_the_run(tmp_path: Path) -> None:
    from slipstream.planning.gpus import parse_gpus
    from slipstream.planning.plan import make_plan
    from slipstream.train.recipe_file import load_recipe

    records = read_records(make_run(tmp_path, steps=4, devices=["NVIDIA H200"] * 8))
    found = predict(records)
    assert isinstance(found, Prediction)
    recipe, _ = load_recipe(tmp_path / "recipe.resolved.yaml", ["train.per_device_train_batch_size=2"])
    wanted = make_plan(recipe, *parse_gpus("8xH200")).given
    assert found.memory_gib == pytest.approx(wanted.memory.peak_gib)
    assert found.tokens_per_second == pytest.approx(8 * wanted.time.tokens_per_second)
    assert found.filled == pytest.approx(0.99 * 88_000_000 / 22_004 / 4096)  # 512 of 51,200 rows are held out
    shown = Page(page(records))
    assert f"{found.memory_gib:.1f}" in shown.words
    assert "micro-batch 2 of 4,096 tokens" in shown.words


@pytest.mark.parametrize(
    ("section", "data", "share"),
    [
        ({}, {"rows": 10, "tokens": 500}, 0.5),
        ({}, {"rows": 10, "tokens": 500, "held_out_rows": 5}, 0.5),  # those are as long as the others
        ({"packing": True}, {"rows": 10, "tokens": 500, "packed_rows": 6, "held_out_rows": 2}, 400 / 600),
        (
            {"packing": True, "eval": ["e"]},
            {"rows": 10, "tokens": 500, "packed_rows": 6, "held_out_rows": 2},
            500 / 600,
        ),
        ({"packing": True, "streaming": True}, {"rows": 10, "tokens": 500}, None),
        ({}, {}, None),
    ],
)
def test_how_full_rows_are(section: dict[str, Any], data: dict[str, Any], share: float | None, tmp_path: Path) -> None:
    (tmp_path / "recipe.resolved.yaml").write_text(yaml.safe_dump({"data": section}))
    (tmp_path / "data.json").write_text(json.dumps(data))
    assert filled(read_records(tmp_path), 100) == (None if share is None else pytest.approx(share))


@pytest.mark.parametrize(
    ("device", "recipe", "reason"),
    [
        (None, None, "The run used no GPU, and a plan is for GPUs."),
        ("NVIDIA T4", None, "No plan can be made of this run: 'NVIDIA T4': no GPU of this name is known"),
        ("NVIDIA H200", "nowhere/at-all", "No plan can be made of this run: model.name_or_path=nowhere/at-all"),
        ("NVIDIA H200", "changed: by hand", "No plan can be made of this run: "),
    ],
)
def test_no_plan_says_why(
    tmp_path: Path, device: str | None, recipe: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make_run(tmp_path, steps=1, devices=[device] if device else [])
    path = tmp_path / "recipe.resolved.yaml"
    if recipe is not None and ":" in recipe:
        path.write_text(recipe)
    elif recipe is not None:
        values = yaml.safe_load(path.read_text())
        values["model"]["name_or_path"] = recipe
        path.write_text(yaml.safe_dump(values))
    found = predict(read_records(tmp_path))
    assert isinstance(found, str)
    assert found.startswith(reason)


def _line(step: int, **values: float) -> dict[str, Any]:
    return {"step": step, "elapsed": float(step), **values}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([_line(0, eval_loss=2.0), _line(4, eval_loss=1.0), _line(8, eval_loss=1.5)], "lowest at step 4 (1)"),
        ([_line(0, eval_loss=2.0), _line(8, eval_loss=2.1)], "did not fall: 2 before training, 2.1 at the end"),
        ([_line(0, eval_loss=2.0), _line(4, eval_loss=1.0), _line(8, eval_loss=1.01)], None),
        ([_line(1, loss=2.0)], "No data was held out"),
        ([_line(1, moe_dead_experts=0.0, moe_load_max_over_mean=4.5), _line(0, eval_loss=1.0)], "4.5 times"),
        ([_line(1, moe_dead_experts=3.0), _line(0, eval_loss=1.0)], "3 experts, of all layers together"),
    ],
)
def test_findings(tmp_path: Path, lines: list[dict[str, Any]], words: str | None) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.json").write_text("{}")
    found = findings(read_records(tmp_path), "no GPU")
    assert [words in sentence for sentence in found if words] == [True] * (words is not None)
    assert len(found) == (words is not None)


def test_findings_of_data_guard_and_plan(tmp_path: Path) -> None:
    make_run(tmp_path, steps=4)
    (tmp_path / "data.json").write_text(
        json.dumps({"tokens": 900, "cut_tokens": 100, "cut_rows": 7, "dropped_rows": 2})
    )
    for step in (3, 9):  # the second is of an earlier, longer run
        (tmp_path / f"bad-step-{step:06d}").mkdir()
        record = {"step": step, "reason": "its loss is nan"}
        (tmp_path / f"bad-step-{step:06d}" / "step.json").write_text(json.dumps(record))
    found = findings(read_records(tmp_path), Prediction("", 40.0, {}, 100_000.0, 0.9))
    assert found == [
        "bad-step-000003 is of a step that was not applied: its loss is nan.",
        "10% of the tokens were cut off at max_length, in 7 rows.",
        "2 rows were longer than max_length and left out.",
        "Peak memory was 63.4 GiB, and the plan says 40.0.",
        found[4],
        "The working folder had changes that were not committed, so its revision alone does not repeat the run.",
    ]
    assert re.fullmatch(r"5\d,\d{3}|60,\d{3}|61,\d{3}", found[4].split(" ")[0])
    assert found[4].endswith("tokens/s were trained, and the plan says 90,000 for rows as full as these.")


def _places(drawn: str, kind: str) -> list[tuple[float, float]]:
    path = re.search(rf'<path class="{kind}" d="M([^"]*)"', drawn)
    assert path is not None
    return [(float(x), float(y)) for x, y in (pair.split() for pair in path[1].strip("z").split("L"))]


def test_curves_stand_where_their_values_are() -> None:
    drawn = small_chart("t", [Line("a", [(0, 1.0), (5, 3.0), (10, 2.0)])], level=Level("plan", 2.0))
    (x0, y0), (x1, y1), (x2, y2) = _places(drawn, "line s1")
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert y1 < y2 < y0  # up is small in SVG
    (level,) = re.findall(r'class="level" d="M\d+ ([\d.]+)H', drawn)
    assert float(level) == pytest.approx(y2, abs=0.1)
    assert "a from 1 at step 0 to 2 at step 10; plan 2" in drawn
    assert "<title>a, step 5: 3</title>" in drawn


def test_long_curves_are_thinned_and_keep_their_extremes() -> None:
    points = [(float(step), 9.0 if step == 777 else 1.0) for step in range(2 * MOST_POINTS + 500)]
    drawn = small_chart("t", [Line("a", points)])
    assert len(_places(drawn, "line s1")) <= MOST_POINTS
    tops = [y for _, y in _places(drawn, "band s1")]
    alone = small_chart("t", [Line("a", [(0, 1.0), (1, 9.0)])])
    assert min(tops) == min(y for _, y in _places(alone, "line s1"))


def test_a_chart_without_points_is_nothing_and_with_one_a_dot() -> None:
    assert chart("t", [Line("a", [])]) == ""
    assert '<circle class="dot s1"' in chart("t", [Line("a", [(3, 0.0)])])


def test_heat_map_shows_the_worst_of_a_column_and_merges_equals() -> None:
    steps = list(range(1, 241))
    values: list[list[float | None]] = [[1.0] * 240, [None] * 240]
    values[0][100] = 9.0
    drawn = heat_map(HeatMap("load", ["0", "1"], steps, values, (1.1, 1.25, 1.5, 2.0, 3.0, 5.0)))
    wide = drawn.split("<svg")[1]
    assert dict(re.findall(r'<path class="(\w+)" d="([^"]*)"', wide)).keys() == {"h0", "h6", "unknown"}
    assert [wide.count(f'class="{kind}"') for kind in ("h0", "h6", "unknown")] == [1, 1, 1]
    bright, none = (re.search(rf'class="{kind}" d="([^"]*)"', wide) for kind in ("h0", "unknown"))
    assert bright is not None
    assert none is not None
    assert (bright[1].count("M"), none[1].count("M")) == (2, 1)  # before and behind the one column
    assert "at most 9, in layer 0 at step 101" in drawn
    assert heat_map(HeatMap("load", ["0"], [1], [[None]], (1,) * 6)) == ""


def test_numbers_in_a_few_characters() -> None:
    values = (0, 2e-5, 0.25, 1.23456, -3.5, 63.12, 999.6, 9999, 61240, 1_200_000, 3e9)
    assert [short(x) for x in values] == ["0", "2e-05", "0.25", "1.235", "-3.5", "63.1", "1,000", "9,999", "61.2k",
                                          "1.2M", "3G"]  # fmt: skip
    assert [duration(x) for x in (4.2, 75, 7322)] == ["4 s", "1 min 15 s", "2 h 2 min"]
    assert ticks(0, 12, 5, whole=True) == [0, 5, 10]
    assert ticks(1, 1, 5) == [1]
    assert ticks(0.1, 0.9, 4) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert all(len(ticks(low, low + span, 5)) <= 5 for low in (0, 0.3, 17) for span in (1e-6, 0.07, 1, 3, 9, 1e7))
    assert NASTY not in escape(NASTY)
