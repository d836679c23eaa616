"""Runs the other tests of this folder with interpreted kernels, in a few processes of their own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.kernels.conditions import INTERPRETED

FILES = sorted(path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__))
PROCESSES = 3  # each has much to import


@pytest.mark.long
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the other tests run by themselves")
@pytest.mark.parametrize("part", range(PROCESSES))
def test_interpreted(part, request) -> None:
    marks = "not gpu and not slow" if "not slow" in request.config.getoption("markexpr") else "not gpu"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks]
    command += map(str, FILES[part::PROCESSES])
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
