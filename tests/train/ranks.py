"""A recipe on two ranks, without the seconds that a launcher and its processes take to start."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from slipstream.train.recipe_file import load_recipe
from slipstream.train.resume import StoppedBySignal
from slipstream.train.run import run
from tests.distributed.harness import run_ranks


class Outcome(NamedTuple):
    screen: str
    error: str | None


def _finetune(path: Path, change: Callable[[], None] | None) -> Outcome:
    if change is not None:
        change()
    screen = io.StringIO()
    try:
        run(load_recipe(path)[0], file=screen)
    except (ValueError, StoppedBySignal) as error:
        return Outcome(screen.getvalue(), str(error))
    return Outcome(screen.getvalue(), None)


def finetune_on_ranks(path: Path, change: Callable[[], None] | None = None) -> list[Outcome]:
    """What each of two ranks printed, and why it was refused or ended early. `change`, of a module, is called first."""
    return run_ranks(_finetune, 2, path, change)
