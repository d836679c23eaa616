"""The dispatcher of a rank that holds all experts: nothing travels.

Dims: see base.py; here R = T.
"""

import torch

from slipstream.moe.dispatch.base import Dispatched, Dispatcher, check_inputs


class LocalDispatcher(Dispatcher):
    """One rank: rows are the tokens and local ids the global ones."""

    def dispatch(self, x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor) -> Dispatched:
        """See `Dispatcher.dispatch`."""
        check_inputs(x_TH, idx_TK, weights_TK)
        return Dispatched(x_TH, idx_TK, weights_TK, idx_TK.numel(), None)

    def combine(self, rows_RH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """See `Dispatcher.combine`."""
        return rows_RH
