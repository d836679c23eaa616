"""AdamW of many tensors: the small ones of a kind in one launch, in which each program finds its tensor."""

from collections.abc import Iterable
from typing import Any

import torch

from slipstream.kernels import HAS_TRITON
from slipstream.kernels.adamw import BLOCK, WARPS, WORD, Facts, Update, adamw_, flags, signed
from slipstream.kernels.rounding import Random

_COLUMNS = 10  # of the table that a launch reads
_Known = tuple[Facts, Update]


def adamw_all_(updates: Iterable[Update]) -> None:
    """`adamw_` of each, the largest first, so that the host is done with the many small ones when the GPU is.

    Updates on one device have the same `scale` and `skip`.
    """
    batches: dict[Any, list[_Known]] = {}
    known = [(_facts(update), update) for update in updates]
    for facts, update in sorted(known, key=lambda one: one[0].size, reverse=True):
        if facts.kind is None or not update.grad.is_contiguous():
            adamw_(*update[:9])
            continue
        whole = facts.whole and update.grad.data_ptr() % 16 == 0
        kind = (facts.kind, whole, update.grad.dtype, update.coefficients, update.random is None)
        batches.setdefault(kind, []).append((facts, update))
    by_device: dict[torch.device, list[tuple[bool, list[_Known]]]] = {}
    for (_, whole, *_), batch in batches.items():
        by_device.setdefault(batch[0][1].param.device, []).append((whole, batch))
    for device, those in by_device.items():
        _launch_shared(device, those)


def _facts(update: Update) -> Facts:
    return update.facts or Facts.of(update.param, update.exp_avg, update.exp_avg_sq, update.residual)


def _launch_shared(device: torch.device, batches: list[tuple[bool, list[_Known]]]) -> None:
    """One launch for each batch of updates, which differ in their tensors, sizes and random bits only; before a batch,
    whether all of its tensors begin and end at multiples of 16."""
    rows: list[int] = []
    launches = []
    for whole, batch in batches:
        first, blocks = len(rows) // _COLUMNS, 0
        for facts, update in batch:
            key, start = update.random or Random(0)
            param, exp_avg, exp_avg_sq, *residual = facts.pointers
            rows += (param, update.grad.data_ptr(), exp_avg, exp_avg_sq, residual[0] if residual else 0)
            rows += (facts.size, signed(key & WORD), signed(key >> 32), start, blocks)
            blocks += -(-facts.size // BLOCK)
        launches.append(([update for _, update in batch], whole, first, blocks))
    table = torch.tensor(rows, dtype=torch.int64).view(-1, _COLUMNS)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    for updates, whole, first, blocks in launches:
        _launch_many(updates, table[first : first + len(updates)], whole, blocks)


def _launch_many(updates: list[Update], table: torch.Tensor, whole: bool, blocks: int) -> None:
    param, grad, exp_avg, exp_avg_sq, _, coefficients, _, scale, skip, _ = updates[0]
    beta1, beta2, decay, step_size, root_scale, eps = coefficients
    with torch.cuda.device_of(param):
        _adamw_many_kernel[(blocks,)](
            table, table if scale is None else scale, table if skip is None else skip, len(updates),
            beta1, 1 - beta1, beta2, 1 - beta2, decay, step_size, root_scale, eps, 0,
            PARAM=_TRITON[param.dtype], GRAD=_TRITON[grad.dtype], EXP_AVG=_TRITON[exp_avg.dtype],
            EXP_AVG_SQ=_TRITON[exp_avg_sq.dtype], WHOLE=whole, COLUMNS=_COLUMNS,
            **flags(updates[0]), BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


if HAS_TRITON:
    import triton
    import triton.language as tl

    from slipstream.kernels.adamw import update_block

    _TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

    @triton.jit(do_not_specialize=["table", "rows", "zero"])
    def _adamw_many_kernel(
        table,
        scale,
        skip,
        rows,
        beta1,
        rest1,
        beta2,
        rest2,
        decay,
        step_size,
        root_scale,
        eps,
        zero,
        PARAM: tl.constexpr,
        GRAD: tl.constexpr,
        EXP_AVG: tl.constexpr,
        EXP_AVG_SQ: tl.constexpr,
        WHOLE: tl.constexpr,
        COLUMNS: tl.constexpr,
        STOCHASTIC: tl.constexpr,
        MASTER: tl.constexpr,
        SCALED: tl.constexpr,
        SKIPS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        applies = True
        if SKIPS:
            applies = tl.load(skip) == 0.0
        if applies:
            # The last row that begins at this block or before; their blocks are numbered through.
            block = tl.program_id(0)
            low = block * 0
            high = low + rows
            while high - low > 1:
                middle = (low + high) // 2
                before = tl.load(table + middle * COLUMNS + (COLUMNS - 1)) <= block
                low = tl.where(before, middle, low)
                high = tl.where(before, high, middle)
            row = table + low * COLUMNS
            first = (block - tl.load(row + COLUMNS - 1)) * BLOCK
            size = tl.load(row + 5)
            param = tl.load(row).to(tl.pointer_type(PARAM))
            grad = tl.load(row + 1).to(tl.pointer_type(GRAD))
            exp_avg = tl.load(row + 2).to(tl.pointer_type(EXP_AVG))
            exp_avg_sq = tl.load(row + 3).to(tl.pointer_type(EXP_AVG_SQ))
            residual = tl.load(row + 4).to(tl.pointer_type(tl.int16))
            if WHOLE:
                size = tl.multiple_of(size, 16)
                param = tl.multiple_of(param, 16)
                grad = tl.multiple_of(grad, 16)
                exp_avg = tl.multiple_of(exp_avg, 16)
                exp_avg_sq = tl.multiple_of(exp_avg_sq, 16)
                residual = tl.multiple_of(residual, 16)
            offsets = first + tl.arange(0, BLOCK)
            update_block(
                param, grad, exp_avg, exp_avg_sq, residual, scale, offsets, offsets < size, beta1, rest1, beta2, rest2,
                decay, step_size, root_scale, eps, tl.load(row + 6), tl.load(row + 7), tl.load(row + 8), zero,
                STOCHASTIC, MASTER, SCALED,
            )  # fmt: skip
