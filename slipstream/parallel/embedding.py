"""The token embedding over ranks that hold some of its rows each: tokens travel, the table does not.

FSDP2 gathers the whole table before a step's first kernel and reduces a gradient as large behind its last, with nothing
to hide either: 1.2 GB for 150,000 words of width 2048, where 4096 tokens are 17 MB. Here every rank looks all ranks'
tokens up in its rows, zeros for the others, and the sum over ranks, one term of which is not zero, goes back to each
token's rank; backward hands every rank all gradients. Vocabulary-parallel embedding (Shoeybi et al. 2019, Megatron-LM,
arXiv 1909.08053, section 3), among ranks that have tokens of their own.

Dims: T tokens of this rank, M the most of any rank, P ranks, N = P * M, V words, R of them on this rank, H width.
"""

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from slipstream.parallel.setup import host_group

# Tokens of a micro-batch that is still usual. All ranks' rows are looked up on each, which is cheaper than to gather
# the table while they are clearly fewer than its words.
USUAL_TOKENS = 4096


def most_ranks(embedding: Any) -> int:
    """Over how many ranks rows of `embedding` should lie for good; 1 where its lookup is more than PyTorch's own."""
    if type(embedding) is not nn.Embedding or isinstance(embedding.weight, DTensor):
        return 1
    plain = embedding.max_norm is None and not (embedding.sparse or embedding.scale_grad_by_freq)
    return max(1, embedding.num_embeddings // (2 * USUAL_TOKENS)) if plain else 1


def spread(embedding: Any, mesh: DeviceMesh, timeout_minutes: float | None = None) -> nn.Parameter:
    """Divide the rows of `embedding`, on the meta device, over all ranks of the job, in place; returns its parameter.

    Its gradient is the mean over the ranks, as FSDP2's are. All ranks call it, and every forward, at the same time.
    """
    host_group(timeout_minutes)
    weight = embedding.weight
    rows = distribute_tensor(weight.data, mesh, [Shard(0)], src_data_rank=None)
    embedding.weight = nn.Parameter(rows, requires_grad=weight.requires_grad)
    # Bound to a module-level function named forward, as in loss.py: survives deepcopy and pickle.
    embedding.forward = MethodType(forward, embedding)
    parameter: nn.Parameter = embedding.weight
    return parameter


def forward(self: nn.Embedding, input: Tensor) -> Tensor:
    """`nn.Embedding`'s, of a table that is spread."""
    weight: Any = self.weight
    if not isinstance(weight, DTensor):
        return F.embedding(input, weight, self.padding_idx)
    mesh = weight.device_mesh
    first = mesh.get_local_rank() * -(-self.num_embeddings // mesh.size())
    out: Tensor = _Lookup.apply(weight.to_local(), input, first, self.padding_idx, mesh.get_group())
    return out


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight_RH: Tensor, ids: Tensor, first: int, padding_idx: int | None, group: ProcessGroup
    ) -> Tensor:
        tokens, (rows, width), ranks = ids.numel(), weight_RH.shape, group.size()
        most = _most_tokens(tokens)
        ids_N = ids.new_empty(ranks * most)
        dist.all_gather_into_tensor(ids_N, F.pad(ids.reshape(-1), (0, most - tokens), value=-1), group=group)
        local_N = ids_N - first
        absent_N = (local_N < 0) | (local_N >= rows)
        rows_NH = F.embedding(local_N.masked_fill(absent_N, 0), weight_RH).masked_fill_(absent_N[:, None], 0)
        out_MH = weight_RH.new_empty(most, width)
        dist.reduce_scatter_tensor(out_MH, rows_NH, group=group)
        if ctx.needs_input_grad[0]:
            if padding_idx is not None:
                absent_N |= ids_N == padding_idx
            ctx.save_for_backward(local_N.masked_fill_(absent_N, rows))
            ctx.rows, ctx.most, ctx.group = rows, most, group
        return out_MH[:tokens].view(*ids.shape, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (local_N,) = ctx.saved_tensors
        ranks, width = ctx.group.size(), grad.shape[-1]
        grad_TH = grad.reshape(-1, width) / ranks
        grad_NH = grad.new_empty(ranks * ctx.most, width)
        dist.all_gather_into_tensor(grad_NH, F.pad(grad_TH, (0, 0, 0, ctx.most - len(grad_TH))), group=ctx.group)
        # What has no row here goes into one more, which gets nothing.
        grad_RH = torch.ops.aten.embedding_dense_backward(grad_NH, local_N, ctx.rows + 1, ctx.rows, False)[:-1]
        return grad_RH, None, None, None, None


def _most_tokens(tokens: int) -> int:
    """The most tokens that any rank of the job has; a few hundred microseconds of the hosts."""
    most = torch.tensor(tokens, device="cpu")
    dist.all_reduce(most, dist.ReduceOp.MAX, group=host_group())
    return max(1, int(most))
