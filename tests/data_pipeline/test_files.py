"""Streams, rows and archives: whole files against their plain content, damaged ones against DataError."""

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data_pipeline.errors import DataError
from data_pipeline.sources.files import Stream, json_lines, parquet_rows, tar_members, text_lines
from data_pipeline.sources.problems import read_arc, read_gsm8k, read_logiqa
from data_pipeline.sources.text import read_jsonl, read_parquet, read_text, read_wiki


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd,
}  # fmt: skip
ROWS = [{"text": f"row {i} é日本 {'x' * (i % 7) * 40}", "other": i} for i in range(60)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
# The function under test runs thousands of times on one folder, which hypothesis does not need to watch.
fuzz = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def outcome(read: Callable[[Path], Iterator[Any]], path: Path) -> list[Any] | None:
    """What `read` finds, or None for one line of DataError that names the file; any other error fails."""
    try:
        return list(read(path))
    except DataError as error:
        line = str(error)
    assert path.name in line
    assert "\n" not in line
    return None


def parquet_bytes(rows: list[dict[str, Any]], **options: Any) -> bytes:
    buffer = io.BytesIO()
    options = {"row_group_size": 17, "write_page_checksum": True, **options}
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, **options)
    return buffer.getvalue()


# ---- compression


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
def test_lines_are_those_of_the_plain_file(tmp_path, suffix):
    text = "first\r\n\n\u2028é\x85 \x0c\nno end " + "long " * 300_000
    path = tmp_path / f"t.txt{suffix}"
    path.write_bytes(COMPRESS.get(suffix, bytes)(text.encode()))
    assert list(text_lines(path)) == [
        "first\r\n", "\n", "\u2028é\x85 \x0c\n", "no end " + "long " * 300_000,
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", COMPRESS)
def test_streams_after_one_another_are_one_file(tmp_path, suffix):
    path = tmp_path / f"t.txt{suffix}"
    first, second = COMPRESS[suffix](b"a\nb"), COMPRESS[suffix](b"c\n" * 50_000)
    padding = b"" if suffix == ".bz2" else b"\0" * 20_000
    path.write_bytes(first + padding + second + padding)
    assert "".join(text_lines(path)) == "a\nb" + "c\n" * 50_000
    for bad in (first + second[:-1], first + second[:3], first + b"x", first + b"\0x"):
        path.write_bytes(bad)
        error = error_of(lambda: list(text_lines(path)))
        assert re.fullmatch(rf"{path} line \d+: cannot be read .*", error)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_rows_cut_anywhere_are_refused(tmp_path, suffix):
    path = tmp_path / f"t.jsonl{suffix}"
    data = COMPRESS[suffix](JSONL)
    path.write_bytes(data)
    assert [document.text for document in read_jsonl(path)] == [row["text"] for row in ROWS]
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        assert f"t.jsonl{suffix} line" in error_of(lambda: list(read_jsonl(path)))


def test_parquet_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    data = parquet_bytes(ROWS)
    path.write_bytes(data)
    assert [document.text for document in read_parquet(path)] == [row["text"] for row in ROWS]
    for cut in range(0, len(data), 7):
        path.write_bytes(data[:cut])
        assert f"{path} row 1: cannot be read" in error_of(lambda: list(read_parquet(path)))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_stream_goes_forward_only_and_never_allocates_what_is_not_there(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    path.write_bytes(COMPRESS[suffix](bytes(range(256)) * 999))
    stream = Stream(path)
    assert stream.read(3) + stream.read(0) + stream.read(2) == bytes(range(5))
    assert stream.seek(256 * 7 + 9) == stream.tell() == 256 * 7 + 9
    assert stream.read(1) == b"\t"
    with pytest.raises(OSError, match="seek backwards"):
        stream.seek(5)
    assert len(stream.read(1 << 60)) == 256 * 999 - 256 * 7 - 10
    assert stream.read(1 << 60) == b""


# ---- damage at random: the same documents or one line that names the file, never another error

READERS: dict[str, tuple[Callable[[Path], Iterator[Any]], bytes]] = {
    "jsonl": (read_jsonl, JSONL),
    "jsonl.gz": (read_jsonl, gzip.compress(JSONL)),
    "jsonl.zst": (read_jsonl, zstd(JSONL)),
    "parquet": (read_parquet, parquet_bytes(ROWS)),
    "zstd.parquet": (read_parquet, parquet_bytes(ROWS, compression="zstd", use_dictionary=False)),
}


@pytest.mark.parametrize("name", READERS)
@fuzz
@given(data=st.data())
def test_flipped_bits(tmp_path, name, data):
    read, good = READERS[name]
    path = tmp_path / name
    path.write_bytes(good)
    documents = list(read(path))
    indices = data.draw(st.lists(st.integers(0, 8 * len(good) - 1), min_size=1, max_size=4, unique=True))
    bad = bytearray(good)
    for index in indices:
        bad[index // 8] ^= 1 << index % 8
    path.write_bytes(bad)
    found = outcome(read, path)
    if name.endswith((".gz", ".zst")):  # those with a checksum: a gzip header has bits without a meaning
        assert found in (None, documents)
    if name == "parquet" and found is not None and found != documents:
        assert len(found) == len(documents)  # the footer has no checksum: names may change, rows are counted


@fuzz
@given(st.binary(max_size=400), st.sampled_from(["", *COMPRESS, ".tar", ".tar.gz", ".tar.zst", ".parquet"]))
def test_arbitrary_bytes(tmp_path, data, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(data)
    for read in (read_text, read_jsonl, read_parquet, read_wiki, read_gsm8k, read_arc, read_logiqa):
        outcome(read, path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@fuzz
@given(
    st.dictionaries(
        st.sampled_from(["text", "prompt", "question", "answer", "id", "answerKey"]), json_values, max_size=6
    )
)
def test_fields_of_wrong_types(tmp_path, row):
    path = tmp_path / "ARC-Easy.jsonl"
    path.write_text('{"text": "a", "question": "b", "answer": "c"}\n' + json.dumps(row))
    good = isinstance(row.get("text"), str)
    found = outcome(read_jsonl, path)
    assert (found is not None) == good
    if found:
        assert found[1].text == row["text"]
    assert (outcome(read_gsm8k, path) is not None) == all(
        isinstance(row.get(key), str) for key in ("question", "answer")
    )
    assert outcome(read_arc, path) is None


@fuzz
@given(
    question=st.fixed_dictionaries(
        {"stem": json_values},
        optional={
            "choices": st.lists(
                st.fixed_dictionaries({"text": json_values, "label": st.sampled_from(["A", "B", 1])})
                | json_values,
                max_size=3,
            )
        },
    )
    | json_values,
    key=st.sampled_from(["A", "B", 1, None]),
)
def test_arc_fields_of_wrong_types(tmp_path, question, key):
    path = tmp_path / "ARC-Easy.jsonl"
    path.write_text(json.dumps({"id": "x", "question": question, "answerKey": key}))
    for problem in outcome(read_arc, path) or ():
        assert problem.prompt == f"Question: {question['stem']}\nAnswer:"
        assert all(isinstance(choice["text"], str) for choice in question["choices"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "\xff"}', "not UTF-8 text (invalid start byte at byte 10)"),
        ("{'text': 'é'}".encode("utf-16"), "not UTF-8"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair ('\\ud800')"),
        (b'{"other\\uDFFF": 1, "text": ""}', "half of a surrogate pair"),
        (b"[" * 200_000, "not JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"text": "a"} x', "not JSON (Extra data)"),
        (b'{"text": null}', "field 'text' is NoneType, not text"),
        (b'{"Text": "a"}', "no field 'text'"),
        (b'"text"', "no field 'text'"),
    ],
)
def test_errors_name_the_line(tmp_path, line, message):
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "good"}\n\n' + line + b"\n"))
    error = error_of(lambda: list(read_jsonl(path)))
    assert f"{path} line 3" in error
    assert message in error


def test_surrogate_pairs_are_text(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00 \\\\ud800"}')
    assert [row["text"] for _, row in json_lines(path, ("text",))] == ["😀 \\ud800"]


# ---- parquet


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_parquet_text_of_every_type(tmp_path, kind):
    strings = pyarrow.array([row["text"] for row in ROWS])
    column = strings.dictionary_encode() if kind == "dictionary" else strings.cast(getattr(pyarrow, kind)())
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"n": range(60), "body": column}), path, row_group_size=25)
    assert [text for text in (d.text for d in read_parquet(path, ("body",)))] == strings.to_pylist()
    rows = list(parquet_rows(path, ("body",)))
    assert [number for number, _ in rows] == list(range(1, 61))
    assert set(rows[0][1]) == {"body"}


def test_parquet_errors_name_the_row_or_the_column(tmp_path):
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b", None], "n": [1, 2, 3]}), path)
    assert f"{path} row 3: field 'text' is NoneType" in error_of(lambda: list(read_parquet(path)))
    assert "column 'n' is int64, not string" in error_of(lambda: list(read_parquet(path, ("n",))))
    assert "no column 'body', or several: it has text, n" in error_of(
        lambda: list(read_parquet(path, ("body",)))
    )
    column = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, pyarrow.array(["ab", "cd"]).buffers()[:2] + [pyarrow.py_buffer(b"ab\xff\xfe")]
    )
    parquet.write_table(pyarrow.table({"text": column}), path)
    assert f"{path} row 2: cannot be read ('utf-8'" in error_of(lambda: list(read_parquet(path)))
    assert "absent.parquet does not exist" in error_of(
        lambda: list(read_parquet(tmp_path / "absent.parquet"))
    )


def test_parquet_is_read_in_pieces(tmp_path):
    """A file of one row group: the peak of arrow's memory stays far below the size of the column."""
    path = tmp_path / "t.parquet"
    texts = [f"{i} {'x' * 5000}" for i in range(8000)]
    parquet.write_table(pyarrow.table({"text": texts}), path, compression="none", use_dictionary=False)
    pool = pyarrow.default_memory_pool()
    before = pool.bytes_allocated()
    peak = 0
    for _ in read_parquet(path):
        peak = max(peak, pool.bytes_allocated() - before)
    assert path.stat().st_size > 40_000_000
    assert peak < 10_000_000


# ---- archives


def tar_of(*members: tarfile.TarInfo, content: bytes = b"text\n") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member in members:
            member.size = len(content) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "evil",
    [
        member("/tmp/zeromodel-evil"),
        member("../evil"),
        member("a/../../evil"),
        member("link", tarfile.SYMTYPE, "/etc/passwd"),
        member("hard", tarfile.LNKTYPE, "good"),
        member("tty", tarfile.CHRTYPE),
        member("disk", tarfile.BLKTYPE),
        member("pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda info: info.name,
)
def test_members_that_are_no_plain_files_are_refused(tmp_path, evil):
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "t.tar.gz"
    path.write_bytes(gzip.compress(tar_of(member("folder", tarfile.DIRTYPE), member("good"), evil)))
    for read in (read_text, read_wiki, tar_members):
        error = error_of(lambda read=read: list(read(path)))
        assert str(path) in error
        assert repr(evil.name) in error or read is read_wiki  # which takes "good" for no record
    assert list(tar_members(path, lambda name: name == "good")) == [("good", b"text\n")]
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "t.tar.gz"]
    assert not Path("/tmp/zeromodel-evil").exists()


def test_sparse_members_are_refused(tmp_path):
    """One could claim 2^60 bytes of zeros."""
    info = member("holes")
    info.pax_headers = {"GNU.sparse.map": "0,5", "GNU.sparse.size": str(1 << 60)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info.size = 5
        archive.addfile(info, io.BytesIO(b"text\n"))
    path = tmp_path / "t.tar"
    path.write_bytes(buffer.getvalue())
    assert "member 'holes' is not a regular file" in error_of(lambda: list(tar_members(path)))


@fuzz
@given(data=st.data())
def test_headers_with_random_bytes(tmp_path, data):
    """Whatever a header says, with its checksum made right again: nothing else is touched."""
    folder = tmp_path / "in"
    folder.mkdir(exist_ok=True)
    good = tar_of(member("a"), member("b" * 120), member("c"))
    bad = bytearray(good)
    header = 512 * data.draw(st.sampled_from([0, 2, 4, 6, 8]))
    for index in data.draw(st.lists(st.integers(0, 511), min_size=1, max_size=12)):
        bad[header + index] = data.draw(st.integers(0, 255))
    total = 256 + sum(bad[header : header + 148]) + sum(bad[header + 156 : header + 512])
    bad[header + 148 : header + 156] = b"%06o\0 " % total
    path = folder / "t.tar"
    path.write_bytes(bad)
    outcome(tar_members, path)
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "t.tar"]
