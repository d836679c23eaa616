"""Stores into other ranks' memory: where things lie in it, and how a rank knows that they have arrived.

Each rank has an area that all ranks of the group can write. Two exchanges take turns in it, `dispatch_rows` (tokens to
the ranks of their experts) and `combine_rows` (one row of each such rank back). A token's place follows from its
number, so that no count has to travel before the rows. After DeepEP (github.com/deepseek-ai/DeepEP), one step simpler.

**Order.** Every program stores its share, then adds 1 to its rank's flag on each rank (release, system scope). A
receiver waits until the flag has grown by the number of programs (acquire). How far it was, it counts in device memory,
so that CUDA graphs can repeat an exchange. **Progress.** A program sends all it has before it waits, and all programs
of a kernel run at once (`Window.programs`), so every rank gets what it waits for. **Reuse.** Dispatch and combine
alternate and have halves of their own, which need no further handshake: a rank writes into a peer's dispatch half only
after the combine flags of the pair before came from all peers, and a peer raises its combine flag after the kernels
that read its dispatch half (one stream). The same holds with the two words exchanged. **A peer that is gone** costs
`timeout`: the wait ends, `failed` and `report` get its number plus 1, and every later wait ends at once; what then lies
in the areas is of no use.

Dims: P ranks, T tokens of this rank, M most tokens of any rank, N = P * M, H hidden, K experts per token, L experts of
a rank, R rows, S rows per token.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from slipstream.kernels import HAS_TRITON

MAX_RANKS = 128
HEADER = 4096  # bytes: flags of dispatch, flags of combine, token counts, int32 each for MAX_RANKS ranks
WARPS = 8
MAX_REGISTERS = 128  # of a thread: two programs fit into a multiprocessor of 65,536
_POLLS = 1024  # looks at a flag between two looks at the clock
_ELEMENTS = 4096  # of a tile, 16 for each thread


class Layout(NamedTuple):
    """Where things lie in each rank's area, in bytes from its start; the same on all ranks."""

    ranks: int
    most: int
    hidden: int
    top_k: int
    rows: int
    ids: int
    weights: int
    combine_rows: int
    combine_grads: int


def half_size(ranks: int, most: int, hidden: int, top_k: int, itemsize: int) -> int:
    """Bytes that an exchange of `most` tokens a rank takes in each direction, rows of `hidden` elements."""
    rows, routes = _sizes(ranks, most, hidden, top_k, itemsize)
    return rows + 2 * routes


def layout(half: int, ranks: int, most: int, hidden: int, top_k: int, itemsize: int) -> Layout:
    """The layout in areas of `HEADER + 2 * half` bytes.

    `half` stays what it is while exchanges of all sizes follow each other, so that no dispatch reaches into a combine
    that a peer still reads.
    """
    rows, routes = _sizes(ranks, most, hidden, top_k, itemsize)
    start, second = HEADER, HEADER + half
    return Layout(ranks, most, hidden, top_k, start, start + rows, start + rows + routes, second, second + rows)


