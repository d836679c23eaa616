"""Fills the compile caches on disk: a step of ours of each architecture, several processes at once.

A row of `slipstream coverage --speed` takes 25-40 s on a fresh machine, nearly all of it compiling on one core; with
its kernels on disk 3-18 s. `python -m slipstream.coverage.warm JOB` is one of the processes.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed

from slipstream.bench.options import OURS, Job
from slipstream.coverage.speed import Timed


def warm(every: Iterable[Timed], workers: int, seconds: float, tell: Callable[[str], None]) -> None:
    """Compile what `every` model's step needs; one that fails or takes longer than `seconds` is left as it is."""
    with ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(_compile, timed, workers, seconds): timed.model for timed in every}
        for job in as_completed(jobs):
            if problem := job.result():
                tell(f"{jobs[job]}: not compiled beforehand: {problem}")


def _compile(timed: Timed, workers: int, seconds: float) -> str | None:
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": threads, "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-m", "slipstream.coverage.warm", Job(timed, OURS, "learned").to_json()]
    try:
        done = subprocess.run(command, env=environment, timeout=seconds, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return f"more than {seconds:g} s"
    lines = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else (lines[-1][:200] if lines else f"exit code {done.returncode}")


def main(arguments: list[str]) -> None:
    """A forward and a backward; no optimizer, so that several models fit beside each other."""
    from slipstream.bench.contenders import build, resolved_device
    from slipstream.bench.measure import Step, make_batch, token_ids

    job = Job.from_json(arguments[0], Timed)
    options, device = job.options, resolved_device(job.options)
    step = Step(build(job, device, 1), make_batch(options, token_ids(options.config()), device, 0))
    step.forward()
    step.backward()


if __name__ == "__main__":
    main(sys.argv[1:])
