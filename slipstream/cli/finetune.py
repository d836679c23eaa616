"""`slipstream finetune`: the recipe's run, from the command line."""

from typing import Annotated

import typer

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="The recipe; sections model, data, train, …")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="section.key=value", help="Values that win over the recipe's.")
]


def finetune(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", help="Start this many ranks here, one a GPU; several nodes: use torchrun.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model that the output folder holds.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the recipe and the first row; write nothing.")
    ] = False,
    gpus: Annotated[
        str | None, typer.Option("--gpus", help="With --dry-run: plan memory and speed for 8xH100-80GB, for instance.")
    ] = None,
) -> None:
    """Fine-tune a model as a recipe says. Runs as is, starts its ranks itself, or is one of torchrun's.

    SIGTERM or SIGUSR1 stops it after the step under way with a checkpoint and exit code 75 (EX_TEMPFAIL), Ctrl-C with
    130; the same command again continues.
    """
    from slipstream.train.recipe_file import load_recipe

    resolved, notes = load_recipe(recipe, overrides or ())
    # Only now: a mistake in the recipe is told without waiting for torch.
    import os
    import sys

    if gpus is not None and not dry_run:
        raise ValueError(f"--gpus {gpus}: it belongs to --dry-run; --nproc starts ranks")
    if nproc is not None and not dry_run:
        from slipstream.cli.ranks import start_ranks

        sys.exit(start_ranks(nproc, ["finetune", recipe, *(overrides or ()), *["--overwrite"] * overwrite]))

    import datasets
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.errors import record
    from transformers.utils import logging

    from slipstream.train.resume import StoppedBySignal
    from slipstream.train.run import run

    if int(os.environ.get("RANK", "0")) == 0:
        for note in notes:
            print(f"note: {note}")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        datasets.disable_progress_bars()

    @record  # tells torchrun which rank failed first, and how
    def recorded() -> None:
        try:
            run(resolved, overwrite=overwrite, dry_run=dry_run)
        except StoppedBySignal as stopped:
            sys.exit(stopped.exit_code)

    recorded()
    if dist.is_initialized():
        dist.destroy_process_group()  # else NCCL warns of a leak
    if gpus is not None:
        from slipstream.cli.plan import verdict
        from slipstream.planning.gpus import parse_gpus
        from slipstream.planning.plan import make_plan

        for line in verdict(make_plan(resolved, *parse_gpus(gpus))):
            print(f"plan for {gpus}: {line}")
