"""`torchrun -m pytest tests/distributed` works too: these tests start ranks of their own, so rank 0 runs them alone."""

import os
from pathlib import Path

import pytest

_FIRST = int(os.environ.get("RANK", "0")) == 0
_PLACES = ("RANK", "WORLD_SIZE", "ROLE_NAME")
if _FIRST:
    # What torchrun set for this process must not reach the processes that the tests start.
    for name in list(os.environ):
        if name.endswith(_PLACES) or name.startswith(("TORCHELASTIC_", "MASTER_")):
            del os.environ[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not _FIRST:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="rank 0 of torchrun runs this"))
