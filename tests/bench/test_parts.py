"""The expert layer, the optimizer and the loss alone."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from slipstream.bench import layer
from slipstream.bench.layer import bench_layer
from slipstream.bench.loss import bench_loss, shape_of
from slipstream.bench.optimizer import bench_optimizer
from slipstream.bench.timing import copy_bandwidth, time_ms
from slipstream.moe import grouped_mm

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Liger or torchao is installed, its kernels would not run on a CPU."""
    for module in ("layer", "loss", "optimizer"):
        monkeypatch.setattr(f"slipstream.bench.{module}.find_spec", lambda _: None)


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "gpt-oss-20b", "nemotron-3-nano-30b-a3b", "nemotron-3-ultra-550b"])
def test_layer(model: str) -> None:
    rows = list(bench_layer(model, [16], CPU, tiny=True, iterations=1))
    assert [row["routing"] for row in rows] == ["balanced", "learned"] * 4
    for row in rows:
        assert (row["tokens"], row["experts"], row["top_k"]) == (16, 8, 2)
        assert row["imbalance"] == 1 or row["routing"] == "learned"
        if row["contender"] in ("slipstream", "transformers grouped_mm"):
            assert row["ms"]["forward_backward"]["min"] > 0
            flops = row["tflops"]["forward"] * row["ms"]["forward"]["median"]
            assert flops * 3 == pytest.approx(
                row["tflops"]["forward_backward"] * row["ms"]["forward_backward"]["median"]
            )


def test_layer_beside_some_rivals_alone() -> None:
    def rows(*rivals: str) -> list[str]:
        found = bench_layer("qwen3-30b-a3b", [16], CPU, tiny=True, iterations=1, rivals=rivals)
        return [row["contender"] for row in found]

    assert rows() == ["slipstream"] * 2
    assert rows("liger") == ["slipstream"] * 2 + ["liger fused moe"] * 2
    with pytest.raises(ValueError, match="--rivals deepgemm: use some of transformers,liger,sonic"):
        rows("deepgemm")


def _stand_in(calls: list[str]) -> ModuleType:
    """The package sonicmoe as bench calls it, written out."""

    def general(x, scores, tokens, experts, up_NHE, up_bias, down_HIE, down_bias, count, stream, kind, concat_layout):
        assert concat_layout
        assert (tokens.diff() >= 0).all(), "it wants tokens in order"
        calls.append(kind)
        hidden = torch.einsum("rh,nhr->rn", x[tokens], up_NHE[..., experts])
        gate, up = hidden.chunk(2, dim=-1)
        rows = torch.einsum("ri,hir->rh", torch.nn.functional.silu(gate) * up, down_HIE[..., experts])
        return torch.zeros_like(x).index_add(0, tokens, rows * scores[:, None].to(rows.dtype)), None

    package: Any = ModuleType("sonicmoe")
    package.moe_general_routing_inputs = general
    return package


def test_sonic_moe_gets_the_layer_that_ours_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("slipstream.bench.layer.find_spec", lambda _: True)
    monkeypatch.setitem(sys.modules, "sonicmoe", _stand_in(calls))
    enums: Any = ModuleType("sonicmoe.enums")
    enums.ActivationType = SimpleNamespace(SWIGLU="swiglu")
    monkeypatch.setitem(sys.modules, "sonicmoe.enums", enums)
    owner, module = layer._experts_module("qwen3-30b-a3b", 8, True, CPU, torch.float32)
    inputs = layer._inputs(module, 16, 2, "learned", CPU, torch.float32)
    outs = {name: forward(*inputs) for name, forward in layer._contenders(owner, module, ["sonic"])}
    torch.testing.assert_close(outs["sonic-moe (quack)"], outs["slipstream"])
    assert calls == ["swiglu"]


def test_a_package_that_does_not_run_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no kernel\nmore")

    monkeypatch.setattr(layer, "_sonic", lambda _: fails)
    rows = list(bench_layer("qwen3-30b-a3b", [16], CPU, tiny=True, iterations=1, rivals=["sonic"]))
    assert [row.get("error") for row in rows] == [None, None, *["RuntimeError: no kernel"] * 2]


def test_layer_counts_the_operations_of_its_products() -> None:
    row = next(bench_layer("qwen3-30b-a3b", [16], CPU, tiny=True, iterations=1))
    rows, hidden, intermediate = 16 * 2, 64, 32
    expected = 2 * rows * (hidden * 2 * intermediate + intermediate * hidden)
    assert row["tflops"]["forward"] * row["ms"]["forward"]["median"] * 1e9 == pytest.approx(expected)


