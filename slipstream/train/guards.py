"""Looks at each step before its update is applied: a loss or gradient that is not finite, or a loss that jumps.

The device decides whether the update changes anything, and the host hears of it a step later, so that it never waits.
Only where the optimizer cannot be told by the device does it wait, once a step, when backward is done.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slipstream.train.formats import IGNORE

Action = Literal["stop", "skip"]
RECENT = 50  # steps whose median a step is compared with
ENOUGH = 10  # steps before anything is called a jump; and bad steps in a row after which "skip" stops
KEPT = ("input_ids", "labels", "attention_mask", "position_ids")


class BadStepError(ValueError):
    """A step was not fit to be applied; the weights are those from before it."""


class StepGuard:
    """Judges a step from its loss and its gradients' norm, and writes down the batch of a bad one.

    Args:
        action: "stop" ends training before the update; "skip" leaves the update out and goes on, until `ENOUGH` steps
            in a row were bad.
        max_loss_spike: a loss over so many times the median of the last `RECENT` steps is bad; None: only what is not
            finite.
        folder: gets a folder `bad-step-000123` for each bad step.
        tokenizer: to write the batch as text too.
        tell: called with what was skipped.
    """

    def __init__(
        self,
        action: Action,
        max_loss_spike: float | None,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        tell: Callable[[str], None],
    ) -> None:
        self.action, self.max_loss_spike, self.folder = action, max_loss_spike, folder
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.tell = tell
        self._tokenizer = tokenizer
        self.bad_in_a_row = 0
        self._batches: list[dict[str, Tensor]] = []
        self._losses: list[Tensor] = []
        self._closed: tuple[list[dict[str, Tensor]], list[Tensor]] = [], []

    @property
    def at_first_batch(self) -> bool:
        """Whether no micro-batch of this step was seen yet."""
        return not self._batches

    def see(self, inputs: dict[str, Any]) -> None:
        """Remember a micro-batch until its step is judged."""
        self._batches.append({key: inputs[key] for key in KEPT if isinstance(inputs.get(key), Tensor)})

    def see_loss(self, loss: Tensor) -> None:
        """Its loss, a scalar on the device: its share of the step's."""
        self._losses.append(loss.detach())

    def loss(self) -> Tensor:
        """This rank's loss of the step so far."""
        return torch.stack(self._losses).sum()

    def close(self) -> None:
        """The step is complete; what was seen of it is kept until it is accepted or rejected."""
        self._closed = self._batches, self._losses
        self._batches, self._losses = [], []

    def is_bad(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether `judge` will find something wrong: a bool on the device, for scalars there."""
        good = loss.isfinite() & grad_norm.isfinite()
        usual = self._usual()
        if usual is not None:
            assert self.max_loss_spike is not None
            good &= loss.double() <= self.max_loss_spike * usual  # in fp64, as the host compares
        return ~good

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, or None; loss and norm are those of all ranks, so that all decide alike."""
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the norm of its gradients is {grad_norm} (its loss, {loss:.4f}, is finite)"
        usual = self._usual()
        if usual is not None and self.max_loss_spike is not None and loss > self.max_loss_spike * usual:
            return (
                f"its loss is {loss:.4f}, more than {self.max_loss_spike:g} times {usual:.4f}, "
                f"the median of the last {len(self.recent)} steps"
            )
        return None

    def _usual(self) -> float | None:
        """The loss that a jump is measured from, or None where none is looked for."""
        if self.max_loss_spike is None or len(self.recent) < ENOUGH:
            return None
        return statistics.median(self.recent)

    def accept(self, loss: float) -> None:
        """The step is good."""
        self.recent.append(loss)
        self.bad_in_a_row = 0
        self._closed = [], []

    def reject(self, step: int, reason: str, rank: int, facts: dict[str, Any]) -> bool:
        """Write the step's batch down; whether training has to stop.

        Every rank writes its own rows, in the pre-tokenised form that `data.train` takes: `rank-0.jsonl`. Rank 0 adds
        `step.json`: what was wrong, and `facts`.
        """
        path = self.bad_folder(step)
        path.mkdir(parents=True, exist_ok=True)
        with (path / f"rank-{rank}.jsonl").open("w", encoding="utf-8") as file:
            for number, (batch, loss) in enumerate(zip(*self._closed, strict=True)):
                for row in _rows(batch):
                    text = self._tokenizer.decode(row["input_ids"])
                    line = {**row, "text": text, "micro_batch": number, "micro_batch_loss": loss.item()}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if rank == 0:
            record = {"step": step, "reason": reason, **facts, "recent_losses": list(self.recent)}
            (path / "step.json").write_text(json.dumps(record, indent=2) + "\n")
        self.bad_in_a_row += 1
        self._closed = [], []
        stops = self.action == "stop" or self.bad_in_a_row >= ENOUGH
        if stops:
            self.bad_in_a_row = 0  # whoever goes on from here counts anew
        return stops

    def state(self) -> dict[str, Any]:
        """What it goes by, as JSON data, once every step has been accepted or rejected."""
        return {"recent": list(self.recent), "bad_in_a_row": self.bad_in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        self.recent.clear()
        self.recent.extend(state["recent"])
        self.bad_in_a_row = state["bad_in_a_row"]

    def bad_folder(self, step: int) -> Path:
        """Where the batch of a bad step is written."""
        return self.folder / f"bad-step-{step:06d}"


def _rows(batch: dict[str, Tensor]) -> list[dict[str, list[int]]]:
    """The documents of a micro-batch without padding, ids and labels."""
    rows = []
    tensors = {key: batch[key].cpu() for key in batch}
    for index in range(len(tensors["input_ids"])):
        row = {key: tensor[index] for key, tensor in tensors.items() if tensor.shape == tensors["input_ids"].shape}
        ids, labels = row["input_ids"], row.get("labels", row["input_ids"])
        if "attention_mask" in row:
            ids, labels = ids[row["attention_mask"].bool()], labels[row["attention_mask"].bool()]
            parts = [(ids, labels)]
        elif "position_ids" in row:
            # Packed: a document begins where positions do.
            sizes = torch.diff(torch.cat([(row["position_ids"] == 0).nonzero()[:, 0], torch.tensor([len(ids)])]))
            parts = list(zip(ids.split(sizes.tolist()), labels.split(sizes.tolist()), strict=True))
        else:
            parts = [(ids, labels)]
        rows += [
            {"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in parts if (labels != IGNORE).any()
        ]
    return rows
