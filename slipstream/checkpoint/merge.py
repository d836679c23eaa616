"""A LoRA adapter added into its base model: a plain checkpoint again, in the base's own files and names.

File by file, so the host holds one of the base's files and the factors of one layer, whatever the model's size. What
the adapter adds is made in the model's names, experts in blocks, and taken to the checkpoint's by Transformers' own
conversion, which only cuts, joins and turns tensors. A head that is the embedding gets a tensor of its own where the
adapter changes one of both, or each in another way: adapted, they are two.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors import safe_open
from torch import Tensor

from slipstream import hf
from slipstream.checkpoint.export import INDEX, ONE_FILE_BYTES, write_shard
from slipstream.checkpoint.export_plan import Holding, make_plan
from slipstream.checkpoint.files import indexed_files, open_tensors, read_json
from slipstream.checkpoint.output import TOKENIZER_FILES, check_output_folder, check_room, write_model
from slipstream.checkpoint.untie import Files, key_of, nbytes, record, shared_parameters, untie
from slipstream.hf_models import is_incomplete
from slipstream.shared_adapters import share_experts

ADAPTER = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
# Settings under which a merged weight is not `W + scaling * B @ A`, or of which PEFT changed the base.
_OTHER_FORMS = ("use_dora", "lora_bias", "layer_replication", "trainable_token_indices", "alora_invocation_tokens",
                "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config")  # fmt: skip
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
# Largest distance of the merged model's logits from those of base and adapter, relative, as rounding makes it.
BOUNDS = {torch.float32: 1e-4}
BOUND_OF_16_BITS = 3e-2


@dataclass(frozen=True)
class Merged:
    """`changed` of `tensors` in `files`, `untied` of which the base has as other ones too; with `verify` how far the
    logits are from those of base and adapter, and how far the adapter moved them from the base's, both relative, of the
    median token."""

    output: Path
    files: int
    tensors: int
    changed: int
    untied: tuple[str, ...] = ()
    logit_error: float | None = None
    adapter_effect: float | None = None


def merge(
    adapter: str, base: str, output: Path, *, verify: bool = False, any_base: bool = False, overwrite: bool = False
) -> Merged:
    """Write base plus adapter to `output` as a Hugging Face checkpoint with the base's files, dtypes and config.

    Only tied weights that the adapter makes differ are untied: a tensor more, and `tie_word_embeddings` false.

    Args:
        adapter: folder or hub id of a PEFT LoRA adapter, its tokenizer included where it has one.
        base: folder or hub id of the model that it was trained on, in safetensors.
        output: the folder to write.
        verify: compare logits on random tokens before anything appears in `output`; loads both models, in turn.
        any_base: also take a base of another name than the adapter records.
        overwrite: replace a model that `output` holds, once the new one is whole.

    Raises:
        ValueError: adapter and base do not fit, a file is damaged, `output` must not be replaced, the logits differ.
        OSError: a hub id cannot be had, or the disk is too small.
    """
    adapter_folder = _folder(adapter, "ADAPTER", ["adapter_*", *TOKENIZER_FILES])
    base_folder = _folder(base, "--into", ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"])
    check_output_folder(output, [base_folder, adapter_folder], overwrite, "--output")
    config = _adapter_config(adapter_folder)
    if not any_base:
        _check_name(config.base_model_name_or_path, base, base_folder)
    files = _weight_files(base_folder)
    model = _on_meta(base_folder)
    shared = shared_parameters(model)
    with open_tensors(adapter_folder / ADAPTER, "ADAPTER") as factors:
        changes = _changes(model, config, factors, adapter_folder)
        differing = _differing(model, shared, changes, files)
        starts = untie(model, differing, files)
        owners = _owners(model, changes, base_folder, files)
        size = sum((base_folder / name).stat().st_size for name in files)
        size += sum(nbytes(base_folder / name, starts[key]) for name in files for key in files[name] if key in starts)
        check_room(output, size, "--output")
        with write_model(output) as incomplete:
            for name, keys in files.items():
                sources = {key: starts.get(key, key) for key in keys}
                _merge_file(base_folder / name, incomplete / name, sources, owners, hf.Reversal(model), changes)
            _copy_rest(base_folder, adapter_folder, incomplete)
            if differing:
                record(incomplete, starts, files)
            error = effect = None
            if verify:
                error, effect = _check_logits(adapter_folder, base_folder, incomplete)
    return Merged(output, len(files), sum(map(len, files.values())), len(owners), tuple(starts), error, effect)


@dataclass(frozen=True)
class _Change:
    """Of one of the model's parameters: `rows` of dim 0, or None for all -> what is added, or what replaces it."""

    make: Callable[[tuple[int, int] | None], Tensor]
    replaces: bool = False