def _sizes(ranks: int, most: int, hidden: int, top_k: int, itemsize: int) -> tuple[int, int]:
    rows, routes = ranks * most * hidden * itemsize, ranks * most * top_k * 4
    return -(-rows // 128) * 128, -(-routes // 128) * 128


@dataclass
class Window:
    """What the kernels need to reach the areas of all ranks.

    Attributes:
        rank: this rank's number of `ranks`.
        peers: `[P]` int64, the address of each rank's area as this device sees it.
        turns: `[2, programs]` int32, how many exchanges of either kind each program has received.
        clock: `[programs]` int64, scratch.
        failed, report: `[1]` int32, 0 or 1 + the rank that did not answer; `report` is one that the host can read.
        timeout: nanoseconds; looks at a flag where kernels are interpreted.
    """

    rank: int
    ranks: int
    peers: torch.Tensor
    turns: torch.Tensor
    clock: torch.Tensor
    failed: torch.Tensor
    report: torch.Tensor
    timeout: int

    @property
    def programs(self) -> int:
        """Programs of a kernel, the same on all ranks; no more than can run at once."""
        return self.clock.shape[0]

    def arguments(self) -> tuple[Any, ...]:
        """What both kernels take, in their order."""
        return (
            self.peers, self.turns, self.clock, self.failed, self.report, self.timeout, self.rank,
        )  # fmt: skip

    def constants(self, at: Layout) -> dict[str, Any]:
        """Compile-time arguments and options of both kernels."""
        block = min(_ELEMENTS, 1 << (at.hidden - 1).bit_length())
        cuda = self.peers.is_cuda
        return {
            "RANKS": self.ranks,
            "TIMED": cuda,
            "POLLS": _POLLS if cuda else 1,
            "BLOCK": block,
            "TOKENS": min(8, _ELEMENTS // block),
            "ENTRIES": 1024,
            "num_warps": WARPS,
            **({"maxnreg": MAX_REGISTERS} if cuda else {}),
        }

    def launches(self, send: bool, receive: bool) -> list[dict[str, bool]]:
        """Both halves in one kernel; interpreted, programs run one by one, so those that wait come last."""
        if self.peers.is_cuda or not (send and receive):
            return [{"SEND": send, "RECEIVE": receive}]
        return [{"SEND": True, "RECEIVE": False}, {"SEND": False, "RECEIVE": True}]


if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import globaltimer

    # Numbers that change from call to call, and must not each compile a kernel anew.
    VARYING = ["rank", "count", "most", "timeout", "num_rows", "scale"]
    _MAX_RANKS = tl.constexpr(MAX_RANKS)
    COUNTS_AT = tl.constexpr(8 * MAX_RANKS)

    @triton.jit
    def at_rank(peers, rank, offset, kind):
        """`rank`'s area from byte `offset` on, as a pointer like `kind`, which is aligned to 16 bytes."""
        address = tl.load(peers + rank) + offset
        return tl.multiple_of(address.to(kind.dtype, bitcast=True), 16)

    @triton.jit
    def signal(peers, rank, ranks, KIND: tl.constexpr):
        """Release what this program has stored, to every rank."""
        tl.debug_barrier()  # all threads of the program have stored
        for peer in range(ranks):
            flag = (tl.load(peers + peer) + 4 * (KIND * _MAX_RANKS + rank)).to(tl.pointer_type(tl.int32))
            tl.atomic_add(flag, 1, sem="release", scope="sys")

    @triton.jit
    def wait_for(
        peers, rank, source, target, clock, failed, report, timeout,
        KIND: tl.constexpr, TIMED: tl.constexpr, POLLS: tl.constexpr,
    ):  # fmt: skip
        """Until all programs of `source` have signalled, or `timeout` has passed here or in an earlier wait.

        All decisions hang on results of atomics, which one thread executes for the whole program: threads that decided
        for themselves could part.
        """
        flag = (tl.load(peers + rank) + 4 * (KIND * _MAX_RANKS + source)).to(tl.pointer_type(tl.int32))
        cell = clock + tl.program_id(0)
        missing = target - tl.atomic_add(flag, 0, sem="acquire", scope="sys")  # right also where int32 wraps around
        polls = tl.zeros((), tl.int64)
        deadline = tl.zeros((), tl.int64)
        while (missing > 0) & (polls >= 0):
            polls += 1
            if polls % POLLS == 0:
                now = polls
                if TIMED:
                    tl.atomic_xchg(cell, globaltimer().to(tl.int64))
                    now = tl.atomic_add(cell, 0)
                if polls == POLLS:
                    deadline = now + timeout
                lost = tl.atomic_add(failed, 0)
                if (lost == 0) & (now >= deadline):
                    lost = source + 1
                    tl.atomic_max(failed, lost)
                    tl.store(report, lost)
                if lost != 0:
                    polls = tl.full((), -1, tl.int64)
            missing = target - tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        tl.debug_barrier()
