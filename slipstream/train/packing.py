"""Several documents in a row of a batch: TRL's packing, and a collator that keeps shapes fixed and documents apart.

Dims: B packed rows of a batch, S `max_length`, T = B * S, N documents.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from slipstream import hf_models, hf_recurrent
from slipstream.train.formats import IGNORE

LENGTHS = "seq_lengths"  # TRL's name for the lengths of the documents of a packed row
TOKENS = "num_tokens"  # of a packed batch, without what is there to fill it; `count_tokens` takes it out
PACKED_AT_ONCE = 10_000  # rows
# Layers whose state begins anew with each document, where they call a function that `slipstream.recurrent` knows.
RESETTING = {
    "linear_attention": (*hf_recurrent.SCANS, hf_recurrent.LIGHTNING),
    "mamba": hf_recurrent.SCANS,
    "conv": (hf_recurrent.CONVOLUTION,),
}
RECURRENT = ("rwkv", "xlstm")  # they name no kinds of layers
# Their models take position_ids and yet attend across documents, or count positions in a way of their own; found by
# `slipstream coverage`.
CROSSING = ("big_bird", "camembert", "data2vec-text", "falcon", "megatron-bert", "openai-gpt", "opt", "reformer",
            "rembert", "roberta", "roberta-prelayernorm", "xglm", "xlm", "xlm-roberta", "xlm-roberta-xl",
            "xmod")  # fmt: skip


def pack(rows: Dataset | IterableDataset, max_length: int) -> Dataset | IterableDataset:
    """Documents put together to rows of up to `max_length` tokens, none of them cut (best fit decreasing)."""
    packed: Dataset | IterableDataset = pack_dataset(
        rows, max_length, strategy="bfd", map_kwargs={"batch_size": PACKED_AT_ONCE}
    )
    return packed


def check_packing(config: PreTrainedConfig) -> None:
    """Raises: ValueError where documents would leak into each other: layers with a state that runs along the row."""
    text = config.get_text_config()
    kinds = ["recurrent"] if text.model_type in RECURRENT else hf_recurrent.beside_attention(config)
    if not hf_models.takes_positions(config):
        raise ValueError(
            f"data.packing: {text.model_type} takes no position_ids, which say where documents begin; set "
            "data.packing: false"
        )
    if text.model_type in CROSSING:
        raise ValueError(
            f"data.packing: {text.model_type} does not keep the documents of a row apart; set data.packing: false"
        )
    resetting = [kind for kind, functions in RESETTING.items() if hf_recurrent.calls_any(config, functions)]
    leaky = [kind for kind in kinds if kind not in resetting]
    if leaky:
        raise ValueError(
            f"data.packing: {text.model_type} has layers of the kind {', '.join(leaky)}, whose state would carry one "
            "document into the next; set data.packing: false"
        )


@dataclass
class Collator(DataCollatorForLanguageModeling):
    """Rows padded to the longest of a batch, as TRL does; packed rows as one row `[1, T]` of always the same length.

    Packed, a batch says where its documents begin (`cu_seq_lens_q` int32 `[N + 1]`, `position_ids` that restart). The
    space left over repeats the batch's first tokens, as a document of its own without labels: padding tokens would all
    go to the same experts, and where their embedding is zero a load-balancing loss sends them gradients that each
    layer's norms multiply by a thousand (1 / sqrt(eps)), until they overflow. A document's first token has no label:
    the token before it is another document's.

    Attributes:
        max_length: S; packed rows are at most as long.
        documents_per_row: where it is given, batches of as many rows have `cu_seq_lens_q` of one length too, and S as
            their longest document, so that a CUDA graph serves them all: behind the last document come empty ones. A
            batch of more documents is as long as it has to be.
    """

    max_length: int = 0
    documents_per_row: int = 0

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if LENGTHS not in examples[0]:
            return dict(super().torch_call([{key: row[key] for key in ("input_ids", "labels")} for row in examples]))
        total = len(examples) * self.max_length
        # Through numpy: torch takes six times as long to read a list.
        ids, labels_T = (
            torch.from_numpy(np.concatenate([np.asarray(row[key], np.int64) for row in examples]))
            for key in ("input_ids", "labels")
        )
        lengths = [length for row in examples for length in row[LENGTHS]]
        if left := total - len(ids):
            lengths.append(left)
        ends = torch.tensor(lengths).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        input_ids = ids.repeat(-(-total // len(ids)))[:total]
        labels_T = F.pad(labels_T, (0, left), value=IGNORE)
        labels_T[starts] = IGNORE
        longest = max(lengths)
        cu_seq_lens = torch.cat([starts, ends[-1:]]).to(torch.int32)
        if self.documents_per_row:
            longest = self.max_length
            empty = len(examples) * self.documents_per_row + 1 - len(lengths)
            cu_seq_lens = F.pad(cu_seq_lens, (0, max(0, empty)), value=total)
        return {
            "input_ids": input_ids[None],
            "labels": labels_T[None],
            "position_ids": (torch.arange(total) - torch.repeat_interleave(starts, torch.tensor(lengths)))[None],
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": longest,
            "max_length_k": longest,
            TOKENS: sum(len(row["input_ids"]) for row in examples if any(label != IGNORE for label in row["labels"])),
        }


def make_collator(tokenizer: PreTrainedTokenizerBase, max_length: int, one_shape_of: float = 0.0) -> Collator:
    """The collator of a run with that tokenizer.

    Args:
        one_shape_of: where it is not 0, packed batches have one shape in all they hold, with room for 1.5 times as many
            documents a row as there are of this many tokens.
    """
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return Collator(
        pad_token_id=next((i for i in ids if i is not None), 0),
        max_length=max_length,
        documents_per_row=math.ceil(1.5 * max_length / one_shape_of) if one_shape_of else 0,
    )


def count_tokens(batch: dict[str, Any]) -> Any:
    """The tokens of a batch's rows that have labels, padding not counted, an int or a scalar on the device; what only
    counts is taken out."""
    if TOKENS in batch:
        return batch.pop(TOKENS)
    return (batch["attention_mask"] * (batch["labels"] != IGNORE).any(-1, keepdim=True)).sum()
