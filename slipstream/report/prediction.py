"""What `slipstream plan` says of a run, beside what the run measured."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from slipstream.report.records import RECIPE_FILE, Records

WARM_UP = 2  # logs before the speed is taken; they hold compilation


@dataclass(frozen=True)
class Prediction:
    """The plan of a run.

    Attributes:
        where: GPUs and layout, in words.
        memory_gib: peak of a GPU, as `memory_gib` in the metrics counts it.
        parts: what it consists of.
        tokens_per_second: of all GPUs, in full rows.
        filled: the share of the rows' length that the run's data fills, without padding.
    """

    where: str
    memory_gib: float
    parts: dict[str, float]
    tokens_per_second: float
    filled: float | None


def predict(records: Records) -> Prediction | str:
    """The plan of the recipe on the GPUs that the run had, or the reason why there is none."""
    devices = records.environment.get("devices")
    if not devices:
        return "The run used no GPU, and a plan is for GPUs."
    from slipstream import hf
    from slipstream.planning.gpus import find_gpu
    from slipstream.planning.plan import make_plan
    from slipstream.train.recipe_file import load_recipe

    try:
        recipe, _ = load_recipe(records.folder / RECIPE_FILE)
        gpu = find_gpu(str(devices[0]))
        # What the run settled on, where the recipe leaves it open.
        train = recipe.train.model_copy(update=records.environment.get("batch") or {})
        ranks = int(records.environment.get("ranks", 1))
        made = make_plan(recipe.model_copy(update={"train": train}), ranks, gpu)
    except (ValueError, OSError, AttributeError, hf.PerLayerFieldError) as error:
        return f"No plan can be made of this run: {error}"
    given = made.given
    layout = given.layout
    where = (
        f"{layout.gpus} x {gpu.name}, ep_size {layout.ep_size}, dp_replicate {layout.dp_replicate}, micro-batch "
        f"{layout.micro_batch} of {layout.seq_len:,} tokens, checkpointing {layout.checkpointing}"
    )
    whole = given.time.tokens_per_second * layout.gpus
    return Prediction(where, given.memory.peak_gib, given.memory.parts, whole, filled(records.data, layout.seq_len))


def filled(data: dict[str, Any], max_length: int) -> float | None:
    """Tokens of the data over those of its rows, were all of them `max_length` long; None where not known."""
    rows = data.get("packed_rows") or data.get("rows")
    tokens = data.get("tokens")
    return tokens / rows / max_length if rows and tokens and max_length else None


def usual_speed(records: Records) -> float | None:
    """Tokens a second of all ranks: the median of what was logged once the run was under way."""
    speeds = [value for _, value in records.points("tokens_per_second")]
    return median(speeds[WARM_UP:] or speeds) if speeds else None


def peak_memory(records: Records) -> float | None:
    """The most GiB of a rank in the run."""
    return max((value for _, value in records.points("memory_gib")), default=None)
