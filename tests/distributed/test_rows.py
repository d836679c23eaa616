"""Which rows two ranks train on and evaluate: those of one, counted once, also where the last batch is incomplete."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.parallelism_config import ParallelismConfig

import slipstream.train.run
from slipstream.train.recipe_file import load_recipe
from slipstream.train.run import run
from tests.distributed.harness import run_ranks
from tests.train.tiny_chat import make_checkpoint, make_tokenizer, write_jsonl, write_recipe

EPOCH = {"eval_fraction": 0.25}  # 15 rows to train on, and 5 held out
STREAM = {"streaming": True, "eval_fraction": 0}
# What of a recipe, the rows of a micro-batch on one rank, and what two ranks are told besides.
RUNS: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "epochs": ({"data": EPOCH, "train": {"num_train_epochs": 2}, "eval": {"per_device_eval_batch_size": 2}}, 4, []),
    "packed": ({"data": {**EPOCH, "packing": True, "max_length": 128}}, 4, []),
    "stream": ({"data": STREAM, "train": {"max_steps": 4}}, 4, ["checkpoint.save_steps=2"]),
    "tensor parallel": ({"data": EPOCH, "train": {"max_steps": 2}}, 4, ["distributed.tp_size=2"]),
}


def train(path: Path, overrides: list[str]) -> None:
    assert run(load_recipe(path, overrides)[0], file=io.StringIO()) is not None


def train_all(jobs: list[tuple[Path, list[str]]]) -> None:
    # Both refuse tp_size on a CPU.
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    slipstream.train.run.check_setup = lambda setup, config: None
    for job in jobs:
        train(*job)


def curve(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "tokens", "eval_loss")
    return [{key: line[key] for key in kept if key in line} for line in lines if "train_runtime" not in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of `RUNS` by two ranks, in `two`, and by one, in `out`."""
    folder = tmp_path_factory.mktemp("rows")
    checkpoint = make_checkpoint(folder / "tiny", make_tokenizer())
    (folder / "files").mkdir()
    for name in "abc":
        write_jsonl(folder / "files" / f"{name}.jsonl", [{"text": f"{name} {'so ' * i}{i}"} for i in range(20)])
    jobs = []
    for name, (changes, rows, more) in RUNS.items():
        (folder / name).mkdir()
        path = write_recipe(folder / name, checkpoint, **changes)
        if name == "stream":
            path.write_text(path.read_text().replace(f"{folder / name / 'rows.jsonl'}", f"{folder / 'files'}"))
        train(path, [f"train.per_device_train_batch_size={rows}"])
        of_two = rows if name == "tensor parallel" else rows // 2
        overrides = [f"train.per_device_train_batch_size={of_two}", f"train.output_dir={folder / name / 'two'}", *more]
        jobs.append((path, overrides))
    run_ranks(train_all, 2, jobs)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_give_the_curve_of_one(folder: Path, name: str) -> None:
    expected = curve(folder / name / "out")
    assert len(expected) >= 2
    for got, one in zip(curve(folder / name / "two"), expected, strict=True):
        assert got == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
def test_one_rank_continues_a_stream_of_two(folder: Path) -> None:
    two = folder / "stream" / "two" / "checkpoints" / "step-000002"
    rest = folder / "stream" / "rest"
    recipe = folder / "stream" / "recipe.yaml"
    train(recipe, [f"train.output_dir={rest}", f"checkpoint.resume_from_checkpoint={two}"])
    for got, one in zip(curve(rest), curve(folder / "stream" / "out")[2:], strict=True):
        assert got == pytest.approx(one, rel=1e-4)
    others = [f"train.output_dir={folder / 'others'}", "train.dataloader_num_workers=2"]
    with pytest.raises(ValueError, match=r"train\.dataloader_num_workers is 1 there and 2 here"):
        train(recipe, [*others, f"checkpoint.resume_from_checkpoint={two}"])
