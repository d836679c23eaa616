"""`slipstream bench`: a training step beside others', and its expert layer, exchange, optimizer and loss alone."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from slipstream.cli.listed import listed

bench = typer.Typer(
    help="Time a training step of real shapes, ours and others' in turn; or one part of it alone.",
    invoke_without_command=True,
    no_args_is_help=False,
)

Model = Annotated[str, typer.Option(help="Preset of shapes: qwen3-30b-a3b, gpt-oss-20b, … (docs/benchmarks.md).")]
Layers = Annotated[int | None, typer.Option(help="Depth; the preset's own if left out, 0 for the full model's.")]
Device = Annotated[str | None, typer.Option(help="cuda or cpu; the GPU where there is one.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="Tiny widths, to try that it runs.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")]
Iterations = Annotated[int, typer.Option(help="Timed iterations.")]


@bench.callback()
def step(
    context: typer.Context,
    model: Model = "qwen3-30b-a3b",
    layers: Layers = None,
    experts: Annotated[int | None, typer.Option(help="Routed experts a layer; 0 for the full model's.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another config field.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens a row.")] = 4096,
    micro_batch: Annotated[int, typer.Option(help="Rows a GPU.")] = 1,
    packed: Annotated[int | None, typer.Option(help="Pack each row with documents of this many tokens.")] = None,
    rivals: Annotated[str, typer.Option(help="Comma list; the first is what ratios refer to.")] = "transformers",
    gate: Annotated[str, typer.Option(help="balanced, learned or both.")] = "balanced,learned",
    repeats: Annotated[int, typer.Option(help="Processes of each contender and gate.")] = 2,
    steps: Annotated[int, typer.Option(help="Timed steps of each process.")] = 10,
    warmup: Annotated[int, typer.Option(help="Steps before them.")] = 5,
    nproc: Annotated[int, typer.Option(help="GPUs; more than 1 starts torchrun.")] = 1,
    ep: Annotated[int | None, typer.Option(help="Expert-parallel ranks; all of them if left out.")] = None,
    activation_checkpointing: Annotated[str, typer.Option(help="none, selective or full.")] = "none",
    optimizer: Annotated[
        str, typer.Option(help="Ours: slipstream or torch (rivals: torch's fused AdamW).")
    ] = "slipstream",
    lora: Annotated[int | None, typer.Option(help="Train PEFT adapters of this rank, experts included.")] = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="With --lora: our experts' own weights in 4 bits.")
    ] = False,
    backend: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Our BackendConfig's field.")] = None,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Ours: forward and backward as one CUDA graph.")
    ] = False,
    rival_attn: Annotated[str, typer.Option(help="Attention of rivals on Transformers.")] = "sdpa",
    rival_env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="A rival's own folder of packages.")
    ] = None,
    nemo_backend: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="NeMo's BackendConfig's field.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Profile a step of each at the end.")] = False,
    timeout: Annotated[float, typer.Option(help="Minutes after which a process counts as hung.")] = 20.0,
    device: Device = None,
    tiny: Tiny = False,
    json_file: Json = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for NAME.md, .json, .svg; benchmarks/results where it exists.")
    ] = None,
) -> None:
    """Time whole training steps: forward with loss, backward, optimizer."""
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console

    from slipstream.bench.options import Options
    from slipstream.bench.report import build_report, failed, terminal_table, write_results
    from slipstream.bench.runner import Plan, run
    from slipstream.bench.timing import check_device

    device = check_device(_device(device))
    options = Options(
        model=model,
        layers=layers,
        experts=experts,
        changes=_pairs("--set", set_),
        tiny=tiny,
        seq_len=min(seq_len, 64) if tiny else seq_len,
        micro_batch=micro_batch,
        packed=packed,
        steps=steps,
        warmup=warmup,
        nproc=nproc,
        ep_size=nproc if ep is None else ep,
        activation_checkpointing=activation_checkpointing,
        device=device,
        optimizer=optimizer,
        lora=lora,
        load_in_4bit=load_in_4bit,
        backend=_pairs("--backend", backend),
        cuda_graphs=cuda_graphs,
        rival_attn=rival_attn,
        nemo_backend=_pairs("--nemo-backend", nemo_backend),
    )
    options.config()  # a mistake in it is told before a process starts
    plan = Plan(
        rivals=listed(rivals),
        gates=listed(gate),
        repeats=repeats,
        profile=profile,
        rival_env={key: str(value) for key, value in _pairs("--rival-env", rival_env).items()},
        timeout_minutes=timeout,
    )
    if json_file is not None and json_file.exists():
        raise ValueError(f"--json {json_file}: the file exists already; give another")
    if output is None and Path("benchmarks/results").is_dir():
        output = Path("benchmarks/results")

    runs, stopped = [], None
    try:
        for result in run(plan, options, lambda line: print(line, flush=True)):
            runs.append(result)
    except (KeyboardInterrupt, SystemExit) as error:
        if not runs:
            raise
        stopped = error
        print(f"stopped: the {len(runs)} runs that were done are reported", file=sys.stderr)
    report = build_report(runs, options, plan.contenders, shlex.join(["slipstream", *sys.argv[1:]]))
    Console(width=None if sys.stdout.isatty() else 200).print(terminal_table(report))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    if output is not None:
        for path in write_results(report, output):
            print(f"wrote {path}")
    for problem in report["problems"]:
        print(f"problem: {problem}", file=sys.stderr)
    if stopped is not None:
        raise stopped
    if failed(report):
        raise typer.Exit(1)


@bench.command()
def layer(
    model: Model = "qwen3-30b-a3b",
    tokens: Annotated[str, typer.Option(help="Comma list of sizes.")] = "4096",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    simulate_ep: Annotated[int, typer.Option(help="Run one rank's share of a group of this size.")] = 1,
    ceiling: Annotated[float, typer.Option(help="TFLOP/s of a dense GEMM here, to compare with.")] = 750.0,
    rivals: Annotated[
        str, typer.Option(help="Comma list, or '' for none. Liger's and sonic-moe's kernels tune for minutes.")
    ] = "transformers,liger,sonic",
    iterations: Iterations = 20,
    device: Device = None,
    tiny: Tiny = False,
    json_file: Json = None,
) -> None:
    """The expert layer alone: forward, and forward with backward."""
    import torch

    from slipstream.bench.layer import bench_layer
    from slipstream.bench.timing import parse_device

    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in dtypes:
        raise ValueError(f"--dtype {dtype}: use {', '.join(dtypes)}")
    rows = []
    for row in bench_layer(
        model, [_whole("--tokens", size) for size in listed(tokens)], parse_device(_device(device)),
        dtype=dtypes[dtype], simulate_ep=simulate_ep, ceiling=ceiling, tiny=tiny, iterations=iterations,
        rivals=listed(rivals),
    ):  # fmt: skip
        found = row.get("error") or f"{row['ms']['forward_backward']['median']:.3f} ms forward + backward"
        typer.echo(f"{row['tokens']} tokens, {row['routing']}, {row['contender']}: {found}", err=True)
        rows.append(row)
    rows.sort(key=lambda row: (row["tokens"], row["routing"]))
    columns = ("tokens", "experts", "top-k", "routing", "contender", "forward ms", "TFLOP/s", "fwd + bwd ms", "TFLOP/s",
               "of ceiling", "peak GiB")  # fmt: skip
    cells = []
    for row in rows:
        about = [str(row[key]) for key in ("tokens", "experts", "top_k")]
        about += [f"{row['routing']} (max/mean {row['imbalance']:.2f})", row["contender"]]
        if "error" in row:
            cells.append([*about, row["error"]])
            continue
        for_each = (("forward", 0), ("forward_backward", 1))
        figures = [f(row, key) for key, _ in for_each for f in (_ms, lambda r, k: f"{r['tflops'][k]:.0f}")]
        cells.append(
            [*about, *figures, f"{100 * row['of_ceiling']['forward_backward']:.0f} %", f"{row['peak_gib']:.2f}"]
        )
    _show(f"expert layer of {model}", columns, cells, rows, json_file)


@bench.command()
def dispatch(
    model: Model = "qwen3-30b-a3b",
    tokens: Annotated[int, typer.Option(help="Tokens of each rank.")] = 4096,
    nproc: Annotated[int, typer.Option(help="Ranks to start here, one a GPU; torchrun's count under torchrun.")] = 2,
    iterations: Iterations = 20,
    tiny: Tiny = False,
    json_file: Json = None,
) -> None:
    """The exchange of tokens between experts' ranks alone: dispatch and combine, forward and backward."""
    if json_file is not None and json_file.exists():
        raise ValueError(f"--json {json_file}: the file exists already; give another")
    if "RANK" not in os.environ:
        from slipstream.cli.ranks import start_ranks

        arguments = ["--model", model, "--tokens", str(tokens), "--iterations", str(iterations), *["--tiny"] * tiny]
        arguments += [] if json_file is None else ["--json", str(json_file)]
        raise typer.Exit(start_ranks(nproc, ["bench", "dispatch", *arguments]))
    import torch.distributed as dist

    from slipstream.bench.dispatch import bench_dispatch
    from slipstream.bench.timing import parse_device
    from slipstream.parallel.setup import DistributedSetup, join_process_group

    join_process_group(DistributedSetup())
    rows = bench_dispatch(model, tokens, parse_device(_device(None)), tiny=tiny, iterations=iterations)
    if dist.get_rank() == 0:
        cells = []
        for row in rows:
            about = [row["routing"], row["contender"]]
            if "error" in row:
                cells.append([*about, row["error"]])
                continue
            ms = row["ms"]
            forward = [_spread(ms[part]) if part in ms else "" for part in ("dispatch", "combine")]
            if "dispatch + combine" in ms:
                forward = [f"both {_spread(ms['dispatch + combine'])}", ""]
            backward, rate, host = _spread(ms["backward"]), f"{row['gb_per_s']:.0f}", f"{row['host_ms']:.2f}"
            cells.append([*about, *forward, backward, f"{row['wire_bytes'] / 1e6:.1f}", rate, host])
        columns = ("routing", "contender", "dispatch ms", "combine ms", "backward ms", "MB one way", "GB/s", "host ms")
        title = f"exchange of {model}, {dist.get_world_size()} ranks of {tokens} tokens x {rows[0]['hidden']} bf16"
        _show(title, columns, cells, rows, json_file)
    dist.destroy_process_group()


