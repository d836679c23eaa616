"""Which runs continue which."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slipstream.train.data import Counts
from slipstream.train.recipe import Recipe
from slipstream.train.recipe_file import load_recipe
from slipstream.train.resume import identity, keep_rows_per_step
from slipstream.train.run import prepare
from tests.train.tiny_chat import write_jsonl, write_recipe


def test_what_makes_two_runs_the_same(tmp_path: Path, checkpoint: Path) -> None:
    """Weights and sizes of the sources, and what shares out a stream; not where files lie."""
    sizes = {"a": 5, "b": 7, "c": 7, "d": 5, "e": 5}
    for name, size in sizes.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"row {i}"} for i in range(size)])

    def of(*sources: str, **data: Any) -> dict[str, Any]:
        train = [{"path": str(tmp_path / f"{source[0]}.jsonl"), "weight": int(source[1:])} for source in sources]
        recipe, _ = load_recipe(write_recipe(tmp_path, checkpoint, data={"train": train, "eval_fraction": 0, **data}))
        prepared = prepare(recipe, overwrite=False)
        return identity(prepared.recipe, prepared.data.counts)

    known = of("a1", "b1")
    assert known["data.train"] == ["5 rows of weight 1", "7 rows of weight 1"]
    assert known == of("e1", "c1")
    assert known != of("a9", "b1")
    assert known != of("c1", "d1")  # as many rows in all


def test_workers_that_share_out_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads its own files, and they take turns by micro-batches: other ones would be other rows."""
    data = {"train": "rows.jsonl", "streaming": True, "eval_fraction": 0}
    sections = {"model": {"name_or_path": "model"}, "data": data}
    one, two = (
        Recipe.model_validate({**sections, "train": {"output_dir": "out", "max_steps": 2, "dataloader_num_workers": n}})
        for n in (1, 2)
    )
    counts = Counts(rows=3, tokens=9, source_rows=[3])
    assert identity(one, counts) != identity(two, counts)
    info = {"info": {"rows_per_step": 4, "rows_at_once": 4, "micro_batch": 4}}
    monkeypatch.setattr("slipstream.train.resume.read_info", lambda path: info)
    for recipe, rows, fits in ((one, 2, True), (two, 4, True), (two, 2, False)):
        args: Any = SimpleNamespace(world_size=1, train_batch_size=rows, gradient_accumulation_steps=4 // rows)
        with nullcontext() if fits else pytest.raises(ValueError, match="had 4 rows on all ranks and would have 2"):
            assert keep_rows_per_step(Path("step-000001"), recipe, args) is None
