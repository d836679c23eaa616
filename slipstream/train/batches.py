"""Which rows each rank gets: its share of every batch, and no row twice, so that any number of ranks trains alike."""

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from slipstream.loss import deferred_causal_lm_loss
from slipstream.train.formats import IGNORE


class SharedRows:
    """A `Trainer`'s data loaders and its held-out loss; put it before `Trainer` in a class's bases.

    Accelerate repeats rows where a set is no multiple of what all ranks take at once. Here copies without labels take
    their place, which change no loss.
    """

    _held_out: tuple[Dataset, Dataset, float] | None = None  # the rows, these with copies, trained tokens a row of them

    def get_train_dataloader(self) -> DataLoader[Any]:
        trainer: Any = self
        given = trainer.train_dataset
        if isinstance(given, IterableDataset):
            rows: Any = WholeStream(given)
        else:
            rows = self._even(given, trainer.args.train_batch_size) if self._ignores_copies() else given
        trainer.train_dataset = rows
        try:
            loader: Any = super().get_train_dataloader()  # type: ignore[misc]
        finally:
            trainer.train_dataset = given
        if isinstance(rows, Dataset) and len(rows) > len(given):
            shuffled = loader.get_sampler()
            shuffled.data_source = given
            loader.set_sampler(CopiesLast(shuffled, len(rows)))
        return loader  # type: ignore[no-any-return]

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader[Any]:
        trainer: Any = self
        given = trainer.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(given, Dataset)
        if self._held_out is None or self._held_out[0] is not given:
            trained = sum(label != IGNORE for row in given["labels"] for label in row[1:])
            even = self._even(given, trainer.args.eval_batch_size)
            self._held_out = given, even, trained / len(even)
        loader: DataLoader[Any] = super().get_eval_dataloader(self._held_out[1])  # type: ignore[misc]
        return loader

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss alone. Trainer weighs batches by their rows, so dividing by rows × (tokens / row) gives the mean."""
        trainer: Any = self
        assert self._held_out is not None
        inputs = trainer._prepare_inputs(inputs)
        labels = inputs["labels"]
        trained = (labels[..., 1:] != IGNORE).sum()
        with torch.no_grad(), trainer.compute_loss_context_manager():
            mean = model(**inputs, **trainer.model_kwargs(training=False)).loss.detach()
        loss = mean * trained / (len(labels) * self._held_out[2])
        return torch.where(trained > 0, loss, 0.0), None, None  # without any label the mean is nan

    def _even(self, rows: Dataset, batch_size: int) -> Dataset:
        """`rows`, and behind them as many copies of the first ones as the ranks' last batches have room for."""
        trainer: Any = self
        ranks = trainer.args.world_size // trainer.get_tp_size()
        missing = -len(rows) % (ranks * batch_size) if ranks > 1 else 0
        if not missing:
            return rows
        copies = rows.with_format(None).select([number % len(rows) for number in range(missing)])[:]
        copies["labels"] = [[IGNORE] * len(labels) for labels in copies["labels"]]
        return concatenate_datasets([rows, Dataset.from_dict(copies, features=rows.features)])

    def _ignores_copies(self) -> bool:
        """Whether rows without labels leave a step's gradients as they are: a rank may get no others."""
        trainer: Any = self
        args, model = trainer.args, trainer.model
        return (
            getattr(model, "loss_function", None) is deferred_causal_lm_loss
            and args.average_tokens_across_devices
            and args.train_sampling_strategy == "random"
            and trainer.accelerator.use_seedable_sampler
        )


class CopiesLast(Sampler[int]):
    """A shuffled set, and behind it what it was filled up with to `length`."""

    def __init__(self, shuffled: Any, length: int) -> None:
        self.shuffled, self.length = shuffled, length

    def __iter__(self) -> Iterator[int]:
        yield from self.shuffled
        yield from range(len(self.shuffled), self.length)

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.shuffled.set_epoch(epoch)


class WholeStream(torch.utils.data.IterableDataset[Any]):
    """A stream that each rank reads whole and takes its share from.

    Of one of the `datasets` package Accelerate would give each rank some of the files, and the rows of a step would
    depend on the number of ranks.
    """

    def __init__(self, rows: IterableDataset) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)
