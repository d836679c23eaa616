"""The planner's choices and refusals, on GPUs that need not exist."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from slipstream.cli.plan import as_data, verdict
from slipstream.parallel.setup import CHECKPOINTING
from slipstream.planning import plan as search
from slipstream.planning.gpus import GPUS, Gpu, find_gpu, parse_gpus
from slipstream.planning.measured import CONSTANTS
from slipstream.planning.memory import GIB
from slipstream.planning.plan import Plan, make_plan
from slipstream.train.recipe import DEFAULT_BATCH_SIZE, Recipe
from slipstream.train.recipe_file import load_recipe

H100 = GPUS["H100-80GB"]


def recipe(preset: str = "qwen3-30b-a3b", /, **sections: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {
        "model": {"config": preset, "dtype": "bfloat16"},
        "data": {"train": "-", "max_length": 4096},
        "train": {"output_dir": "-", "per_device_train_batch_size": 1},
    }
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    return Recipe.model_validate(values)


def plan(gpus: int = 8, gpu: Gpu = H100, **sections: dict[str, Any]) -> Plan:
    return make_plan(recipe(**sections), gpus, gpu)


def test_the_best_is_the_fastest_that_fits() -> None:
    made = plan(distributed={"ep_size": 8})
    assert made.given.fits
    assert made.nearest is None
    assert made.best is not None
    assert made.best.fits
    assert made.best.time.tokens_per_second >= made.given.time.tokens_per_second
    assert list(made.modes) == list(CHECKPOINTING)
    assert made.given.memory == made.modes["none"].memory


def test_does_not_fit_and_what_does() -> None:
    """4 x 4096 tokens need checkpointing; the batch and the layout stay."""
    made = plan(distributed={"ep_size": 8}, train={"per_device_train_batch_size": 4})
    assert not made.given.fits
    assert made.nearest is not None
    assert made.nearest.layout == dataclasses.replace(made.given.layout, checkpointing="full")
    said = verdict(made)
    assert said[0].startswith("does not fit, because a GPU needs 106")
    assert "and has 79.1 (activations" in said[0]
    assert said[1].startswith("the nearest that fits is ep_size 8, dp_replicate 1, micro-batch 4, checkpointing full")


def test_too_large_for_these_gpus() -> None:
    made = plan(1)
    assert made.best is None
    assert made.nearest is not None
    assert made.nearest.fits
    assert made.nearest.layout.gpus in (4, 8)
    assert f"is {made.nearest.layout.gpus} x H100-80GB" in verdict(made)[1]


def test_nothing_fits() -> None:
    made = plan(1, dataclasses.replace(H100, memory_gib=1.0))
    assert made.nearest is None
    assert "train adapters" in verdict(made)[1]


def test_layouts_that_are_not_looked_at_would_not_fit() -> None:
    made = plan(8, dataclasses.replace(H100, memory_gib=60.0))
    model, layout, gpu = made.model, made.given.layout, made.given.gpu
    every = [model.estimate(other, gpu) for other in search._candidates(model, layout)]
    found = search._fitting(model, layout, gpu)
    assert found == [estimate for estimate in every if estimate.fits]
    assert 0 < len(found) < len(every)


def test_an_expert_parallel_size_that_does_not_go() -> None:
    made = plan(2, GPUS["H200"], distributed={"ep_size": 8})
    assert made.given.layout.ep_size == 2
    assert made.notes == (
        "distributed.ep_size=8 does not go with 128 routed experts on 2 GPUs a replica (allowed: 1, 2); planned with 2",
    )
    dense = make_plan(recipe("qwen3-8b", distributed={"ep_size": 2}), 2, H100)
    assert dense.given.layout.ep_size == 1
    assert "no routed experts" in dense.notes[0]


@pytest.mark.parametrize(
    ("distributed", "message"),
    [({"tp_size": 2}, "tp_size=2: not planned yet"), ({"cpu_offload": True}, "cpu_offload=True: not planned yet"),
     ({"dp_replicate": 3}, "dp_replicate=3 does not divide 8 GPUs")],
)  # fmt: skip
def test_refusals(distributed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(distributed=distributed)


def test_recipe_settings_reach_the_layout() -> None:
    made = plan(
        distributed={"ep_size": 4, "dp_replicate": 2, "reshard_after_forward": False},
        train={"gradient_accumulation_steps": 3, "optim": "slipstream_adamw_master"},
        model={"config": "qwen3-30b-a3b", "backend": {"compile": "none", "loss": "transformers"}},
    )
    layout = made.given.layout
    assert (layout.ep_size, layout.dp_replicate, layout.reshard_after_forward) == (4, 2, False)
    assert (layout.accumulation, layout.optimizer) == (3, "slipstream_adamw_master")
    assert (layout.compiled, layout.fused_loss) == (False, False)
    assert made.given.time.tokens == 3 * 4096
    ddp = plan(distributed={"strategy": "ddp"}).given.layout
    assert (ddp.dp_replicate, ddp.shards) == (8, 1)
    whole = plan(model={"config": "qwen3-30b-a3b", "dtype": "float32"}).given.layout
    assert (whole.weight_bytes, whole.compute_bytes, whole.optimizer) == (4, 2, "adamw_torch_fused")


@pytest.mark.parametrize("rows", [1, "auto"])
def test_the_rows_of_a_step_are_as_training_has_them(rows: int | str) -> None:
    accumulated = plan(train={"gradient_accumulation_steps": 8}).given
    made = plan(train={"global_batch_size": 64, "per_device_train_batch_size": rows})
    assert made.given.layout.accumulation == 8
    assert made.given.memory == accumulated.memory
    assert made.given.time.tokens == accumulated.time.tokens
    assert made.best is not None
    assert made.best.layout.micro_batch > 1
    assert made.best.layout.micro_batch * made.best.layout.accumulation == 8
    with pytest.raises(ValueError, match="global_batch_size=12 is no multiple of 8"):
        plan(train={"global_batch_size": 12, "per_device_train_batch_size": rows})
    assert plan(train={"per_device_train_batch_size": "auto"}).given.layout.accumulation == DEFAULT_BATCH_SIZE


def test_modules_that_train_in_whole_beside_adapters() -> None:
    without, made = plan(lora={"r": 8}), plan(lora={"r": 8, "modules_to_save": ["embed_tokens", "lm_head"]})
    saved = 2 * 151936 * 2048
    assert made.model.shape.saved == saved
    parts, before = made.given.memory.parts, without.given.memory.parts
    assert (parts["adapters"] - before["adapters"]) * GIB * 8 == pytest.approx(2 * saved)
    assert (parts["optimizer"] - before["optimizer"]) * GIB * 8 == pytest.approx(4 * saved)
    assert made.given.memory.gradients_gib > without.given.memory.gradients_gib


def test_lora() -> None:
    some = plan(lora={"r": 8, "target_modules": ["q_proj", "v_proj"]})
    every = plan(lora={"r": 8})
    assert {linear.name.rpartition(".")[2] for linear in some.model.shape.linears} == {"q_proj", "v_proj"}
    assert some.given.memory.gradients_gib < every.given.memory.gradients_gib
    assert some.given.time.step_ms < plan().given.time.step_ms
    experts = plan(lora={"r": 8, "target_modules": [], "target_parameters": "all-experts"}).model.shape
    (up, down) = experts.linears[:2]
    assert (up.inputs, up.outputs, down.inputs, down.outputs) == (128 * 2048, 128 * 1536, 128 * 768, 128 * 2048)
    assert len(experts.linears) == 2 * len(experts.layers)
    shared = plan(lora={"r": 8, "target_modules": [], "target_parameters": "all-experts", "share_experts": True})
    assert [(one.inputs, one.outputs) for one in shared.model.shape.linears[:2]] == [(2048, 1536), (768, 2048)]
    with pytest.raises(ValueError, match="matches no linear layer"):
        plan(lora={"target_modules": ["nothing"]})


def test_experts_in_4_bits_fit_a_smaller_gpu() -> None:
    """The example on one GPU of 48 GB, of which torch sees 44.4; in 16 bits it does not fit."""
    path = Path(__file__).parents[2] / "examples" / "qlora.yaml"
    made, whole = (
        make_plan(load_recipe(path, [f"lora.load_in_4bit={on}"])[0], 1, GPUS["L40S"]) for on in ("true", "false")
    )
    assert made.given.fits
    assert not whole.given.fits
    parts, shape = made.given.memory.parts, made.model.shape
    assert parts["expert weights"] * GIB == pytest.approx(shape.routed * 4.5 / 8)
    assert parts["dequantised experts"] * GIB == pytest.approx(2 * 128 * 3 * 2048 * 768)
    assert parts["dense weights"] == whole.given.memory.parts["dense weights"]
    assert made.given.time.step_ms > whole.given.time.step_ms
    # Packed experts have one owner each: as many expert-parallel ranks as GPUs.
    small = make_plan(load_recipe(path)[0], 1, GPUS["RTX4090"])
    assert not small.given.fits
    assert small.nearest is not None
    assert small.nearest.layout.ep_size == small.nearest.layout.gpus == 2
    four = make_plan(load_recipe(path)[0], 4, H100)
    assert four.given.layout.ep_size == 4
    assert any("planned with 4" in note for note in four.notes)


def test_what_4_bits_do_not_go_with() -> None:
    lora = {"r": 8, "load_in_4bit": True}
    with pytest.raises(ValueError, match="describes a dense model"):
        plan(1, model={"config": "qwen3-8b", "dtype": "bfloat16"}, lora=lora)
    with pytest.raises(ValueError, match=r"8 GPUs take distributed.ep_size=8.*dp_replicate=1 \(given 2\)"):
        plan(lora=lora, distributed={"dp_replicate": 2, "ep_size": 4})


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    """A folder without weights, and a hub name that a preset has the shapes of."""
    from slipstream.bench.presets import build_config

    build_config("olmoe-1b-7b", 2).save_pretrained(tmp_path)
    made = make_plan(recipe(model={"config": None, "name_or_path": str(tmp_path)}), 1, H100)
    assert len(made.model.shape.layers) == 2
    named = make_plan(recipe(model={"config": None, "name_or_path": "Qwen/Qwen3-30B-A3B"}), 8, H100)
    assert named.notes == ("the shapes of Qwen/Qwen3-30B-A3B are those of the preset qwen3-30b-a3b",)
    with pytest.raises(OSError, match="no config there"):
        make_plan(recipe(model={"config": None, "name_or_path": "nobody/nothing"}), 8, H100)


def test_550b_on_128_gpus() -> None:
    loaded, _ = load_recipe("examples/nemotron-3-ultra-550b.yaml")
    made = make_plan(loaded, 128, H100)
    assert made.given.fits
    assert made.model.parameters.total == pytest.approx(550e9, rel=0.01)
    # 8 bytes a parameter of 128 GPUs, and something on top.
    assert made.given.memory.peak_gib > 8 * 549e9 / 128 / 2**30 - 9
    assert made.given.layout.ep_size == 64
    assert as_data(made, [])["given"]["fits"] is True


def test_faster_gpus_are_faster() -> None:
    order = ["B200", "H200", "H100-80GB", "A100-80GB", "L40S", "RTX4090"]
    speeds = [make_plan(recipe("qwen3-8b"), 1, GPUS[name]).given.time.tokens_per_second for name in order]
    assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [("8xH100-80GB", 8, "H100-80GB"), ("2 x H200", 2, "H200"), ("h100", 1, "H100-80GB"), ("4xRTX 4090", 4, "RTX4090"),
     ("128xA100", 128, "A100-80GB"), ("NVIDIA B200", 1, "B200"), ("L40S", 1, "L40S")],
)  # fmt: skip
def test_gpus(text: str, count: int, name: str) -> None:
    assert parse_gpus(text) == (count, GPUS[name])


@pytest.mark.parametrize("text", ["", "8", "0xH100", "8xTPU", "-1xH100"])
def test_no_such_gpus(text: str) -> None:
    with pytest.raises(ValueError, match="give a number and one of B200, H200"):
        parse_gpus(text)


def test_gpus_by_the_drivers_name() -> None:
    names = {"NVIDIA H200": "H200", "NVIDIA H100 80GB HBM3": "H100-80GB", "NVIDIA A100-SXM4-40GB": "A100-40GB",
             "NVIDIA A100-SXM4-80GB": "A100-80GB", "NVIDIA L40S": "L40S",
             "NVIDIA GeForce RTX 4090": "RTX4090"}  # fmt: skip
    assert {device: find_gpu(device).name for device in names} == names
    for device in ("NVIDIA GH200 480GB", "Tesla T4", "NVIDIA L40"):
        with pytest.raises(ValueError, match="no GPU of this name is known"):
            find_gpu(device)


def test_every_constant_says_where_it_is_from() -> None:
    for constant in CONSTANTS.values():
        assert constant.value > 0
        assert constant.unit
        file = constant.source.split(",")[0].split(":")[0]
        if file.startswith("benchmarks/"):
            assert Path(file).is_file(), file
        else:
            assert constant.source.startswith(("assumed", "fitted", "project notes")), constant.source


def test_all_peaks_are_known() -> None:
    assert all(gpu.peak_tflops > 100 for gpu in GPUS.values())
