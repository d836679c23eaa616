"""`slipstream finetune`: the recipe's run, from the command line."""

from typing import Annotated

import typer


def finetune(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="The recipe; sections model, data, train, …")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="section.key=value", help="Values that win over the recipe's.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model that the output folder holds.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the recipe and the first row; write nothing.")
    ] = False,
) -> None:
    """Fine-tune a model as a recipe says. Runs as is, or on each rank under torchrun.

    SIGTERM or SIGUSR1 stops it after the step under way with a checkpoint and exit code 75 (EX_TEMPFAIL); the same
    command again continues.
    """
    from slipstream.train.recipe_file import load_recipe

    resolved, notes = load_recipe(recipe, overrides or ())
    # Only now: a mistake in the recipe is told without waiting for torch.
    import os
    import sys

    from torch.distributed.elastic.multiprocessing.errors import record
    from transformers.utils import logging

    from slipstream.train.resume import EXIT_REQUEUE, StoppedBySignal
    from slipstream.train.run import run

    if int(os.environ.get("RANK", "0")) == 0:
        for note in notes:
            print(f"note: {note}")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()

    @record  # tells torchrun which rank failed first, and how
    def recorded() -> None:
        try:
            run(resolved, overwrite=overwrite, dry_run=dry_run)
        except StoppedBySignal:
            sys.exit(EXIT_REQUEUE)

    recorded()
