"""The report of what was accelerated, what was not, and why."""

import importlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from slipstream.backend import BackendConfig
from slipstream.compilation import uncompiled
from slipstream.parallel.setup import DistributedSetup
from slipstream.parallel.units import class_of

if TYPE_CHECKING:
    from rich.table import Table

MARK = "_slipstream"


@dataclass(frozen=True)
class Choice:
    """What one operation of the step uses."""

    operation: str
    chosen: str
    why: str
    faster_with: str = ""


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` leaves on a model."""

    backend: BackendConfig
    setup: DistributedSetup
    choices: tuple[Choice, ...]

    def __deepcopy__(self, memo: object) -> "Acceleration":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, ()


def _restored() -> None:
    """What torch.save(model) restores runs the class's own forward: it is not accelerated. But it names our experts and
    our attention, which have to be known."""
    importlib.import_module("slipstream.attention.interface")
    importlib.import_module("slipstream.moe.experts")


@dataclass(frozen=True)
class Description:
    """What Slipstream made of a model. Prints as a table; the same as data through its fields or `as_dict`."""

    model_class: str
    parameters: int
    choices: tuple[Choice, ...]

    def __getitem__(self, operation: str) -> Choice:
        """The choice made for `operation` (a field of `BackendConfig`)."""
        for choice in self.choices:
            if choice.operation == operation:
                return choice
        raise KeyError(operation)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        return {
            "model_class": self.model_class,
            "parameters": self.parameters,
            "choices": [vars(choice) for choice in self.choices],
        }

    def __rich__(self) -> "Table":
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{self.model_class}, {self.parameters / 1e6:,.1f} M parameters")
        for heading in ("operation", "chosen", "why", "faster with"):
            table.add_column(heading, overflow="fold")
        for choice in self.choices:
            # Text, because a bracket in a plain string is markup to rich.
            table.add_row(*map(Text, (choice.operation, choice.chosen, choice.why, choice.faster_with)))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def describe(model: Any) -> Description:
    """What Slipstream made of `model`: per operation the implementation chosen, why, and what would be faster.

    Raises:
        ValueError: `model` has not been accelerated.
    """
    model = unwrap(model)
    applied = acceleration_of(model)
    if applied is None:
        raise ValueError(
            f"this {type(model).__name__} was not accelerated: load it with slipstream.AutoModelForCausalLM, "
            "or call slipstream.accelerate(model)"
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    choices = applied.choices
    for name, reason in uncompiled(model).items():
        choices = tuple(
            replace(choice, why=f"{choice.why}; {name} runs uncompiled: {reason}")
            if choice.operation == "compile"
            else choice
            for choice in choices
        )
    return Description(class_of(model).__name__, parameters, choices)


def acceleration_of(model: Any) -> Acceleration | None:
    """What `accelerate` did to `model`, or None if it never saw it."""
    return vars(model).get(MARK)


def unwrap(model: Any) -> Any:
    """The Transformers model inside PEFT's wrapper, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
