"""Ranks on this machine for one command, started and ended by torchrun's process layer."""

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def start_ranks(nproc: int, arguments: Sequence[str]) -> int:
    """Run `slipstream ARGUMENTS` on `nproc` ranks as `torchrun --standalone` does; the exit code.

    It differs from torchrun where a run is told to stop: a signal goes on to the ranks, which then have all the time
    they need for their checkpoint (torchrun kills them after 30 seconds), and their exit code is this one's.

    Raises: ValueError when the ranks do not fit: too many for the GPUs, or inside another launcher.
    """
    if nproc < 1:
        raise ValueError(f"--nproc {nproc}: give the number of ranks, 1 or more")
    if "WORLD_SIZE" in os.environ:
        raise ValueError(f"--nproc {nproc}: torchrun has started this already; leave --nproc out")
    import torch
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    if 0 < (gpus := torch.cuda.device_count()) < nproc:
        raise ValueError(f"--nproc {nproc}: this machine has {gpus} GPU{'s' * (gpus > 1)}; use at most that many")
    # The ranks meet in this store, so no port can be taken by another process meanwhile.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": nproc,
        "LOCAL_WORLD_SIZE": nproc,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // nproc)),
    }
    context = start_processes(
        name="slipstream",
        entrypoint=sys.executable,
        args=dict.fromkeys(range(nproc), ("-u", "-m", "slipstream.cli", *arguments)),
        envs={rank: {key: str(x) for key, x in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
              for rank in range(nproc)},
        logs_specs=DefaultLogsSpecs(),
    )  # fmt: skip

    def forward(number: int, frame: FrameType | None) -> None:
        for pid in context.pids().values():
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.kill(pid, number)

    previous = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        result = context.wait(period=0.1)
    finally:
        context.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    assert result is not None
    codes = [failure.exitcode for _, failure in sorted(result.failures.items())]
    for told in (os.EX_TEMPFAIL, 128 + signal.SIGINT):
        if told in codes:
            return told
    return 1 if codes else 0
