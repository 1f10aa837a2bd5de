"""Readers of text files, plain or in an archive, and of rows with text fields; texts are left as they are."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.sources.documents import Document
from data_pipeline.sources.files import decode, json_lines, parquet_rows, tar_members, text_fields, text_lines

MIN_TEXT_DOCUMENT = (
    2000  # characters; a plain text file is cut at blank lines into documents of at least this
)


def read_wiki(path: Path) -> Iterator[str]:
    """Article texts, the title first, of a tar.xz of `<doc id url title> ... </doc>` records."""
    for name, data in tar_members(path):
        article: list[str] | None = None
        for number, line in enumerate(decode(data, f"{path}:{name}").split("\n"), start=1):
            if line.startswith("<doc ") and article is None:
                article = []
            elif line == "</doc>" and article is not None:
                yield "\n".join(article).strip()
                article = None
            elif article is not None:
                article.append(line)
            elif line.strip():
                raise DataError(f"{path}:{name} line {number}: text outside <doc> records: download it again")
        if article is not None:
            raise DataError(f"{path}:{name} ends inside a <doc> record: download it again")


def read_text(path: Path) -> Iterator[str]:
    """Documents of a text file, or of a tar of text files (one document per file), compressed or not.

    A single file is cut at blank lines into documents of at least MIN_TEXT_DOCUMENT characters (the last may
    be shorter). White space at the ends of a document is dropped, empty documents are skipped.
    """
    if re.search(r"\.tar(\.\w+)?$|\.tgz$", Path(path).name):
        for name, data in tar_members(path):
            if text := decode(data, f"{path}:{name}").strip():
                yield text
        return
    document: list[str] = []
    size = 0
    for line in text_lines(path):
        if not line.strip() and size >= MIN_TEXT_DOCUMENT:
            yield "".join(document).strip()
            document, size = [], 0
        document.append(line)
        size += len(line)
    if text := "".join(document).strip():
        yield text


def read_jsonl(path: Path, fields: Sequence[str] = ("text",)) -> Iterator[Document]:
    """One document per line of a JSON lines file, compressed or not.

    `fields` are the names of one text, or of a prompt and its completion, all of them strings.
    """
    return _rows(json_lines, path, fields, "line")


def read_parquet(path: Path, fields: Sequence[str] = ("text",)) -> Iterator[Document]:
    """One document per row of a parquet file; `fields` as in `read_jsonl`."""
    return _rows(parquet_rows, path, fields, "row")


def _rows(read: Callable[..., Any], path: Path, fields: Sequence[str], unit: str) -> Iterator[Document]:
    for number, row in read(path, fields):
        *prompt, completion = text_fields(row, fields, f"{path} {unit} {number}")
        yield Document(prompt[0] if prompt else "", completion)
