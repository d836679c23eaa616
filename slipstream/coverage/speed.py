"""A training step of every architecture on one GPU, plain Transformers' and ours one after another in this process."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import torch
from transformers import PretrainedConfig

from slipstream.bench.options import OURS, Job, Options
from slipstream.bench.worker import execute, versions
from slipstream.coverage.checks import Row, time_limit
from slipstream.coverage.compare import Attempt
from slipstream.coverage.shapes import in_words, timed_config
from slipstream.coverage.table import AIM
from slipstream.coverage.tiny import tiny_config
from slipstream.hf_recurrent import beside_attention
from slipstream.planning.flops import count_parameters, forward_flops
from slipstream.planning.gpus import find_gpu
from slipstream.planning.speed import least_ms

RIVAL = "transformers"
# By what people train, roughly.
MOST_USED = (
    "qwen3_moe", "gpt_oss", "mixtral", "qwen2_moe", "olmoe", "nemotron_h", "glm4_moe", "deepseek_v3", "qwen3_next",
    "qwen3_5_moe_text", "deepseek_v2", "llama4_text", "gemma4_text", "glm4_moe_lite", "granitemoehybrid", "minimax_m2",
    "kimi_linear", "lfm2_moe", "ernie4_5_moe", "phimoe", "bailing_hybrid", "dbrx", "jamba", "hunyuan_v1_moe", "llama",
    "qwen3", "qwen2", "mistral", "gemma3_text", "phi3", "qwen3_5_text", "olmo3", "smollm3", "granite",
)  # fmt: skip
LOST = "CUDA error"  # after it nothing runs in this process any more
_COMPILED_TOGETHER = 3  # models of each process
_CLEARLY = 1.05


@dataclass(frozen=True)
class Timed(Options):
    """As for `bench`, of an architecture: `model` is a model type, and `tiny` means the sizes of the checks."""

    steps: int = 5
    warmup: int = 3

    def config(self) -> PretrainedConfig:
        """The model's config; without a cache of keys and values, which Transformers would make in training too."""
        config = tiny_config(self.model) if self.tiny else timed_config(self.model, self.seq_len)
        config.get_text_config().use_cache = False
        return config


def measure_all(
    rows: Iterable[Row],
    options: Callable[[str], Timed],
    *,
    limit_seconds: float | None,
    seconds_per_model: float,
    done: Callable[[Row, float], None],
    compile_workers: int = 0,
    tell: Callable[[str], None] = print,
) -> list[str]:
    """Fill in the `speed` of each row that has none yet with these versions on this GPU, or an error; in the order of
    `in_order`.

    Args:
        options: of a model type.
        limit_seconds: after so long no architecture is begun.
        seconds_per_model: after so long a side counts as stopped.
        done: called with each row that was measured, and its seconds.
        compile_workers: so many processes compile the next few models' steps before these are measured; 0: nothing
            is compiled beforehand. Each needs memory for a model and its gradients.
        tell: called with what went wrong there.

    Returns:
        The model types that are left.
    """
    from slipstream.coverage import warm  # its processes import this module

    begun = monotonic()
    rows = in_order([row for row in rows if not _is_measured(row, options(row.model_type))], options)
    for place, row in enumerate(rows):
        timed = options(row.model_type)
        if limit_seconds is not None and monotonic() - begun > limit_seconds:
            return [row.model_type for row in rows[place:]]
        if compile_workers and place % (_COMPILED_TOGETHER * compile_workers) == 0:
            following = rows[place : place + _COMPILED_TOGETHER * compile_workers]
            warm.warm([options(row.model_type) for row in following], compile_workers, seconds_per_model, tell)
        start = monotonic()
        row.speed = measure(timed, seconds_per_model)
        done(row, monotonic() - start)
        if LOST in row.speed.get("error", ""):
            return [row.model_type for row in rows[place + 1 :]]
    return []


def _is_measured(row: Row, options: Timed) -> bool:
    return row.speed.get("of") == _conditions(options) and "error" not in row.speed


