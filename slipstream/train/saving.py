"""The end of a run: the trained model is saved, or what it takes to save it another time."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from slipstream.checkpoint import passthrough
from slipstream.checkpoint.output import INCOMPLETE, WEIGHTS, check_room
from slipstream.checkpoint.resume import Checkpointer, checkpoint_name, latest
from slipstream.checkpoint.team import SavingError
from slipstream.parallel.setup import failing_together, rank_and_ranks
from slipstream.train.trainer import SlipstreamTrainer


def check_room_for(model: Any, output: Path) -> None:
    """Raise OSError, on all ranks, where the disk has no room for what will be saved of `model`: adapters or all."""
    adapted = isinstance(model, PeftModel)
    saved = [parameter for parameter in model.parameters() if parameter.requires_grad or not adapted]
    size = sum(parameter.numel() * parameter.element_size() for parameter in saved)
    if not adapted:
        size += sum(passthrough.sizes(model).values())
    with failing_together():
        check_room(output, size, "train.output_dir")


def save_trained(trainer: SlipstreamTrainer, output: Path, continued: Path | None) -> None:
    """Write the trained model to `output/.incomplete`; where that fails, a checkpoint instead. Call it on all ranks.

    Args:
        trainer: done with training.
        output: of the run.
        continued: a checkpoint that has all of the training already.

    Raises: OSError on all ranks, with what is on the disk now.
    """
    try:
        with failing_together(), _as_os_error():
            trainer.save_model(str(output / INCOMPLETE))
    except OSError as error:
        left = _kept(trainer, output, continued)
        raise OSError(f"train.output_dir: the model is trained and could not be saved ({error}); {left}") from error


def keep(trainer: SlipstreamTrainer) -> OSError | None:
    """Have a checkpoint after the last step under way, or complete; on all ranks alike, why there will be none."""
    checkpointer = trainer.checkpointer
    assert checkpointer is not None
    if written(checkpointer) is None and checkpointer.saved_step == trainer.state.global_step:
        return None
    try:
        with failing_together(), _as_os_error():
            trainer.save_checkpoint()
    except OSError as error:
        return error
    return None


def written(checkpointer: Checkpointer) -> OSError | None:
    """Wait for the checkpoint under way; on all ranks alike, why it could not be written."""
    try:
        with failing_together(), _as_os_error():
            checkpointer.wait()
    except OSError as error:
        return error
    return None


def _kept(trainer: SlipstreamTrainer, output: Path, continued: Path | None) -> str:
    """See to a checkpoint after the last step; what there is to continue from."""
    checkpointer = trainer.checkpointer
    assert checkpointer is not None
    path = continued or checkpointer.folder / checkpoint_name(trainer.state.global_step)
    first = rank_and_ranks()[0] == 0
    if first and (output / INCOMPLETE).is_dir():
        for part in (output / INCOMPLETE).iterdir():
            if WEIGHTS.fullmatch(part.name) or part.name == "adapter_model.safetensors":
                part.unlink()  # makes room
    error = None if continued else keep(trainer) or written(checkpointer)
    if error is None:
        return f"{path} has all of the training: mend this, and the same command saves the model from there"
    if first:
        shutil.rmtree(path.with_name(path.name + INCOMPLETE), ignore_errors=True)
    newest = latest(checkpointer.folder)
    rest = "there is no earlier one" if newest is None else f"the same command continues from {newest}"
    return f"neither could a checkpoint ({error}); {rest}"


@contextmanager
def _as_os_error() -> Iterator[None]:
    """An error inside is one of writing. Of several ranks only what is known to be: any other may have left the others
    in the middle of an exchange, where they would not hear of it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if rank_and_ranks()[1] > 1 and not isinstance(error, SavingError | SafetensorError):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error