def _folder(name: str, what: str, patterns: list[str]) -> Path:
    """`name` as a folder; a hub id's files come from the hub or its cache."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or name.startswith(".") or len(path.parts) > 2:
        raise ValueError(f"{what} {name}: no such folder")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise OSError(f"{what} {name}: no such folder, and not to be had from the hub ({error})") from error


def _adapter_config(folder: Path) -> LoraConfig:
    if not (folder / "adapter_config.json").is_file() or not (folder / ADAPTER).is_file():
        raise ValueError(
            f"ADAPTER {folder}: adapter_config.json or {ADAPTER} is missing; name a folder that PEFT saved"
        )
    kind = read_json(folder / "adapter_config.json", "ADAPTER").get("peft_type")
    if kind != "LORA":
        raise ValueError(f"ADAPTER {folder}: its type is {kind}; only LORA can be merged here")
    config: LoraConfig = LoraConfig.from_pretrained(str(folder))
    other = [name for name in _OTHER_FORMS if getattr(config, name, None)]
    if config.init_lora_weights not in _PLAIN_STARTS:
        other.append(f"init_lora_weights={config.init_lora_weights}")
    if other:
        raise ValueError(f"ADAPTER {folder}: {other[0]} is not merged here; use PEFT's merge_and_unload")
    return share_experts(config, False)  # its files have the factors of each expert


def _check_name(recorded: str | None, base: str, folder: Path) -> None:
    """Another fine-tune of the same architecture fits in every shape, so its name has to tell."""
    if not recorded or Path(recorded).expanduser().resolve() == folder.resolve():
        return
    last = Path(recorded).name
    if last not in {Path(base).name, folder.resolve().name} and f"models--{recorded.replace('/', '--')}" not in str(
        folder
    ):
        raise ValueError(
            f"--into {base}: the adapter was trained on {recorded}; give that, or --any-base if this is the same model"
        )


def _weight_files(folder: Path) -> Files:
    """The base's files in their order, with the names and shapes of their tensors."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"--into {folder}: no config.json there; name a Hugging Face checkpoint")
    if "quantization_config" in read_json(folder / "config.json", "--into"):
        raise ValueError(f"--into {folder}: its weights are quantised; merge into the checkpoint in 16 or 32 bits")
    names = ["model.safetensors"]
    if (folder / INDEX).is_file():
        names = indexed_files(folder / INDEX, "--into")
    files = {}
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"--into {folder}: {name} is missing; a checkpoint in safetensors is needed")
        with open_tensors(folder / name, "--into") as file:
            files[name] = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    return files


def _on_meta(folder: Path) -> Any:
    """The model without its weights, and with the way back to the names of its checkpoint."""
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="meta", dtype="auto")
    except RuntimeError as error:
        if not is_incomplete(error):
            raise
        raise ValueError(
            f"--into {folder}: it lacks weights of some layers, or has them in other shapes (the report above names "
            "the layers); use a complete checkpoint"
        ) from error


