"""`slipstream launch`: the job file for a cluster. Nothing is started; the cluster's own command does that."""

import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli.finetune import Overrides, RecipeFile

if TYPE_CHECKING:
    from slipstream.train.recipe import Recipe


def launch(
    recipe: RecipeFile,
    overrides: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="A batch script, for sbatch.")] = False,
    skypilot: Annotated[bool, typer.Option("--skypilot", help="A task, for sky jobs launch.")] = False,
    kubernetes: Annotated[bool, typer.Option("--kubernetes", help="A Job, for kubectl apply.")] = False,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option("--gpus-per-node", min=1, help="GPUs of each, a rank on every one.")] = 8,
    name: Annotated[str | None, typer.Option("--name", help="Of the job; default: the recipe's.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file; default: print it.")] = None,
    restarts: Annotated[
        int, typer.Option("--max-restarts", min=0, help="How often all ranks are started again after one died.")
    ] = 3,
    setup: Annotated[
        list[str] | None, typer.Option("--setup", help="A shell line before the run, such as an environment's.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="name=value: an option of sbatch, a resource of SkyPilot, or a node label."),
    ] = None,
    accelerator: Annotated[str, typer.Option("--accelerator", help="SkyPilot's name of the GPU.")] = "H100",
    storage: Annotated[
        str | None, typer.Option("--storage", help="A bucket that SkyPilot mounts as the output folder.")
    ] = None,
    image: Annotated[str, typer.Option("--image", help="For Kubernetes, built from the Dockerfile.")] = "slipstream",
    claim: Annotated[
        str, typer.Option("--claim", help="A volume claim that all pods write to, mounted as the output folder.")
    ] = "slipstream-output",
) -> None:
    """Write the file with which a cluster runs a recipe on several nodes.

    torchrun runs the ranks, with elastic restarts; a run that is stopped saves and continues when it starts again.
    All nodes have to see the output folder.
    """
    if slurm + skypilot + kubernetes != 1:
        raise ValueError("slipstream launch: give one of --slurm, --skypilot, --kubernetes")
    from slipstream.launch.job import Job
    from slipstream.train.recipe_file import load_recipe

    resolved, notes = load_recipe(recipe, overrides or ())
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    _check(resolved, nodes, gpus)
    for text in option or ():
        if not re.fullmatch(r"[^=\s]+=.+" if not slurm else r"[^=\s]+(=.*)?", text):
            raise ValueError(f"--option {text}: give name=value")
    job_name = name or Path(recipe).stem
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?", job_name):
        raise ValueError(f"--name {job_name}: use small letters, digits and dashes, 52 at most, as clusters want it")
    output_dir = resolved.train.output_dir
    more = list(overrides or ())
    if (kubernetes or storage is not None) and not os.path.isabs(output_dir):
        # Where a volume is mounted has to be absolute.
        output_dir = f"/{output_dir}"
        more.append(f"train.output_dir={output_dir}")
    job = Job(
        name=job_name,
        recipe=recipe,
        output_dir=output_dir,
        overrides=tuple(more),
        nodes=nodes,
        gpus=gpus,
        restarts=restarts,
        setup=tuple(setup or ()),
        options=tuple(option or ()),
    )
    if slurm:
        from slipstream.launch.slurm import slurm as render_slurm

        text, start = render_slurm(job), "sbatch"
    elif skypilot:
        from slipstream.launch.skypilot import skypilot as render_skypilot

        text, start = render_skypilot(job, accelerator, storage), "sky jobs launch"
    else:
        from slipstream.launch.kubernetes import kubernetes as render_kubernetes

        text, start = render_kubernetes(job, image, claim), "kubectl apply -f"
    if output is None:
        print(text, end="")
        return
    output.write_text(text, encoding="utf-8")
    if slurm:
        output.chmod(output.stat().st_mode | stat.S_IXUSR)
    print(f"written: {output}; start it with: {start} {output}")


def _check(recipe: "Recipe", nodes: int, gpus: int) -> None:
    from slipstream.parallel.setup import DistributedSetup

    setup, ranks = DistributedSetup.of(recipe.distributed), nodes * gpus
    group = setup.ep_size * setup.dp_replicate * setup.tp_size
    if ranks % group:
        raise ValueError(
            f"{nodes} nodes of {gpus} GPUs are {ranks} ranks, and the recipe's distributed section (ep_size x "
            f"dp_replicate x tp_size) needs a multiple of {group}; change --nodes or the section"
        )
