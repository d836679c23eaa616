"""The tiny chat model, made once for all tests of training."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.train.tiny_chat import make_checkpoint, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Do not write to it."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", tokenizer)
