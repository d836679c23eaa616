"""Logits of a saved model on one batch: stored through Slipstream, then compared in a process without it.

python scripts/logits.py --import slipstream MODEL BATCH.jsonl STORED.pt
python scripts/logits.py --import transformers MODEL BATCH.jsonl STORED.pt
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

parser = argparse.ArgumentParser()
parser.add_argument("--import", dest="library", choices=["transformers", "slipstream"], required=True)
parser.add_argument("model", type=Path)
parser.add_argument("batch", type=Path, help="conversations as JSONL `messages`; the first two are used")
parser.add_argument("stored", type=Path)
options = parser.parse_args()
logging.disable_progress_bar()

if options.library == "slipstream":
    from slipstream import AutoModelForCausalLM
else:
    from transformers import AutoModelForCausalLM

tokenizer = AutoTokenizer.from_pretrained(options.model)
lines = options.batch.read_text(encoding="utf-8").splitlines()[:2]
ids = tokenizer.apply_chat_template(
    [json.loads(line)["messages"] for line in lines],
    padding=True,
    truncation=True,
    max_length=256,
    return_tensors="pt",
    return_dict=True,
)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
with torch.inference_mode():
    logits = model(**ids).logits[ids["attention_mask"].bool()]  # [tokens, V]

if options.library == "slipstream":
    torch.save(logits, options.stored)
else:
    assert "slipstream" not in sys.modules
    difference = (logits - torch.load(options.stored)).abs().max().item()
    print(f"{options.model} in plain Transformers ({type(model).__name__}): largest logit difference {difference:.1e}")
    sys.exit(not difference < 1e-3)
