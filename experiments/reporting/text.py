"""Sections of text, tables and pictures, written as Markdown and as one HTML page."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.reports.figures import png_tag
from eval.reports.html import html_table, page


@dataclass(frozen=True)
class Table:
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Picture:
    path: Path  # of the PNG
    description: str


@dataclass(frozen=True)
class Commands:
    lines: tuple[str, ...]


Block = str | Table | Picture | Commands  # text: paragraphs or a list, with `code` and **strong**


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list[Block] = field(default_factory=list)
    parts: list["Section"] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not self.blocks and all(part.empty for part in self.parts)


def to_markdown(title: str, opening: str, sections: Sequence[Section], folder: Path) -> str:
    """Pictures are linked from `folder`, where the text will lie."""
    lines = [f"# {title}", "", opening, ""]
    for section in sections:
        lines += _markdown(section, 2, folder)
    return "\n".join(lines).rstrip() + "\n"


def _markdown(section: Section, level: int, folder: Path) -> list[str]:
    if section.empty:
        return []
    lines = [f"{'#' * level} {section.title}", ""]
    for block in section.blocks:
        if isinstance(block, Table):
            lines += [_row(block.header), "|---" * len(block.header) + "|", *map(_row, block.rows)]
        elif isinstance(block, Picture):
            lines.append(f"![{block.description}]({block.path.relative_to(folder).as_posix()})")
        elif isinstance(block, Commands):
            lines += ["```bash", *block.lines, "```"]
        else:
            lines.append(block)
        lines.append("")
    for part in section.parts:
        lines += _markdown(part, level + 1, folder)
    return lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def to_page(title: str, opening: str, sections: Sequence[Section]) -> str:
    """One HTML page with its pictures inside."""
    return page(title, opening, [(section.title, _html(section)) for section in sections])


def _html(section: Section, level: int = 3) -> str:
    body = "".join(map(_html_block, section.blocks))
    for part in section.parts:
        if not part.empty:
            body += f"<h{level}>{html.escape(part.title)}</h{level}>{_html(part, level + 1)}"
    return body


def _html_block(block: Block) -> str:
    if isinstance(block, Table):
        return html_table(block.header, block.rows)
    if isinstance(block, Picture):
        return png_tag(block.path.read_bytes(), block.description)
    if isinstance(block, Commands):
        return f"<pre>{html.escape(chr(10).join(block.lines))}</pre>"
    if block.startswith("- "):
        return (
            "<ul>"
            + "".join(f"<li>{_inline(item)}</li>" for item in re.split(r"^- ", block, flags=re.M)[1:])
            + "</ul>"
        )
    return "".join(f"<p>{_inline(text)}</p>" for text in block.split("\n\n"))


def _inline(text: str) -> str:
    escaped = html.escape(" ".join(text.split()))
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", escaped)
