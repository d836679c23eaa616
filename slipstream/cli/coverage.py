"""`slipstream coverage`: every causal-LM architecture of the installed Transformers, checked and timed."""

import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.cli.listed import listed

if TYPE_CHECKING:
    from slipstream.coverage.checks import Row


def coverage(
    models: Annotated[str, typer.Option(help="Model types, comma-separated; all by default.")] = "",
    output: Annotated[
        Path | None, typer.Option(help="Write PATH.json and PATH.md, and keep what PATH.json has of other runs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    ep: Annotated[bool, typer.Option(help="Check expert parallelism over two processes too.")] = True,
    speed: Annotated[
        bool, typer.Option("--speed", help="Time steps on this GPU instead; experts, and what was never timed, first.")
    ] = False,
    limit_seconds: Annotated[
        float | None, typer.Option(help="--speed: begin no architecture after so long; run again to go on.")
    ] = None,
    seconds_per_model: Annotated[float, typer.Option(help="--speed: a side that takes longer is given up.")] = 120.0,
    compile_workers: Annotated[
        int, typer.Option(help="--speed: processes that compile the next models beforehand; 5 on 140 GB, 3 on 80.")
    ] = 0,
    seq_len: Annotated[int, typer.Option(help="--speed: tokens a row, fewer for a few models.")] = 4096,
    compile_layers: Annotated[bool, typer.Option("--compile/--no-compile", help="--speed: ours compiled.")] = True,
    tiny: Annotated[bool, typer.Option("--tiny", help="--speed: tiny sizes, on the CPU if there is no GPU.")] = False,
) -> None:
    """Check every causal-LM architecture against plain Transformers at tiny sizes, or time it at real layers' sizes."""
    import transformers

    from slipstream.coverage import table
    from slipstream.coverage.architectures import architectures

    known = architectures()
    chosen = listed(models) or known
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"--models {unknown[0]}: Transformers {transformers.__version__} has no such causal-LM type")
    before = table.read(output.with_name(output.name + ".json")) if output else {}
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")

    def keep(rows: "list[Row]") -> None:
        before.update({row.model_type: row for row in rows})
        if output is not None:
            table.write(output, [before[name] for name in known if name in before])

    if speed:
        limits: dict[str, Any] = {
            "limit_seconds": limit_seconds,
            "seconds_per_model": seconds_per_model,
            "compile_workers": compile_workers,
        }
        rows = _timed(chosen, before, keep, limits, seq_len, compile_layers, tiny)
    else:
        rows = _checked(chosen, before, ep)
        keep(rows)
    if as_json:
        print(table.as_json(rows), end="")
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 200).print(table.as_table(rows))
    if failed := [f"{row.model_type} ({', '.join(row.failed)})" for row in rows if row.failed]:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


def _checked(chosen: list[str], before: "dict[str, Row]", ep: bool) -> "list[Row]":
    from slipstream.coverage.checks import check_architecture
    from slipstream.coverage.ranks import check_expert_parallelism

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for place, name in enumerate(chosen):
            print(f"\r{place + 1} of {len(chosen)}: {name}\x1b[K", end="", file=sys.stderr, flush=True)
            rows.append(check_architecture(name, Path(folder) if ep else None))
            rows[-1].speed = before[name].speed if name in before else {}
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        prepared = {row.model_type: Path(folder, row.model_type) for row in rows}
        prepared = {name: path for name, path in prepared.items() if path.is_dir()}
        if prepared:
            cells = check_expert_parallelism(prepared)
            for row in rows:
                if row.model_type in cells:
                    row.checks["ep2"] = cells[row.model_type]
    return rows


def _timed(
    chosen: list[str],
    before: "dict[str, Row]",
    keep: Any,
    limits: dict[str, Any],
    seq_len: int,
    compile_layers: bool,
    tiny: bool,
) -> "list[Row]":
    import torch

    from slipstream.coverage.architectures import has_experts, is_composite
    from slipstream.coverage.checks import Row
    from slipstream.coverage.shapes import timed_tokens
    from slipstream.coverage.speed import Timed, measure_all

    if not (tiny or torch.cuda.is_available()):
        raise ValueError("--speed needs a GPU; --tiny tries the same at tiny sizes on the CPU")
    backend = {} if compile_layers else {"compile": "none"}
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def options(name: str) -> Timed:
        tokens = seq_len if tiny else timed_tokens(name, seq_len)
        return Timed(name, seq_len=tokens, device=device, tiny=tiny, backend=backend)

    def done(row: Row, seconds: float) -> None:
        keep([row])
        found = {name: row.speed.get(name) for name in ("step", "memory", "loss_error", "compile_s", "error")}
        said = ", ".join(f"{name} {v:.3g}" if isinstance(v, float) else str(v) for name, v in found.items() if v)
        print(f"{row.model_type}: {said} ({row.speed.get('shapes')}; {seconds:.0f} s)", file=sys.stderr, flush=True)

    rows = [before.get(name) or Row(name, has_experts(name)) for name in chosen if not is_composite(name)]
    left = measure_all(rows, options, done=done, tell=lambda line: print(line, file=sys.stderr, flush=True), **limits)
    if left:
        print(f"left: {','.join(left)}", file=sys.stderr)
    return rows
