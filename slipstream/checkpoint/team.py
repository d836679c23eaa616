"""Ranks that write a model together fail together."""

from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from slipstream.parallel.setup import rank_and_ranks

T = TypeVar("T")


class SavingError(RuntimeError):
    """A model could not be saved; raised on all ranks."""


class Team:
    """As a context it keeps this rank's error back until `share`, so that the ranks stay in step and raise together."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if not isinstance(error, Exception):
            return False
        self.error = self.error or error
        return True

    def share(self, value: T) -> list[T]:
        """Every rank's value.

        Raises: SavingError if any rank has had an error.
        """
        message = None if self.error is None else f"{type(self.error).__name__}: {self.error}"
        everyone: Any = [(message, value)]
        if rank_and_ranks()[1] > 1:
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, (message, value))
        failed = [f"rank {rank}: {message}" for rank, (message, _) in enumerate(everyone) if message is not None]
        if failed:
            raise SavingError(f"saving the model failed on {'; '.join(failed)}") from self.error
        return [value for _, value in everyone]
