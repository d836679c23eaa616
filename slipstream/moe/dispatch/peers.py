"""Memory that all ranks of a group reach, for exchanges by stores: made once a group, shared by all layers and models.

On GPUs it is PyTorch's symmetric memory (CUDA backend, no multicast). On a CPU it is a file in shared memory, for
tests, where the kernels are interpreted.

Ranks may hold different numbers of tokens, another at each call, and each has to know the largest: it decides how rows
lie in the areas and whether the areas have to grow. The hosts tell each other, in a page that their processes share
(all are on one machine): each writes its number and waits until all have, which takes microseconds where they run in
step. No device is waited for.

Dims: see base.py.
"""

import functools
import itertools
import math
import mmap
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from slipstream.kernels import runs_on
from slipstream.kernels.nvlink_window import HEADER, MAX_RANKS, Layout, Window, half_size, layout

# Environment variables: seconds that a rank waits for another (its host may be compiling or saving), and programs of a
# kernel. By default two for each multiprocessor but some: an NCCL kernel, one program on each of up to 32, can fill
# them while it waits for its peer, and all programs of an exchange have to run beside it, or each waits for the other.
TIMEOUT, PROGRAMS = "SLIPSTREAM_EXCHANGE_TIMEOUT", "SLIPSTREAM_EXCHANGE_PROGRAMS"
_LEFT_TO_OTHERS = 36
_INTERPRETED_PROGRAMS = 2
_POLLS_PER_SECOND = 2000  # of an interpreted kernel, about

_PEERS: dict[str, "Peers"] = {}
_REFUSED: dict[str, str] = {}


class NoPeerAccessError(RuntimeError):
    """The ranks of a group can't reach each other's memory; raised on all of them."""


def peers_of(group: ProcessGroup | None, device: torch.device) -> "Peers":
    """The group's, made at the first call, which all its ranks have to make together.

    Raises:
        NoPeerAccessError: there can be none, with the reason and what to change.
    """
    group = group or dist.group.WORLD
    assert group is not None
    name = group.group_name
    found = _PEERS.get(name)
    if found is not None and found.group is group:
        return found
    if name in _REFUSED:
        raise NoPeerAccessError(_REFUSED[name])
    try:
        found = _PEERS[name] = Peers(group, device)
    except NoPeerAccessError as error:
        _REFUSED[name] = str(error)
        raise
    return found


def peers_named(name: str) -> "Peers":
    """The group's of that name; `peers_of` has made it."""
    return _PEERS[name]


