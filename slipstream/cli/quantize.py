"""`slipstream quantize`: a saved GPT-OSS back in MXFP4."""

import time
from pathlib import Path
from typing import Annotated

import typer


def quantize(
    source: Annotated[Path, typer.Argument(help="GPT-OSS checkpoint in 16 or 32 bits: a Hugging Face folder.")],
    output: Annotated[Path, typer.Option(help="Folder to write the MXFP4 checkpoint to.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that OUTPUT already holds.")] = False,
) -> None:
    """Store the experts of a saved GPT-OSS in MXFP4, as it is published, expert by expert: 4.25 bits a weight.

    Each weight is rounded to the nearest of 4 bits, without training for it.
    """
    from slipstream.checkpoint.quantize import quantize as run

    start = time.monotonic()
    done = run(source, output, overwrite=overwrite)
    sizes = f"{done.bytes_before / 1e9:.1f} -> {done.bytes_after / 1e9:.1f} GB"
    print(f"quantised: {done.tensors} tensors of experts, {sizes}")
    print(f"rounding moved the experts' weights by {100 * done.error:.2g} % (root mean square)")
    print(f"saved: {done.output} after {time.monotonic() - start:.0f} s")
