"""What is checked of an architecture on one process, at tiny sizes in fp32, against plain Transformers.

Every check returns a `Cell`. What goes wrong inside one becomes its text: a table of all architectures has to come
through whatever one of them does.
"""

import copy
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel

import slipstream
from slipstream import hf, hf_models
from slipstream.attention import interface as attention
from slipstream.coverage.architectures import is_composite
from slipstream.coverage.compare import (
    LIMIT,
    Attempt,
    Cell,
    compared,
    limit_of,
    loss_and_gradients,
    rounding,
    saved_tensors,
    worst_gradient,
)
from slipstream.coverage.ranks import prepare
from slipstream.coverage.tiny import tiny_batch, tiny_config, tiny_model

MAX_PARAMETERS = 20_000_000
SECONDS = 120.0  # an architecture's time


@dataclass
class Row:
    """An architecture's line of the table.

    Attributes:
        passes: operation -> what `describe` says was chosen.
        flavour: of the experts, or why they are not on the fast path.
        why_not: why nothing was checked.
        checks: name of a check -> its outcome.
        speed: what `--speed` measured.
    """

    model_type: str
    moe: bool = False
    passes: dict[str, str] = field(default_factory=dict)
    flavour: str = ""
    why_not: str = ""
    checks: dict[str, Cell] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, data: dict[str, Any]) -> "Row":
        return cls(**{**data, "checks": {name: Cell(**cell) for name, cell in data["checks"].items()}})

    @property
    def failed(self) -> list[str]:
        """The checks that went wrong."""
        return [name for name, cell in self.checks.items() if cell.status == "failed"]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises: TimeoutError inside after so long; for the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_architecture(model_type: str, keep: Path | None = None, seconds: float = SECONDS) -> Row:
    """All checks that one process can do.

    Args:
        keep: where to leave the tiny checkpoint of a model with experts, for `ranks.check_expert_parallelism`.
        seconds: after so long it counts as stopped.
    """
    row = Row(model_type)
    attempt = Attempt()
    with attempt, time_limit(seconds):
        row.why_not = _why_not_built(model_type)
        if not row.why_not:
            _check(row, keep)
    if attempt.error:
        if row.passes:
            row.checks["stopped"] = Cell("failed", attempt.error)
        else:
            row.why_not = attempt.error
    return row


def _why_not_built(model_type: str) -> str:
    if model_type not in CONFIG_MAPPING:
        return "Transformers names no config of this type"
    if is_composite(model_type):
        text = f"{model_type}_text" if f"{model_type}_text" in CONFIG_MAPPING else "text model"
        return f"more than a language model; its {text} is what is trained here"
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type))
    if (size := sum(parameter.numel() for parameter in model.parameters())) > MAX_PARAMETERS:
        return f"its config does not shrink: {size / 1e6:.0f} M parameters"
    return ""


def _check(row: Row, keep: Path | None) -> None:
    reference = build(row.model_type)
    ours = slipstream.accelerate(copy.deepcopy(reference))
    report = slipstream.describe(ours)
    row.moe = hf.num_routed_experts(reference.config) is not None
    row.passes = {choice.operation: choice.chosen for choice in report.choices}
    row.flavour = report["experts"].why if row.moe else "dense"
    for name, check in CHECKS.items():
        attempt = Attempt()
        with attempt:
            row.checks[name] = check(reference, ours)
        if attempt.error:
            row.checks[name] = Cell("failed", attempt.error)
        ours.zero_grad()
        reference.zero_grad()
    if keep is None or not row.moe:
        return
    if not any(True for _ in hf.experts_modules(ours)):
        row.checks["ep2"] = Cell("n/a", "its experts are not called through the interface")
        return
    try:
        hf_models.experts_plan(ours)
    except ValueError as error:
        row.checks["ep2"] = Cell("refused", str(error).split("; ")[0])
    else:
        prepare(reference, keep / row.model_type)


def build(model_type: str) -> PreTrainedModel:
    """The tiny model with Transformers' plainest experts."""
    return tiny_model(model_type, "eager" if _has_interface(model_type) else None)


def _has_interface(model_type: str) -> bool:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type))
    return any(True for _ in hf.experts_modules(model))