def _changes(model: Any, config: LoraConfig, factors: Any, folder: Path) -> dict[str, _Change]:
    """What the adapter does to each of the parameters of `model`, by their names. PEFT says what adapts what."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    left = set(factors.keys())
    adapted: Any = get_peft_model(model, config, low_cpu_mem_usage=True)
    changes: dict[str, _Change] = {}

    def take(key: str, shape: torch.Size) -> str:
        if key not in left or torch.Size(factors.get_slice(key).get_shape()) != shape:
            found = f"of shape {factors.get_slice(key).get_shape()}" if key in left else "missing"
            raise ValueError(f"ADAPTER {folder} does not fit this base: {key} should be {[*shape]} and is {found}")
        left.discard(key)
        return key

    for name, module in adapted.base_model.model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        target = name.replace(".base_layer", "") + "." + getattr(module, "parameter_name", "weight")
        pair = []
        for kind in ("A", "B"):
            if "default" in getattr(module, f"lora_embedding_{kind}"):
                pair.append(take(f"{_PREFIX}{name}.lora_embedding_{kind}",
                                 getattr(module, f"lora_embedding_{kind}")["default"].shape))  # fmt: skip
            else:
                weight = getattr(module, f"lora_{kind}")["default"].weight
                pair.append(take(f"{_PREFIX}{name}.lora_{kind}.weight", weight.shape))
        changes[target] = _Change(_delta_of(module, factors, *pair))
    for key in left:
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if name not in parameters or parameters[name].shape != torch.Size(factors.get_slice(key).get_shape()):
            raise ValueError(f"ADAPTER {folder} does not fit this base, which has no {name} of that shape")
        changes[name] = _Change(_saved(factors, key, changes.get(name)), replaces=True)
    adapted.unload()
    return changes


def _saved(factors: Any, key: str, beside: _Change | None) -> Callable[[tuple[int, int] | None], Tensor]:
    """A whole parameter that the adapter has; PEFT also saves an embedding that has factors `beside` it."""

    def saved(rows: tuple[int, int] | None) -> Tensor:
        tensor: Tensor = factors.get_tensor(key) if rows is None else factors.get_slice(key)[slice(*rows)]
        return tensor if beside is None else tensor.float() + beside.make(rows)

    return saved


def _delta_of(module: Any, factors: Any, a: str, b: str) -> Callable[[tuple[int, int] | None], Tensor]:
    scaling, experts = module.scaling["default"], getattr(module, "num_experts", 1)
    turned = "lora_embedding_" in a or getattr(module, "fan_in_fan_out", False)

    def delta(rows: tuple[int, int] | None) -> Tensor:
        if experts == 1:
            whole = factors.get_tensor(b).float() @ factors.get_tensor(a).float() * scaling
            whole = whole.t() if turned else whole
            return whole if rows is None else whole[slice(*rows)]
        first, last = rows or (0, experts)
        rank = module.r["default"]
        a_ErA = factors.get_slice(a)[first * rank : last * rank].float().view(last - first, rank, -1)
        b_EBr = factors.get_tensor(b).float().view(-1, rank, experts)[..., first:last].permute(2, 0, 1)
        delta_EBA = b_EBr @ a_ErA * scaling
        return delta_EBA.transpose(1, 2) if getattr(module.get_base_layer(), "is_transposed", False) else delta_EBA

    return delta


def _differing(model: Any, shared: dict[str, str], changes: dict[str, _Change], files: Files) -> dict[str, str]:
    """Those of the `shared` parameters that need a tensor of their own; what changes alike stays in `changes` once."""
    differing = {}
    for name, of in shared.items():
        stored = any(key_of(model, name) in shapes for shapes in files.values())
        if not stored and _are_alike(changes.get(name), changes.get(of)):
            changes.pop(name, None)
        elif name in changes or of in changes:
            differing[name] = of
    return differing


def _are_alike(one: _Change | None, other: _Change | None) -> bool:
    if one is None or other is None or one.replaces != other.replaces:
        return one is other
    # The factors that PEFT ties (`ensure_weight_tying`) are each other's transposes.
    return torch.allclose(one.make(None).float(), other.make(None).float(), rtol=1e-4, atol=1e-7)


@dataclass(frozen=True)
class _Part:
    """Parameters that convert together: `rows` of dim 0 or None for all, the shapes of these, and the checkpoint's
    names for what comes out, where the conversion of these rows alone gives others."""

    shapes: dict[str, tuple[int, ...]]
    rows: tuple[int, int] | None
    renamed: dict[str, str]


def _owners(model: Any, changes: dict[str, _Change], folder: Path, files: Files) -> dict[str, _Part]:
    """Of each of the checkpoint's tensors that changes, the part of the model's parameters that it comes from.

    Raises: ValueError where the checkpoint has no such tensor, or of another shape.
    """
    parameters = dict(model.named_parameters())
    reversal = hf.Reversal(model)
    units = [unit for unit in reversal.units(set(parameters)) if any(name in changes for name in unit)]
    held = {name: Holding.of(parameters[name]) for unit in units for name in unit}
    plan = make_plan([held], hf.Reversal(model), lambda _, dtype: dtype, ONE_FILE_BYTES, ONE_FILE_BYTES)
    on_disk = {key: shape for shapes in files.values() for key, shape in shapes.items()}
    owners: dict[str, _Part] = {}
    for planned in plan.parts[0]:
        rows = planned.rows
        shapes = {
            name: tuple(parameters[name].shape if rows is None else (rows[1] - rows[0], *parameters[name].shape[1:]))
            for name in planned.names
        }
        part = _Part(shapes, rows, planned.renamed)
        metas = reversal.convert({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
        for name, meta in metas.items():
            key = part.renamed.get(name, name)
            shape = on_disk.get(key)
            if shape != [*meta.shape]:
                raise ValueError(
                    f"--into {folder}: the adapter changes {key} {[*meta.shape]}, and the checkpoint has "
                    f"{shape or 'no such tensor'}"
                )
            owners[key] = part
    return owners


def _merge_file(
    source: Path,
    target: Path,
    keys: dict[str, str],
    owners: dict[str, _Part],
    reversal: hf.Reversal,
    changes: dict[str, _Change],
) -> None:
    """`keys`: of the new file's tensors, and of those of `source` that they are made from."""
    with safe_open(source, "pt") as file:
        tensors = {key: file.get_tensor(of) for key, of in keys.items()}
    for part in {id(owners[key]): owners[key] for key in keys if key in owners}.values():
        for key, value in _converted(part, reversal, changes).items():
            if key not in tensors:
                continue  # the part's others are in another file
            if all(changes[name].replaces for name in part.shapes if name in changes):
                tensors[key] = value.to(tensors[key].dtype).contiguous()
            else:
                tensors[key] = (tensors[key].float() + value).to(tensors[key].dtype)
    write_shard(target, tensors)