@bench.command()
def optimizer(
    model: Model = "qwen3-30b-a3b",
    layers: Layers = None,
    iterations: Iterations = 10,
    device: Device = None,
    tiny: Tiny = False,
    json_file: Json = None,
) -> None:
    """The optimizer's step alone, against the bandwidth of the device's memory."""
    from slipstream.bench.optimizer import bench_optimizer
    from slipstream.bench.timing import parse_device

    found = bench_optimizer(model, parse_device(_device(device)), layers=layers, tiny=tiny, iterations=iterations)
    cells = [
        [row["contender"], row["error"]]
        if "error" in row
        else [
            row["contender"],
            _spread(row["ms"]),
            f"{row['bytes_per_parameter']:.1f}",
            f"{row['gb_per_s']:,.0f}",
            f"{100 * row['of_bandwidth']:.0f} %",
            f"{row['extra_peak_gib']:.2f}",
        ]
        for row in found["rows"]
    ]
    title = (
        f"AdamW over {found['parameters'] / 1e9:.2f} B bf16 parameters in {found['tensors']} tensors; "
        f"a copy reaches {found['copy_gb_per_s']:,.0f} GB/s"
    )
    _show(title, ("contender", "ms", "B/parameter", "GB/s", "of copy", "extra GiB"), cells, found, json_file)