def _parity(reference: PreTrainedModel, ours: PreTrainedModel) -> Cell:
    ids = tiny_batch()
    expected_loss, expected = loss_and_gradients(reference, ids)
    loss, found = loss_and_gradients(ours, ids)
    apart = abs(loss / expected_loss - 1).item(), worst_gradient(found, expected)
    cell = compared(*apart, limit_of(reference))
    if cell.status == "failed":
        reference.zero_grad()
        if worst_gradient(loss_and_gradients(reference, ids)[1], expected)[0] > LIMIT:
            return Cell("n/a", "plain Transformers gives other gradients each time")
        cell = compared(*apart, max(limit_of(reference), rounding(reference, ids)))
    return cell


def _save(reference: PreTrainedModel, ours: PreTrainedModel) -> Cell:
    with tempfile.TemporaryDirectory() as folder:
        theirs, mine = Path(folder, "theirs"), Path(folder, "ours")
        reference.save_pretrained(theirs)
        ours.save_pretrained(mine)
        saved = [saved_tensors(path) for path in (theirs, mine)]
        if [list(tensors) for tensors in saved] != [sorted(saved[0])] * 2:
            return Cell("failed", "other names than Transformers saves")
        if not all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0]):
            return Cell("failed", "other values than Transformers saves")
        again = slipstream.AutoModelForCausalLM.from_pretrained(mine, dtype=torch.float32)
        if not (name := _different(again, ours)):
            return Cell("ok")
        if _different(transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32), reference):
            return Cell("n/a", f"Transformers does not load {name} again either")
    return Cell("failed", f"{name} comes back different")


def _different(found: PreTrainedModel, expected: PreTrainedModel) -> str:
    """The first tensor that is not the same, if any."""
    state, before = found.state_dict(), expected.state_dict()
    return next((name for name in before if name not in state or not torch.equal(before[name], state[name])), "")


def packed_batch(lengths: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Documents one after another in a row, as `train.packing.Collator` gives them."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    ends = starts.to(torch.int32)
    return {
        "input_ids": tiny_batch(1, int(starts[-1]), seed),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def _packing(reference: PreTrainedModel, ours: PreTrainedModel) -> Cell:
    """Whether a document's logits are those it has alone, whatever its neighbours are."""
    from slipstream.train.packing import check_packing

    lengths = (9, 14, 7)
    one, other = packed_batch(lengths, seed=5), packed_batch(lengths, seed=6)
    inside = slice(lengths[0], lengths[0] + lengths[1])
    other["input_ids"][:, inside] = one["input_ids"][:, inside]
    try:
        check_packing(ours.config)
    except ValueError as error:
        return Cell("refused", str(error).removeprefix("data.packing: ").split(", whose")[0])
    packed = copy.deepcopy(reference).eval()
    if attention.obstacle(packed) is None:
        packed = slipstream.accelerate(packed, backend={"attn": attention.NAME})  # what a GPU runs
    else:
        packed = slipstream.accelerate(packed)
    with torch.no_grad():
        first, second = (packed(**batch, use_cache=False).logits[:, inside] for batch in (one, other))
        alone = packed(input_ids=one["input_ids"][:, inside], use_cache=False).logits
    size = alone.abs().max().item()
    moved, apart = ((first - logits).abs().max().item() / size for logits in (second, alone))
    if max(moved, apart) > LIMIT:
        return Cell("failed", f"leaks: a neighbour moves logits by {moved:.0e}, alone they differ by {apart:.0e}")
    return Cell("ok")


def _lora(reference: PreTrainedModel, ours: PreTrainedModel) -> Cell:
    """Adapters on the attention's projections, their loss and gradients."""
    import peft

    targets = [
        name
        for name, module in reference.named_modules()
        if type(module) is torch.nn.Linear and re.search(r"att[^.]*\.[^.]+$|\.[qv]_proj$", name) and "gate" not in name
    ]
    if not targets:
        return Cell("n/a", "no plain projections in an attention")

    def adapted(model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(4)
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        return loss_and_gradients(peft.get_peft_model(copy.deepcopy(model), config), tiny_batch(1, 24))

    attempt = Attempt()
    with attempt:
        expected_loss, expected = adapted(reference)
    if attempt.error:
        return Cell("n/a", f"plain Transformers: {attempt.error}")
    loss, found = adapted(ours)
    return compared(abs(loss / expected_loss - 1).item(), worst_gradient(found, expected), limit_of(reference))


Check = Callable[[PreTrainedModel, PreTrainedModel], Cell]
CHECKS: dict[str, Check] = {"parity": _parity, "save": _save, "packing": _packing, "lora": _lora}