class Peers:
    """The areas of a group's ranks, and its hosts' agreement on their size. Errors come on all ranks together."""

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.group, self.device, self.name = group, device, group.group_name
        self.ranks, self.rank = group.size(), group.rank()
        self.seconds = float(os.environ.get(TIMEOUT, "600"))
        self._calls = 0
        self._half = 0
        self._direction = "combine"
        self._stream: Any = None
        self._handle: Any = None
        facts = self._gathered(lambda: (_machine(), *_local_facts(device)))
        _check_facts(facts)
        programs = min(programs for *_, programs in facts)
        (pages,) = self._shared([2 * self.ranks * 8])
        self._board = memoryview(pages).cast("q")
        cuda = device.type == "cuda"
        # device, as with the others: this may run under a `with torch.device("cuda")`.
        self.report = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=cuda)
        self._lost = self.report.numpy()
        self.area = torch.empty(0, dtype=torch.uint8, device=device)
        self.window = Window(
            self.rank,
            self.ranks,
            torch.zeros(self.ranks, dtype=torch.int64, device=device),
            torch.zeros(2, programs, dtype=torch.int32, device=device),
            torch.zeros(programs, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            self.report,
            int(self.seconds * (1e9 if cuda else _POLLS_PER_SECOND)),
        )
        self._grow(1 << 16)  # finds out whether it works

    def agree(self, tokens: int) -> list[int]:
        """The tokens of every rank in the exchange that comes next, of which this rank has `tokens`.

        Raises:
            RuntimeError: a rank did not say within the timeout, or did not answer in an earlier exchange.
        """
        self.check()
        self._calls += 1
        # Two pages in turn: a rank that writes into a page has seen all numbers of the other one, so all ranks are done
        # with what was in this one. Number of the call and tokens are one word, written at once.
        page = self.ranks * (self._calls % 2)
        self._board[page + self.rank] = self._calls << 32 | tokens
        deadline = 0.0
        while True:
            words = self._board[page : page + self.ranks].tolist()
            late = [rank for rank, word in enumerate(words) if word >> 32 != self._calls]
            if not late:
                return [word & 0xFFFFFFFF for word in words]
            now = time.monotonic()
            deadline = deadline or now + self.seconds
            if now > deadline:
                raise RuntimeError(self._unanswered(late))
            self.check()
            time.sleep(0 if now < deadline - self.seconds + 0.01 else 1e-4)

    def check(self) -> None:
        """Raise RuntimeError if a device found that a rank does not answer."""
        if self._lost[0]:
            raise RuntimeError(self._unanswered([int(self._lost[0]) - 1]))

    def layout(self, most: int, hidden: int, top_k: int, dtype: torch.dtype) -> Layout:
        """Where an exchange of that size lies; makes the areas larger where it does not fit, on all ranks together."""
        sizes = (self.ranks, most, hidden, top_k, dtype.itemsize)
        needed = half_size(*sizes)
        if needed > self._half:
            self._grow(needed + needed // 4 if self._half > 1 << 16 else needed)
        return _layout(self._half, *sizes)

    def rows(self, at: Layout, dtype: torch.dtype) -> torch.Tensor:
        """The rows of `at` that a dispatch brings, in place, `[N, H]`. Valid until the next combine."""
        rows = at.ranks * at.most
        size = rows * at.hidden * dtype.itemsize
        return self.area[at.rows : at.rows + size].view(dtype).view(rows, at.hidden)

    def enter(self, direction: str) -> None:
        """Note that a kernel of `direction`, "dispatch" or "combine", is launched next.

        Raises:
            RuntimeError: not in turn. A combine follows each dispatch, or a rank could overwrite rows unread.
        """
        if direction == self._direction:
            raise RuntimeError(
                f"a second {direction} without the other direction between: a dispatch needs its combine, and a "
                "backward through the combine alone needs inputs of the dispatch that require no gradient"
            )
        self._direction = direction
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            if stream != self._stream:
                # Exchanges rely on the order of one stream; a graph that is captured brings its own.
                if self._stream is not None and not torch.cuda.is_current_stream_capturing():
                    stream.wait_stream(self._stream)
                self._stream = stream

    def _unanswered(self, late: list[int]) -> str:
        names = " and ".join(f"rank {dist.get_global_rank(self.group, rank)}" for rank in late)
        return (
            f"{names} did not answer rank {dist.get_global_rank(self.group, self.rank)} within {self.seconds:g} s in "
            f"the exchange of tokens between experts: look for its error, or what keeps it; {TIMEOUT} sets the seconds"
        )

    def _gathered(self, make: Callable[[], Any]) -> list[Any]:
        """What `make` returns on every rank, or NoPeerAccessError on all of them with the first rank's reason."""
        mine: tuple[Any, str | None]
        try:
            mine = (make(), None)
        except (OSError, RuntimeError, ValueError) as error:
            mine = (None, (str(error).strip().splitlines() or [type(error).__name__])[0])
        every: list[Any] = [None] * self.ranks
        dist.all_gather_object(every, mine, group=self.group)
        for rank, (_, problem) in enumerate(every):
            if problem is not None:
                raise NoPeerAccessError(f"rank {dist.get_global_rank(self.group, rank)}: {problem}")
        return [value for value, _ in every]

    def _shared(self, sizes: list[int]) -> list[mmap.mmap]:
        """Zeroed pages of those bytes that all ranks of the group map. The files are gone when this returns."""
        memory = Path("/dev/shm")
        place = str(memory) if memory.is_dir() and os.access(memory, os.W_OK) else None
        made = self._gathered(lambda: tempfile.mkdtemp(prefix="slipstream-", dir=place) if self.rank == 0 else "")
        files = [Path(made[0]) / str(number) for number in range(len(sizes))]

        def create() -> None:
            for file, size in zip(files, sizes, strict=True):
                with file.open("wb") as stream:
                    stream.truncate(size)

        def open_all() -> None:
            for file, size in zip(files, sizes, strict=True):
                with file.open("r+b") as stream:
                    pages.append(mmap.mmap(stream.fileno(), size))

        pages: list[mmap.mmap] = []
        try:
            self._gathered(lambda: create() if self.rank == 0 else None)
            self._gathered(open_all)
        finally:
            if self.rank == 0:
                shutil.rmtree(made[0], ignore_errors=True)
        return pages

    def _grow(self, half: int) -> None:
        """Areas of `half` bytes a direction, collectively. What was in the old ones is done with: this rank's kernels
        have run to their end, and so have seen all that its peers had to store for it."""
        half = math.ceil(half / 512) * 512
        size = HEADER + 2 * half
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("the exchange's memory can't grow in a CUDA graph: run this size before capture")
            torch.cuda.synchronize(self.device)
            addresses = self._gathered(lambda: self._symmetric(size))[self.rank]
        else:
            self._handle = [torch.frombuffer(pages, dtype=torch.uint8) for pages in self._shared([size] * self.ranks)]
            self.area = self._handle[self.rank]
            addresses = [area.data_ptr() for area in self._handle]
        self._half = half
        self.window.peers.copy_(torch.tensor(addresses, dtype=torch.int64, device="cpu"))
        self.window.turns.zero_()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._gathered(lambda: None)  # all flags are zero before any is raised

    def _symmetric(self, size: int) -> list[int]:
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # not used here, and not without risk
        from torch.distributed import _symmetric_memory as symmetric_memory

        self.area = symmetric_memory.empty(size, dtype=torch.uint8, device=self.device)
        self.area.zero_()
        self._handle = symmetric_memory.rendezvous(self.area, self.group.group_name)
        # The tensor need not begin where the memory does.
        offset = self.area.data_ptr() - self._handle.buffer_ptrs[self.rank]
        return [pointer + offset for pointer in self._handle.buffer_ptrs]


_layout = functools.lru_cache(maxsize=256)(layout)


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.is_file() else socket.gethostname()


def _local_facts(device: torch.device) -> tuple[str, list[str], int]:
    """The identity of this rank's GPU, of those that it can reach, and the programs it has room for.

    Raises:
        RuntimeError: no GPU, nor interpreted kernels.
    """
    if device.type != "cuda":
        if not runs_on(torch.empty(0, device="cpu")):
            raise RuntimeError("stores into other ranks' memory need GPUs; use dispatcher='all_to_all'")
        return f"cpu {os.getpid()}", [], _INTERPRETED_PROGRAMS
    if not runs_on(torch.empty(0, device=device)):
        raise RuntimeError("Triton is not installed: pip install triton")
    mine = device.index if device.index is not None else torch.cuda.current_device()
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    unreachable = [
        str(other.uuid)
        for index, other in enumerate(properties)
        if index != mine and not torch.cuda.can_device_access_peer(mine, index)
    ]
    processors = properties[mine].multi_processor_count
    most = 2 * max(processors - _LEFT_TO_OTHERS, processors // 2)
    programs = int(os.environ.get(PROGRAMS, most))
    if not 1 <= programs <= 2 * processors:
        raise RuntimeError(f"{PROGRAMS}={programs}: give 1 to {2 * processors}; from {most} on beside NCCL it may hang")
    return str(properties[mine].uuid), unreachable, programs


def _check_facts(facts: list[tuple[str, str, list[str], int]]) -> None:
    machines, devices, _, _ = zip(*facts, strict=True)
    if len(facts) > MAX_RANKS:
        raise NoPeerAccessError(f"{len(facts)} ranks, at most {MAX_RANKS}: use a smaller ep_size")
    if len(set(machines)) > 1:
        raise NoPeerAccessError(
            f"the group's {len(facts)} ranks are on {len(set(machines))} machines: use an ep_size that fits into one"
        )
    if len(set(devices)) < len(devices):
        raise NoPeerAccessError("two ranks share a GPU, where each would keep the other waiting: give each its own")
    for rank, (_, _, unreachable, _) in enumerate(facts):
        for peer in set(unreachable) & set(devices):
            raise NoPeerAccessError(
                f"the GPU of rank {rank} of the group can't reach rank {devices.index(peer)}'s memory: "
                "`nvidia-smi topo -p2p r` shows who can; PCIe access control (ACS) or a virtual machine may forbid it"
            )


def obstacle(ranks: int) -> str | None:
    """Why a group of `ranks` neighbouring ranks would not reach each other, or None if nothing speaks against it.

    As far as a rank sees without the others; all ranks of a group come to the same.
    """
    if not torch.cuda.is_available():
        return "no GPU"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local % ranks:
        return f"{ranks} ranks do not fit into a machine of {local}"
    count = torch.cuda.device_count()
    if count < local:
        return f"this rank sees {count} of the machine's GPUs (CUDA_VISIBLE_DEVICES), and can't tell"
    first = int(os.environ.get("LOCAL_RANK", "0")) // ranks * ranks
    for one, other in itertools.permutations(range(first, first + ranks), 2):
        if not torch.cuda.can_device_access_peer(one, other):
            return f"GPU {one} can't reach GPU {other}'s memory (nvidia-smi topo -p2p r)"
    return None
