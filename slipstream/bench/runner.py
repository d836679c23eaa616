"""Starts a process for every contender, gate and repeat, in alternation, and collects what they found."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slipstream.bench.options import GATES, OURS, RIVALS, Job, Options
from slipstream.bench.worker import FAILURE, RESULT


@dataclass(frozen=True)
class Plan:
    """Who is measured how often.

    Attributes:
        rivals: in the order of the table; the first is what ratios refer to.
        gates: "balanced", "learned" or both.
        repeats: processes of each contender and gate.
        profile: whether the last repeat of each ends with a profiled step.
        rival_env: rival -> folder of packages that goes before all others.
        timeout_minutes: when a process counts as hung.
    """

    rivals: Sequence[str]
    gates: Sequence[str]
    repeats: int = 2
    profile: bool = False
    rival_env: Mapping[str, str] = field(default_factory=dict)
    timeout_minutes: float = 20.0

    def __post_init__(self) -> None:
        for name, given, allowed in (("--rivals", self.rivals, RIVALS), ("--gate", self.gates, GATES)):
            if unknown := [value for value in given if value not in allowed]:
                raise ValueError(f"{name} {unknown[0]}: use one or more of {', '.join(allowed)}")
        if not self.gates:
            raise ValueError("--gate: give balanced, learned or both")
        if self.repeats < 1:
            raise ValueError(f"--repeats {self.repeats}: give 1 or more")
        for name, folder in self.rival_env.items():
            if name not in RIVALS:
                raise ValueError(f"--rival-env {name}={folder}: the rivals are {', '.join(RIVALS)}")
            if not Path(folder).is_dir():
                raise ValueError(f"--rival-env {name}={folder}: no such folder")

    @property
    def contenders(self) -> tuple[str, ...]:
        return (*self.rivals, OURS)


def run(plan: Plan, options: Options, tell: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Every job's result, or `error` instead: dicts with at least `contender`, `gate` and `repeat`.

    Args:
        tell: called with a line of progress before each job.
    """
    runs = []
    moe = bool(_experts(options))
    gates = plan.gates if moe else plan.gates[-1:]  # a dense model has no gate
    for repeat in range(plan.repeats):
        for gate in gates:
            for contender in plan.contenders:
                job = Job(options, contender, gate if moe else "learned", plan.profile and repeat == plan.repeats - 1)
                tell(f"{contender}, {job.gate if moe else 'dense'}, {repeat + 1} of {plan.repeats}")
                runs.append({"contender": contender, "gate": job.gate, "repeat": repeat, **run_job(job, plan)})
                if "error" in runs[-1]:
                    tell(f"  failed: {runs[-1]['error']}")
    return runs


def run_job(job: Job, plan: Plan) -> dict[str, Any]:
    """What `worker.execute` returns, from a process of its own; `{"error": …, "log": …}` if it failed."""
    command = [sys.executable]
    # NeMo reads torchrun's variables on one GPU too.
    if job.options.nproc > 1 or job.contender == "nemo":
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.options.nproc}"]
    command += ["-m", "slipstream.bench.worker", job.to_json()]
    with tempfile.TemporaryFile("w+") as log:
        before = _sigterm_raises()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, text=True, env=_environment(job, plan),
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(timeout=plan.timeout_minutes * 60)
            hung = False
        except subprocess.TimeoutExpired:
            hung = True
        finally:
            _stop(process)
            if before is not None:
                signal.signal(signal.SIGTERM, before)
        log.seek(0)
        lines = log.read().splitlines()
    for line in lines:
        if line.startswith(RESULT) and process.returncode == 0:
            return json.loads(line.removeprefix(RESULT))
    # The ranks write to one log at once: behind a line's first message another's may follow.
    decode = json.JSONDecoder().raw_decode
    failures = [decode(line.removeprefix(FAILURE))[0] for line in lines if line.startswith(FAILURE)]
    if hung:
        failures.insert(0, f"no result after {plan.timeout_minutes:g} minutes")
    error = failures[0] if failures else f"exit code {process.returncode}"
    return {"error": error.splitlines()[0][:300], "log": "\n".join(lines[-60:])}


def _sigterm_raises() -> Any:
    """From here on SIGTERM runs `finally` clauses: contenders have sessions of their own and would outlive us.

    Returns the handler to put back; None outside the main thread, which alone may change it.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _stop(process: subprocess.Popen[str]) -> None:
    """End a process that still runs. torchrun passes SIGTERM on to its ranks, which have sessions of their own."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _environment(job: Job, plan: Plan) -> dict[str, str]:
    """This process's, without a torchrun around it, with the rival's packages first and ourselves last."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TORCHELASTIC_", "MASTER_"))
        and name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    }
    paths = [plan.rival_env[job.contender]] if job.contender in plan.rival_env else []
    paths += [path for path in [environment.get("PYTHONPATH")] if path]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, str(Path(__file__).parents[2])])
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if job.options.nproc > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def _experts(options: Options) -> int | None:
    from slipstream import hf

    return hf.num_routed_experts(options.config())
