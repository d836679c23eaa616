"""Sparse upcycling: a dense checkpoint becomes a Mixture-of-Experts whose experts are copies of its MLPs.

Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", arXiv 2212.05055, 2023.

Mixtral divides the routing weights by their sum, so equal experts add up to the MLP they were copied from: the new
model starts exactly where the dense one stopped, and training drives its experts apart.
"""

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from slipstream.checkpoint.output import check_output_folder, write_model

TOLERANCE = 1e-3  # largest logit difference in fp32; measured 1e-4 on SmolLM2-135M
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TEXT = (
    "The Wright brothers flew their first powered aeroplane near Kitty Hawk, North Carolina, on 17 December 1903. "
    "Orville was at the controls; the flight lasted twelve seconds and covered about 37 metres, less than the "
    "wingspan of many airliners today. What had they understood that others had not? That a pilot must steer in "
    "three axes at once: roll, pitch and yaw."
)

# Every parameter of a decoder that fits, layer numbers left out.
_FITTING = {
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    *(f"model.layers.*.{name}_layernorm.weight" for name in ("input", "post_attention")),
    *(f"model.layers.*.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"model.layers.*.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
}
# Mixtral's published names for the three matrices of an expert.
_EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_CONFIG_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "initializer_range",
    "attention_dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class Upcycled:
    """What `upcycle` did.

    Attributes:
        output: the folder written.
        dense_parameters: parameters of the dense model, tied ones counted once.
        parameters: parameters of the MoE model.
        active_parameters: those that one token uses.
        max_logit_difference: largest absolute difference to the dense model's logits in fp32 on `TEXT`.
    """

    output: Path
    dense_parameters: int
    parameters: int
    active_parameters: int
    max_logit_difference: float


def upcycle(
    source: Path,
    output: Path,
    *,
    experts: int = 4,
    top_k: int = 2,
    dtype: str = "bfloat16",
    seed: int = 0,
    overwrite: bool = False,
) -> Upcycled:
    """Turn the dense checkpoint at `source` into a Mixtral checkpoint at `output`.

    Args:
        source: a Hugging Face folder with safetensors, a `.gguf` file, or a folder that holds one `.gguf` file.
        output: the folder to write: config, safetensors, tokenizer with its chat template, generation config.
        experts: copies of each MLP, at least 2.
        top_k: experts that a token goes to, from 1 to `experts`.
        dtype: what the weights are saved in, "bfloat16" or "float32". The comparison always runs in fp32.
        seed: of the routers' random weights.
        overwrite: replace a model that `output` already holds.

    Raises:
        ValueError: a value out of range, a decoder that does not fit, a damaged checkpoint, an output folder that must
            not be replaced, or logits further than `TOLERANCE` from the dense model's. Nothing has been written then.
        OSError: `source` or a file in it is missing.
        ImportError: `source` is a `.gguf` file and the `gguf` package is missing.
    """
    source, output = Path(source), Path(output)
    if experts < 2:
        raise ValueError(f"experts={experts} is too few; use 2 or more")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k={top_k} is out of range; with experts={experts} use 1 to {experts}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; use {' or '.join(DTYPES)}")
    check_output_folder(output, [source], overwrite, "output")

    dense, tokenizer = load_dense(source)
    model = to_mixtral(dense, experts=experts, top_k=top_k, seed=seed)
    difference = max_logit_difference(dense, model, tokenizer)
    if not difference <= TOLERANCE:  # so that NaN is refused too
        raise ValueError(
            f"the upcycled model's logits differ from the dense model's by {difference:.1e}, over {TOLERANCE:.0e}: "
            f"{dense.config.model_type} computes something that Mixtral does not; nothing was written"
        )
    model.generation_config = dense.generation_config
    idle = sum(
        parameter.numel() * (experts - top_k) // experts
        for name, parameter in model.named_parameters()
        if ".mlp.experts." in name
    )
    report = Upcycled(
        output=output,
        dense_parameters=dense.num_parameters(),
        parameters=model.num_parameters(),
        active_parameters=model.num_parameters() - idle,
        max_logit_difference=difference,
    )
    del dense  # its memory serves the shards being written
    with write_model(output) as folder:
        model.to(dtype=DTYPES[dtype])  # type: ignore[call-arg]  # Transformers' decorator hides `self`
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return report


def load_dense(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a dense model in fp32 and its tokenizer; the weights are read only when the decoder fits Mixtral.

    Raises: as `upcycle`.
    """
    folder, gguf_file = _locate(source)
    config = AutoConfig.from_pretrained(folder, gguf_file=gguf_file)
    check_fits(config)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    # By default Transformers keeps GGUF blocks packed, which can be neither copied nor saved.
    quantization = {"quantization_config": GgufConfig(dequantize=True)} if gguf_file else {}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf_file, dtype=torch.float32, output_loading_info=True, **quantization
        )
    except SafetensorError as error:
        raise ValueError(f"{source} holds a damaged safetensors file ({error}); fetch it again") from error
    dense, loading = loaded
    # Transformers would go on with random values in their place.
    absent = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if absent:
        raise ValueError(f"{source} lacks {len(absent)} weights, the first {absent[0]}; fetch the checkpoint again")
    return dense.eval(), tokenizer


def check_fits(config: PreTrainedConfig) -> None:
    """Check that a decoder's blocks are Mixtral's but for the MLP: RMS norms, RoPE, full attention, SwiGLU, no biases.

    Raises:
        ValueError: naming all that does not fit.
    """
    problems = []
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(config)
    names = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in dense.named_parameters(remove_duplicate=False)}
    if names - _FITTING:
        problems.append(f"parameters that Mixtral has not ({', '.join(sorted(names - _FITTING))})")
    if _FITTING - names:
        problems.append(f"parameters that are missing ({', '.join(sorted(_FITTING - names))})")
    activation = getattr(config, "hidden_act", None)
    if activation not in ("silu", "swish"):
        problems.append(f"activation {activation!r} (Mixtral's is 'silu')")
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if getattr(config, "sliding_window", None) is not None or layer_types != {"full_attention"}:
        problems.append("sliding-window or other partial attention")
    if (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0) != 1.0:
        problems.append("RoPE on a part of each head")
    if getattr(config, "quantization_config", None):
        problems.append("quantized weights")
    if problems:
        raise ValueError(
            f"{config.model_type} does not fit Mixtral exactly: {'; '.join(problems)}. "
            "Use a Llama-family decoder such as Llama, SmolLM2 or TinyLlama"
        )


def to_mixtral(dense: PreTrainedModel, *, experts: int, top_k: int, seed: int = 0) -> MixtralForCausalLM:
    """Build the MoE model, in the dense model's dtype, from a dense model that `check_fits`."""
    config = MixtralConfig(
        **{field: getattr(dense.config, field) for field in _CONFIG_FIELDS if hasattr(dense.config, field)},
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        sliding_window=None,
    )
    # Transformers merges the experts of a published checkpoint into its own layout; the dense MLP stands in for each.
    weights = dict(_published(dense, experts, torch.Generator().manual_seed(seed)))
    loaded: Any = MixtralForCausalLM.from_pretrained(
        None, config=config, state_dict=weights, dtype=dense.dtype, output_loading_info=True
    )
    model, loading = loaded
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    return model.eval()


def max_logit_difference(dense: PreTrainedModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Largest absolute difference of the two models' logits [1, S, V] on `TEXT`, S at most what the model allows."""
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, : dense.config.max_position_embeddings]
    with torch.inference_mode():
        return (dense(input_ids=ids).logits - model(input_ids=ids).logits).abs().max().item()


def _published(dense: PreTrainedModel, experts: int, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """The MoE's weights under the names of a published Mixtral checkpoint; experts share the dense tensors."""
    for name, tensor in dense.state_dict().items():
        mlp = re.fullmatch(r"(model\.layers\.\d+)\.mlp\.(\w+)\.weight", name)
        if mlp is None:
            yield name, tensor
            continue
        block = f"{mlp[1]}.block_sparse_moe"
        for expert in range(experts):
            yield f"{block}.experts.{expert}.{_EXPERT_NAMES[mlp[2]]}.weight", tensor
        if mlp[2] == "gate_proj":
            router = torch.randn(experts, tensor.shape[1], generator=generator) * dense.config.initializer_range
            yield f"{block}.gate.weight", router.to(tensor.dtype)


def _locate(source: Path) -> tuple[Path, str | None]:
    """The folder to load from, and the name of the GGUF file in it, if it is one."""
    if not source.exists():
        raise FileNotFoundError(
            f"there is no folder or file {source}; a model on the hub must be downloaded first "
            "(`hf download NAME --local-dir FOLDER`)"
        )
    if source.is_dir():
        if (source / "config.json").is_file():
            return source, None
        files = sorted(source.glob("*.gguf"))
        if len(files) != 1:
            raise ValueError(
                f"{source} holds no config.json and {len(files)} .gguf files; name a Hugging Face model folder, "
                "a .gguf file, or a folder with one .gguf file"
            )
        source = files[0]
    elif source.suffix != ".gguf":
        raise ValueError(f"{source} is not a .gguf file; name a Hugging Face model folder or a .gguf file")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"reading {source.name} needs the gguf package: pip install 'slipstream[gguf]'")
    return source.parent, source.name
