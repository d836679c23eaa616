"""Saving a distributed model gives the files that plain Transformers writes on one process."""

import ctypes
import hashlib
import json
import multiprocessing
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.distributed import DistributedConfig

from slipstream.checkpoint import export as export_module
from slipstream.checkpoint.export import INCOMPLETE, INDEX, export, install_save
from slipstream.hf import experts_modules
from tests.distributed.harness import RankFailedError, run_ranks
from tests.tiny_models import tiny_batch, tiny_model

ARCHITECTURES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "nemotron_h", "granitemoe"]
MANY_FILES = 60_000  # bytes of a file, so that a tiny model fills many


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a tiny model that plain Transformers saved, by architecture."""
    root = tmp_path_factory.mktemp("sources")

    def folder(model_type: str) -> Path:
        if not (root / model_type).exists():
            tiny_model(model_type, None).save_pretrained(root / model_type)
        return root / model_type

    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, each of which is in one file, the one that the index names."""
    files = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    found = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    assert len(found) == sum(map(len, files.values()))
    if len(files) > 1:
        index = json.loads((folder / INDEX).read_text())
        assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
        assert sorted(files) == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    else:
        assert list(files) == ["model.safetensors"]
        assert not (folder / INDEX).exists()
    return found


def assert_same(folder: Path, expected: Path) -> None:
    found, wanted = weights(folder), weights(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    for name in ("config.json", "generation_config.json"):
        assert (folder / name).read_text() == (expected / name).read_text()
    assert not (folder / INCOMPLETE).exists()


def reload(folder: Path) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info


def load(folder: Path, ep_size: int) -> Any:
    setup = DistributedConfig(fsdp_size=dist.get_world_size(), ep_size=ep_size)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=setup, dtype="auto")


def _save_layouts(folder: Path, output: Path, ep_sizes: list[int]) -> None:
    for ep_size in ep_sizes:
        model = load(folder, ep_size)
        install_save(model)
        model.save_pretrained(output / f"{ep_size}")
        model.save_pretrained(output / f"{ep_size} many", max_shard_size=MANY_FILES)


@pytest.mark.parametrize(("ranks", "ep_sizes"), [(2, [2]), (4, [4, 2])])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_writes_what_plain_transformers_writes(
    model_type: str, ranks: int, ep_sizes: list[int], source: Any, tmp_path: Path
) -> None:
    run_ranks(_save_layouts, ranks, source(model_type), tmp_path, ep_sizes)
    for ep_size in ep_sizes:
        one, many = tmp_path / f"{ep_size}", tmp_path / f"{ep_size} many"
        assert_same(one, source(model_type))
        assert_same(many, source(model_type))
        assert len(list(many.glob("*.safetensors"))) > ranks
        for file in many.glob("*.safetensors"):
            tensors = load_file(file)
            assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= MANY_FILES
    reload(tmp_path / f"{ep_sizes[-1]} many")


