"""What in a run deserves a second look, in sentences."""

from slipstream.report.markup import short
from slipstream.report.prediction import Prediction, peak_memory, usual_speed
from slipstream.report.records import Records

RISE = 1.02  # a held-out loss over its lowest by this factor
IMBALANCE = 4.0  # tokens of the fullest expert over the mean's
CUT = 0.02  # of the tokens
OFF = 0.2  # of the plan


def findings(records: Records, prediction: Prediction | str) -> list[str]:
    """The most important first; none where all is well."""
    return [*_of_the_end(records), *_of_the_loss(records), *_of_experts(records), *_of_data(records),
            *_of_the_plan(records, prediction), *_of_repeating(records)]  # fmt: skip


def _of_the_end(records: Records) -> list[str]:
    found = []
    if not records.finished:
        found.append(
            f"The run has not finished: the last record is of step {records.last_step}. It is still training, was "
            "stopped, or failed; the same command continues it from its newest checkpoint."
        )
    found += [
        f"bad-step-{step:06d} is of a step that was not applied: {bad.get('reason')}."
        for bad in records.bad_steps
        if isinstance(step := bad.get("step"), int) and step <= records.last_step + 1
    ]
    return found


def _of_the_loss(records: Records) -> list[str]:
    found = []
    not_finite = [line["step"] for line in records.lines if "loss" in line and _not_finite(line["loss"])]
    if not_finite:
        found.append(f"The loss was not finite in {len(not_finite)} logs, first at step {not_finite[0]}.")
    held_out = records.points("eval_loss")
    if len(held_out) > 1:
        best_step, best = min(held_out, key=lambda point: point[1])
        last_step, last = held_out[-1]
        if best_step == held_out[0][0]:
            found.append(f"The held-out loss did not fall: {short(best)} before training, {short(last)} at the end.")
        elif last > best * RISE:
            found.append(
                f"The held-out loss was lowest at step {best_step:g} ({short(best)}) and is {short(last)} at step "
                f"{last_step:g}: the model may have begun to learn its rows by heart."
            )
    elif records.finished and not held_out:
        found.append("No data was held out, so nothing here says how the model does on rows it was not trained on.")
    return found


def _of_experts(records: Records) -> list[str]:
    found = []
    dead, load = records.points("moe_dead_experts"), records.points("moe_load_max_over_mean")
    if dead and dead[-1][1]:
        found.append(f"At the end {dead[-1][1]:.0f} experts, of all layers together, got no token.")
    if load and load[-1][1] > IMBALANCE:
        found.append(
            f"At the end the fullest expert got {short(load[-1][1])} times the mean's tokens; with expert parallelism "
            "each step waits for it."
        )
    return found


def _of_data(records: Records) -> list[str]:
    data = records.data
    found = []
    cut, tokens = data.get("cut_tokens", 0), data.get("tokens", 0)
    if tokens and cut > CUT * (tokens + cut):
        found.append(
            f"{cut / (tokens + cut):.0%} of the tokens were cut off at max_length, in {data.get('cut_rows', 0):,} rows."
        )
    for key, what in (("dropped_rows", "were longer than max_length and left out"),
                      ("masked_rows", "had no token to train on and were left out")):  # fmt: skip
        if data.get(key):
            found.append(f"{data[key]:,} rows {what}.")
    return found + [str(note).rstrip(".") + "." for note in data.get("notes", ())]


def _of_the_plan(records: Records, prediction: Prediction | str) -> list[str]:
    if isinstance(prediction, str):
        return []
    found = []
    memory, speed = peak_memory(records), usual_speed(records)
    if memory is not None and abs(memory / prediction.memory_gib - 1) > OFF:
        found.append(f"Peak memory was {memory:.1f} GiB, and the plan says {prediction.memory_gib:.1f}.")
    if speed is not None and prediction.filled is not None:
        expected = prediction.tokens_per_second * prediction.filled
        if speed < expected * (1 - OFF):
            found.append(
                f"{speed:,.0f} tokens/s were trained, and the plan says {expected:,.0f} for rows as full as these."
            )
    return found


def _of_repeating(records: Records) -> list[str]:
    if (records.environment.get("git") or {}).get("changes"):
        return [
            "The working folder had changes that were not committed, so its revision alone does not repeat the run."
        ]
    return []


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and (value != value or value in (float("inf"), float("-inf")))
