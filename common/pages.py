"""Reports as sections of text, tables and pictures, written as Markdown or as one self-contained HTML page.

All text is Markdown; titles and table cells are inline Markdown. HTML in it is shown as text, never
interpreted. `plain` escapes foreign text, such as file names and error messages.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

_MARKDOWN = MarkdownIt("commonmark", {"html": False})
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#!|&~])")


@dataclass(frozen=True)
class Table:
    """Cells are inline Markdown."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Picture:
    """A PNG: a file, which Markdown links to, or its bytes, for HTML pages only."""

    image: Path | bytes
    description: str


@dataclass(frozen=True)
class Code:
    """Preformatted text; a page folds it under its `title` if it has one.

    `kind`: the language, or `right` or `wrong` for an answer.
    """

    text: str
    kind: str = ""
    title: str = ""


@dataclass(frozen=True)
class Note:
    """A remark on the block above; `missing` marks a remark about absent data."""

    text: str
    missing: bool = False


Block = str | Table | Picture | Code | Note  # str: paragraphs or a list


@dataclass(frozen=True)
class Section:
    """A heading, its blocks and its subsections; an empty section is left out."""

    title: str
    blocks: list[Block] = field(default_factory=list)
    parts: list["Section"] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not self.blocks and all(part.empty for part in self.parts)


def printable(text: str) -> str:
    """`text` in one line that terminals, pages and fonts can show: without control characters."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def plain(text: str) -> str:
    """Inline Markdown that shows `text` as it is, in one line."""
    return _SPECIAL.sub(r"\\\1", printable(text))


def to_markdown(title: str, opening: str, sections: Sequence[Section], folder: Path) -> str:
    """The text of a Markdown file in `folder`; its links to pictures are relative to that folder."""
    lines = [f"# {title}", "", opening, ""]
    for section in sections:
        lines += _markdown(section, 2, folder)
    return "\n".join(lines).rstrip() + "\n"


def _markdown(section: Section, level: int, folder: Path) -> list[str]:
    if section.empty:
        return []
    lines = [f"{'#' * level} {section.title}", ""]
    for block in section.blocks:
        lines += [*_markdown_block(block, folder), ""]
    for part in section.parts:
        lines += _markdown(part, level + 1, folder)
    return lines


def _markdown_block(block: Block, folder: Path) -> list[str]:
    if isinstance(block, Table):
        return table_lines(block)
    if isinstance(block, Picture):
        assert isinstance(block.image, Path)
        return [f"![{plain(block.description)}]({quote(block.image.relative_to(folder).as_posix())})"]
    if isinstance(block, Code):
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
        return [f"{fence}{block.kind}", *block.text.split("\n"), fence]
    return [block.text if isinstance(block, Note) else block]


def table_lines(table: Table) -> list[str]:
    """A table in Markdown."""
    return [_row(table.header), "|---" * len(table.header) + "|", *map(_row, table.rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in cells) + " |"


def to_page(title: str, opening: str, sections: Sequence[Section]) -> str:
    """One HTML page with its pictures embedded."""
    return _PAGE.render(title=title, opening=opening, sections=[s for s in sections if not s.empty])


def _paragraphs(text: str) -> Markup:
    return Markup(_MARKDOWN.render(text))


def _inline(text: str) -> Markup:
    """A score such as `0.3 ± 0.1` does not break across lines."""
    return Markup(_MARKDOWN.renderInline(text).replace(" ± ", "&nbsp;±&nbsp;"))


def _text_of(text: str) -> str:
    """Inline Markdown without its markup, for the window's title."""
    return Markup(_MARKDOWN.renderInline(text)).striptags()


def _data_url(image: Path | bytes) -> str:
    png = image.read_bytes() if isinstance(image, Path) else image
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _kind(block: Block) -> str:
    return "Text" if isinstance(block, str) else type(block).__name__


_ENVIRONMENT = Environment(loader=PackageLoader("common"), autoescape=True, undefined=StrictUndefined)
_ENVIRONMENT.trim_blocks = _ENVIRONMENT.lstrip_blocks = True
_ENVIRONMENT.filters |= {
    "paragraphs": _paragraphs,
    "inline": _inline,
    "text_of": _text_of,
    "data_url": _data_url,
    "kind": _kind,
}
_PAGE = _ENVIRONMENT.get_template("page.html")