def test_a_rank_s_share_of_a_group() -> None:
    row = next(bench_layer("qwen3-30b-a3b", [16], CPU, tiny=True, iterations=1, simulate_ep=4))
    assert (row["tokens"], row["experts"], row["top_k"]) == (32, 2, 1)
    with pytest.raises(ValueError, match="does not divide 8 experts"):
        list(bench_layer("qwen3-30b-a3b", [16], CPU, tiny=True, simulate_ep=3))
    with pytest.raises(ValueError, match="dense model"):
        list(bench_layer("qwen3-8b", [16], CPU, tiny=True))


def test_layer_contenders_run_different_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from slipstream.bench import layer

    chosen = []
    original = layer._measure
    monkeypatch.setattr(
        layer,
        "_measure",
        lambda forward, module, *rest: (
            chosen.append(module.config._experts_implementation) or original(forward, module, *rest)
        ),
    )
    list(bench_layer("qwen3-30b-a3b", [16], CPU, tiny=True, iterations=1))
    assert chosen[:4] == ["slipstream", "slipstream", "grouped_mm", "grouped_mm"]


def test_a_layer_in_fp8_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [row["contender"] for row in bench_layer("qwen3-30b-a3b", [16], CPU, tiny=True, iterations=1)]
    assert "slipstream fp8" not in names
    monkeypatch.setattr("slipstream.fp8.obstacle", lambda device: None)
    calls, original = [], grouped_mm.grouped_mm_fp8
    monkeypatch.setattr(grouped_mm, "grouped_mm_fp8", lambda *given: calls.append(None) or original(*given))
    row = list(bench_layer("qwen3-30b-a3b", [16], CPU, tiny=True, iterations=1))[4]
    assert (row["contender"], row["ms"]["forward_backward"]["min"] > 0, len(calls) > 4) == (
        "slipstream fp8",
        True,
        True,
    )
    rows = list(bench_layer("qwen3-30b-a3b", [16], CPU, dtype=torch.float32, tiny=True, iterations=1))
    assert "slipstream fp8" not in [row["contender"] for row in rows]


def test_liger_runs_where_its_layout_fits() -> None:
    reasons = {
        model: list(bench_layer(model, [16], CPU, tiny=True, iterations=1))[-1].get("error")
        for model in ("qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v3", "gpt-oss-20b", "nemotron-3-nano-30b-a3b")
    }
    assert [reason == "only SwiGLU as [gate; up] without biases" for reason in reasons.values()] == [0, 0, 0, 1, 1]


def test_optimizer() -> None:
    found = bench_optimizer("qwen3-30b-a3b", CPU, layers=2, tiny=True, iterations=1)
    rows = {row["contender"]: row for row in found["rows"]}
    fused = rows["torch AdamW fused"]
    # Weights, gradients and two states in bf16: 4 read and 3 written; torch also keeps a step count a tensor.
    assert fused["bytes_per_parameter"] == pytest.approx(14, rel=0.01)
    assert fused["gb_per_s"] == pytest.approx(
        found["parameters"] * fused["bytes_per_parameter"] / fused["ms"]["median"] / 1e6
    )
    assert rows["slipstream AdamW stochastic"]["bytes_per_parameter"] == pytest.approx(14, rel=0.01)
    # The fp32 master, or what bf16 leaves of it, is read and written.
    assert rows["slipstream AdamW master"]["bytes_per_parameter"] >= 18
    assert rows["torchao AdamW 8-bit"].keys() >= {"error"} or rows["torchao AdamW 8-bit"]["bytes_per_parameter"] < 11


def test_loss() -> None:
    hidden, vocabulary = shape_of("qwen3-30b-a3b", tiny=True)
    found = bench_loss(32, hidden, vocabulary, CPU, iterations=1)
    ours, plain, *_ = found["rows"]
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    for row in (ours, plain):
        assert row["over_gemms"] == pytest.approx(row["ms"]["median"] / found["gemm_ms"]["median"])
        assert row["tflops"] * row["ms"]["median"] * 1e9 == pytest.approx(6 * 32 * hidden * vocabulary)


def test_timing_runs_what_it_is_asked_to() -> None:
    calls = []
    found = time_ms(lambda: calls.append(1), CPU, iterations=4, warmup=3)
    assert len(calls) == 7
    assert found["min"] <= found["median"] <= found["max"]
    assert copy_bandwidth(CPU, 2**20) > 0
