"""`slipstream merge`: a LoRA adapter added into its base model."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer


def merge(
    adapter: Annotated[str, typer.Argument(help="PEFT adapter: a folder or a hub id.")],
    into: Annotated[str, typer.Option(help="The model that it was trained on: a folder or a hub id.")],
    output: Annotated[Path, typer.Option(help="Folder to write the merged checkpoint to.")],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare logits with those of base and adapter; loads both models, in turn."),
    ] = False,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Take a base of another name than the adapter records.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that OUTPUT already holds.")] = False,
) -> None:
    """Merge an adapter into its base, file by file: a plain checkpoint in the base's own layout, experts included.

    The host holds one of the base's files at a time.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    from slipstream.checkpoint.merge import merge as run

    start = time.monotonic()
    done = run(adapter, into, output, verify=verify, any_base=any_base, overwrite=overwrite)
    print(f"merged: {done.changed:,} of {done.tensors:,} tensors changed, in {done.files} files")
    if done.untied:
        print(f"untied: the adapter makes {', '.join(done.untied)} a tensor of its own (tie_word_embeddings: false)")
    if done.logit_error is not None:
        print(
            f"verified: logits within {done.logit_error:.1e} of base and adapter (which moved them by "
            f"{done.adapter_effect:.1e})"
        )
    print(f"saved: {done.output} after {time.monotonic() - start:.0f} s")
