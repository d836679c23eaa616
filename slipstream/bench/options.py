"""What is measured, as plain data that travels to the process that measures it."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PretrainedConfig

from slipstream.bench.presets import build_config

OURS = "slipstream"
RIVALS = ("transformers", "transformers-ep", "transformers-liger", "nemo")
GATES = ("balanced", "learned")


@dataclass(frozen=True)
class Options:
    """One benchmark: every contender gets the same.

    Attributes:
        model: a preset; `layers`, `experts`, `changes` and `tiny` as in `presets.build_config`.
        seq_len, micro_batch: tokens a row, rows a rank.
        packed: tokens of each document, where rows are packed with several; else None.
        steps, warmup: timed steps of each process, and those before them.
        nproc, ep_size: ranks, and how many of them share a layer's experts.
        activation_checkpointing: "none", "selective" or "full".
        device: "cuda" or "cpu".
        optimizer: ours, "slipstream" or "torch". Rivals have torch's fused AdamW.
        lora: train PEFT's adapters of this rank on attention, dense layers and experts instead of the weights; all
            sides have torch's fused AdamW then.
        load_in_4bit: with `lora`, our experts' own weights are in 4 bits; rivals have them whole.
        backend: fields of our `BackendConfig`.
        cuda_graphs: our forward and backward run as one CUDA graph, `GraphedStep`.
        rival_attn: the attention that rivals on Transformers load with, where the architecture has it.
        nemo_backend: fields of NeMo's `BackendConfig` that win over those of `bench/nemo.py`.
    """

    model: str
    layers: int | None = None
    experts: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    tiny: bool = False
    seq_len: int = 4096
    micro_batch: int = 1
    packed: int | None = None
    steps: int = 10
    warmup: int = 5
    nproc: int = 1
    ep_size: int = 1
    activation_checkpointing: str = "none"
    device: str = "cuda"
    optimizer: str = "slipstream"
    lora: int | None = None
    load_in_4bit: bool = False
    backend: dict[str, Any] = field(default_factory=dict)
    cuda_graphs: bool = False
    rival_attn: str = "sdpa"
    nemo_backend: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("seq_len", "micro_batch", "steps", "nproc", "ep_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more")
        if self.warmup < 1:
            raise ValueError(f"warmup={self.warmup}: give 1 or more, the first step compiles and allocates")
        if self.cuda_graphs and self.warmup < 4:
            raise ValueError(f"warmup={self.warmup} with cuda_graphs: give 4 or more, the fourth step captures")
        if self.packed is not None and (self.packed < 1 or self.seq_len % self.packed):
            raise ValueError(f"packed={self.packed} does not divide the {self.seq_len} tokens of a row")
        if self.lora is not None and self.lora < 1:
            raise ValueError(f"lora={self.lora}: give the rank, 1 or more")
        if self.load_in_4bit and self.lora is None:
            raise ValueError("load_in_4bit without lora: experts in 4 bits do not train; give lora as well")
        if self.nproc % self.ep_size:
            raise ValueError(f"ep_size={self.ep_size} does not divide the {self.nproc} ranks")
        if self.optimizer not in ("slipstream", "torch"):
            raise ValueError(f"optimizer={self.optimizer!r}: use 'slipstream' or 'torch'")

    @property
    def tokens(self) -> int:
        """Tokens of a rank's step."""
        return self.seq_len * self.micro_batch

    @property
    def fp8(self) -> list[str]:
        """What of ours runs in FP8, as `BackendConfig` names it."""
        return [name for name, value in self.backend.items() if value == "fp8"]

    def config(self) -> PretrainedConfig:
        """The model's config."""
        return build_config(self.model, self.layers, experts=self.experts, tiny=self.tiny, changes=self.changes)


@dataclass(frozen=True)
class Job:
    """One process's share: a contender, a gate, and whether to profile a step at the end."""

    options: Options
    contender: str
    gate: str
    profile: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, kind: type[Options] = Options) -> "Job":
        fields = json.loads(text)
        return cls(**{**fields, "options": kind(**fields["options"])})
