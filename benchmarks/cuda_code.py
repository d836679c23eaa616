"""What Inductor and Triton make of a model's layers on an H200, without a GPU: kernels, PTX, seconds to compile.

    python -m venv cuda && cuda/bin/pip install torch===2.11.0 -e .
    cuda/bin/python benchmarks/cuda_code.py gpt_oss --layers 1 --output /tmp/gpt_oss

Needs a CUDA build of torch and a C compiler. Layers are built from the architecture's default config, as `slipstream
coverage --speed` has them, and run on fake tensors; a stand-in for CUDA's runtime (cuda_stub.c) says that there is an
H200. Nothing runs on it: how fast a kernel is, only a GPU can tell.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_INSIDE = "SLIPSTREAM_CUDA_STUB"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a model_type of Transformers")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--attn", default="auto")
    parser.add_argument("--output", type=Path, help="a folder for the code of graphs and kernels")
    options = parser.parse_args()
    if _INSIDE not in os.environ:
        _start_again()
    _pretend()
    graphs = _graphs(options)
    for number, graph in enumerate(graphs):
        print(f"graph {number}: {len(graph.kernels)} kernels")
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / f"{number}.py").write_text(graph.code)
        for name, source in graph.kernels:
            _report(name, source, options.output)


def _start_again() -> None:
    """The stand-in has to be there before torch is."""
    folder = tempfile.mkdtemp()
    runtime, driver = Path(folder, "cudart_stub.so"), Path(folder, "libcuda.so.1")
    for library in (runtime, driver):
        source = str(Path(__file__).with_name("cuda_stub.c"))
        subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", str(library), source], check=True)
    changes = {"LD_PRELOAD": str(runtime), "LD_LIBRARY_PATH": folder, _INSIDE: "1", "OMP_NUM_THREADS": "1"}
    changes |= {"TRITON_ALWAYS_COMPILE": "1", "PYTHONWARNINGS": "ignore"}
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **changes})


def _pretend() -> None:
    import torch
    from torch._dynamo.device_interface import CudaInterface
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    if torch.version.cuda is None:
        raise SystemExit("this torch is no CUDA build; see the top of this file")
    device = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=140 << 30, warp_size=32,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
        shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
        L2_cache_size=50 << 20, gcnArchName="",
    )  # fmt: skip
    for name, value in {
        "is_available": True, "is_initialized": True, "current_device": 0, "device_count": 1,
        "get_device_properties": device, "get_device_capability": (9, 0), "get_device_name": device.name,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "_lazy_init": None,
        "synchronize": None, "set_device": None, "_exchange_device": 0, "_maybe_exchange_device": 0,
        "mem_get_info": (130 << 30, 140 << 30), "is_bf16_supported": True,
    }.items():  # fmt: skip
        setattr(torch.cuda, name, lambda *_, value=value: value)
    for interface in (CudaInterface, CudaInterface.Worker):
        for name, value in {"current_device": 0, "get_device_properties": device}.items():
            setattr(interface, name, staticmethod(lambda *_, value=value: value))
    torch._C._cuda_getCurrentRawStream = lambda *_: 0
    CudaInterface.get_raw_stream = staticmethod(lambda *_: 0)
    CudaInterface.get_compute_capability = staticmethod(lambda *_: 90)
    fake_tensor.init_gpu_context = lambda *_: None
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
            get_active_torch_device=lambda: torch.device("cuda"), get_device_interface=lambda: torch.cuda,
            get_current_stream=lambda *_: 0, launcher_cls=None,
        )
    )  # fmt: skip


def _graphs(options: argparse.Namespace) -> list[Any]:
    """The graphs of the layers, forward and backward, with their kernels."""
    import torch
    import torch._inductor.config as inductor
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from transformers import AutoModelForCausalLM

    import slipstream
    from slipstream.coverage.shapes import timed_config

    inductor.force_disable_caches, inductor.compile_threads = True, 1
    inductor.shape_padding = False  # is decided by timing GEMMs
    graphs: list[Any] = []
    generate = GraphLowering.codegen

    def keep(self: Any, name: str, source: str, **_: Any) -> Any:
        graphs[-1].kernels.append((name, source))  # when the code of a graph is loaded
        return _Idle()

    def observed(self: Any) -> Any:
        found = generate(self)
        code = getattr(found[0], "value", str(found[0]))
        graphs.append(SimpleNamespace(code=code, kernels=[]))
        return found

    AsyncCompile.triton, GraphLowering.codegen = keep, observed
    config = timed_config(options.model, options.seq_len)
    config.use_cache, config.num_hidden_layers = False, options.layers
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types[: options.layers])
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    slipstream.accelerate(model, backend={"compile": "layers", "attn": options.attn})
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")).train()
        ids = torch.empty((1, options.seq_len), dtype=torch.long, device="cuda")
        failure: Any = None
        try:
            model(input_ids=ids, labels=ids)
        except Exception as error:  # noqa: BLE001  what was compiled cannot run
            failure = error
    if not graphs:
        raise SystemExit(f"no layer was compiled: {failure}")
    return graphs


class _Idle:
    """In the place of a compiled kernel."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def _report(name: str, source: str, output: Path | None) -> None:
    """Compile a kernel with every configuration that Inductor would try."""
    import triton
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    triton_helpers.set_driver_to_gpu = lambda: None
    place = (output or Path(tempfile.mkdtemp())) / f"{name}.py"
    place.write_text(source)
    scope: dict[str, Any] = {"__name__": name, "__file__": str(place)}
    exec(compile(source, str(place), "exec"), scope)
    (kernel,) = (value for value in scope.values() if isinstance(value, triton_heuristics.CachingAutotuner))
    original, made = triton.compile, []

    def observed(*args: Any, **kwargs: Any) -> Any:
        made.append(original(*args, **kwargs))
        return made[-1]

    triton.compile = triton_heuristics.triton.compile = observed
    try:
        for config in kernel.configs:
            began = time.perf_counter()
            with contextlib.suppress(Exception):  # a launcher wants a driver
                kernel._precompile_config(config)
            seconds = time.perf_counter() - began
            ptx = made.pop().asm["ptx"] if made else ""
            counts = (len(re.findall(pattern, ptx)) for pattern in (r"\n\t[a-z@]", r"ld\.global", r"st\.global"))
            told = "{} instructions, {} loads, {} stores".format(*counts)
            print(f"  {seconds:5.1f} s  {told}  {name[:60]} {config.kwargs} {config.num_warps} warps", flush=True)
    finally:
        triton.compile = triton_heuristics.triton.compile = original


if __name__ == "__main__":
    main()
