"""Reports as Markdown and as pages: what a reader sees; quoted text never becomes markup."""

from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from markdown_it import MarkdownIt

from common.pages import Code, Note, Picture, Section, Table, plain, to_markdown, to_page

from ..browser import needs_browser, shows

UGLY = r"<script>alert(1)</script> **a** `b` [c](d) x_1_ *e* \ # & | ~f~ !g"


class Seen(HTMLParser):
    """The text a reader sees, by the innermost tag it is in, and the pictures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "br", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag  # well formed

    def handle_data(self, data: str) -> None:
        if data.strip() and "style" not in self.open:
            self.texts.append((self.open[-1], data))

    @property
    def text(self) -> str:
        return "".join(data for _, data in self.texts)

    def of(self, tag: str) -> list[str]:
        return [data for inner, data in self.texts if inner == tag]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "pictures" / "one.png"
    path.parent.mkdir()
    matplotlib.image.imsave(path, np.random.default_rng(0).random((8, 8, 3)))
    return path


def sections(picture: Path) -> list[Section]:
    return [
        Section(
            "Claims (`equal`)",
            [
                "Over all tasks: **undecided**.\n\n- one `a`\n- two",
                Table(("`key`", "**effect**"), [("`p_hop/small`", "0.3 ± 0.1"), (plain(UGLY), "a|b")]),
            ],
            [Section("Part", [Picture(picture, "a picture"), Code("x <y> `z`", "bash")])],
        ),
        Section("Empty", parts=[Section("Empty too")]),
        Section("Notes", [Note("gone", missing=True), Code("a: 1", "yaml", title="Resolved **config**")]),
    ]


def test_a_page_shows_markdown_rendered_everywhere(picture):
    seen = Seen(to_page("A **bold** title", "Written by `report.py`.", sections(picture)))
    assert not seen.open
    assert "**" not in seen.text.replace(UGLY, "")
    assert "`" not in seen.text.replace(UGLY, "").replace("x <y> `z`", "")
    assert {"undecided", "effect", "config"} <= set(seen.of("strong"))
    assert {"equal", "key", "p_hop/small", "report.py"} <= set(seen.of("code"))
    assert seen.of("title") == ["A bold title"]
    assert [tag for tag in seen.tags if tag in ("h1", "h2", "h3")] == ["h1", "h2", "h3", "h2"]
    assert "Empty" not in seen.text
    assert seen.of("li")[:1] == ["one "]
    assert "0.3\xa0±\xa00.1" in seen.of("td")


def test_quoted_text_stays_text(picture):
    seen = Seen(to_page(plain(UGLY), plain(UGLY), sections(picture)))
    assert "script" not in seen.tags
    for tag in ("h1", "p", "td"):
        assert UGLY in "".join(seen.of(tag))
    assert "x <y> `z`" in seen.of("pre")


def test_a_markdown_parser_reads_the_same_from_the_markdown(picture, tmp_path):
    text = to_markdown("Title", "Opening.", sections(picture), tmp_path)
    assert "![a picture](pictures/one.png)" in text
    assert "\n```bash\nx <y> `z`\n```\n" in text
    assert "Empty" not in text
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    seen = Seen(html)
    assert "a|b" in seen.of("td")
    assert UGLY in "".join(seen.of("td"))
    assert seen.tags.count("td") == 4


def test_a_page_is_self_contained(picture):
    page = to_page("Title", "", sections(picture))
    assert page.count("src=") == page.count('src="data:image/png;base64,') == 1
    assert "http" not in page
    assert "@import" not in page


@needs_browser
def test_a_browser_shows_the_page(picture, tmp_path):
    shows(to_page("A **bold** title", "Opening.", sections(picture)), tmp_path)
