"""Headers of safetensors files that lie: every lie is refused in a line that names both numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.weight_files import read_header
from model.weight_writer import save_tensors

Header = dict[str, Any]


def rewritten(
    path: Path, change: Callable[[Header], object], length: int | None = None, extra: int = 0
) -> None:
    """A file of a (3, 4) and b (5,) in F32 whose header is changed; `extra` bytes are added or cut off."""
    save_tensors(path, {"a": torch.zeros(3, 4), "b": torch.zeros(5)})
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:end]), content[end:]
    change(header)
    text = json.dumps(header).encode()
    data = data[:extra] if extra < 0 else data + bytes(extra)
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (
            lambda h: None,
            {"length": 2**63},
            r"header is 9,223,372,036,854,775,808 bytes long, where at most 2\d",
        ),
        (lambda h: None, {"extra": -4}, "b ends at byte 68 of the data, which has 64"),
        (lambda h: None, {"extra": 8}, "its tensors take 68 bytes, but the file has 76 for them"),
        (lambda h: h["a"].update(shape=[10**8] * 2), {}, r"a \(100000000, 100000000\) in F32 takes 40,000,"),
        (
            lambda h: h["a"].update(shape=[2**62, 8]),
            {},
            r"a.shape\[0\]=4611686018427387904 must be at least 0",
        ),
        (lambda h: h["a"].update(shape=[-3, -4]), {}, r"a.shape\[0\]=-3 must be at least 0"),
        (lambda h: h["b"].update(dtype="F64"), {}, r"b \(5,\) in F64 takes 40 bytes, but its place has 20"),
        (
            lambda h: h["b"].update(data_offsets=[28, 48]),
            {},
            "b begins at byte 28 of the data, where the ten",
        ),
        (lambda h: h["b"].update(data_offsets=[56, 76]), {"extra": 8}, "b begins at byte 56 of the data"),
        (lambda h: h["b"].update(data_offsets=[48, 10**15]), {}, "20 bytes, but its place has 999,999,999,9"),
        (lambda h: h["b"].update(data_offsets=5), {}, "b.data_offsets=5 is not a list"),
        (lambda h: h["b"].pop("dtype"), {}, "b.dtype is missing"),
        (lambda h: h.update({"c\n": []}), {}, r"'c\\n'=\[\] is not a mapping"),
        (lambda h: h["b"].update(dtype="X7"), {}, "unknown variant `X7`"),
    ],
)
def test_a_lie_is_named_with_value_and_limit(tmp_path, change, more, message):
    path = tmp_path / "model.safetensors"
    rewritten(path, change, **more)
    with pytest.raises(ValueError, match=rf"is damaged \(.*{message}.*\); get it again") as caught:
        read_header(path, "get it again")
    assert "\n" not in str(caught.value)


def test_what_is_no_header_is_refused_in_the_librarys_words(tmp_path):
    path = tmp_path / "model.safetensors"
    for content in (b"", b"12345", bytes(8), b"\x03" + bytes(7) + b"{{{", b"\x02" + bytes(7) + b"[]"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged \(.+\); get it again"):
            read_header(path, "get it again")
    rewritten(path, lambda header: None)
    assert read_header(path, "")["a"].shape == (3, 4)
