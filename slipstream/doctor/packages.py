"""Versions of what a run stands on, and what optional packages change."""

import importlib.metadata
import importlib.util
import platform
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import slipstream

# The packages that a run stands on, in the order in which people ask for them.
CORE = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors")

# module, names on the package index, what it changes today. A module is looked up, never imported.
OPTIONAL = (
    ("triton", ("triton",), "our kernels on a GPU (it comes with CUDA torch); with them and compiled layers a step was "
     "1.24 to 1.79 times as fast as Transformers', GPT-OSS 3.9 times (one H200, benchmarks/results)"),
    ("torchao", ("torchao",), "`train.optim: adamw_torch_8bit`: 2 bytes of optimizer state a parameter instead of 4"),
    ("gguf", ("gguf",), "`slipstream upcycle` reads .gguf files"),
    ("fla", ("flash-linear-attention",), "Transformers' linear-attention layers (Qwen3-Next, …) run as kernels instead "
     "of our batched GEMMs; not measured here"),
    ("mamba_ssm", ("mamba-ssm",), "the same for Mamba layers (Jamba, …); Mamba2's scan (Nemotron-H, …) is our own"),
    ("causal_conv1d", ("causal-conv1d",), "the convolution in both, which compiled layers have in one pass anyway"),
    ("flash_attn", ("flash-attn",), "allows `BackendConfig(attn='flash_attention_2')`; the default needs no package"),
    (None, ("flash-attn-4",), "allows `BackendConfig(attn='flash_attention_4')`; not measured here"),
    ("liger_kernel", ("liger-kernel",), "nothing: norms and RoPE are compiled into the layers and the loss is our own; "
     "`slipstream bench --rivals transformers-liger` compares"),
    ("deep_ep", ("deep_ep", "sgl-deep-ep"), "allows `BackendConfig(dispatcher='deepep')`; the default exchange "
     "is our own; not measured here"),
    ("quack", ("quack-kernels",), "nothing yet: the experts run on PyTorch's grouped GEMM"),
    ("transformer_engine", ("transformer-engine",), "nothing: `BackendConfig(experts='fp8')` needs no package"),
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Of Python, Slipstream and `CORE`; None: not installed."""
    own = _version("slipstream") or f"{slipstream.__version__} (not installed)"  # a source tree on PYTHONPATH
    found = {"python": platform.python_version(), "slipstream": own}
    return found | {name: _version(name) for name in CORE}


def optional_packages() -> list[dict[str, Any]]:
    """`package`, `version` or None, and `effect` of each in `OPTIONAL`."""
    return [
        {"package": names[0], "version": _optional_version(module, names), "effect": effect}
        for module, names, effect in OPTIONAL
    ]


def requirement_problems() -> list[str]:
    """Packages outside the ranges that slipstream states; a missing package of an extra is no problem."""
    problems = []
    for line in _requirements():
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


def _requirements() -> list[str]:
    """Slipstream's, from its metadata, or where it runs without installation, from its source tree if that is there."""
    try:
        return importlib.metadata.requires("slipstream") or []
    except importlib.metadata.PackageNotFoundError:
        source = Path(slipstream.__file__).parents[1] / "pyproject.toml"
    if not source.is_file():
        return []
    project = tomllib.loads(source.read_text(encoding="utf-8"))["project"]
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name != "test"}
    return project["dependencies"] + [f"{line}; extra == '{name}'" for name, lines in extras.items() for line in lines]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _optional_version(module: str | None, names: tuple[str, ...]) -> str | None:
    """The installed version; "unknown" where the module is there without package metadata."""
    found = [version for version in map(_version, names) if version is not None]
    if found:
        return found[0]
    return "unknown" if module is not None and importlib.util.find_spec(module) is not None else None
