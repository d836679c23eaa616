"""The same training loop through Transformers and through Slipstream, one import apart.

    python examples/drop_in.py --import transformers
    python examples/drop_in.py --import slipstream

Without --model a tiny random Qwen3-MoE is trained on this file's own text, byte by byte; nothing is downloaded.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3MoeConfig

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--import", dest="library", choices=["transformers", "slipstream"], default="slipstream")
parser.add_argument("--model", help="a checkpoint folder instead of the tiny random model")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

if options.library == "slipstream":
    from slipstream import AutoModelForCausalLM
else:
    from transformers import AutoModelForCausalLM

TINY = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=64,
    moe_intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
    output_router_logits=True,  # adds the load-balancing loss
)

torch.manual_seed(options.seed)
text = Path(__file__).read_text(encoding="ascii")
if options.model:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(options.model)(text, return_tensors="pt")["input_ids"][0]
else:
    model = AutoModelForCausalLM.from_config(TINY)
    tokens = torch.tensor(list(text.encode()))
rows = tokens[: len(tokens) // 64 * 64].view(-1, 64)  # [rows, 64]

model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if not options.model else 1e-5)
for step in range(options.steps):
    batch = rows[torch.randint(len(rows), (4,))]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1:2d}  loss {loss.item():.6f}")
print(f"{type(model).__name__} through {options.library}: {sum(p.numel() for p in model.parameters()):,} parameters")
