"""How a model is spread over the ranks of a job."""

import atexit
import dataclasses
import functools
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

STRATEGIES = ("fsdp2", "ddp")
CHECKPOINTING = ("none", "selective", "full")
DTYPES = (None, "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DistributedSetup:
    """Parallelism of a job, a dimension each.

    `dp_replicate × fsdp × tp_size` is the number of ranks, and every rank (with `tp_size=1`) trains on its own data.
    Expert parallelism lies across the same ranks: within each replica, of `ep_size` neighbouring ranks each holds its
    share of a layer's experts, and the ranks that hold the same ones (`efsdp_size`) shard them further.

    Attributes:
        strategy: `"fsdp2"` shards weights, gradients and optimizer states; `"ddp"` keeps them whole on every rank.
        ep_size: ranks that share the experts of a layer; divides the number of experts and the ranks of a replica.
        dp_replicate: replicas of the sharded model (HSDP), the number of nodes for instance.
        tp_size: ranks that share a dense layer, by Transformers' plan for the architecture. `Trainer`, and so a recipe,
            can do it on GPUs only.
        reshard_after_forward: free a layer's gathered weights after its forward and gather them again for backward;
            None: only where those of all layers take more than 2 GiB.
        param_dtype: what weights are gathered and computed in ("bfloat16"), None for the dtype they are stored in.
        reduce_dtype: what gradients are reduced in, None for the dtype they have.
        cpu_offload: keep weights, gradients and optimizer states in host memory.
        activation_checkpointing: `"full"` computes every layer again in backward, `"selective"` all of it but the
            experts and their exchange between ranks.
        timeout_minutes: how long a rank waits for the others in a collective before the job fails, None for
            PyTorch's default. Only where the process group is ours to make.

    Raises:
        ValueError: a value that does not exist, or sizes that exclude each other.
    """

    strategy: str = "fsdp2"
    ep_size: int = 1
    dp_replicate: int = 1
    tp_size: int = 1
    reshard_after_forward: bool | None = None
    param_dtype: str | None = None
    reduce_dtype: str | None = None
    cpu_offload: bool = False
    activation_checkpointing: str = "none"
    timeout_minutes: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("strategy", STRATEGIES),
            ("activation_checkpointing", CHECKPOINTING),
            ("param_dtype", DTYPES),
            ("reduce_dtype", DTYPES),
            ("reshard_after_forward", (None, True, False)),
            ("cpu_offload", (True, False)),
        ):
            value = getattr(self, name)
            if not any(value is choice or (value == choice and isinstance(value, str)) for choice in allowed):
                raise ValueError(f"{name}={value!r}: use one of {', '.join(map(repr, allowed))}")
        for name in ("ep_size", "dp_replicate", "tp_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: give a whole number of ranks, 1 or more")
        if self.timeout_minutes is not None and not 0 < self.timeout_minutes < math.inf:
            raise ValueError(f"timeout_minutes={self.timeout_minutes!r}: give minutes, more than 0")
        if self.strategy == "ddp":
            for name in ("ep_size", "dp_replicate", "tp_size"):
                if getattr(self, name) > 1:
                    raise ValueError(f"strategy='ddp' keeps the model whole on every rank; {name} needs 'fsdp2'")
        if self.tp_size > 1 and self.ep_size > 1:
            raise ValueError(f"tp_size={self.tp_size} with ep_size={self.ep_size}: use one of the two")

    @classmethod
    def of(cls, value: "DistributedSetup | Mapping[str, Any] | None") -> "DistributedSetup":
        """`value` as a `DistributedSetup`: itself, the fields of a mapping, or all defaults for None."""
        if value is None:
            return cls()
        return value if isinstance(value, DistributedSetup) else create_distributed_setup_from_config(value)

    @property
    def ranks(self) -> int:
        """The number of ranks of this job: of the process group, or as torchrun set it."""
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return dist.get_world_size()
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def replicas(self) -> int:
        """How often the whole model exists."""
        return self.ranks if self.strategy == "ddp" else self.dp_replicate

    @property
    def fsdp_size(self) -> int:
        """The ranks that a dense parameter is sharded over."""
        return self.ranks // (self.replicas * self.tp_size)

    @property
    def dp_size(self) -> int:
        """The ranks that have different data."""
        return self.ranks // self.tp_size

    @property
    def efsdp_size(self) -> int:
        """The ranks of a replica that hold the same experts."""
        return self.fsdp_size * self.tp_size // self.ep_size

    def check(self, num_experts: int | None) -> None:
        """Refuse sizes that do not fit a model with `num_experts` routed experts a layer (None: dense) and this job.

        Raises:
            ValueError: names the sizes that would work.
        """
        if self.ranks % (self.dp_replicate * self.tp_size):
            name = "dp_replicate" if self.ranks % self.dp_replicate else "tp_size"
            fits = _listed(size for size in range(1, self.ranks + 1) if self.ranks % size == 0)
            raise ValueError(
                f"{name}={getattr(self, name)} does not divide the {_ranks(self.ranks)} of this job; use one of {fits}"
            )
        if self.ep_size == 1:
            return
        if num_experts is None:
            raise ValueError(f"ep_size={self.ep_size}, but this model has no routed experts; leave ep_size out")
        works = [size for size in range(1, num_experts + 1) if num_experts % size == 0]
        if self.ep_size not in works:
            raise ValueError(
                f"ep_size={self.ep_size} does not divide {num_experts} experts; use one of {_listed(works)}"
            )
        if self.fsdp_size % self.ep_size:
            whose = "of this job" if self.dp_replicate == 1 else f"of each of the {self.dp_replicate} replicas"
            fits = _listed(size for size in works if self.fsdp_size % size == 0)
            raise ValueError(
                f"ep_size={self.ep_size} does not divide the {_ranks(self.fsdp_size)} {whose}; use one of {fits}, "
                f"or start more ranks (torchrun --nproc-per-node={self.ep_size} …)"
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


def join_process_group(setup: DistributedSetup) -> None:
    """Make the default process group from torchrun's variables and bind this rank's GPU, unless the caller has done so.

    NCCL for GPUs and gloo for CPU tensors, so that both can be exchanged.

    Raises:
        ValueError: the setup asks for something that this machine does not have.
    """
    import torch
    import torch.distributed as dist

    if setup.cpu_offload and not torch.accelerator.is_available():
        raise ValueError(
            "cpu_offload=True: there is no GPU here, so everything is in host memory already; leave it out"
        )
    _let_go_at_exit()
    if dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = None if setup.timeout_minutes is None else timedelta(minutes=setup.timeout_minutes)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)


