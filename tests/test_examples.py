import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.train.recipe_file import load_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"


def printed_by(
    name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """The lines of an example that runs in this process."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_drop_in_gives_the_same_curve_through_either_import(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    curves = []
    for library in ("transformers", "slipstream"):
        arguments = ("--import", library, "--steps", "5")
        if library == "slipstream":
            lines = printed_by("drop_in.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
        else:  # where nothing of ours is
            command = [sys.executable, EXAMPLES / "drop_in.py", *arguments]
            lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        assert lines[-1].startswith(f"Qwen3MoeForCausalLM through {library}")
        curves.append([float(line.split()[-1]) for line in lines[:-1]])
    assert len(curves[0]) == 5
    assert curves[0][-1] < curves[0][0]
    assert max(abs(one - other) for one, other in zip(*curves, strict=True)) < 1e-4


def test_recipes_are_short_and_valid() -> None:
    for path in EXAMPLES.glob("*.yaml"):
        _, notes = load_recipe(path)
        assert notes == []
        assert len(path.read_text().splitlines()) <= 15


def test_expert_parallel_gives_the_same_losses_on_one_process_and_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = ("--output", str(tmp_path / "1"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(EXAMPLES / "expert_parallel.py"), "--output", str(tmp_path / "2")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    curves = []
    for lines in (
        printed_by("expert_parallel.py", *alone, monkeypatch=monkeypatch, capsys=capsys),
        done.stdout.splitlines(),
    ):
        assert float(lines[-1].split()[-1]) < 1e-5
        curves.append([float(line.split()[-1]) for line in lines if line.startswith("step")])
    assert len(curves[0]) == 5
    assert max(abs(one - other) for one, other in zip(*curves, strict=True)) < 1e-4
