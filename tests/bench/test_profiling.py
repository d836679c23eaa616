import pytest

from slipstream.bench.profiling import category_of, profile, summarize
from slipstream.bench.worker import execute
from tests.bench.test_step import CPU, options


def span(category: str, name: str, start: float, length: float, correlation: int | None = None) -> dict[str, object]:
    arguments = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "args": arguments}


def test_summary_of_a_trace() -> None:
    """100 us of which kernels cover 0-20, 30-60 (two overlapping) and 80-90; the last was launched by the optimizer."""
    found = summarize(
        [
            span("user_annotation", "bench.step", 1000, 100),
            span("user_annotation", "bench.forward", 1000, 40),
            span("user_annotation", "bench.optimizer", 1060, 30),
            span("gpu_user_annotation", "bench.optimizer", 1080, 10),
            span("cuda_runtime", "cudaLaunchKernel", 1001, 1, 1),
            span("cuda_driver", "cuLaunchKernelEx", 1002, 1, 2),
            span("cuda_runtime", "cudaMemcpyAsync", 1003, 1, 3),
            span("cuda_runtime", "cudaLaunchKernelExC", 1061, 1, 4),
            span("cuda_runtime", "cudaStreamSynchronize", 1062, 1, 5),
            span("kernel", "nvjet_hsh_128x256", 1000, 20, 1),
            span("kernel", "triton_poi_fused_mul_0", 1030, 20, 2),
            span("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 1040, 20, 3),
            span("kernel", "some_gemm_inside_the_optimizer", 1080, 10, 4),
            {"ph": "M", "name": "process_name", "args": {}},
        ]
    )
    assert {row["name"]: (row["ms"], row["launches"]) for row in found["categories"]} == {
        "other GEMM": (0.02, 1),
        "elementwise, norms, RoPE": (0.02, 1),
        "copies": (0.02, 1),
        "optimizer": (0.01, 1),
    }
    assert sum(row["percent"] for row in found["categories"]) == pytest.approx(100)
    assert (found["launches"], found["host_launches"]) == (4, 4)
    assert found["kernel_ms"] == pytest.approx(0.07)
    assert found["busy_ms"] == pytest.approx(0.06)
    assert (found["wall_ms"], found["idle_percent_profiled"]) == (pytest.approx(0.1), pytest.approx(40))
    assert [kernel["name"] for kernel in found["kernels"]][-1] == "some_gemm_inside_the_optimizer"


@pytest.mark.parametrize(
    ("kernel", "category"),
    [
        ("void cutlass::device_kernel<...GemmUniversal<cutlass::gemm::GroupProblemShape<cute::tuple>>>", "expert GEMM"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTT", "other GEMM"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>", "copies"),
        ("_quantize_columns_kernel", "quantisation"),
        ("Memset (Device)", "copies"),
        ("void at::native::vectorized_gather_kernel<16, long>", "gather, scatter, sort"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>", "loss"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", "elementwise, norms, RoPE"),
        ("something else", "other"),
    ],
)
def test_categories(kernel: str, category: str) -> None:
    assert category_of(kernel) == category


def test_a_step_can_be_profiled() -> None:
    from slipstream.bench.contenders import build
    from slipstream.bench.measure import PARTS, Step, make_batch
    from slipstream.bench.options import Job

    job = Job(options(), "slipstream", "learned", profile=True)
    step = Step(build(job, CPU, 1), make_batch(job.options, 512, CPU, 0))
    before = step.contender.model.lm_head.weight.detach().clone()
    found = profile(step, {part: [1.0, 3.0] for part in PARTS})
    assert found["step_ms"] == 6
    assert found["layers"] == 4
    assert found["host_ms"].keys() == set(PARTS)
    assert found["wall_ms"] > 0  # the step's range was found in the trace
    assert (found["launches"], found["idle_percent"], found["syncs"]) == (0, 100.0, [])  # no GPU here
    assert not before.equal(step.contender.model.lm_head.weight)
    assert "profile" in execute(job)
