"""What a run writes beside its model so that it can be repeated: the environment it ran in, and what its data was."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from slipstream.report.records import DATA_FILE, ENVIRONMENT_FILE
from slipstream.train.data import TokenizedData

PACKAGES = ("slipstream", "torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers",
            "safetensors", "torchao")  # fmt: skip


def write_records(folder: Path, data: TokenizedData, batch: dict[str, int]) -> None:
    """Write `environment.json`, with what a step's `batch` is made of, and `data.json` into `folder`."""
    held_out = len(data.eval) if data.eval is not None else 0
    bad = [{"place": place, "reason": reason} for place, reason in data.bad_rows]
    report = {**asdict(data.counts), "held_out_rows": held_out, "bad": bad, "notes": data.notes}
    for name, content in ((ENVIRONMENT_FILE, {**environment(), "batch": batch}), (DATA_FILE, report)):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def environment() -> dict[str, Any]:
    """Command, machine, versions, and the git revision of the working folder and of Slipstream's own."""
    return {
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "git": git_revision(Path.cwd()),
        "slipstream_git": git_revision(Path(__file__).parent),
    }


def git_revision(folder: Path) -> dict[str, Any] | None:
    """`revision` and whether there are `changes` since, of the repository around `folder`; None outside of one."""
    try:
        revision, changes = (
            subprocess.run(["git", "-C", str(folder), *what], capture_output=True, text=True, timeout=10, check=True)
            for what in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no git here, or no repository
    return {"revision": revision.stdout.strip(), "changes": bool(changes.stdout.strip())}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
