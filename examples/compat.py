"""A script written for NeMo AutoModel, its import line changed. Runs on CPU ranks too.

    torchrun --nproc-per-node=2 examples/compat.py --model FOLDER --output DIR

Without --model a tiny random Qwen3-MoE is made first.
"""

import argparse
import tempfile

import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

# was: from nemo_automodel import NeMoAutoModelForCausalLM … and two more import lines
from slipstream.compat import BackendConfig, NeMoAutoModelForCausalLM, create_distributed_setup_from_config

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model")
parser.add_argument("--output")
parser.add_argument("--steps", type=int, default=3)
options = parser.parse_args()

dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)

folder = [options.model or (tempfile.mkdtemp() if rank == 0 else None)]
dist.broadcast_object_list(folder)
if not options.model and rank == 0:
    sizes = {"vocab_size": 256, "hidden_size": 64, "moe_intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    config = Qwen3MoeConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2)
    Qwen3MoeForCausalLM(config).save_pretrained(folder[0])
dist.barrier()

setup = create_distributed_setup_from_config({"strategy": "fsdp2", "ep_size": world, "activation_checkpointing": False})
model = NeMoAutoModelForCausalLM.from_pretrained(
    folder[0],
    torch_dtype=torch.float32,
    distributed_setup=setup,
    backend=BackendConfig(attn="te", linear="te", experts="torch_mm", dispatcher="deepep"),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
generator = torch.Generator().manual_seed(rank)
ids = torch.randint(0, 256, (2, 32), generator=generator).to(device)
for step in range(options.steps):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {step + 1}  loss {loss.item():.4f}", flush=True)
if options.output:
    model.save_pretrained(options.output)
    if rank == 0:
        print(f"saved {options.output}")
dist.barrier()
dist.destroy_process_group()
