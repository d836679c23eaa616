"""How many tokens each expert gets: counted on the device while a model trains, read when somebody asks.

A hook in front of each experts module sees the ids of this rank's own tokens, before any exchange between ranks, and
adds to a counter. It is plain tensor code, so a compiled layer takes it into its graph; nothing waits for the device.

Dims: T tokens, K experts per token, E experts of a layer (of all ranks), N layers with experts.
"""

import re
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from slipstream import hf

_COUNTER = "_slipstream_counter"


class _Mask:
    """Which of the batch's tokens count, int32 `[T]`; None: all of them. One for all layers."""

    tokens_T: Tensor | None = None


class _Counter:
    """Of one experts module. int32, because an atomic add of int64 falls back to a sort in a compiled layer."""

    def __init__(self, num_experts: int, mask: _Mask, device: torch.device) -> None:
        # One slot more takes ids behind the last expert, which some routers give to tokens that skip the experts.
        self.counts_E1 = torch.zeros(num_experts + 1, dtype=torch.int32, device=device)
        self.one = torch.ones((), dtype=torch.int32, device=device)
        self.mask = mask


class ExpertLoad:
    """Counts the tokens of each expert in training, of all layers of a model whose experts follow the interface.

    Where a layer runs again in backward (activation checkpointing), its tokens may count twice: read proportions, not
    totals. Layers of a class share compiled graphs, which do not look for hooks: a model without counters must not be
    trained beside one with them in the same process.

    Attributes:
        layers: the names of the layers, mostly their numbers: "0", "1", …
        num_experts: E of each.
        sizes_N: the same on the device.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._mask = _Mask()
        self._counters: list[_Counter] = []
        self.layers: list[str] = []
        self.num_experts: list[int] = []
        for name, experts in hf.experts_modules(model):
            # As a DTensor, a weight has its whole shape, also where this rank holds some experts only.
            total = max(weight.shape[0] for weight in experts.parameters() if weight.ndim == 3)
            counter = _Counter(total, self._mask, device)
            if not hasattr(experts, _COUNTER):
                experts.register_forward_pre_hook(_count)
            setattr(experts, _COUNTER, counter)
            self._counters.append(counter)
            self.layers.append(layer_name(name))
            self.num_experts.append(total)
        self.sizes_N = torch.tensor(self.num_experts, dtype=torch.int64, device=device)
        if self.layers:
            torch.compiler.reset()  # what was compiled before does not look for hooks

    def see(self, attention_mask: Tensor | None) -> None:
        """Say which tokens of the next batch count: `[B, S]`, 0 for padding. None, or another shape: all of them."""
        if attention_mask is None or attention_mask.ndim != 2:
            self._mask.tokens_T = None
            return
        self._mask.tokens_T = attention_mask.reshape(-1).to(torch.int32)
        # What hangs on a module is taken for static otherwise, and another batch size compiled anew.
        torch._dynamo.maybe_mark_dynamic(self._mask.tokens_T, 0)

    def forget_if(self, bad: Tensor) -> None:
        """Take nothing into account since the last `take` where `bad`, a scalar on the device, is true."""
        torch._foreach_mul_([counter.counts_E1 for counter in self._counters], (bad == 0).to(torch.int32))

    def take(self) -> Tensor:
        """Tokens of each expert since the last call, on this rank: int64 `[N, E]` on the device, missing experts 0."""
        counts_E = [counter.counts_E1[:-1] for counter in self._counters]
        most = max(self.num_experts)
        taken_NE = torch.stack([F.pad(counts, (0, most - len(counts))) for counts in counts_E]).to(torch.int64)
        torch._foreach_zero_([counter.counts_E1 for counter in self._counters])
        return taken_NE


def _count(experts: nn.Module, args: tuple[Any, ...]) -> None:
    """The hook: `args` are those of the experts interface."""
    if not experts.training:
        return
    counter: _Counter = getattr(experts, _COUNTER)
    counts_E1, tokens_T, idx_TK = counter.counts_E1, counter.mask.tokens_T, args[1]
    slots = idx_TK.reshape(-1).clamp(max=counts_E1.shape[0] - 1)
    if tokens_T is None:
        ones = counter.one.expand(slots.shape)
    else:
        ones = tokens_T[:, None].expand(idx_TK.shape).reshape(-1)
    counts_E1.index_add_(0, slots, ones)


def layer_name(module_name: str) -> str:
    """The number of the layer that a module is in, as text; the module's whole name where there is none.

    >>> layer_name("model.layers.3.mlp.experts"), layer_name("mtp.layers.0.mtp_block.mlp.experts")
    ('3', 'mtp 0')
    """
    number = re.search(r"(^mtp|)\b.*?\.(\d+)\.", module_name)
    return " ".join(filter(None, number.groups())) if number else module_name


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """`tensor`, in place, summed over all ranks of the job."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
