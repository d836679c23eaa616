"""Which implementation each operation of the training step uses."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

# Value -> the package it needs (None: nothing beyond the base install).
CHOICES: dict[str, dict[str, str | None]] = {
    "attn": {
        "auto": None,
        "sdpa": None,
        "slipstream": None,
        "eager": None,
        "flex_attention": None,
        "flash_attention_2": "flash_attn",
        "flash_attention_3": "flash_attn_interface",
        "flash_attention_4": "flash_attn.cute",
    },
    "linear": {"auto": None, "torch": None, "fp8": None},
    "experts": {"auto": None, "slipstream": None, "fp8": None, "transformers": None},
    "dispatcher": {
        "auto": None,
        "local": None,
        "all_gather": None,
        "all_to_all": None,
        "hierarchical": None,
        "nvlink": None,
        "deepep": "deep_ep",
    },
    "rms_norm": {"auto": None, "transformers": None},
    "rope": {"auto": None, "transformers": None},
    "loss": {"auto": None, "fused": None, "transformers": None},
    "compile": {"auto": None, "layers": None, "none": None},
    "gate": {"learned": None, "balanced": None},
}

# Where a package is from, where its name does not say.
HOW_TO_GET = {
    "deep_ep": "build it from github.com/deepseek-ai/DeepEP, or `pip install sgl-deep-ep` where a wheel fits your torch"
}


@dataclass(frozen=True)
class BackendConfig:
    """The implementation of each operation; `"auto"` picks one once, when the model is accelerated.

    Attributes:
        attn: attention. `slipstream`: PyTorch's SDPA for plain rows, FlashAttention-2 for packed documents, padding and
            windows, both with sinks. `auto` keeps an `attn_implementation=` and takes `slipstream` otherwise, on a GPU
            and for the architectures that it fits. The rest are Transformers' names.
        linear: dense projections; `fp8`: those of decoder layers but routers, on Hopper.
        experts: the experts' MLP; `fp8`: ours with FP8 GEMMs, on Hopper (`slipstream/fp8.py`); `transformers` keeps
            `experts_implementation=`, or else Transformers' default.
        dispatcher: how tokens reach experts on other ranks. `local`: there are none; `all_gather`: every token goes
            to every rank; `all_to_all`: a token goes to the ranks that hold its experts; `hierarchical`: once to each
            node, and on to the ranks there (`auto` over several nodes); `nvlink`: it is stored into the ranks' memory,
            which takes GPUs of one machine that reach each other's (`auto` there); `deepep`: DeepEP's kernels, in bf16.
        rms_norm, rope: normalisation and rotary embedding; fused by compiling the layer around them.
        loss: `fused` never builds the logits (linear cross-entropy in chunks), `transformers` does.
        compile: what `torch.compile` covers: `layers` is each decoder layer, on its first use; `auto` is that on a GPU.
        gate: `learned` follows the router. `balanced` sends the same number of tokens to every expert whatever the
            router says: for benchmarks only, the model's output is meaningless.

    Raises:
        ValueError: a value that does not exist.
        ImportError: a value whose package is not installed.
    """

    attn: str = "auto"
    linear: str = "auto"
    experts: str = "auto"
    dispatcher: str = "auto"
    rms_norm: str = "auto"
    rope: str = "auto"
    loss: str = "auto"
    compile: str = "auto"
    gate: str = "learned"

    def __post_init__(self) -> None:
        for operation, values in CHOICES.items():
            value = getattr(self, operation)
            if value not in values:
                raise ValueError(f"BackendConfig({operation}={value!r}): use one of {', '.join(map(repr, values))}")
            package = values[value]
            if package is not None and not is_installed(package):
                works = [repr(name) for name, needs in values.items() if needs is None]
                raise ImportError(
                    f"BackendConfig({operation}={value!r}) needs the package {package!r}, which is not installed: "
                    f"{HOW_TO_GET.get(package, 'install it')}, or use one of {', '.join(works)}"
                )
        if self.gate == "balanced" and self.experts == "transformers":
            raise ValueError(
                f"BackendConfig(gate='balanced') works with experts='slipstream' or 'fp8', not {self.experts!r}: "
                "the uniform choice is made inside that implementation"
            )

    @classmethod
    def of(cls, value: "BackendConfig | Mapping[str, Any] | None") -> "BackendConfig":
        """`value` as a `BackendConfig`: itself, the fields of a mapping, or all defaults for None."""
        if isinstance(value, cls):
            return value
        if value is None:
            return cls()
        if not isinstance(value, Mapping):
            raise TypeError(f"backend must be a BackendConfig or a dict, not {type(value).__name__}")
        fields = [field.name for field in dataclasses.fields(cls)]
        if unknown := [key for key in value if key not in fields]:
            raise ValueError(f"BackendConfig has no field {', '.join(map(repr, unknown))}; it has {', '.join(fields)}")
        return cls(**value)


def is_installed(package: str) -> bool:
    """Whether `package` (dotted names allowed) can be imported, found without importing it."""
    parent = package.rpartition(".")[0]
    if parent and not is_installed(parent):
        return False
    return find_spec(package) is not None
