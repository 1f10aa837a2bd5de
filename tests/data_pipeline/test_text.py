import bz2
import gzip
import lzma
from collections.abc import Callable

import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources.text import read_text, read_wiki
from tests.data_pipeline.archives import tar


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_texts_published(data_root):
    shakespeare = data_root / "text" / "tinyshakespeare.txt"
    documents = list(read_text(shakespeare))
    assert all(len(d) >= 1990 for d in documents[:-1])
    assert " ".join(documents).split() == shakespeare.read_text().split()
    assert sum(1 for _ in read_text(data_root / "text" / "python-peps.tar.xz")) == 703
    articles = read_wiki(data_root / "text" / "enwiki2015-AA.tar.xz")
    first = next(articles)
    assert first.startswith("Anarchism\n\nAnarchism is a political philosophy")
    assert "<doc" not in first
    assert "</doc>" not in first


def test_damaged_archives_are_refused_and_nothing_is_written(tmp_path):
    text = "<doc id=1>\nT\n\nx < y\n</doc>\n<doc id=2>\nU\n</doc>\n"
    path = tar(tmp_path / "w.tar.xz", {"a/x": text, "b..": text}, lzma.compress)
    assert list(read_wiki(path)) == ["T\n\nx < y", "U"] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.tar.xz"]
    data = path.read_bytes()
    for bad in (data[:-30], data[: len(data) // 2], data[:20] + b"\0\xff" + data[22:], b"x" * 600):
        path.write_bytes(bad)
        for reader in (read_wiki, read_text):
            assert "w.tar.xz is not a whole tar" in error_of(lambda reader=reader: list(reader(path)))


COMPRESS = {"tar": bytes, "tar.xz": lzma.compress, "tar.gz": gzip.compress, "tar.bz2": bz2.compress}
MEMBERS = {"a": "x" * 900, "b": "y", "empty": "", "c": "z" * 513}
HEADERS = (0, 1536, 2560, 3072)  # of the members in the plain tar
END = 4608  # of the last member's padded content in the plain tar; two blocks of zeros follow


@pytest.mark.parametrize("suffix", COMPRESS)
def test_archives_cut_anywhere_are_refused(tmp_path, suffix):
    path = tar(tmp_path / f"t.{suffix}", MEMBERS, COMPRESS[suffix])
    data = path.read_bytes()
    assert list(read_text(path)) == ["x" * 900, "y", "z" * 513]
    for cut in range(0, END + 512, 64) if suffix == "tar" else range(0, len(data), 5):
        path.write_bytes(data[:cut])
        assert f"t.{suffix} is not a whole tar" in error_of(lambda: list(read_text(path)))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_archives_with_a_damaged_byte_lose_nothing_in_silence(tmp_path, suffix):
    """Any byte of a compressed archive, any header of a plain one (its contents have no checksum)."""

    def read() -> list[str] | None:
        try:
            return list(read_text(path))
        except DataError:
            return None

    path = tar(tmp_path / f"t.{suffix}", MEMBERS, COMPRESS[suffix])
    data = path.read_bytes()
    documents = read()
    results = []
    for place in HEADERS if suffix == "tar" else range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        results.append(read())
    assert all(result in (None, documents) for result in results)  # gzip's header has bytes without a meaning
    assert results.count(None) > 0.9 * len(results)


@pytest.mark.parametrize("text", ["stray\n<doc>\nT\n</doc>\n", "<doc id=1>\nT\n", "</doc>\n"])
def test_wiki_records_must_be_whole(tmp_path, text):
    path = tar(tmp_path / "w.tar.xz", {"wiki_00": text}, lzma.compress)
    assert "wiki_00" in error_of(lambda: list(read_wiki(path)))


def test_text_is_cut_at_blank_lines(tmp_path):
    path = tmp_path / "t.txt"
    paragraph = "word " * 150 + "\n"
    path.write_text("\n\n".join([paragraph] * 10) + "\n\n  \n")
    documents = list(read_text(path))
    assert [d.count("word") for d in documents] == [450, 450, 450, 150]
    path.write_text("no blank line at all " * 1000)
    assert len(list(read_text(path))) == 1
    path = tar(tmp_path / "t.tar.xz", {"a": "one", "empty": " \n", "b": "two\n"}, lzma.compress)
    assert list(read_text(path)) == ["one", "two"]
    path = tar(tmp_path / "t.tar.xz", {"a": b"\xff"}, lzma.compress)
    assert "t.tar.xz:a is not UTF-8" in error_of(lambda: list(read_text(path)))