def in_order(rows: list[Row], options: Callable[[str], Timed]) -> list[Row]:
    """As they should be measured where time may not last: models with experts before others; of each, those without a
    result on this kind of device, then those with an error there, then the rest; the most used first."""

    def place(row: Row) -> tuple[bool, int, int]:
        here = row.speed.get("of", {}).get("device") == _conditions(options(row.model_type))["device"]
        before = 0 if not here else 1 if "error" in row.speed else 2
        return not row.moe, before, MOST_USED.index(row.model_type) if row.model_type in MOST_USED else len(MOST_USED)

    return sorted(rows, key=place)


def measure(options: Timed, seconds: float) -> dict[str, Any]:
    """Both sides of one architecture.

    Returns:
        `step` and `memory`, Transformers' over ours and ours over theirs; `milliseconds` and `gib` of either;
        `graphed`, the ratio with our forward and backward as a CUDA graph, where that is clearly more and `step` less
        than aimed at, or `no_graph`, why there is none; `loss_error`, how far the first losses are apart; `compile_s`,
        our first step; `imbalance` of the routers; our `attention`; what `limit` says; `notes`, where a layer did not
        compile; `shapes`, `device` and `of`, what it was measured with. Or `error`.
    """
    found: dict[str, Any] = {"of": _conditions(options)}
    attempt = Attempt()
    with attempt:
        found["shapes"] = in_words(options.config())
    if attempt.error:
        return found | {"error": attempt.error}
    theirs, error = _run(RIVAL, options, seconds)
    if error:
        return found | {"error": error}
    ours, error = _run(OURS, options, seconds)
    if error:
        return found | {"error": error}
    found |= limit(options, ours["device_name"], theirs["back_to_back_ms"])
    found |= {
        "step": theirs["back_to_back_ms"] / ours["back_to_back_ms"],
        "memory": ours["peak_gib"] / theirs["peak_gib"] if theirs["peak_gib"] else 1.0,
        "milliseconds": {RIVAL: theirs["back_to_back_ms"], OURS: ours["back_to_back_ms"]},
        "gib": {RIVAL: theirs["peak_gib"], OURS: ours["peak_gib"]},
        "loss_error": abs(ours["first_loss"] / theirs["first_loss"] - 1),
        "compile_s": ours["cold_start_s"],
        "device": ours["device_name"],
        "imbalance": ours["imbalance"],
        "attention": ours["settings"]["attn"],
        **({"notes": ours["notes"]} if ours["notes"] else {}),
    }
    if options.device == "cuda" and found["step"] < AIM and found.get("limit", AIM) >= AIM:
        graphed, error = _run(OURS, replace(options, cuda_graphs=True, warmup=options.warmup + 2), seconds)
        if reason := graphed.get("no_graph"):
            found["no_graph"] = reason
        elif not error and graphed["back_to_back_ms"] < ours["back_to_back_ms"] / _CLEARLY:
            found["graphed"] = theirs["back_to_back_ms"] / graphed["back_to_back_ms"]
    return found


def _run(contender: str, options: Timed, seconds: float) -> tuple[dict[str, Any], str]:
    """What `execute` found, or an error."""
    result: dict[str, Any] = {}
    attempt = Attempt()
    with attempt, time_limit(seconds):
        result = execute(Job(options, contender, "learned"))
    if LOST not in attempt.error:
        _forget()
    return result, f"{contender}: {attempt.error}" if attempt.error else ""


def limit(options: Timed, device: str, theirs_ms: float) -> dict[str, Any]:
    """`others`: the kinds of layers that mix tokens by something else than plain attention, of which the least time is
    not counted. Or, without such, `limit`: the ratio of a step of GEMMs, attention and AdamW alone."""
    config = options.config()
    if others := beside_attention(config):
        return {"others": others}
    found: dict[str, Any] = {}
    with Attempt():  # not every config says what is counted here, such as the experts of a token
        flops, parameters = forward_flops(config, options.seq_len), count_parameters(config).total
        found["limit"] = theirs_ms / least_ms(flops, parameters, options.tokens, find_gpu(device))
    return found


def _conditions(options: Timed) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    return {"device": device, "tokens": options.tokens, "backend": dict(options.backend), "versions": versions()}


def _forget() -> None:
    """Give back what a side held, its compiled layers with it."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
