import os
import subprocess
import sys
from pathlib import Path

from slipstream.train.recipe_file import load_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_drop_in_gives_the_same_curve_through_either_import() -> None:
    curves = []
    for library in ("transformers", "slipstream"):
        command = [sys.executable, EXAMPLES / "drop_in.py", "--import", library, "--steps", "5"]
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


def test_expert_parallel_gives_the_same_losses_on_one_process_and_two(tmp_path: Path) -> None:
    curves = []
    for ranks in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if ranks == 2 else []
        command = [
            sys.executable,
            *launcher,
            str(EXAMPLES / "expert_parallel.py"),
            "--output",
            str(tmp_path / str(ranks)),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert float(lines[-1].split()[-1]) < 1e-5
        curves.append([float(line.split()[-1]) for line in lines if line.startswith("step")])
    assert len(curves[0]) == 5
    assert max(abs(one - other) for one, other in zip(*curves, strict=True)) < 1e-4
