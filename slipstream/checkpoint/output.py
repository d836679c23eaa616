"""A folder that is about to hold a model: what must not be written to, and how a model arrives there whole."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
# Files of an earlier model that a new one replaces, or that would contradict it when it has no such file.
REPLACED = (
    *MODEL_FILES,
    "*.safetensors.index.json",
    "pytorch_model*.bin.index.json",
    "adapter_*",
    "generation_config.json",
    *TOKENIZER_FILES,
)


def holds_model(folder: Path) -> bool:
    """Whether `folder` has a file that belongs to a Hugging Face model or adapter."""
    return any(next(folder.glob(pattern), None) for pattern in MODEL_FILES)


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


def check_room(output: Path, size: int, name: str) -> None:
    """Raise OSError where the disk that `output` will be on has less than `size` bytes free. `name`: of the setting."""
    free = shutil.disk_usage(next(parent for parent in output.absolute().parents if parent.exists())).free
    if free < size:
        raise OSError(f"{name} {output}: {free / 1e9:.1f} GB free there, the model takes {size / 1e9:.1f}")


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
    for pattern in REPLACED:
        for old in output.glob(pattern):
            if old.name not in new and old.is_file():
                old.unlink()
    # config.json last: it is what makes a folder a model.
    for name in sorted(new, key=lambda name: (name in ("config.json", "adapter_config.json"), name)):
        (incomplete / name).replace(output / name)
    incomplete.rmdir()
