"""The code that a worker process runs, here in this one."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from slipstream.bench.contenders import build
from slipstream.bench.measure import PARTS, Step, make_batch, routing_imbalance
from slipstream.bench.options import Job, Options
from slipstream.bench.presets import PRESETS
from slipstream.bench.report import LOSS_BOUND
from slipstream.bench.worker import execute
from slipstream.cli import app

CPU = torch.device("cpu")


def options(model: str = "qwen3-30b-a3b", **changes: object) -> Options:
    return Options(**{"model": model, "tiny": True, "seq_len": 64, "steps": 1, "warmup": 1, "device": "cpu", **changes})


@pytest.mark.parametrize("name", PRESETS)
def test_both_sides_compute_the_same(name: str) -> None:
    found = [execute(Job(options(name, steps=5), side, "learned")) for side in ("transformers", "slipstream")]
    assert found[0]["first_loss"] == pytest.approx(found[1]["first_loss"], rel=LOSS_BOUND / 3)
    for side in found:
        assert {part: len(times) for part, times in side["times"].items()} == dict.fromkeys(PARTS, 5)
        assert side["last_loss"] < side["first_loss"]  # the optimizer steps, on the same batch
        assert json.loads(json.dumps(side)) == side


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "nemotron-3-nano-30b-a3b"])
def test_balanced_gate_is_the_same_on_both_sides(name: str) -> None:
    learned = execute(Job(options(name), "transformers", "learned"))
    sides = [execute(Job(options(name), side, "balanced")) for side in ("transformers", "slipstream")]
    assert sides[0]["first_loss"] == pytest.approx(sides[1]["first_loss"], rel=LOSS_BOUND / 3)
    assert sides[0]["first_loss"] != learned["first_loss"]


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gpt-oss-20b"])
def test_both_sides_train_the_same_adapters(name: str) -> None:
    found = [execute(Job(options(name, steps=3, lora=4), side, "balanced")) for side in ("transformers", "slipstream")]
    bare = execute(Job(options(name), "transformers", "balanced"))["first_loss"]
    assert found[0]["first_loss"] == pytest.approx(found[1]["first_loss"], rel=LOSS_BOUND / 3)
    assert found[0]["first_loss"] != pytest.approx(bare, rel=LOSS_BOUND / 3)
    said = [side["settings"]["lora"] for side in found]
    assert said[0] == said[1]
    assert said[0].startswith("r=4, ")
    for side in found:
        assert side["last_loss"] < side["first_loss"]
        assert "torch" in side["settings"]["optimizer"]


def test_experts_in_4_bits() -> None:
    whole, packed = (
        execute(Job(options(steps=3, lora=4, load_in_4bit=on), "slipstream", "balanced")) for on in (False, True)
    )
    assert packed["settings"]["expert weights"] == "nf4"
    assert packed["settings"]["lora"] == whole["settings"]["lora"]
    assert packed["last_loss"] < packed["first_loss"] != whole["first_loss"]
    assert not packed["same_weights"]
    assert "4 bits" in packed["notes"][0]


@pytest.mark.parametrize("side", ["transformers", "slipstream"])
def test_packed_documents_do_not_see_each_other(side: str) -> None:
    """The first documents' loss does not change with what follows in the row."""
    job = Job(options(packed=16), side, "learned")
    contender = build(job, CPU, 1)
    batch = make_batch(job.options, 512, CPU, 0)
    assert batch["position_ids"].tolist() == [list(range(16)) * 4]
    head = {name: tensor.clone() for name, tensor in batch.items()}
    head["labels"][:, 16:] = -100
    other = {**head, "input_ids": head["input_ids"].clone()}
    other["input_ids"][:, :8] = 7  # earlier in the same document: it matters
    head["labels"][:, :16] = -100
    head["labels"][:, 20:32] = batch["labels"][:, 20:32]
    alone = {**head, "input_ids": head["input_ids"].clone()}
    alone["input_ids"][:, :16] = 7  # another document: it does not
    with torch.no_grad():
        assert contender.loss(head).item() == pytest.approx(contender.loss(alone).item(), rel=1e-3)
        other["labels"][:, :16] = batch["labels"][:, :16]
        same = {**other, "input_ids": batch["input_ids"]}
        assert abs(contender.loss(other).item() - contender.loss(same).item()) > 1e-3


