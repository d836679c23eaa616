"""The process that measures one job: `python -m slipstream.bench.worker JOB`, with or without torchrun around it."""

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from slipstream.bench.contenders import build, resolved_device
from slipstream.bench.measure import Step, make_batch, measure, routing_imbalance, token_ids
from slipstream.bench.options import OURS, Job

# What marks our lines among whatever else a process prints.
RESULT, FAILURE = "SLIPSTREAM-BENCH-RESULT ", "SLIPSTREAM-BENCH-FAILURE "
_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "liger-kernel",
    "nemo-automodel",
    "torchao",
    "quack-kernels",
    "mamba-ssm",
)


def execute(job: Job) -> dict[str, Any]:
    """Build the job's contender, measure it, and return what was found; on every rank."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = resolved_device(job.options)
    contender = build(job, device, ranks)
    step = Step(contender, make_batch(job.options, token_ids(job.options.config()), device, rank))
    result = measure(step, job.options)
    if job.profile:
        from slipstream.bench.profiling import profile

        result["profile"] = profile(step, result["times"])
    result["imbalance"] = routing_imbalance(step) if job.gate == "learned" else None
    if job.contender == OURS:
        from slipstream.compilation import uncompiled  # rivals' environments may have an older Transformers

        if contender.graphed is not None and not contender.graphed.captured:
            result["no_graph"] = contender.graphed.reason
            contender.notes[-1] = f"no CUDA graph was captured: {contender.graphed.reason}"
        contender.notes += [f"{name} runs uncompiled: {why}" for name, why in uncompiled(contender.model).items()]
    result |= {
        "contender": job.contender,
        "gate": job.gate,
        "settings": contender.settings,
        "notes": contender.notes,
        "same_weights": contender.same_weights,
        "versions": versions(),
        "device_name": torch.cuda.get_device_name() if job.options.device == "cuda" else "CPU",
    }
    return result


def versions() -> dict[str, str]:
    """The installed ones of the packages that bear on speed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The one line that the parent shows, before the traceback that it keeps."""
    print(FAILURE + json.dumps(f"{kind.__name__}: {error}"), flush=True)
    sys.__excepthook__(kind, error, trace)


def main(arguments: list[str]) -> None:
    sys.excepthook = _tell
    job = Job.from_json(arguments[0])
    if "RANK" in os.environ:
        from slipstream.parallel.setup import DistributedSetup, join_process_group

        join_process_group(DistributedSetup())
    result = execute(job)
    if int(os.environ.get("RANK", "0")) == 0:
        print("\n" + RESULT + json.dumps(result), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
