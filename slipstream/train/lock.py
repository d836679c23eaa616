"""One run at a time in an output folder: a second one would delete what the first is writing."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from slipstream.parallel.setup import failing_together, rank_and_ranks

LOCK_FILE = ".running"


def check_free(output: Path) -> None:
    """Raises: ValueError where another run holds `output`. For the first rank, before anything is written."""
    with suppress(FileNotFoundError, NotADirectoryError), open(output / LOCK_FILE, "r+", encoding="utf-8") as file:
        _take(file, output)


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Hold `output`, which is made if need be, until the block ends; every rank enters. The system lets go of it when
    the process dies.

    Raises: ValueError on all ranks where another run holds it.
    """
    with ExitStack() as stack:
        with failing_together():
            if rank_and_ranks()[0] == 0:
                stack.enter_context(_held(output))
        yield


@contextmanager
def _held(output: Path) -> Iterator[None]:
    created = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    path = output / LOCK_FILE
    while True:
        with ExitStack() as stack:
            file = stack.enter_context(open(path, "a+", encoding="utf-8"))
            _take(file, output)
            with suppress(FileNotFoundError):  # else the run before has just removed it
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    file.truncate(0)
                    file.write(f"{socket.gethostname()}, process {os.getpid()}")
                    file.flush()
                    stack.pop_all()
                    break
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        if created and not any(output.iterdir()):
            output.rmdir()


def _take(file: TextIO, output: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(
            f"train.output_dir: another run is writing to {output} ({file.read() or 'just started'}); name another "
            "folder, or let that run end"
        ) from None
    except OSError:  # a file system without locks
        pass
