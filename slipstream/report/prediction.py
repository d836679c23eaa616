"""What `slipstream plan` says of a run, beside what the run measured."""

from dataclasses import dataclass
from statistics import median

from slipstream.report.records import RECIPE_FILE, Records

# The planner builds the model anew on tensors without data, which an architecture's own code may not allow. That must
# not end a run whose model has just been saved.
_NO_PLAN = (ValueError, TypeError, OSError, AttributeError, LookupError, RuntimeError, ImportError)
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
    from slipstream.planning.gpus import find_gpu
    from slipstream.planning.plan import make_plan
    from slipstream.train.recipe_file import load_recipe

    try:
        recipe, _ = load_recipe(records.folder / RECIPE_FILE)
        gpu = find_gpu(str(devices[0]))
        # What the run settled on, where the recipe leaves it open.
        train = recipe.train.model_copy(update=records.environment.get("batch") or {})
        ranks = int(records.environment.get("ranks", 1))
        given = make_plan(recipe.model_copy(update={"train": train}), ranks, gpu).given
    except _NO_PLAN as error:
        return f"No plan can be made of this run: {' '.join(str(error).split())[:300]}"
    layout = given.layout
    where = (
        f"{layout.gpus} x {gpu.name}, ep_size {layout.ep_size}, dp_replicate {layout.dp_replicate}, micro-batch "
        f"{layout.micro_batch} of {layout.seq_len:,} tokens, checkpointing {layout.checkpointing}"
    )
    whole = given.time.tokens_per_second * layout.gpus
    return Prediction(where, given.memory.peak_gib, given.memory.parts, whole, filled(records, layout.seq_len))


def filled(records: Records, max_length: int) -> float | None:
    """Tokens of the rows that are trained on over those of as many rows of `max_length`; None where not known."""
    data, section = records.data, records.section("data")
    rows, tokens = data.get("rows"), data.get("tokens")
    if not rows or not tokens or not max_length:
        return None
    if section.get("packing"):
        if not (packed := data.get("packed_rows")):
            return None  # of a stream, whose packed rows nobody has counted
        # Tokens were counted before rows were held out.
        held_out = 0 if section.get("eval") else data.get("held_out_rows", 0)
        tokens, rows = tokens * (1 - held_out / rows), packed
    return float(min(1.0, tokens / rows / max_length))


def usual_speed(records: Records) -> float | None:
    """Tokens a second of all ranks: the median of what was logged once the run was under way."""
    speeds = [value for _, value in records.points("tokens_per_second")]
    return median(speeds[WARM_UP:] or speeds) if speeds else None


def peak_memory(records: Records) -> float | None:
    """The most GiB of a rank in the run."""
    return max((value for _, value in records.points("memory_gib")), default=None)
