"""The records of a run that never was, of any size; `python -m tests.report.made_run FOLDER` writes a large one."""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import yaml

from slipstream.report.records import DATA_FILE, ENVIRONMENT_FILE, METRICS_FILE, RECIPE_FILE
from slipstream.train.recipe import Recipe
from slipstream.train.recipe_file import dump_recipe

NASTY = "</pre><script>alert('x')</script>&\x00\ud800"


def make_run(
    folder: Path, steps: int = 40, layers: int = 4, devices: list[str] | None = None, name: str = "Qwen/Qwen3-30B-A3B"
) -> Path:
    """Write what `slipstream finetune` writes, the model's config.json included; the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    lines: list[dict[str, Any]] = [_evaluation(0, 2.31), _samples(0, "The wind is a horse, and the horse is a wind.")]
    for step in range(1, steps + 1):
        done = step / steps
        worst = [1.3 + 0.4 * layer / layers + 3 * math.exp(-5 * done) + draw.random() * 0.5 for layer in range(layers)]
        dead = [float(layer == 1 and done < 0.3) * 3 for layer in range(layers)]
        lines.append(
            {
                "step": step,
                "elapsed": step * 1.31,
                "loss": 1.2 + 1.1 * math.exp(-4 * done) + draw.random() * 0.12,
                "grad_norm": 0.8 + draw.random(),
                "learning_rate": 1e-5 * (1 + math.cos(math.pi * done)),
                "tokens_per_second": 58_000 + 3000 * draw.random() if step > 2 else 9000,
                "tokens": step * 61_000,
                "memory_gib": 63.4,
                "mfu": 0.41 + 0.01 * draw.random(),
                "moe_load_max_over_mean": max(worst),
                "moe_load_entropy": 0.97,
                "moe_dead_experts": sum(dead),
                "router_grad_norm": 0.02 + 0.01 * draw.random(),
                "moe": {"layer": [str(n) for n in range(layers)], "load_max_over_mean": worst, "dead_experts": dead},
            }
        )
        if steps >= 4 and step % (steps // 4) == 0:
            lines += [_evaluation(step, 1.25 + math.exp(-4 * done)), _samples(step, f"By step {step} the sea is calm.")]
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / RECIPE_FILE).write_text(dump_recipe(_recipe(name)))
    data = {"rows": 51_200, "tokens": 88_000_000, "trained_tokens": 52_000_000, "cut_rows": 310, "cut_tokens": 120_000,
            "packed_rows": 22_004, "held_out_rows": 512, "bad_rows": 1, "notes": ["1 bad rows were left out"],
            "bad": [{"place": "chats.jsonl:17", "reason": NASTY}]}  # fmt: skip
    (folder / DATA_FILE).write_text(json.dumps(data))
    environment = {"command": ["slipstream", "finetune", "recipe.yaml"], "folder": "/work",
                   "ranks": len(devices or [1]), "devices": devices or [], "cuda": "13.0",
                   "python": "3.12.9", "platform": "Linux",
                   "packages": {"torch": "2.11.0", "transformers": "5.23.0"},
                   "git": {"revision": "0" * 40, "changes": True},
                   "batch": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}}  # fmt: skip
    (folder / ENVIRONMENT_FILE).write_text(json.dumps(environment))
    (folder / "config.json").write_text("{}")
    return folder


def _recipe(name: str) -> Recipe:
    values = """
        model: {dtype: bfloat16}
        data: {train: [{path: chats.jsonl, weight: 3}, {path: papers, weight: 1}], max_length: 4096, packing: true}
        train: {output_dir: out, per_device_train_batch_size: auto}
        distributed: {strategy: fsdp2, ep_size: 8}
        eval: {eval_steps: 10}
    """
    recipe = yaml.safe_load(values)
    recipe["model"]["name_or_path"] = name
    recipe["eval"]["sample_prompt"] = ["Describe the sea.", NASTY.replace("\ud800", "").replace("\x00", "")]
    return Recipe.model_validate(recipe)


def _evaluation(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "elapsed": step * 1.31, "eval_loss": loss}


def _samples(step: int, answer: str) -> dict[str, Any]:
    pairs = [{"prompt": "Describe the sea.", "answer": answer}, {"prompt": NASTY, "answer": NASTY}]
    return {"step": step, "elapsed": step * 1.31, "samples": pairs}


if __name__ == "__main__":
    make_run(Path(sys.argv[1]), steps=800, layers=48, devices=["NVIDIA H200"] * 8)
