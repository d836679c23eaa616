"""Runs a probe on a process for each GPU, so that one that crashes or hangs takes nothing else down."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

_GRACE = 2.0  # seconds for the others after one has failed, to say why


def on_ranks(probe: str, ranks: int, device: str, seconds: float) -> dict[str, Any] | str:
    """The answer of a function in `slipstream.doctor.probe`, run on `ranks` processes; in words why there is none.

    Args:
        probe: the function's name.
        device: "cuda", a GPU for each rank, or "cpu".
        seconds: until all processes are ended.
    """
    with tempfile.TemporaryDirectory(prefix="slipstream-doctor-") as folder, ExitStack() as stack:
        started = []
        for rank in range(ranks):
            environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment["OMP_NUM_THREADS"] = "1"
            files = [stack.enter_context(Path(folder, f"{rank}.{name}").open("w+")) for name in ("out", "err")]
            command = [sys.executable, "-m", "slipstream.doctor.probe", probe, device, f"file://{folder}/store",
                       str(seconds)]  # fmt: skip
            process = subprocess.Popen(command, stdout=files[0], stderr=files[1], env=environment,
                                       start_new_session=True)  # fmt: skip
            stack.callback(_end, process)
            started.append((process, files))
        deadline = time.monotonic() + seconds
        failed = None
        while time.monotonic() < deadline and any(process.poll() is None for process, _ in started):
            codes = [process.poll() for process, _ in started]
            if failed is None and any(codes):
                failed = next(rank for rank, code in enumerate(codes) if code)
                deadline = min(deadline, time.monotonic() + _GRACE)
            time.sleep(0.05)
        codes = [process.poll() for process, _ in started]
        if failed is None and any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
        if failed is not None:
            return f"rank {failed} {_fate(codes[failed])}{_last_words(started[failed][1][1])}"
        if None in codes:
            return f"no answer within {seconds:g} s"
        answer = started[0][1][0]
        answer.seek(0)
        lines = answer.read().splitlines()
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _fate(code: int | None) -> str:
    assert code
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _last_words(errors: Any) -> str:
    """Its exception, from what it wrote to stderr; the last line where there is none."""
    errors.seek(0)
    # torch tags lines with the rank, and warns at exit, behind the exception.
    lines = [re.sub(r"^\[rank\d+\]: ?", "", line).strip() for line in errors.read().splitlines()]
    lines = [line for line in lines if line and not re.match(r"\[[WI]\d", line)]
    trace = max((number for number, line in enumerate(lines) if line.startswith("Traceback")), default=0)
    begins = (number for number in range(trace, len(lines)) if re.match(r"[\w.]+(Error|Exception)\b", lines[number]))
    told = lines[next(begins, len(lines) - 1) :]
    return f": {' '.join(told)[:300]}" if told else ""
