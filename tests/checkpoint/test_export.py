"""The pieces of a distributed save that one process can check."""

import contextlib
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from slipstream.checkpoint.export import export, install_save
from slipstream.checkpoint.export_plan import Holding, Plan, avoid_names_in_use, file_names, make_plan, spans_of
from slipstream.hf import Reversal, saved_tensors
from tests.tiny_models import moe_architectures, tiny_config, tiny_model


def split(tensors: dict[str, torch.Tensor], ranks: int) -> list[dict[str, Holding]]:
    """What each rank holds when dim 0 of every tensor is split over all."""
    return [
        {
            name: Holding(
                tuple(tensor.shape),
                tensor.dtype,
                tuple(spans_of(size, [] if dim else [(0, ranks, rank)]) for dim, size in enumerate(tensor.shape)),
            )
            for name, tensor in tensors.items()
        }
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("model_type", moe_architectures())
def test_parts_become_what_transformers_makes_of_the_whole(model_type: str) -> None:
    model = tiny_model(model_type, None)
    tensors = {name: tensor.detach() for name, tensor in saved_tensors(model).items()}
    expected = revert_weight_conversion(model, dict(tensors))
    reversal = Reversal(model)
    plan = make_plan(split(tensors, 4), reversal, lambda name, dtype: dtype, 100_000, 0)
    written = {}
    for rank, parts in enumerate(plan.parts):
        for part in parts:
            assert part.writer == rank
            rows = slice(None) if part.rows is None else slice(*part.rows)
            unit = {name: tensors[name][rows] if part.rows else tensors[name] for name in part.names}
            for name, tensor in reversal.convert(unit).items():
                name = part.renamed.get(name, name)
                assert name not in written
                assert part.outputs[name] == tensor.nbytes
                written[name] = tensor
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    files = [sorted(keys) for _, keys in plan.shards]
    assert sorted(key for keys in files for key in keys) == sorted(expected)
    loads = [sum(part.nbytes for part in parts) for parts in plan.parts]
    assert max(loads) < 1.1 * min(loads) + max(tensor.nbytes for tensor in tensors.values())


def test_experts_are_written_where_they_are() -> None:
    model = tiny_model("qwen3_moe", None)
    tensors = saved_tensors(model)
    plan = make_plan(split(tensors, 4), Reversal(model), lambda name, dtype: dtype, 10**9, 0)
    for rank, parts in enumerate(plan.parts):
        experts = [part for part in parts if ".experts." in part.names[0]]
        assert all(part.is_local and part.rows == (2 * rank, 2 * rank + 2) for part in experts)
        assert len(experts) == 2 * model.config.num_hidden_layers


def test_spans_follow_the_placements_that_fsdp_makes() -> None:
    assert [spans_of(5, [(0, 4, rank)]) for rank in range(4)] == [((0, 2),), ((2, 4),), ((4, 5),), ()]
    # Eight experts over ep 2 and within each group over efsdp 2: outermost is the strided efsdp.
    held = [spans_of(8, [(2, 2, efsdp), (0, 2, ep)]) for efsdp in range(2) for ep in range(2)]
    assert held == [((0, 2),), ((4, 6),), ((2, 4),), ((6, 8),)]
    assert spans_of(8, [(2, 2, 1)]) == ((2, 4), (6, 8))
    assert spans_of(8, [(2, 2, 1), (0, 4, 1)]) == ((3, 4),)


def test_a_tensor_that_is_held_only_partly_is_refused() -> None:
    model = tiny_model("qwen3_moe", None)
    holdings = split(saved_tensors(model), 2)[:1]
    with pytest.raises(ValueError, match="do not hold the whole of"):
        make_plan(holdings, Reversal(model), lambda name, dtype: dtype, 10**9, 0)


def test_names_of_a_checkpoint_there_are_not_used_again() -> None:
    plan = Plan([], [(0, ["a", "b", "c"]), (1, ["d"])])
    avoid_names_in_use(plan, {2, 5})
    assert plan.shards == [(0, ["a"]), (0, ["b", "c"]), (1, ["d"])]
    assert file_names(plan)[0] == "model-00001-of-00003.safetensors"


@pytest.mark.parametrize("max_shard_size", ["1MB", 200_000])
def test_one_process_writes_what_transformers_writes(max_shard_size: int | str, tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3", None)
    model.save_pretrained(tmp_path / "plain")
    export(model, tmp_path / "export", max_shard_size=max_shard_size)
    expected = load_file(tmp_path / "plain" / "model.safetensors")
    found = {}
    for path in (tmp_path / "export").glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("before", "after"), [(100_000, 100_000), ("1MB", 100_000), (100_000, "1MB"), ("1MB", "1MB")])
def test_a_kill_while_files_move_leaves_the_old_model_or_the_new(
    before: int | str, after: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("qwen3_moe")
    config.num_hidden_layers = 1
    old, new = AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)
    move, remove = Path.replace, Path.unlink
    outcomes = []
    for survived in range(20):
        folder = tmp_path / str(survived)
        export(old, folder, max_shard_size=before)
        steps = iter(range(survived))

        def killed(step: Any, steps: Any = steps) -> Any:
            def act(path: Path, *arguments: Any, **kwargs: Any) -> Any:
                if next(steps, None) is None:
                    raise KeyboardInterrupt
                return step(path, *arguments, **kwargs)

            return act

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(Path, "replace", killed(move))
            patch.setattr(Path, "unlink", killed(remove))
            export(new, folder, max_shard_size=after)
            outcomes.append("finished")
            break
        loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        same = [all(torch.equal(loaded[key], value) for key, value in m.state_dict().items()) for m in (old, new)]
        outcomes.append({(True, False): "old", (False, True): "new"}[tuple(same)])
    assert outcomes == sorted(outcomes, key=["old", "new", "finished"].index)
    assert {"old", "finished"} <= set(outcomes)


def test_installed_method_follows_a_copy_and_is_not_pickled(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", None)
    install_save(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.fill_(7.0)
    twin.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].unique().tolist() == [7.0]
    pickle.loads(pickle.dumps(model)).save_pretrained(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["lm_head.weight"], model.lm_head.weight)


def test_what_export_cannot_do_goes_to_transformers(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", None)
    install_save(model)
    model.save_pretrained(tmp_path, variant="fp32", state_dict=None)
    assert (tmp_path / "model.fp32.safetensors").exists()
    with pytest.raises(ValueError, match="save_dtype does not go together with variant"):
        model.save_pretrained(tmp_path, variant="fp32", save_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="export does not support variant"):
        export(model, tmp_path, variant="fp32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_shard_size": "5 parsecs"}, "max_shard_size='5 parsecs' is not a size"),
        ({"max_shard_size": 0}, "max_shard_size=0"),
        ({"save_dtype": "int8"}, "save_dtype='int8' is not a floating-point dtype"),
    ],
)
def test_refuses_arguments_before_anything_is_written(
    arguments: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export(tiny_model("qwen3_moe", None), tmp_path / "output", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "output").exists()