@functools.cache
def _let_go_at_exit() -> None:
    """Gloo's threads may hold tensors of the last collectives for a moment longer, also when the groups are destroyed;
    a thread that frees one of Python's while the interpreter ends aborts the process (pytorch/pytorch#179291)."""
    atexit.register(time.sleep, 0.2)


_hosts: dict[Any, Any] = {}  # the default process group -> its `host_group`


def host_group(timeout_minutes: float | None = None) -> Any:
    """A group of all ranks whose collectives are the hosts' own, on CPU tensors; made by the first call, which all
    ranks make together and whose timeout it keeps."""
    import torch.distributed as dist

    world = dist.group.WORLD
    if world not in _hosts:
        timeout = None if timeout_minutes is None else timedelta(minutes=timeout_minutes)
        _hosts[world] = dist.new_group(backend="gloo", timeout=timeout)
    return _hosts[world]


def rank_and_ranks() -> tuple[int, int]:
    """This rank and the number of them; (0, 1) without a process group."""
    import torch.distributed as dist

    ready = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if ready else (0, 1)


@contextmanager
def failing_together() -> Iterator[None]:
    """A context that every rank enters: the ValueError or OSError of the first rank that has one inside is raised on
    all."""
    import torch.distributed as dist

    error: ValueError | OSError | None = None
    try:
        yield
    except (ValueError, OSError) as refused:
        error = refused
    mine = None if error is None else (isinstance(error, OSError), str(error))
    everyone: list[tuple[bool, str] | None] = [mine]
    if rank_and_ranks()[1] > 1:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    first = next((found for found in everyone if found is not None), None)
    if first is not None:
        of_system, message = first
        raise error or (OSError(message) if of_system else ValueError(message))


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def _listed(sizes: Any) -> str:
    return ", ".join(map(str, sizes))
