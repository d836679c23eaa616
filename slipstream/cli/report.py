"""`slipstream report`: a run's account as one HTML file, also while it trains."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT_DIR", help="The recipe's train.output_dir.")],
) -> None:
    """Write report.html: curves, speed and memory against the plan, experts, data, samples, recipe, environment.

    `slipstream finetune` does so at its end. Reads what the run has written so far; loads no weights.
    """
    from slipstream.report.page import write_report

    print(f"written: {write_report(output)}")