def _converted(part: _Part, reversal: hf.Reversal, changes: dict[str, _Change]) -> dict[str, Tensor]:
    """What is added to the checkpoint's tensors of one part, or replaces them."""
    made = {name: changes[name].make(part.rows) for name in part.shapes if name in changes}
    some = next(iter(made.values()))
    for name in part.shapes:
        if name not in made:  # joined in the checkpoint with one that changes
            made[name] = torch.zeros(part.shapes[name], dtype=some.dtype)
    converted = reversal.convert({name: made[name] for name in part.shapes})
    return {part.renamed.get(name, name): tensor for name, tensor in converted.items()}


def _copy_rest(base: Path, adapter: Path, target: Path) -> None:
    """Everything else of the base; the tokenizer that was trained with, where the adapter has one."""
    for path in base.iterdir():
        if path.is_file() and (path.name == INDEX or not path.name.endswith(_WEIGHTS)):
            shutil.copyfile(path, target / path.name)
    if any(adapter.glob("tokenizer*")):
        for pattern in TOKENIZER_FILES:
            for path in adapter.glob(pattern):
                shutil.copyfile(path, target / path.name)


@torch.no_grad()
def _check_logits(adapter: Path, base: Path, merged: Path) -> tuple[float, float]:
    """Distance of the merged model's logits from those of base and adapter, and of the latter from the base's.

    Raises: ValueError where the first is more than rounding.
    """

    def load(folder: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    model: Any = load(base)
    dtype = transformers.AutoConfig.from_pretrained(base).dtype or torch.float32
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (2, 32), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=ids).logits
    expected = PeftModel.from_pretrained(model, adapter).eval()(input_ids=ids).logits
    del model
    got = load(merged)(input_ids=ids).logits
    # The median over tokens: rounding sends a few of them to another expert.
    error, effect = (
        ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item() for logits in (got, before)
    )
    if not error <= BOUNDS.get(dtype, BOUND_OF_16_BITS):
        raise ValueError(
            f"--verify: the merged model's logits are {error:.1e} from those of base and adapter, where rounding to "
            f"{dtype} explains {BOUNDS.get(dtype, BOUND_OF_16_BITS):.0e} (the adapter moved them by {effect:.1e}); "
            "nothing was written"
        )
    return error, effect
