"""What the report's pages are made of: tables, notes, the frame."""

import html
from collections.abc import Sequence

from eval.scoring.core import Score

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a202c }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { border-bottom: 1px solid #e2e8f0; margin-top: 2.2rem }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0; display: block; overflow-x: auto }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #e2e8f0; text-align: left } th { background: #f7fafc }
td { font-variant-numeric: tabular-nums; max-width: 24rem }
img { max-width: 100% } pre { background: #f7fafc; padding: .6rem; overflow-x: auto; white-space: pre-wrap }
.missing { color: #975a16; background: #fffff0; border-left: 4px solid #ecc94b; padding: .3rem .8rem }
.right { border-left: 4px solid #38a169 } .wrong { border-left: 4px solid #e53e3e }
.note { color: #718096; font-size: .9rem }
"""


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page; a section is a heading and its HTML, and is left out if that is empty."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{text}" for heading, text in sections if text)
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    opening = f"<h1>{html.escape(title)}</h1><p class='note'>{html.escape(subtitle)}</p>"
    return f"<!DOCTYPE html><html lang='en'><head>{head}</head><body>{opening}{body}</body></html>\n"


def missing(text: str) -> str:
    return f"<p class='missing'>{html.escape(text)}</p>"


def note(text: str) -> str:
    return f"<p class='note'>{html.escape(text)}</p>"


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        whole = (html.escape(cell).replace(" ± ", "&nbsp;±&nbsp;") for cell in cells)  # a score is not broken
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in whole) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def show(score: Score | None, form: str = ".3f") -> str:
    """`0.345 ± 0.012`; a dash for no score."""
    if score is None:
        return "–"
    return format(score.value, form) + ("" if score.stderr is None else f" ± {score.stderr:{form}}")
