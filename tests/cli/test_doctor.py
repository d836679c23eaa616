import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

# `slipstream.cli` gives the command of the same name in place of its module.
doctor = importlib.import_module("slipstream.cli.doctor")
ROOT = Path(__file__).parents[2]


def test_json_and_tables_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.doctor(as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"versions", "gpus", "optional", "problems"}
    assert report["versions"]["transformers"].startswith("5.")
    assert {row["package"] for row in report["optional"]} >= {"deep_ep", "quack-kernels", "flash-attn-4", "gguf"}

    console = Console(width=200, record=True, file=io.StringIO())
    doctor.render(report, console)
    text = console.export_text()
    for name, version in report["versions"].items():
        assert name in text
        assert (version or "missing") in text
    for row in report["optional"]:
        assert row["package"] in text
        assert row["effect"] in text
    for sentence in report["problems"] or ["no problem found"]:
        assert sentence in text


def test_optional_packages_are_not_imported() -> None:
    code = (
        "import importlib, sys; doctor = importlib.import_module('slipstream.cli.doctor'); doctor.collect(); "
        "names = {module for module, _, _ in doctor.OPTIONAL if module} - {'triton'}; "
        "print(sorted(names & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout == "[]\n"


def test_a_version_out_of_range_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: ["transformers>=5.23,<5.24", "torch>=2.11"])
    monkeypatch.setattr(doctor, "_version", {"transformers": "4.57.1", "torch": "2.13.0+cpu"}.get)
    (problem,) = doctor.requirement_problems()
    assert problem.startswith("transformers 4.57.1 is outside the supported range: pip install 'transformers")


def test_only_base_requirements_can_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ["rich>=13", "torchao>=0.15; extra == 'optim'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: requirements)
    monkeypatch.setattr(doctor, "_version", lambda _: None)
    assert doctor.requirement_problems() == ["rich is missing: pip install 'rich>=13'"]


@pytest.mark.parametrize(
    ("torch_cuda", "usable", "present", "words"),
    [
        (None, False, True, "torch is a CPU build"),
        ("13.0", False, True, "torch cannot use it"),
        ("13.0", False, False, "there is no GPU"),
        ("13.0", True, True, None),
        (None, False, False, None),
    ],
)
def test_device_problems(torch_cuda: str | None, usable: bool, present: bool, words: str | None) -> None:
    problems = doctor.device_problems(torch_cuda, usable=usable, present=present)
    assert [words in problem for problem in problems] == [True] * (words is not None)


@pytest.mark.parametrize(
    "script", sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"]), ids=lambda path: path.name
)
def test_shell_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
