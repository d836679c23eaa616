"""`slipstream bench` as it is typed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.cli import main

TINY = ["--tiny", "--device", "cpu", "--repeats", "1", "--steps", "1", "--warmup", "1"]


@pytest.fixture(autouse=True)
def without_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Liger or torchao is installed, its kernels would not run on a CPU."""
    for module in ("layer", "loss", "optimizer"):
        monkeypatch.setattr(f"slipstream.bench.{module}.find_spec", lambda _: None)


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "slipstream.cli", "bench", *arguments],
        capture_output=True, text=True, cwd=cwd, timeout=540, check=False,
    )  # fmt: skip


@pytest.mark.long
def test_the_whole_command(tmp_path: Path) -> None:
    """Two sides, a rival that does not run on one rank, files, table."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    done = command(*TINY, "--rivals", "transformers,transformers-ep", "--gate", "learned", "--layers", "2",
                   "--set", "num_experts_per_tok=4", "--json", "out.json", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    rows = {row["contender"]: row for row in report["rows"]}
    assert rows.keys() == {"transformers", "transformers-ep", "slipstream"}
    assert rows["slipstream"]["speedup_step"] > 0
    assert rows["slipstream"]["imbalance"]["worst"] >= 1
    assert rows["transformers-ep"]["error"].startswith("ValueError: with ep_size=1 transformers-ep is transformers")
    assert report["options"]["changes"] == {"num_experts_per_tok": 4}
    assert "--set num_experts_per_tok=4" in report["command"]
    written = sorted(path.suffix for path in (tmp_path / "benchmarks" / "results").iterdir())
    assert written == [".json", ".md", ".svg"]
    assert "problem: transformers-ep, learned gate: ValueError" in done.stderr
    assert "slipstream" in done.stdout


@pytest.mark.slow
def test_two_ranks_start_from_the_same_weights(tmp_path: Path) -> None:
    """Transformers' FSDP2, its own expert parallelism, and ours: one loss."""
    done = command(*TINY, "--rivals", "transformers,transformers-ep", "--gate", "balanced", "--layers", "2",
                   "--nproc", "2", "--json", "out.json", "--output", "made", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    losses = {row["contender"]: row["first_loss"] for row in report["rows"]}
    assert losses == pytest.approx(dict.fromkeys(losses, losses["transformers"]), rel=1e-3)
    assert report["device"] == "2 x CPU"
    assert len(list((tmp_path / "made").iterdir())) == 3


@pytest.mark.parametrize("part", ["layer", "optimizer", "loss"])
def test_the_parts(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    extra = [] if part == "optimizer" else ["--tokens", "16"]
    with pytest.raises(SystemExit) as left:
        main(["bench", part, "--tiny", "--device", "cpu", "--iterations", "1", *extra, "--json", str(file)])
    assert left.value.code == 0
    assert "slipstream" in capsys.readouterr().out
    data = json.loads(file.read_text())
    assert "slipstream" in str(data)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "qwen4"], "no such preset"),
        (["--rivals", "axolotl"], "--rivals axolotl: use one or more of transformers"),
        (["--gate", "fair"], "--gate fair: use one or more of balanced, learned"),
        (["--set", "hidden_size"], "--set hidden_size: give KEY=VALUE"),
        (["--rival-env", "nemo=/nowhere"], "no such folder"),
        (["--device", "cuda:3"], "--device cuda:3: use cuda or cpu"),
        (["--packed", "100"], "does not divide"),
        (["layer", "--tokens", "many"], "give whole numbers"),
        (["layer", "--dtype", "int8"], "use bfloat16"),
    ],
)
def test_mistakes_start_nothing(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["bench", *arguments])
    assert left.value.code == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_no_file_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.json").write_text("mine")
    with pytest.raises(SystemExit):
        main(["bench", *TINY, "--json", str(tmp_path / "out.json")])
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out.json").read_text() == "mine"
