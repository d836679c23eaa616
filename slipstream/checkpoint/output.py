"""A folder that is about to hold a model: what must not be written to, and how a model arrives there whole."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

INCOMPLETE = ".incomplete"  # what is not whole yet: a folder of this name, or one whose name ends so
# One of these makes a folder hold a model.
MODEL_FILES = ("config.json", "adapter_config.json", "*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
)
# What Transformers looks for: weights and their indexes.
WEIGHTS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|pytorch_model(-\d{5}-of-\d{5})?\.bin|"
    r"(model\.safetensors|pytorch_model\.bin)\.index\.json"
)
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# What else an earlier model consists of, by the names under which Transformers and PEFT save it.
_REST = {"config.json", "generation_config.json", "adapter_config.json", "adapter_model.safetensors",
         "adapter_model.bin", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model",
         "sentencepiece.bpe.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
         "merges.txt", "chat_template.jinja", "chat_template.json"}  # fmt: skip


def holds_model(folder: Path) -> bool:
    """Whether `folder` has a file that belongs to a Hugging Face model or adapter."""
    return any(next(folder.glob(pattern), None) for pattern in MODEL_FILES)


def model_files(folder: Path) -> list[Path]:
    """The files of the Hugging Face model or adapter in `folder`, none where it holds no model.

    Not everything that may be named so: what is not known to be of a model is the user's.
    """
    if not holds_model(folder):
        return []
    names = set()
    for index in INDEXES:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            names |= set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
    return [
        path
        for path in folder.iterdir()
        if path.is_file() and (path.name in _REST or path.name in names or WEIGHTS.fullmatch(path.name))
    ]


def check_output_folder(output: Path, sources: Sequence[Path], overwrite: bool, name: str) -> None:
    """Refuse, before any work is done, an output folder that must not be written to.

    Args:
        output: the folder.
        sources: what the new model is made from; it is never replaced.
        overwrite: replace a model that `output` holds.
        name: what the user calls this setting.

    Raises:
        ValueError: `output` is a file, is where one of `sources` lies, or holds a model and `overwrite` is false.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{name}: {output} is a file; name a folder")
    for source in sources:
        if source.resolve().is_relative_to(output.resolve()):
            raise ValueError(f"{name}: {output} is where the model comes from ({source}); name another folder")
    if not overwrite and holds_model(output):
        raise ValueError(f"{name}: {output} already holds a model; name another folder or pass --overwrite")


def check_writable(output: Path, name: str) -> None:
    """Raise OSError where nothing can be written to `output`, by making a folder there, or where it will be, and taking
    it away again. `name`: of the setting."""
    try:
        there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
        tempfile.TemporaryDirectory(prefix=".slipstream-", dir=there).cleanup()
    except OSError as error:
        raise OSError(f"{name}: nothing can be written to {output} ({error.strerror})") from error


def check_room(output: Path, size: int, name: str) -> None:
    """Raise OSError where the disk that `output` will be on has less than `size` bytes free. `name`: of the setting."""
    place = output.absolute()
    free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free
    if free < size:
        raise OSError(
            f"{name} {output}: {free / 1e9:.1f} GB free there, the model takes {size / 1e9:.1f}; make room, or name "
            "another folder"
        )


@contextmanager
def write_model(output: Path) -> Iterator[Path]:
    """Yield a folder to write a model into; what it holds becomes `output`'s model when the block ends.

    Until then an earlier model stays as it is, also when the block fails or the process dies.
    """
    created = not output.exists()
    incomplete = output / INCOMPLETE
    shutil.rmtree(incomplete, ignore_errors=True)  # of a process that was killed
    incomplete.mkdir(parents=True)
    try:
        yield incomplete
        publish(output)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)
        if created and not any(output.iterdir()):
            output.rmdir()


def publish(output: Path) -> None:
    """Move what `output/.incomplete` holds into `output`, in place of an earlier model's files. Other files stay."""
    incomplete = output / INCOMPLETE
    new = {path.name for path in incomplete.iterdir()}
    for old in model_files(output):
        if old.name not in new:
            old.unlink()
    # config.json last: it is what makes a folder a model.
    for name in sorted(new, key=lambda name: (name in ("config.json", "adapter_config.json"), name)):
        (incomplete / name).replace(output / name)
    incomplete.rmdir()
