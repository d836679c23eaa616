"""`slipstream doctor`: what is installed, what it changes, what of the machine works, and what is set up wrongly."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.doctor import gpus as hardware
from slipstream.doctor import packages, settings
from slipstream.doctor.ranks import on_ranks

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS = 120.0  # for a probe: NCCL starts in some 10 s, after an import on every rank


def doctor(
    bench: Annotated[
        bool, typer.Option("--bench", help="Also measure NCCL between the GPUs; takes under a minute.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as one JSON object.")] = False,
) -> None:
    """Show versions, GPUs and their links, what works between them, optional packages, and misconfigurations."""
    report = collect(bench)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        from rich.console import Console

        render(report, Console(soft_wrap=not sys.stdout.isatty()))


def collect(bench: bool = False) -> dict[str, Any]:
    """Everything `doctor` shows, as JSON data.

    Keys: `versions` (name to version or None), `gpus` (name, memory_gib, capability), `links` (of each pair),
    `symmetric_memory` (`works` and `why`), `nccl` (GB/s; None unless asked for), `optional` (package, version or None,
    effect), `problems` and `hints` (sentences with the fix).
    """
    torch_cuda, usable = hardware.torch_gpus()
    listed = hardware.driver_gpus()
    driver = listed[0]["driver"] if listed else None
    versions = packages.versions() | {"cuda (of torch)": torch_cuda}
    if driver is not None:
        versions["driver"] = driver
    machine = settings.this_machine(torch_cuda, len(usable), driver, tuple(gpu["used_gib"] for gpu in listed))
    problems = packages.requirement_problems() + settings.problems(machine)
    symmetric, nccl = _between(len(usable), bench)
    if isinstance(nccl, str) and len(usable) > 1:
        problems.append(f"NCCL does not work between the GPUs: {nccl}; run with NCCL_DEBUG=INFO to see why")
    return {
        "versions": versions,
        "gpus": usable or listed,
        "links": hardware.links() if len(usable or listed) > 1 else [],
        "symmetric_memory": symmetric,
        "nccl": nccl,
        "optional": packages.optional_packages(),
        "problems": problems,
        "hints": settings.hints(machine),
    }


def _between(gpus: int, bench: bool) -> tuple[dict[str, Any], dict[str, Any] | str | None]:
    """What works between GPUs: symmetric memory, and where asked for, NCCL and how fast."""
    if gpus < 2:
        why = "it is between GPUs, and torch can use " + ("one" if gpus else "none")
        return {"works": False, "why": why}, "nothing to measure with fewer than two GPUs" if bench else None
    print(f"trying symmetric memory{' and NCCL' * bench} on {gpus} GPUs …", file=sys.stderr)
    tried = on_ranks("symmetric_memory", gpus, "cuda", _SECONDS)
    works = not isinstance(tried, str)
    measured = on_ranks("bandwidth", gpus, "cuda", _SECONDS) if bench else None
    return {"works": works, "why": "" if works else tried}, measured


def render(report: dict[str, Any], console: "Console") -> None:
    """Print a report of `collect` as tables."""
    from rich.table import Table

    versions = Table("package", "version", title="Versions", title_justify="left")
    for name, version in report["versions"].items():
        versions.add_row(name, version or "missing")
    console.print(versions)

    gpus = Table("GPU", "memory (GiB)", "capability", title="GPUs", title_justify="left")
    for gpu in report["gpus"] or [{"name": "none", "memory_gib": "", "capability": ""}]:
        gpus.add_row(gpu["name"], str(gpu["memory_gib"]), gpu["capability"])
    console.print(gpus)
    lines = [f"links: {line}" for line in hardware.describe_links(report["links"])]
    if len(report["gpus"]) > 1:
        works, why = report["symmetric_memory"]["works"], report["symmetric_memory"]["why"]
        lines.append(f"symmetric memory: {'works' if works else f'does not work: {why}'}")
    if report["nccl"] is not None:
        lines.append(f"NCCL: {_bandwidth(report)}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    optional = Table("package", "version", "what it changes", title="Optional packages", title_justify="left")
    for row in report["optional"]:
        optional.add_row(row["package"], row["version"] or "missing", row["effect"])
    console.print(optional)

    for problem in report["problems"] or ["no problem found"]:
        console.print(f"- {problem}", markup=False, highlight=False, soft_wrap=True)
    for hint in report["hints"]:
        console.print(f"- hint: {hint}", markup=False, highlight=False, soft_wrap=True)


def _bandwidth(report: dict[str, Any]) -> str:
    """The measured rates, beside the link's by data sheet where the GPU is known."""
    from slipstream.planning.gpus import find_gpu

    found = report["nccl"]
    if isinstance(found, str):
        return found
    try:
        limit = f"; the link's data sheet says {find_gpu(report['gpus'][0]['name']).link:g}"
    except ValueError:
        limit = ""
    return (
        f"all-reduce {found['all_reduce']:.0f} GB/s, all-to-all {found['all_to_all']:.0f} GB/s a GPU in one direction, "
        f"at {found['mib']} MiB on {found['ranks']} GPUs{limit}"
    )
