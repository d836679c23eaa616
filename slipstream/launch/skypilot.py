"""A task for SkyPilot (`sky jobs launch FILE`, which also recovers it when spot machines are taken away)."""

from typing import Any

import yaml

from slipstream.launch.job import PORT, Job, environment, torchrun

INSTALL = 'pip install "slipstream[train]"'


def skypilot(job: Job, accelerator: str, storage: str | None = None) -> str:
    """The task as YAML.

    Args:
        accelerator: SkyPilot's name of the GPU, such as "H100".
        storage: a bucket's address, mounted where the run writes; all nodes and every recovery then see one folder.
    """
    head = ['head=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)']
    command = torchrun(
        job,
        nodes='"$SKYPILOT_NUM_NODES"',
        gpus='"$SKYPILOT_NUM_GPUS_PER_NODE"',
        head=f'"$head:{PORT}"',
        run_id='"$SKYPILOT_TASK_ID"',
    )
    task: dict[str, Any] = {
        "name": job.name,
        "num_nodes": job.nodes,
        "resources": {
            "accelerators": f"{accelerator}:{job.gpus}",
            "network_tier": "best",
            "job_recovery": {"max_restarts_on_errors": job.restarts},
            **dict(option.split("=", 1) for option in job.options),
        },
        "workdir": ".",
        "setup": _Block("\n".join([*job.setup, INSTALL]) + "\n"),
        "run": _Block("\n".join(["set -euo pipefail", *job.setup, *environment(), *head, *command]) + "\n"),
    }
    if storage is not None:
        task["file_mounts"] = {job.output_dir: {"source": storage, "mode": "MOUNT"}}
    return dump(task)


class _Block(str):
    """Text that YAML writes as a block, so that a person can read it."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    _Block, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="|")
)


def block(text: str) -> str:
    """`text`, to be written as a block by `dump`."""
    return _Block(text)


def dump(*documents: dict[str, Any]) -> str:
    """YAML documents in the order of their keys."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120)
