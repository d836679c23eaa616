import importlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from rich.console import Console

import slipstream
from slipstream.doctor import packages

# `slipstream.cli` gives the command of the same name in place of its module.
doctor = importlib.import_module("slipstream.cli.doctor")
ROOT = Path(__file__).parents[2]
TWO: dict[str, Any] = {
    "versions": {"torch": "2.11.0", "driver": "580.1"},
    "gpus": [{"name": "NVIDIA H200", "memory_gib": 139.8, "capability": "9.0"}] * 2,
    "links": [{"gpus": [0, 1], "link": "NV18", "peer_access": True}],
    "symmetric_memory": {"works": True, "why": ""},
    "nccl": {"ranks": 2, "mib": 256, "all_reduce": 320.4, "all_to_all": 201.6},
    "optional": [],
    "problems": [],
    "hints": ["try this"],
}


def shown(report: dict[str, Any]) -> str:
    console = Console(width=300, record=True, file=io.StringIO())
    doctor.render(report, console)
    return console.export_text()


def test_json_and_tables_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.doctor(as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == TWO.keys()
    assert report["versions"]["transformers"].startswith("5.")
    assert {row["package"] for row in report["optional"]} >= {"deep_ep", "quack-kernels", "flash-attn-4", "gguf"}
    text = shown(report)
    for name, version in report["versions"].items():
        assert name in text
        assert (version or "missing") in text
    for row in report["optional"]:
        assert row["package"] in text
        assert row["effect"] in text
    for sentence in report["problems"] or ["no problem found"]:
        assert sentence in text


def test_what_is_between_two_gpus() -> None:
    text = shown(TWO)
    assert "links: every pair: 18 NVLinks, peer access" in text
    assert "symmetric memory: works" in text
    assert "NCCL: all-reduce 320 GB/s, all-to-all 202 GB/s a GPU in one direction, at 256 MiB on 2 GPUs" in text
    assert "the link's data sheet says 450" in text
    assert "- hint: try this" in text
    failed = {**TWO, "symmetric_memory": {"works": False, "why": "rank 1 was killed by SIGSEGV"}, "nccl": None}
    assert "symmetric memory: does not work: rank 1 was killed by SIGSEGV" in shown(failed)
    assert "NCCL" not in shown(failed)


def test_probes_are_asked_for_once_and_their_failure_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def fail(*arguments: Any) -> str:
        asked.append(arguments[:3])
        return "no answer within 120 s"

    monkeypatch.setattr(doctor, "on_ranks", fail)
    monkeypatch.setattr(doctor.hardware, "torch_gpus", lambda: ("13.0", TWO["gpus"]))
    monkeypatch.setattr(doctor.hardware, "driver_gpus", lambda: [])
    monkeypatch.setattr(doctor.hardware, "links", lambda: TWO["links"])
    report = doctor.collect()
    assert asked == [("symmetric_memory", 2, "cuda")]
    assert report["symmetric_memory"] == {"works": False, "why": "no answer within 120 s"}
    assert not any("NCCL does not work" in problem for problem in report["problems"])
    report = doctor.collect(bench=True)
    assert asked[1:] == [("symmetric_memory", 2, "cuda"), ("bandwidth", 2, "cuda")]
    assert any("NCCL does not work between the GPUs: no answer" in problem for problem in report["problems"])


def test_without_gpus_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "on_ranks", None)  # a call would fail
    monkeypatch.setattr(doctor.hardware, "torch_gpus", lambda: (None, []))
    monkeypatch.setattr(doctor.hardware, "driver_gpus", lambda: [])
    report = doctor.collect(bench=True)
    assert (report["gpus"], report["links"], report["hints"]) == ([], [], [])
    assert report["nccl"] == "nothing to measure with fewer than two GPUs"
    assert not report["symmetric_memory"]["works"]


def test_optional_packages_are_not_imported() -> None:
    code = (
        "import importlib, sys; doctor = importlib.import_module('slipstream.cli.doctor'); doctor.collect(); "
        "names = {module for module, _, _ in doctor.packages.OPTIONAL if module} - {'triton'}; "
        "print(sorted(names & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout == "[]\n"


def test_a_version_out_of_range_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.metadata, "requires", lambda _: ["transformers>=5.23,<5.24", "torch>=2.11"])
    monkeypatch.setattr(packages, "_version", {"transformers": "4.57.1", "torch": "2.13.0+cpu"}.get)
    (problem,) = packages.requirement_problems()
    assert problem.startswith("transformers 4.57.1 is outside the supported range: pip install 'transformers")


def test_only_base_requirements_can_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ["rich>=13", "torchao>=0.15; extra == 'optim'"]
    monkeypatch.setattr(packages.importlib.metadata, "requires", lambda _: requirements)
    monkeypatch.setattr(packages, "_version", lambda _: None)
    assert packages.requirement_problems() == ["rich is missing: pip install 'rich>=13'"]


def test_a_source_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed, version = set(packages._requirements()), packages.importlib.metadata.version

    def absent(name: str) -> Any:
        if name == "slipstream":
            raise packages.importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(packages.importlib.metadata, "requires", absent)
    monkeypatch.setattr(packages.importlib.metadata, "version", absent)
    report = doctor.collect()
    assert report["versions"]["slipstream"] == f"{slipstream.__version__} (not installed)"
    read = {str(Requirement(line)) for line in packages._requirements()}
    assert read == {str(Requirement(line)) for line in installed if "'test'" not in line}
    monkeypatch.setattr(packages.slipstream, "__file__", "/nowhere/slipstream/__init__.py")
    assert packages.requirement_problems() == []


@pytest.mark.parametrize(
    "script", sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"]), ids=lambda path: path.name
)
def test_shell_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
