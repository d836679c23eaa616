"""Run a function on several ranks of this machine, and hear what went wrong on which."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import pytest

# The fork server imports these once for all ranks of all tests; a rank then starts in milliseconds. A plain fork of
# pytest would not do: autograd refuses to run in the child of a process that has used it.
_IMPORTED_ONCE = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers", "slipstream.auto",
                  "slipstream.moe.dispatch", "slipstream.train.run", "tests.tiny_models", "tests.train.tiny_chat",
                  "tests.conftest"]  # fmt: skip


class RankFailedError(AssertionError):
    """A rank raised, died or did not come back in time."""


def run_ranks(
    function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120.0, backend: str = "gloo"
) -> list[Any]:
    """`function(*args)` on `ranks` ranks, one torch thread each; what each rank returned, in their order.

    `function` is importable (module level) and finds the default process group ready, and RANK, WORLD_SIZE and
    LOCAL_RANK in the environment. With `backend="nccl"` rank r has GPU r. Arguments and results are pickled. Under
    torchrun only rank 0 starts ranks.

    Raises:
        RankFailedError: with the traceback of the rank that failed first; the others are stopped. Also when a rank
            dies or `timeout` seconds pass.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        pytest.skip("rank 0 of torchrun starts the ranks of this test")
    # A process must not be forked once anything in it has looked for GPUs.
    context: Any = multiprocessing.get_context("forkserver" if backend == "gloo" else "spawn")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        waiting: dict[Connection, int] = {}
        processes = []
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe(duplex=False)
                job = (theirs, f"{folder}/store", rank, ranks, timeout, backend, function, args)
                process = context.Process(target=_rank, args=job, daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                waiting[ours] = rank
            deadline = time.monotonic() + timeout
            while waiting:
                # A pipe is ready when its rank reports and when it dies.
                ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
                if not ready:
                    late = sorted(waiting.values())
                    raise RankFailedError(f"{function.__name__}: rank {late} did not return within {timeout:.0f} s")
                failures = []
                for connection in ready:
                    assert isinstance(connection, Connection)
                    rank = waiting.pop(connection)
                    failed_at, results[rank] = _received(connection, processes[rank])
                    if failed_at is not None:
                        failures.append((failed_at, f"{function.__name__}: rank {rank} {results[rank]}"))
                if failures:
                    # The ranks that lost a peer fail soon after it.
                    raise RankFailedError(min(failures)[1])
        finally:
            for process in processes:
                if not waiting:
                    process.join(timeout=5.0)
                process.kill()
                process.join()
    return [results[rank] for rank in range(ranks)]


def _received(connection: Connection, process: Any) -> tuple[float | None, Any]:
    """When the rank failed, if it did, and its result or what went wrong."""
    try:
        failed_at, value = pickle.loads(connection.recv_bytes())
    except EOFError:
        process.join()
        return 0.0, f"died with exit code {process.exitcode}"
    return failed_at, value


class _Report:
    """Sends the traceback of what is raised inside to the parent."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None:
            message = "failed:\n" + "".join(traceback.format_exception(error))
            self.connection.send_bytes(pickle.dumps((time.monotonic(), message)))
        return error is not None


def _rank(
    connection: Connection,
    store: str,
    rank: int,
    ranks: int,
    timeout: float,
    backend: str,
    function: Callable[..., Any],
    args: Any,
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with _Report(connection):
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
        )
        result = function(*args)
        # Plain pickle copies tensors; multiprocessing's own would share memory that ends with this process.
        connection.send_bytes(pickle.dumps((None, result)))
        dist.destroy_process_group()
