"""The job files: valid for bash and YAML, and the Slurm script runs where only the cluster's commands are stand-ins."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from slipstream.cli import main
from tests.train.tiny_chat import make_checkpoint, make_tokenizer, write_recipe

EXAMPLE = "examples/nemotron-3-ultra-550b.yaml"
# Starts the command once a node, as srun does, and ends with the worst exit code.
SRUN = """#!/bin/bash
nodes=1
while [[ "$1" == --* ]]; do
  case "$1" in --nodes=*) nodes=${1#*=} ;; esac
  shift
done
for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node "$@" & done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit "$status"
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then echo 127.0.0.1; else echo "$@" >> "$SCONTROL_LOG"; fi
"""


def written(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["launch", *arguments])
    assert caught.value.code == 0
    return capsys.readouterr().out


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["launch", *arguments])
    assert caught.value.code == 1
    return capsys.readouterr().err


def stand_in(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment as Slurm gives it to a job on two nodes, with stand-ins for its commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stand_in(folder, "srun", SRUN)
    stand_in(folder, "scontrol", SCONTROL)
    # No torchrun of an outer run.
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC_", "MASTER_", "SLURM_"))
    }
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        kept.pop(name, None)
    return kept | {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path.cwd()),
    }


def test_slurm_file_of_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.sbatch"
    arguments = ["--slurm", "--nodes", "16", EXAMPLE, "train.max_steps=7", "--option", "partition=gpu",
                 "--option", "time=04:00:00", "--setup", "module load cuda", "-o", str(file)]  # fmt: skip
    assert f"sbatch {file}" in written(*arguments, capsys=capsys)
    subprocess.run(["bash", "-n", file], check=True)
    script = file.read_text()
    settings = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"nodes=16", "gpus-per-node=8", "partition=gpu", "time=04:00:00", "requeue"} <= set(settings)
    assert "\nmodule load cuda\n" in script
    assert f"finetune {EXAMPLE} train.max_steps=7\n" in script
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in script


@pytest.mark.slow
def test_slurm_file_starts_two_ranks(
    tmp_path: Path, cluster: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny", make_tokenizer())
    recipe = write_recipe(tmp_path, checkpoint, train={"max_steps": 2}, distributed={"ep_size": 2})
    script = tmp_path / "job.sbatch"
    written("--slurm", "--nodes", "2", "--gpus-per-node", "1", str(recipe), "-o", str(script), capsys=capsys)
    done = subprocess.run([script], env=cluster, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists() or list((tmp_path / "out").glob("model-*.safetensors"))
    resolved = yaml.safe_load((tmp_path / "out" / "recipe.resolved.yaml").read_text())
    assert resolved["distributed"]["ep_size"] == 2  # which one rank alone would have refused
    assert not (tmp_path / "scontrol.log").exists()


@pytest.mark.parametrize(
    ("run", "status", "requeued"),
    [
        ("mkdir -p {out}/checkpoints; echo step-000004 > {out}/checkpoints/latest; exit 1", 1, True),
        ("exit 1", 1, False),  # nothing new since the last turn: it would fail for ever
        ("rm -f {out}/checkpoints/latest; exit 0", 0, False),
    ],
)
def test_slurm_requeues_what_got_on(
    tmp_path: Path,
    cluster: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    run: str,
    status: int,
    requeued: bool,
) -> None:
    """With torchrun replaced by what a turn would leave behind."""
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path, tmp_path / "model")
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "latest").write_text("step-000002\n")
    body = f'if [ "$1" = --help ]; then exit; fi\necho "$@" >> {tmp_path}/arguments\n{run.format(out=out)}\n'
    stand_in(tmp_path / "bin", "torchrun", f"#!/bin/bash\n{body}")
    script = tmp_path / "job.sbatch"
    written("--slurm", "--nodes", "2", "--gpus-per-node", "4", str(recipe), "-o", str(script), capsys=capsys)
    done = subprocess.run([script], env=cluster, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    log = Path(cluster["SCONTROL_LOG"])
    assert (log.read_text() if log.exists() else "") == (f"requeue {os.getpid()}\n" if requeued else "")
    started = (tmp_path / "arguments").read_text().splitlines()
    assert len(started) == 2
    assert shlex.split(started[0])[:2] == ["--nnodes=2", "--nproc-per-node=4"]
    assert "--shutdown-timeout" not in started[0]  # this torchrun's --help has not heard of it


def test_skypilot_file(capsys: pytest.CaptureFixture[str]) -> None:
    task = yaml.safe_load(
        written("--skypilot", "--nodes", "4", EXAMPLE, "distributed.ep_size=32", "--storage", "s3://runs",
                "--accelerator", "H200", "--option", "infra=aws", capsys=capsys)
    )  # fmt: skip
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (4, "H200:8")
    assert task["resources"]["infra"] == "aws"
    ((folder, mount),) = task["file_mounts"].items()
    assert mount == {"source": "s3://runs", "mode": "MOUNT"}
    assert f"train.output_dir={folder}" in task["run"]
    subprocess.run(["bash", "-n"], input=task["setup"] + task["run"], text=True, check=True)


def test_kubernetes_file(capsys: pytest.CaptureFixture[str]) -> None:
    text = written("--kubernetes", "--nodes", "16", EXAMPLE, "--image", "registry/slipstream:1",
                   "--option", "pool=h100", capsys=capsys)  # fmt: skip
    recipe, service, job = (dict[str, Any](document) for document in yaml.safe_load_all(text))
    ((name, held),) = recipe["data"].items()
    assert held == Path(EXAMPLE).read_text()
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 16, 16)
    assert pod["nodeSelector"] == {"pool": "h100"}
    container = pod["containers"][0]
    assert container["image"] == "registry/slipstream:1"
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    # Pods find the first one by the Service's name, and write into the volume.
    host = f"{job['metadata']['name']}-0.{service['metadata']['name']}:"
    command = container["command"][-1]
    assert f"--rdzv-endpoint={host}" in command
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]
    assert f"/recipe/{name}" in command
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert f"train.output_dir={mounts['output']}" in command
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    subprocess.run(["bash", "-n"], input=command, text=True, check=True)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "one of --slurm, --skypilot, --kubernetes" in refused(EXAMPLE, capsys=capsys)
    assert "one of --slurm, --skypilot, --kubernetes" in refused(EXAMPLE, "--slurm", "--skypilot", capsys=capsys)
    assert "8 ranks" in refused(EXAMPLE, "--slurm", "--nodes", "1", capsys=capsys)
    assert "--option pool: give name=value" in refused(
        EXAMPLE, "--kubernetes", "--nodes", "8", "--option", "pool", capsys=capsys
    )
    assert "--name My_Job" in refused(EXAMPLE, "--slurm", "--nodes", "8", "--name", "My_Job", capsys=capsys)
    assert "no such recipe file" in refused(str(tmp_path / "none.yaml"), "--slurm", capsys=capsys)
