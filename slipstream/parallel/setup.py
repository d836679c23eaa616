"""How a model is spread over the ranks of a job."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STRATEGIES = ("fsdp2",)


@dataclass(frozen=True)
class DistributedSetup:
    """Parallelism of a job, as a dimension each.

    Every rank trains on its own data (`dp` = number of ranks). Expert parallelism lies across the same ranks: of
    `ep_size` neighbouring ranks each holds its share of the experts.

    Attributes:
        strategy: `"fsdp2"`: dense weights, gradients and optimizer states are sharded over all ranks.
        ep_size: ranks that share the experts of a layer between them; divides both the number of experts and the
            number of ranks.

    Raises:
        ValueError: a value that does not exist.
    """

    strategy: str = "fsdp2"
    ep_size: int = 1

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy={self.strategy!r}: use one of {', '.join(map(repr, STRATEGIES))}")
        if isinstance(self.ep_size, bool) or not isinstance(self.ep_size, int) or self.ep_size < 1:
            raise ValueError(f"ep_size={self.ep_size!r}: give a whole number of ranks, 1 or more")

    @classmethod
    def of(cls, value: "DistributedSetup | Mapping[str, Any] | None") -> "DistributedSetup":
        """`value` as a `DistributedSetup`: itself, the fields of a mapping, or one without sharding for None."""
        if value is None:
            return cls()
        return value if isinstance(value, DistributedSetup) else create_distributed_setup_from_config(value)

    @property
    def ranks(self) -> int:
        """The number of ranks of this job, as torchrun set it."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    def check(self, num_experts: int | None) -> None:
        """Refuse sizes that do not fit a model with `num_experts` routed experts a layer (None: dense) and this job.

        Raises:
            ValueError: names the sizes that would work.
        """
        if self.ep_size == 1:
            return
        if num_experts is None:
            raise ValueError(f"ep_size={self.ep_size}, but this model has no routed experts; leave ep_size out")
        works = [size for size in range(1, num_experts + 1) if num_experts % size == 0]
        if self.ep_size not in works:
            listed = ", ".join(map(str, works))
            raise ValueError(f"ep_size={self.ep_size} does not divide {num_experts} experts; use one of {listed}")
        if self.ranks % self.ep_size:
            fits = ", ".join(str(size) for size in works if self.ranks % size == 0)
            raise ValueError(
                f"ep_size={self.ep_size} does not divide the {self.ranks} rank{'s' * (self.ranks > 1)} of this job; "
                f"use one of {fits}, or start more ranks (torchrun --nproc-per-node={self.ep_size} …)"
            )


def create_distributed_setup_from_config(config: Mapping[str, Any]) -> DistributedSetup:
    """A `DistributedSetup` from plain data, such as a recipe's `distributed:` section.

    Raises:
        TypeError: `config` is not a mapping.
        ValueError: an unknown key or a value that does not exist.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"distributed_setup must be a DistributedSetup or a dict, not {type(config).__name__}")
    fields = [field.name for field in dataclasses.fields(DistributedSetup)]
    if unknown := [key for key in config if key not in fields]:
        raise ValueError(f"distributed_setup has no field {', '.join(map(repr, unknown))}; it has {', '.join(fields)}")
    return DistributedSetup(**config)
