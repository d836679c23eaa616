"""`slipstream plan` as a user calls it: on a machine without a GPU, from a config alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.cli import main


def run(*arguments: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["plan", *arguments])
    captured = capsys.readouterr()
    assert caught.value.code == code, captured.err
    return captured.out if code in (0, 2) else captured.err


def test_the_examples(capsys: pytest.CaptureFixture[str]) -> None:
    one = run("examples/qwen3-30b-a3b.yaml", "--gpus", "8xH100-80GB", capsys=capsys)
    assert "30.5 B parameters, 3.4 B active, on 8 x H100-80GB" in one
    assert "selective (given)" in one
    assert "\nfits: " in one
    other = run("examples/qwen3-30b-a3b.yaml", "distributed.ep_size=2", "--gpus", "2xH200", capsys=capsys)
    assert "ep_size 2" in other
    large = run("examples/nemotron-3-ultra-550b.yaml", "--gpus", "128xH100-80GB", "--sources", capsys=capsys)
    assert "549.3 B parameters" in large
    assert "dense GEMM" in large


def test_json_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    text = run("--model", "qwen3-30b-a3b", "--layers", "8", "--gpus", "1xH200", "--json", capsys=capsys)
    data = json.loads(text)
    given = data["given"]
    assert given["fits"]
    assert given["peak_gib"] == pytest.approx(sum(given["memory_gib"].values()))
    assert set(data["modes"]) == {"none", "selective", "full"}
    assert (given["layout"]["gpus"], given["layout"]["ep_size"], given["layout"]["seq_len"]) == (1, 1, 4096)


def test_what_does_not_fit_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    text = run("--model", "qwen3-30b-a3b", "--gpus", "8xRTX4090", capsys=capsys, code=2)
    assert "does not fit, because a GPU needs " in text
    assert "the nearest that fits is 16 x RTX4090" in text


def test_check_of_recorded_benchmarks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(run("--check", "benchmarks/results", "--json", capsys=capsys))
    assert len(rows) >= 3
    assert "no *.json there" in run("--check", str(tmp_path), capsys=capsys, code=1)


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give a number and one of B200" in run("--model", "qwen3-8b", "--gpus", "8xTPU", capsys=capsys, code=1)
    assert "give a RECIPE.yaml, or --model" in run(capsys=capsys, code=1)
    assert "no such file: nothing" in run("--model", "nothing", capsys=capsys, code=1)


def test_a_wrong_gpu_is_told_without_waiting_for_torch() -> None:
    code = "import sys; from slipstream.cli import main\ntry: main(['plan', '--model', 'x', '--gpus', '1xTPU'])\n"
    code += "except SystemExit: assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
