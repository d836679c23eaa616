"""Whole models that torch.save wrote, in a process that knows nothing of us."""

import subprocess
import sys
from pathlib import Path

import torch

import slipstream
from slipstream.coverage.checks import packed_batch
from tests.tiny_models import tiny_batch, tiny_model

# Our experts and attention; recurrent layers; experts that do not follow the interface by themselves.
TYPES = ["qwen3_moe", "nemotron_h", "llama4_text"]
LOADS = """
import sys, torch
results = []
for name in sys.argv[1:]:
    model, inputs = torch.load(name, weights_only=False)
    before = [model(**one).loss.detach() for one in inputs[:1]]
    import slipstream
    slipstream.accelerate(model, backend={"attn": "slipstream"} if "qwen3" in name else None)
    after = [model(**one).loss.detach() for one in inputs]
    hooks = [len(hooks) for m in model.modules() for hooks in (m._forward_pre_hooks, m._forward_hooks)]
    experts = next(m for n, m in model.named_modules() if n.endswith("experts"))
    results.append((before, after, hooks, slipstream.describe(model)["experts"].why, "forward" in vars(experts)))
torch.save(results, "results")
"""


def test_another_process(tmp_path: Path) -> None:
    expected = []
    for model_type in TYPES:
        backend = {"attn": "slipstream"} if model_type == "qwen3_moe" else None
        model = slipstream.accelerate(tiny_model(model_type), backend=backend)
        ids, packed = tiny_batch(2, 20), packed_batch((9, 11), seed=5)
        packed = {name: packed[name] for name in ("input_ids", "position_ids")}
        positions = torch.arange(20)[None]
        inputs = [{"input_ids": ids, "labels": ids, "position_ids": positions}, packed | {"labels": ids[:1]}]
        losses = [model(**one).loss.detach() for one in inputs]
        hooks = [len(hooks) for m in model.modules() for hooks in (m._forward_pre_hooks, m._forward_hooks)]
        experts = next(m for n, m in model.named_modules() if n.endswith("experts"))
        expected.append((losses, hooks, slipstream.describe(model)["experts"].why, "forward" in vars(experts)))
        torch.save((model, inputs), tmp_path / model_type)
    done = subprocess.run([sys.executable, "-c", LOADS, *TYPES], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (before, after, *found), (losses, *wanted) in zip(torch.load(tmp_path / "results"), expected, strict=True):
        assert found == wanted
        torch.testing.assert_close(before, losses[:1])
        torch.testing.assert_close(after, losses)
