"""A Job for Kubernetes (`kubectl apply -f FILE`); no operator is needed."""

from pathlib import Path
from typing import Any

from slipstream.launch.job import GRACE_SECONDS, PORT, Job, environment, torchrun
from slipstream.launch.skypilot import block, dump

_RECIPES = "/recipe"


def kubernetes(job: Job, image: str, claim: str) -> str:
    """Three objects: the recipe as a ConfigMap, a headless Service that gives pods names, and an indexed Job, a pod a
    node. A pod that ends is made again under its name, and torchrun meets it there.

    Args:
        job: its recipe is a file here; what it names has to be there in the pods.
        image: with slipstream in it (see Dockerfile).
        claim: a PersistentVolumeClaim that all pods can write to, mounted at the recipe's output folder.
    """
    recipe = Path(job.recipe)
    inside = Job(**{**vars(job), "recipe": f"{_RECIPES}/{recipe.name}"})
    command = torchrun(
        inside,
        nodes=str(job.nodes),
        gpus=str(job.gpus),
        head=f"{job.name}-0.{job.name}:{PORT}",
        run_id=job.name,
        before="exec ",  # signals reach torchrun, not a shell
    )
    script = "\n".join(["set -uo pipefail", *job.setup, *environment(), *command]) + "\n"
    labels = {"app": job.name}
    pod: dict[str, Any] = {
        "subdomain": job.name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [
            {
                "name": "train",
                "image": image,
                "command": ["bash", "-c", block(script)],
                "resources": {"limits": {"nvidia.com/gpu": job.gpus}},
                "volumeMounts": [
                    {"name": "recipe", "mountPath": _RECIPES},
                    {"name": "output", "mountPath": job.output_dir},
                    {"name": "memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "recipe", "configMap": {"name": f"{job.name}-recipe"}},
            {"name": "output", "persistentVolumeClaim": {"claimName": claim}},
            # NCCL and data loaders share memory; a pod's own 64 MB are too few.
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    for option in job.options:
        key, _, value = option.partition("=")
        pod.setdefault("nodeSelector", {})[key] = value
    return dump(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": f"{job.name}-recipe", "labels": labels},
            "data": {recipe.name: block(recipe.read_text(encoding="utf-8"))},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": job.name, "labels": labels},
            # Ranks look for each other before they are ready.
            "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels},
        },
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": job.name, "labels": labels},
            "spec": {
                "completionMode": "Indexed",
                "completions": job.nodes,
                "parallelism": job.nodes,
                "backoffLimit": job.nodes * (job.restarts + 1),
                # A pod that was evicted says nothing against the run.
                "podFailurePolicy": {
                    "rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]
                },
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        },
    )