@bench.command()
def loss(
    model: Annotated[str, typer.Option(help="Preset whose head is taken.")] = "qwen3-30b-a3b",
    tokens: Annotated[int, typer.Option(help="Rows of the head.")] = 4096,
    hidden: Annotated[int | None, typer.Option(help="Width, instead of the preset's.")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Vocabulary, instead of the preset's.")] = None,
    iterations: Iterations = 20,
    device: Device = None,
    tiny: Tiny = False,
    json_file: Json = None,
) -> None:
    """The output head with its loss alone, against the time of its GEMMs."""
    from slipstream.bench.loss import bench_loss, shape_of
    from slipstream.bench.timing import parse_device

    own_hidden, own_vocabulary = shape_of(model, tiny=tiny)
    found = bench_loss(
        tokens, hidden or own_hidden, vocabulary or own_vocabulary, parse_device(_device(device)), iterations=iterations
    )
    cells = [
        [row["contender"], row["error"]]
        if "error" in row
        else [
            row["contender"],
            _spread(row["ms"]),
            f"{row['over_gemms']:.2f} x",
            f"{row['tflops']:.0f}",
            f"{row['peak_gib']:.2f}",
            f"{row['loss']:.4f}",
        ]
        for row in found["rows"]
    ]
    title = (
        f"head and loss, {found['tokens']} x {found['hidden']} x {found['vocabulary']}; "
        f"its three GEMMs {found['gemm_ms']['median']:.2f} ms"
    )
    _show(title, ("contender", "fwd + bwd ms", "over GEMMs", "TFLOP/s", "peak GiB", "loss"), cells, found, json_file)


def _show(title: str, columns: tuple[str, ...], rows: list[list[str]], data: Any, json_file: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if json_file is not None:
        with json_file.open("x") as file:
            file.write(json.dumps(data, indent=1) + "\n")


def _ms(row: dict[str, Any], part: str) -> str:
    return _spread(row["ms"][part])


def _spread(ms: dict[str, float]) -> str:
    return f"{ms['median']:.2f} ({ms['min']:.2f}-{ms['max']:.2f})"


def _device(name: str | None) -> str:
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _whole(option: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{option} {text}: give whole numbers of 1 or more, with commas between")
    return int(text)


def _pairs(option: str, texts: list[str] | None) -> dict[str, Any]:
    """`KEY=VALUE` as a dict, the values read as YAML: 8, true, sdpa, [1, 2]."""
    import yaml

    pairs = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"{option} {text}: give KEY=VALUE")
        pairs[key] = yaml.safe_load(value)
    return pairs