def _save_placed(folder: Path, output: Path) -> None:
    """Placements that Transformers does not make itself: other dims, uneven and empty shards, replicas."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    line = init_device_mesh("cpu", (4,))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    layouts = [(mesh, [Shard(1), Shard(0)]), (mesh, [Replicate(), Shard(0)]), (mesh, [Shard(0), Shard(0)])]
    experts = [module for _, module in experts_modules(model)]
    for number, module in enumerate(experts):
        place(module, *layouts[number % len(layouts)])
    place(model.get_input_embeddings(), line, [Shard(1)])
    for layer in model.model.layers:
        place(layer.input_layernorm, line, [Shard(0)])
        place(layer.self_attn.k_proj, init_device_mesh("cpu", (4,)), [Shard(0)])
    place(model.lm_head, mesh, [Shard(0), Shard(1)])
    export(model, output / "many", max_shard_size=MANY_FILES)
    export(model, output / "one")


def place(module: nn.Module, mesh: Any, placements: list[Any]) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        sharded = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
        setattr(module, name, nn.Parameter(sharded))


def test_any_placement(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(vocab_size=37, hidden_size=30, num_hidden_layers=4, num_experts=6, num_experts_per_tok=2,
                            moe_intermediate_size=9, num_attention_heads=2, num_key_value_heads=1, head_dim=3,
                            tie_word_embeddings=False)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    run_ranks(_save_placed, 4, tmp_path / "source", tmp_path)
    assert_same(tmp_path / "many", tmp_path / "source")
    assert_same(tmp_path / "one", tmp_path / "source")


def _save_after_forward(folder: Path, output: Path) -> None:
    model = load(folder, 2)
    model(input_ids=tiny_batch())  # leaves FSDP2's last group gathered
    export(model, output, save_dtype="bfloat16", max_shard_size=MANY_FILES)
    assert model.config.dtype == torch.float32
    model(input_ids=tiny_batch())


@pytest.mark.parametrize("model_type", ["deepseek_v3", "granitemoe"])
def test_save_dtype_is_that_of_a_model_loaded_so(model_type: str, source: Any, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(source(model_type), dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "plain")
    run_ranks(_save_after_forward, 2, source(model_type), tmp_path / "export")
    assert_same(tmp_path / "export", tmp_path / "plain")


def _save_tied(folder: Path, output: Path) -> None:
    model = load(folder, 2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    export(model, output, max_shard_size=MANY_FILES)


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    config = tiny_model("qwen3_moe", None).config
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    run_ranks(_save_tied, 2, tmp_path / "source", tmp_path / "export")
    assert_same(tmp_path / "export", tmp_path / "source")
    assert "lm_head.weight" not in weights(tmp_path / "export")


def _save_again(folder: Path, output: Path) -> list[str]:
    model = load(folder, 2)
    names = []
    for size in (MANY_FILES, MANY_FILES, "5GB", MANY_FILES):
        export(model, output, max_shard_size=size)
        names.append(sorted(path.name for path in output.iterdir() if dist.get_rank() == 0))
    return names


def test_replaces_a_checkpoint_and_leaves_other_files(source: Any, tmp_path: Path) -> None:
    (tmp_path / INCOMPLETE).mkdir()
    (tmp_path / INCOMPLETE / "model-00001-of-00003.safetensors").write_bytes(b"left by a killed run")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"an older model")
    many, again, one, last = run_ranks(_save_again, 2, source("qwen3_moe"), tmp_path)[0]
    # Other names than the checkpoint there, which stays valid until the index is replaced.
    assert not {name for name in again if "-of-" in name} & set(many)
    assert one == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert last == many
    assert_same(tmp_path, source("qwen3_moe"))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def _save_and_fail(folder: Path, output: Path) -> str:
    model = load(folder, 2)
    write = export_module.write_shard

    def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if dist.get_rank() == 1 and list(path.parent.iterdir()):
            raise OSError(28, "No space left on device")
        write(path, tensors)

    export_module.write_shard = write_shard
    with pytest.raises(RuntimeError, match="failed on rank 1: OSError") as failure:
        export(model, output, max_shard_size=MANY_FILES)
    return str(failure.value)


def test_all_ranks_raise_what_one_met(source: Any, tmp_path: Path) -> None:
    tiny_model("qwen3_moe", None, seed=5).save_pretrained(tmp_path, max_shard_size=MANY_FILES)
    before = digests(tmp_path)
    messages = run_ranks(_save_and_fail, 4, source("qwen3_moe"), tmp_path)
    assert len(set(messages)) == 1
    assert "No space left on device" in messages[0]
    assert digests(tmp_path) == before
    assert not (tmp_path / INCOMPLETE).exists()


def _save_and_die(rank: int, ranks: int, victim: int, folder: Path, output: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    store = f"file://{output.parent}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    model = load(folder, 2)
    write = export_module.write_shard

    def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        write(path, tensors)
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    export_module.write_shard = write_shard
    with pytest.raises(RuntimeError):
        export(model, output, max_shard_size=MANY_FILES)
    (output.parent / f"rank {rank} raised").touch()
    os._exit(0)


@pytest.mark.parametrize("victim", [0, 2])
def test_killed_rank_leaves_the_previous_checkpoint(victim: int, source: Any, tmp_path: Path) -> None:
    output = tmp_path / "output"
    tiny_model("qwen3_moe", None, seed=5).save_pretrained(output, max_shard_size=MANY_FILES)
    before = digests(output)
    # Not `run_ranks`, which stops the other ranks when one dies: here they must end by themselves.
    context = multiprocessing.get_context("forkserver")
    arguments = (4, victim, source("qwen3_moe"), output)
    ranks = [context.Process(target=_save_and_die, args=(rank, *arguments), daemon=True) for rank in range(4)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 60
    for rank, process in enumerate(ranks):
        process.join(deadline - time.monotonic())
        assert process.exitcode == (-signal.SIGKILL if rank == victim else 0), rank
        assert (tmp_path / f"rank {rank} raised").exists() == (rank != victim)
    assert digests(output) == before
    reload(output)
    run_ranks(_save_layouts, 2, source("qwen3_moe"), output, [2])
    (output / "2").rename(tmp_path / "later")
    assert_same(tmp_path / "later", source("qwen3_moe"))


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _peak_of_save(folder: Path, output: Path, max_shard_size: int) -> int:
    """Host memory at the peak of a save over what the loaded model takes."""
    model = load(folder, 2)
    for parameter in model.parameters():
        parameter.to_local().sum()  # loading may only have mapped the file
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back at once
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    export(model, output, max_shard_size=max_shard_size)
    return _resident("VmHWM") - before


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_no_rank_holds_more_than_a_file_beyond_its_weights(model_type: str, tmp_path: Path) -> None:
    config = tiny_model(model_type, None).config
    config.hidden_size, config.num_hidden_layers, config.vocab_size = 256, 6, 8192
    config.intermediate_size = config.moe_intermediate_size = 512
    if model_type == "gpt_oss":
        config.layer_types = ["full_attention"] * 6
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    nbytes = (tmp_path / "source" / "model.safetensors").stat().st_size
    assert nbytes > 90e6
    peaks = run_ranks(_peak_of_save, 2, tmp_path / "source", tmp_path / "export", 13_000_000)
    assert_same(tmp_path / "export", tmp_path / "source")
    # A file of 13 MB, a piece of 4 MB on its way, and what the allocator and gloo keep; a full gather takes it all.
    assert max(peaks) < 13e6 + 10e6 < nbytes / 2, [f"{peak / 1e6:.0f} MB" for peak in peaks]


def _save_elsewhere(folder: Path, output: Path) -> None:
    export(load(folder, 2), output)


def test_refuses_what_is_not_a_folder(source: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RankFailedError, match=r"failed on rank 0: (FileExists|NotADirectory)Error"):
        run_ranks(_save_elsewhere, 2, source("qwen3_moe"), tmp_path / "file")
