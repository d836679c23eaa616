"""Expert parallelism beside data parallelism: train, save, and load the result in plain Transformers.

    python examples/expert_parallel.py                              # one process
    torchrun --nproc-per-node=2 examples/expert_parallel.py         # the same losses on two, half the experts on each

Without --model a tiny random Qwen3-MoE is made in --output first; nothing is downloaded.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from slipstream import AutoModelForCausalLM, DistributedSetup, clip_grad_norm_, describe
from slipstream.parallel.setup import join_process_group

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", type=Path, help="a checkpoint folder instead of the tiny random model")
parser.add_argument("--output", type=Path, default=Path("runs/expert_parallel"))
parser.add_argument("--ep-size", type=int, help="default: as many as there are processes")
parser.add_argument("--steps", type=int, default=5)
options = parser.parse_args()

ranks = DistributedSetup().ranks
setup = DistributedSetup(strategy="fsdp2", ep_size=options.ep_size or ranks)
if ranks > 1:
    join_process_group(setup)
rank = dist.get_rank() if ranks > 1 else 0
source = options.model or options.output / "start"
if options.model is None and rank == 0:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "moe_intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    config = transformers.Qwen3MoeConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(source)
if ranks > 1:
    dist.barrier()

model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, distributed_setup=setup).train()
if rank == 0:
    print(describe(model))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
tokens = torch.tensor(list(Path(__file__).read_bytes()))
for step in range(options.steps):
    rows = tokens[: len(tokens) // 64 * 64].view(-1, 64)[step * 4 : step * 4 + 4]
    batch = rows.chunk(ranks)[rank].to(model.device)  # each rank trains on its own rows
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach().clone()
    if ranks > 1:
        dist.all_reduce(mean)
    if rank == 0:
        print(f"step {step + 1}  loss {mean.item() / ranks:.6f}", flush=True)

model.save_pretrained(options.output / "trained")
model.eval()
with torch.no_grad():
    logits = model(input_ids=batch[:1]).logits.float().cpu()
if rank == 0:
    plain = transformers.AutoModelForCausalLM.from_pretrained(options.output / "trained", dtype=torch.float32)
    difference = (plain(input_ids=batch[:1].cpu()).logits - logits).abs().max().item()
    print(f"{options.output / 'trained'} in plain Transformers: largest logit difference {difference:.1e}")
if ranks > 1:
    dist.barrier()
    dist.destroy_process_group()
