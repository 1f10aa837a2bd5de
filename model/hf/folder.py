"""Writing a folder that another command may hold, or that is of another kind."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.files import read_object
from common.locks import FolderLock
from model.export_files import (
    CONFIG_NAME,
    CONVERSIONS_NAME,
    TOKENIZER_NAME,
    TRAINING_DATA_NAME,
)
from model.weight_files import INDEX_NAME

# Files of a model's that speak for it where they lie, beside its config and weights.
_PARTS = (
    TOKENIZER_NAME,
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    TRAINING_DATA_NAME,
    CONVERSIONS_NAME,
)


@contextmanager
def writing(out: Path, what: str, is_hf: bool) -> Iterator[None]:
    """Holds the folder that a command writes.

    Args:
        is_hf: whether it is to be a Hugging Face folder.

    Raises:
        ValueError: another command writes there, or it already is a folder of the other kind, which would be
            lost.
    """
    with FolderLock(out, what, "choose another --out"):
        path = out / CONFIG_NAME
        fix = "delete it or choose another --out"
        if path.is_file() and ("model_type" in read_object(path, fix)) != is_hf:
            other = "an export of ZeroModel" if is_hf else "a Hugging Face folder"
            raise ValueError(f"{out} is {other}, whose files would be overwritten; choose another --out")
        yield


def remove_old(out: Path) -> None:
    """Deletes what an earlier model left in a folder and this one may not have; config.json goes first."""
    for name in (CONFIG_NAME, *_PARTS):
        (out / name).unlink(missing_ok=True)


def refuse_stale_weights(out: Path, written: Iterable[str]) -> None:
    """Raises ValueError if the folder holds weights, or an index, that are not among what will be written."""
    held = {path.name for path in out.glob("*.safetensors")} | {INDEX_NAME} & {p.name for p in out.glob("*")}
    if stale := sorted(held - set(written)):
        raise ValueError(f"{out} holds {stale[0]} of another model; delete it or choose another --out")