def test_imbalance_counts_what_the_router_chose() -> None:
    job = Job(options(), "transformers", "learned")
    contender = build(job, CPU, 1)
    with torch.no_grad():
        for layer in contender.model.model.layers:
            layer.mlp.gate.weight.zero_()  # ties everywhere: the same experts for every token
    found = routing_imbalance(Step(contender, make_batch(job.options, 512, CPU, 0)))
    assert found == {"mean": 4.0, "worst": 4.0}  # 2 of 8 experts take all
    assert not any(module._forward_pre_hooks for module in contender.experts)


def test_batches_differ_by_rank_only() -> None:
    first, again, other = (make_batch(options(), 512, CPU, rank)["input_ids"] for rank in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_checkpointing_and_settings_are_told() -> None:
    full = execute(Job(options(activation_checkpointing="selective"), "transformers", "learned"))
    assert full["notes"] == ["activation checkpointing: full (Transformers has no selective one)"]
    gpt = execute(Job(options("gpt-oss-20b"), "transformers", "learned"))
    assert gpt["notes"] == ["attention: eager (GptOssForCausalLM has no sdpa in Transformers)"]
    ours = execute(Job(options(backend={"loss": "transformers"}, optimizer="torch"), "slipstream", "learned"))
    assert ours["settings"]["loss"] == "transformers"
    assert "torch" in ours["settings"]["optimizer"]


def test_what_a_side_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.bench.contenders.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="give --nproc 2 or more"):
        build(Job(options(), "transformers-ep", "learned"), CPU, 1)
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        build(Job(options(), "transformers-liger", "learned"), CPU, 1)
    with pytest.raises(ValueError, match="needs a GPU"):
        build(Job(options(), "nemo", "learned"), CPU, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"packed": 48}, "does not divide the 64 tokens"),
        ({"warmup": 0}, "give 1 or more"),
        ({"nproc": 4, "ep_size": 3}, "does not divide the 4 ranks"),
        ({"optimizer": "sgd"}, "use 'slipstream' or 'torch'"),
        ({"lora": 0}, "give the rank, 1 or more"),
        ({"load_in_4bit": True}, "give lora as well"),
    ],
)
def test_options_that_do_not_fit(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        options(**changes)


def test_a_job_travels_as_text() -> None:
    job = Job(
        options(backend={"compile": "none"}, changes={"rope_parameters": {"rope_theta": 1.0}}),
        "slipstream",
        "balanced",
        True,
    )
    assert Job.from_json(job.to_json()) == job


def test_a_stopped_bench_leaves_no_process_behind(tmp_path: Path) -> None:
    """The contender has a session of its own: on a GPU it would go on and keep the memory."""
    flags = ["--tiny", "--device", "cpu", "--seq-len", "64", "--layers", "2", "--rivals", "", "--gate", "learned"]
    flags += ["--steps", "100000", "--output", str(tmp_path)]
    command = [sys.executable, "-m", "slipstream.cli", "bench", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (workers := children(process.pid)):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.terminate()
        assert process.wait(timeout=60) == 143
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    finally:
        process.kill()


def test_what_was_done_before_a_stop_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = execute(Job(options("llama-3.2-1b"), "transformers", "learned"))
    answers = iter([done])

    def run_job(job: Job, plan: object) -> object:
        for answer in answers:
            return answer
        raise SystemExit(143)

    monkeypatch.setattr("slipstream.bench.runner.run_job", run_job)
    flags = ["--model", "llama-3.2-1b", "--tiny", "--device", "cpu", "--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        app(["bench", *flags], standalone_mode=False)
    (written,) = tmp_path.glob("*.json")
    rows = json.loads(written.read_text())["rows"]
    assert [row["contender"] for row in rows] == ["transformers"]


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
