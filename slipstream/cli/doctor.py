"""`slipstream doctor`: what is installed, what it changes, and what is set up wrongly."""

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
from typing import Annotated, Any

import typer
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

# The packages that a run stands on, in the order in which people ask for them.
CORE = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors")

# module, names on the package index, what it changes today. A module is looked up, never imported.
OPTIONAL = (
    ("gguf", ("gguf",), "`slipstream upcycle` reads .gguf files"),
    ("triton", ("triton",), "our kernels on a GPU: fused loss, sum over experts (comes with CUDA torch)"),
    ("deep_ep", ("deep_ep", "sgl-deep-ep"), "not used yet; expert-parallel exchange between nodes"),
    ("quack", ("quack-kernels",), "not used yet; Hopper GEMMs for experts and the loss"),
    ("flash_attn", ("flash-attn",), "BackendConfig(attn='flash_attention_2')"),
    (None, ("flash-attn-4",), "BackendConfig(attn='flash_attention_4')"),
    ("fla", ("flash-linear-attention",), "used by Transformers itself in linear-attention layers"),
    ("mamba_ssm", ("mamba-ssm",), "used by Transformers itself in Mamba layers"),
    ("causal_conv1d", ("causal-conv1d",), "used by Transformers itself in Mamba and linear-attention layers"),
    ("liger_kernel", ("liger-kernel",), "not used yet; fused norms and RoPE"),
    ("transformer_engine", ("transformer-engine",), "not used yet; FP8 linear layers"),
    ("torchao", ("torchao",), "8-bit optimizers, by Transformers' names (`optim: adamw_torch_8bit`)"),
)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as one JSON object.")] = False,
) -> None:
    """Show versions, GPUs, optional packages and what each would change, and common misconfigurations."""
    report = collect()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        render(report, Console())


def collect() -> dict[str, Any]:
    """Everything `doctor` shows, as JSON data.

    Keys: `versions` (name to version or None), `gpus` (dicts of name, memory_gib, capability), `optional` (dicts of
    package, version or None, effect) and `problems` (sentences, each with its fix).
    """
    torch_cuda, gpus = _torch_devices()
    driver_gpus = gpus or _driver_devices()
    versions = {"python": platform.python_version(), "slipstream": _version("slipstream")}
    versions |= {name: _version(name) for name in CORE}
    versions["cuda (of torch)"] = torch_cuda
    optional = [
        {"package": names[0], "version": _optional_version(module, names), "effect": effect}
        for module, names, effect in OPTIONAL
    ]
    problems = requirement_problems() + device_problems(torch_cuda, usable=bool(gpus), present=bool(driver_gpus))
    return {"versions": versions, "gpus": driver_gpus, "optional": optional, "problems": problems}


def requirement_problems() -> list[str]:
    """Packages outside the ranges of slipstream's own metadata; a missing package of an extra is no problem."""
    problems = []
    for line in importlib.metadata.requires("slipstream") or []:
        requirement = Requirement(line)
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        installed = _version(requirement.name)
        if installed is None and needed:
            problems.append(f"{requirement.name} is missing: pip install '{requirement.name}{requirement.specifier}'")
        elif installed is not None and not requirement.specifier.contains(installed, prereleases=True):
            problems.append(
                f"{requirement.name} {installed} is outside the supported range: "
                f"pip install '{requirement.name}{requirement.specifier}'"
            )
    return sorted(set(problems))


def device_problems(torch_cuda: str | None, *, usable: bool, present: bool) -> list[str]:
    """How torch and the machine's GPUs fail to meet.

    Args:
        torch_cuda: the CUDA version that torch was built for, or None.
        usable: torch sees a GPU.
        present: torch or the driver sees a GPU.
    """
    if present and torch_cuda is None:
        return ["the driver lists a GPU but torch is a CPU build: reinstall torch from the plain package index"]
    if present and not usable:
        return ["the driver lists a GPU but torch cannot use it: check CUDA_VISIBLE_DEVICES and the driver's version"]
    if torch_cuda is not None and not present:
        return [f"torch is built for CUDA {torch_cuda} but there is no GPU: the CPU build takes several GB less"]
    return []


def render(report: dict[str, Any], console: Console) -> None:
    """Print a report of `collect` as tables."""
    versions = Table("package", "version", title="Versions", title_justify="left")
    for name, version in report["versions"].items():
        versions.add_row(name, version or "missing")
    console.print(versions)

    gpus = Table("GPU", "memory (GiB)", "capability", title="GPUs", title_justify="left")
    for gpu in report["gpus"] or [{"name": "none", "memory_gib": "", "capability": ""}]:
        gpus.add_row(gpu["name"], str(gpu["memory_gib"]), gpu["capability"])
    console.print(gpus)

    optional = Table("package", "version", "what it changes", title="Optional packages", title_justify="left")
    for row in report["optional"]:
        optional.add_row(row["package"], row["version"] or "missing", row["effect"])
    console.print(optional)

    for problem in report["problems"] or ["no problem found"]:
        console.print(f"- {problem}", markup=False, highlight=False, soft_wrap=True)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _optional_version(module: str | None, names: tuple[str, ...]) -> str | None:
    """The installed version; "unknown" where the module is there without package metadata."""
    versions = [version for version in map(_version, names) if version is not None]
    if versions:
        return versions[0]
    return "unknown" if module is not None and importlib.util.find_spec(module) is not None else None


def _torch_devices() -> tuple[str | None, list[dict[str, Any]]]:
    """The CUDA version of torch and the GPUs it can use."""
    if importlib.util.find_spec("torch") is None:
        return None, []
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = round(device.total_memory / 2**30, 1)
        found.append({"name": device.name, "memory_gib": memory, "capability": f"{device.major}.{device.minor}"})
    return torch.version.cuda, found


def _driver_devices() -> list[dict[str, Any]]:
    """The GPUs that NVIDIA's driver lists, for when torch sees none."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    listing = subprocess.run(query, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        return []
    rows = [line.split(", ") for line in listing.stdout.splitlines()]
    return [{"name": name, "memory_gib": round(float(mib) / 1024, 1), "capability": cap} for name, mib, cap in rows]
