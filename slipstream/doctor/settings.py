"""What is commonly set up wrongly, each with its fix. Looks at facts alone, so that a test can make any machine up."""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# The oldest driver that runs programs of a CUDA version: NVIDIA's CUDA release notes, minor-version compatibility.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
CACHE_GIB = 20.0  # less room than this does not hold a small MoE
SHARED_GIB = 1.0
USED_GIB = 2.0  # of a GPU, before anything of ours runs

# Variable, whether it matters without a second GPU, what it does.
SWITCHES = (
    ("CUDA_LAUNCH_BLOCKING", True, "the host waits for every kernel, which is several times slower"),
    ("PYTORCH_NO_CUDA_MEMORY_CACHING", True, "every tensor is asked of the driver, which is far slower"),
    ("TRITON_INTERPRET", True, "kernels are interpreted in Python, which is for tests on a CPU"),
    ("TORCHDYNAMO_DISABLE", True, "no layer is compiled"),
    ("TORCH_COMPILE_DISABLE", True, "no layer is compiled"),
    ("NCCL_P2P_DISABLE", False, "GPUs of one host exchange through its memory instead of their links"),
    ("NCCL_SHM_DISABLE", False, "GPUs of one host without links between them exchange over the network"),
    ("NCCL_IB_DISABLE", False, "hosts exchange over TCP, also where they have InfiniBand or RoCE"),
)


@dataclass(frozen=True)
class Machine:
    """The facts that are judged.

    Attributes:
        environment: of this process.
        cores: that this process may use.
        torch_cuda: the CUDA version torch is built for, None of a CPU build.
        gpus: that torch can use.
        driver_gpus: that the driver lists.
        driver: its version.
        used_gib: of each GPU, by anybody.
        shared_gib: size of /dev/shm, None where there is none.
        cache: where models from the hub go, and `cache_gib`, the room there.
        compiler: whether there is a C compiler, which Triton needs.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    cores: int = 8
    torch_cuda: str | None = None
    gpus: int = 0
    driver_gpus: int = 0
    driver: str | None = None
    used_gib: tuple[float | None, ...] = ()
    shared_gib: float | None = None
    cache: str = "~/.cache/huggingface/hub"
    cache_gib: float = 1000.0
    compiler: bool = True


def this_machine(torch_cuda: str | None, gpus: int, driver: str | None, used_gib: tuple[float | None, ...]) -> Machine:
    """The machine that this process runs on; `used_gib` has an entry for each GPU that the driver lists."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    shared = Path("/dev/shm")
    compilers = [os.environ[name] for name in ("CC",) if name in os.environ] or ["cc", "gcc", "clang"]
    return Machine(
        environment=dict(os.environ),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        torch_cuda=torch_cuda,
        gpus=gpus,
        driver_gpus=len(used_gib),
        driver=driver,
        used_gib=used_gib,
        shared_gib=shutil.disk_usage(shared).total / 2**30 if shared.is_dir() else None,
        cache=str(cache),
        cache_gib=shutil.disk_usage(existing).free / 2**30,
        compiler=any(shutil.which(name.split()[0]) for name in compilers if name),
    )


def problems(machine: Machine) -> list[str]:
    """What keeps a run from working or from its speed."""
    return [*_device(machine), *_switches(machine), *_threads(machine), *_room(machine)]


def hints(machine: Machine) -> list[str]:
    """What helps some runs; nothing on a machine without GPUs."""
    if not machine.gpus:
        return []
    found = []
    allocator = [machine.environment.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")]
    if not any("expandable_segments" in text for text in allocator):
        found.append(
            "if a run goes out of memory while much of it is reserved and unused (rows of very different lengths): "
            "PYTORCH_ALLOC_CONF=expandable_segments:True"
        )
    if machine.gpus > 1 and "OMP_NUM_THREADS" not in machine.environment:
        share = max(1, machine.cores // machine.gpus)
        found.append(
            f"torchrun gives each rank one CPU thread; OMP_NUM_THREADS={share} uses the cores (--nproc does so itself)"
        )
    if not _on(machine, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        found.append(
            "before torchrun --max-restarts: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or restarted ranks can wait "
            "for each other for ever (pytorch#135712)"
        )
    return found


def _device(machine: Machine) -> list[str]:
    present = max(machine.gpus, machine.driver_gpus) > 0
    cuda = machine.torch_cuda
    if present and cuda is None:
        return ["the driver lists a GPU but torch is a CPU build: reinstall torch from the plain package index"]
    if cuda is not None and not present:
        return [f"torch is built for CUDA {cuda} but there is no GPU: the CPU build takes several GB less"]
    oldest, driver = OLDEST_DRIVER.get(_major(cuda)), _major(machine.driver)
    if oldest is not None and driver and driver < oldest:
        return [
            f"the driver ({machine.driver}) is older than torch's CUDA {cuda} allows: update it to {oldest} or newer, "
            "or install a torch built for an older CUDA"
        ]
    if present and not machine.gpus:
        return ["the driver lists a GPU but torch cannot use it: check CUDA_VISIBLE_DEVICES and the driver's version"]
    found = []
    if machine.gpus and not machine.compiler:
        found.append(
            "no C compiler: Triton needs one to start its kernels; apt-get install gcc libc6-dev, or set CC to one"
        )
    for index, used in enumerate(machine.used_gib):
        if used is not None and used > USED_GIB:
            found.append(f"GPU {index} has {used:.1f} GiB in use already: nvidia-smi lists the processes")
    return found


def _switches(machine: Machine) -> list[str]:
    if not machine.gpus:
        return []
    found = [
        f"{name}={machine.environment[name]}: {effect}; unset it"
        for name, always, effect in SWITCHES
        if _on(machine, name) and (always or machine.gpus > 1)
    ]
    if machine.environment.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL":
        found.append("TORCH_DISTRIBUTED_DEBUG=DETAIL: every collective is checked on all ranks first; unset it")
    return found


def _threads(machine: Machine) -> list[str]:
    text = machine.environment.get("OMP_NUM_THREADS")
    if text is None:
        return []
    if not re.fullmatch(r"\s*[1-9]\d*(\s*,\s*[1-9]\d*)*\s*", text):
        return [f"OMP_NUM_THREADS={text!r} is no number: set it to the cores a rank may use, at most {machine.cores}"]
    threads = int(text.split(",")[0])
    if threads > machine.cores:
        return [
            f"OMP_NUM_THREADS={threads}, but this process may use {machine.cores} cores: the threads wait for one "
            f"another; set it to {machine.cores} or less"
        ]
    return []


def _room(machine: Machine) -> list[str]:
    found = []
    if machine.gpus and machine.shared_gib is not None and machine.shared_gib < SHARED_GIB:
        found.append(
            f"/dev/shm has {machine.shared_gib * 1024:.0f} MiB, and NCCL and data loaders share memory there: docker "
            "run --ipc host or --shm-size 16g; Kubernetes: mount an emptyDir with medium: Memory"
        )
    if machine.cache_gib < CACHE_GIB:
        found.append(
            f"{machine.cache} has {machine.cache_gib:.1f} GiB left for models from the hub: set HF_HOME to a folder "
            "on a larger disk"
        )
    return found


def _on(machine: Machine, name: str) -> bool:
    return machine.environment.get(name, "").strip().lower() not in ("", "0", "false", "off", "no", "n")


def _major(version: str | None) -> int:
    return int(found[0]) if (found := re.match(r"\d+", version or "")) else 0
