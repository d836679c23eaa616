"""`slipstream upcycle`: a dense checkpoint becomes a Mixture-of-Experts."""

import os
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class SaveDtype(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"


def upcycle(
    source: Annotated[Path, typer.Argument(help="Dense model: a Hugging Face folder or a .gguf file.")],
    output: Annotated[Path, typer.Option(help="Folder to write the Mixtral checkpoint to.")],
    experts: Annotated[int, typer.Option(help="Copies of each MLP.")] = 4,
    top_k: Annotated[int, typer.Option(help="Experts that each token goes to.")] = 2,
    dtype: Annotated[SaveDtype, typer.Option(help="Type of the saved weights.")] = SaveDtype.bfloat16,
    seed: Annotated[int, typer.Option(help="Seed of the routers' random weights.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that OUTPUT already holds.")] = False,
) -> None:
    """Turn a dense model into a Mixture-of-Experts by copying its MLPs (sparse upcycling).

    Works for Llama-family decoders, whose blocks fit Mixtral exactly. Checks that the new model's logits equal the
    dense model's within 1e-3 before it writes anything.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a log file keeps every redraw; tqdm looks when it is imported
    from slipstream.checkpoint.upcycle import TOLERANCE
    from slipstream.checkpoint.upcycle import upcycle as run

    start = time.monotonic()
    done = run(source, output, experts=experts, top_k=top_k, dtype=dtype.value, seed=seed, overwrite=overwrite)
    print(
        f"{done.dense_parameters / 1e6:.1f} M dense parameters -> {done.parameters / 1e6:.1f} M in {experts} experts, "
        f"{done.active_parameters / 1e6:.1f} M active per token (top {top_k})"
    )
    print(f"largest logit difference to the dense model: {done.max_logit_difference:.1e} (limit {TOLERANCE:.0e})")
    print(f"saved {done.output} in {dtype.value} after {time.monotonic() - start:.0f} s")
