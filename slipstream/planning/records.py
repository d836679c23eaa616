"""Recorded benchmarks of `slipstream bench` beside what the plan says of them."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipstream.bench.options import OURS, Options
from slipstream.planning.gpus import find_gpu
from slipstream.planning.memory import Layout
from slipstream.planning.plan import adapted, describe_model
from slipstream.train.recipe import ALL_EXPERTS, LoraSection


@dataclass(frozen=True)
class Comparison:
    """One recorded run of ours and its prediction.

    Attributes:
        run: the file's name and the gate.
        peak_gib, step_ms: measured; the step's time is that of steps back to back, as in training.
    """

    run: str
    peak_gib: float
    predicted_gib: float
    step_ms: float
    predicted_ms: float


def compare(path: Path) -> list[Comparison]:
    """The prediction of every run of ours in a JSON file of benchmarks/results; none where it holds none.

    Raises:
        ValueError: a run on GPUs that are not known.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if "rows" not in record or "model" not in record.get("options", {}):
        return []  # of one layer, or of the loss alone
    rows = [row for row in record["rows"] if row.get("contender") == OURS and row.get("peak_gib")]
    if not rows or record["options"]["device"] != "cuda":
        return []
    known = {field.name for field in dataclasses.fields(Options)}
    options = Options(**{key: value for key, value in record["options"].items() if key in known})
    if options.fp8:
        return []  # the plan knows 16 bits only
    model = describe_model(options.model, options.config(), options.seq_len, options.packed)
    if options.lora is not None:
        adapters = LoraSection.model_validate({"r": options.lora, "target_parameters": ALL_EXPERTS})
        model = dataclasses.replace(model, shape=adapted(model.shape, adapters))
    gpu = find_gpu(record["device"])
    found = []
    for row in rows:
        if row["settings"].get("recurrent") == "torch":
            continue  # layers with a state are planned with a fused scan
        estimate = model.estimate(_layout(options, row["settings"]), gpu)
        found.append(
            Comparison(
                run=f"{path.stem}, {row['gate']} gate",
                peak_gib=row["peak_gib"],
                predicted_gib=estimate.memory.peak_gib,
                step_ms=row["back_to_back_ms"] or row["step"]["median"],
                predicted_ms=estimate.time.step_ms,
            )
        )
    return found


def _layout(options: Options, settings: dict[str, Any]) -> Layout:
    ours = options.optimizer == OURS and options.lora is None
    return Layout(
        gpus=options.nproc,
        ep_size=options.ep_size,
        micro_batch=options.micro_batch,
        seq_len=options.seq_len,
        checkpointing=options.activation_checkpointing,
        optimizer="slipstream_adamw" if ours else "adamw_torch_fused",
        lora_rank=options.lora,
        load_in_4bit=options.load_in_4bit,
        compiled=settings["compile"] == "layers",
        fused_loss=settings["loss"] == "fused",
        dispatcher=settings["dispatcher"],
    )
