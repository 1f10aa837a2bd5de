"""eval/report.py over damaged and hostile runs: a page or one line, no markup of a stranger, no half file."""

import copy
import errno
import json
import os
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.text
import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from common import files
from common import result_files as report_files
from common.locks import FolderInUseError, FolderLock
from common.pages import Code, Picture, Section, Table, plain, to_markdown
from common.result_files import new_results_file, results_files, samples_file, written_now
from eval import report
from eval.reports import scores as report_scores
from eval.reports import thoughts as report_thoughts
from eval.reports.comparisons import label_of
from eval.reports.runs import read_runs
from model import ModelConfig

from ..eval.test_report import metrics_lines
from ..eval.test_report_runs import babi, entry, results_file
from ..eval.test_report_thoughts import COT, OWN, write_results
from .mutations import byte_mutations, config_mutations, paths

FAST_OR_ALL = [pytest.param(10, id="fast"), pytest.param(150, id="all", marks=pytest.mark.slow)]
EVIL = (
    "<script>x</script>[l](javascript:alert)![i](http://e.x/i.png)<http://e.x>"
    "&amp;&#60;b&#62;`c`*e*|$x^$_\n# h"
)
LEVELS = [f"causal_loop_level{n}" for n in (1, 2)]


def scores() -> dict[str, Any]:
    """A results file with every kind of section."""
    both = {"exact_match,trace": 0.5, "exact_match,direct": 0.25}
    guesses = {"chance": 0.1, "majority": 0.2, "one_step": 0.15}
    entries = [
        entry("causal_loop", 0, metrics=both, parts=LEVELS, guesses=guesses),
        *(entry(name, 0, metrics=both, guesses=guesses) for name in LEVELS),
        entry("arc_easy", 0.31, suffix="@num_steps=1", num_steps=1, mean_steps=1.0),
        entry("arc_easy", 0.42, mean_steps=2.0),
        entry("arc_easy", 0.5, suffix="@shots=2", shots=2),
        entry("gsm8k", 0.1, samples=4, metrics={"acc,none": 0.1, "exact_match,maj@4": 0.2}),
        *babi([0.97] * 20),
    ]
    return results_file(entries)


def sample(right: float) -> dict[str, Any]:
    texts = {"prompt": "A=3?A\n", "resps": {"trace": "Answer: 3", "direct": " 3"}}
    return {"doc_id": "1", "level": 1, "answer": 3, "exact_match,trace": right, **texts}


def write_run(folder: Path, found: dict[str, Any], metrics: list[dict[str, Any]]) -> Path:
    (folder / "eval").mkdir(parents=True)
    (folder / "export").mkdir()
    config = {"vocab_size": 300, "use_moe": False, "recurrence": {"placement": "block", "num_steps": 2}}
    (folder / "export" / "config.json").write_text(json.dumps(ModelConfig.from_dict(config).to_dict()))
    (folder / "config.yaml").write_text("max_steps: 3\ndata:\n  seed: 7\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    path = folder / "eval" / "results_2026-01-01T00-00-00.000000.json"
    path.write_text(json.dumps(found))
    lines = "".join(json.dumps(sample(right)) + "\n" for right in (1.0, 0.0))
    samples_file(path, "causal_loop").write_text(lines)
    return folder


def metrics() -> list[dict[str, Any]]:
    evaluation = {"step": 3, "tokens": 3000, "eval": {"arc_easy": {"acc,none": 0.3, "acc_stderr,none": 0.1}}}
    return [*metrics_lines(3), evaluation, {"step": 3, "eval_failed": "no room"}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("whole") / "run", scores(), metrics())
    write_results(run, {OWN: [0.5, 1.0, 0.25], COT: [0.9, 1.0, 0.8]}, 9)
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


class Page(HTMLParser):
    """What a browser would make of a page; raises AssertionError for an address that is not in the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags = set[str]()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, attrs)
            if name in ("src", "href", "srcset", "data", "action", "style"):
                assert name == "src", (tag, attrs)
                assert str(value).startswith("data:image/png;base64,")

    def handle_data(self, data: str) -> None:
        self.text += data


def page_or_line(*paths: Path) -> Page | None:
    """The page about these runs; None if they were refused in one line. Raises anything else."""
    try:
        runs, _ = read_runs(paths)
        page = report.build_page(runs)
    except (ValueError, OSError) as error:
        line = str(error)
    else:
        found = Page(page)
        assert not found.tags & {"script", "a", "iframe", "link", "object", "form", "base"}
        return found
    assert "\n" not in line
    assert paths[0].name in line  # of the file
    return None


# ---- wrong types and damage


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not drawn, which takes most of a page's time."""
    for module in (report, report_scores, report_thoughts):
        monkeypatch.setattr(module, "picture", lambda figure, description: Picture(b"", description))


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch, undrawn: None) -> None:
    """Only the text of a page is looked at."""
    for module in (report, report_scores, report_thoughts):
        for name in dir(module):
            if name.endswith("_figure"):
                monkeypatch.setattr(module, name, lambda *arguments, **options: Figure())


@pytest.mark.parametrize("count", FAST_OR_ALL)
@pytest.mark.parametrize("name", ["results", "thoughts", "metrics", "samples"])
def test_wrong_types_are_a_page_or_one_line(run, undrawn, name, count):
    """Of metrics and samples always a page: the line is named and the others are used."""
    path, values = {
        "results": (next((run / "eval").glob("results_2026*")), None),
        "thoughts": (run / "eval" / "results_9.json", None),
        "metrics": (run / "metrics.jsonl", metrics()),
        "samples": (next((run / "eval").glob("samples_*")), [sample(1.0), sample(0.0)]),
    }[name]
    before = path.read_bytes()
    for what, mutated in config_mutations(values_of(path, values), count, seed=1):
        lines = mutated.get("lines")
        if values is not None and not isinstance(lines, list):
            continue  # the list of lines itself, which no file holds
        text = json.dumps(mutated) if values is None else "".join(json.dumps(line) + "\n" for line in lines)
        path.write_text(text)
        try:
            page = page_or_line(run)
        except Exception as error:
            raise AssertionError(f"{name}: {what}") from error
        assert page is not None or values is None, what
    path.write_bytes(before)


def values_of(path: Path, lines: list[Any] | None) -> dict[str, Any]:
    return json.loads(path.read_text()) if lines is None else {"lines": lines}


@pytest.mark.parametrize("count", FAST_OR_ALL)
def test_damaged_bytes_are_a_page_or_one_line(run, undrawn, count):
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        before = path.read_bytes()
        for what, damaged in byte_mutations(before, count // 6, seed=2):
            path.write_bytes(damaged)
            try:
                page_or_line(run)
            except Exception as error:
                raise AssertionError(f"{path.name}: {what}") from error
        path.write_bytes(before)


def test_damaged_lines_are_named_and_the_rest_is_used(run, without_figures):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    wrong = [b'{"step": "x"}\n', b'{"step": 2, "loss": NaN}\n', b"\x00\xff\n", b"[" * 100_000 + b"\n"]
    (run / "metrics.jsonl").write_bytes(b"".join([lines[0], *wrong, *lines[1:], b'{"step": 4, "lo']))
    page = page_or_line(run)
    assert page is not None
    for number in range(2, 6):
        assert f"metrics.jsonl line {number}" in page.text
    assert "steps done" in page.text
    assert (run / "metrics.jsonl").read_bytes().count(b"\n") == len(lines) + len(wrong)  # it only reads


# ---- foreign text


def strings(values: Any) -> Iterator[tuple[str | int, ...]]:
    """Where text lies."""
    for place in paths(values):
        found = values
        for key in place:
            found = found[key]
        if isinstance(found, str):
            yield place


def test_no_text_of_a_run_becomes_markup(tmp_path, without_figures):
    """Every text, and keys of tables, become hostile, one after another; what is shown is shown as it is."""
    shown = 0
    found, lines = scores(), metrics()
    mutants: list[tuple[dict[str, Any], list[dict[str, Any]], str]] = []
    for place in strings(found):
        mutated = copy.deepcopy(found)
        holder = mutated
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = EVIL
        mutants.append((mutated, lines, EVIL))
    renamed = json.loads(json.dumps(found).replace('"arc_easy', json.dumps(EVIL)[:-1]))
    guess = json.loads(json.dumps(found).replace('"majority"', json.dumps(EVIL)))
    failed = [*lines[:-1], {"step": 3, "eval_failed": EVIL}, {"step": EVIL}]
    task = [*lines, {"step": 3, "eval": {EVIL: {"acc,none": 0.5}}}]
    mutants += [(renamed, lines, EVIL), (guess, lines, EVIL), (found, failed, EVIL), (found, task, EVIL)]
    for number, (one, own_lines, _) in enumerate(mutants):
        folder = write_run(tmp_path / f"{number} <b>$x$ [l](javascript:x) `c`", one, own_lines)
        page = page_or_line(folder)
        if page is not None:
            assert "<b>$x$ [l](javascript:x) `c`" in page.text
            shown += "<script>x</script>[l](javascript:alert)" in page.text
    assert shown >= 4


def test_samples_and_config_are_shown_as_text(run, without_figures):
    (run / "config.yaml").write_bytes(b"max_steps: </details><script>x</script>\nseed: [l](http://e.x)\xff\n")
    path = next((run / "eval").glob("samples_*"))
    line = sample(1.0) | {"prompt": EVIL + "\ud800</pre><script>", "resps": {"trace": EVIL}}
    path.write_text(json.dumps(line) + "\n")
    page = page_or_line(run)
    assert page is not None
    assert page.text.count(EVIL) == 2
    report.write_page(run / "page.html", report.build_page(read_runs([run])[0]))
    assert "</script>" not in (run / "page.html").read_text()


def test_markdown_holds_foreign_text_as_text(tmp_path):
    code = Section("S", [Code("```\n<script>\n````\n# h", "yaml"), Table(("a",), [(plain(EVIL),)])])
    picture = Section("P", [Picture(tmp_path / "a ) b.png", "x](javascript:alert)![")])
    text = to_markdown("T", "o", [code, picture], tmp_path)
    parser = MarkdownIt("commonmark").enable("table")
    page = parser.render(text)
    assert "<script>" not in page
    assert page.count("<h1>") == 1
    assert 'href="' not in page
    assert page.count("<img") == 1
    assert page.count("<tr>") == 2


@pytest.mark.parametrize("name", ["a$b$c $\\frac$", "_hidden\nb\x1b[31m 東京 é [x]{y} %s", b"\xff\xfe"])
def test_names_of_runs_do_not_break_figures(tmp_path, name):
    """Drawn: a formula that matplotlib cannot read fails only then."""
    found = results_file([entry("arc_easy", 0.3), entry("logiqa", 0.3)])
    folders = [write_run(tmp_path / (os.fsdecode(name) + end), found, metrics()) for end in ("", "2")]
    runs, _ = read_runs(folders)
    page = report.build_page(runs)
    assert Page(page).tags >= {"img", "table"}
    report.write_page(tmp_path / "page.html", page)


def test_a_name_in_a_legend_is_no_formula_and_not_hidden():
    for name in ("$x$", "a\\$b$", "_x"):
        text = matplotlib.text.Text(0, 0, label_of(name))
        assert text._preprocess_math(text.get_text())[1] is False
        assert not text.get_text().startswith("_")


def test_runs_whose_names_are_long_or_equal_have_legends_of_their_own(tmp_path):
    names = ["a", "a (2)", *(f"{'x' * 40}{n}" for n in range(3))]
    folders = [
        write_run(tmp_path / str(n) / name, scores(), metrics()) for n, name in enumerate(["a", *names])
    ]
    runs, _ = read_runs(folders)
    assert len({run.name for run in runs}) == len({run.label for run in runs}) == len(folders)


# ---- one order, one writer, whole files


def test_results_are_ordered_by_what_they_hold(tmp_path):
    newest = tmp_path / "results_2020-01-01T00-00-00.000000.json"  # the clock was set back
    older = tmp_path / "results_2026-01-01T00-00-00.000000.json"
    (tmp_path / "results_2027-01-01T00-00-00.000000.json").write_text("{}")  # of a version without numbers
    assert written_now(tmp_path)["number"] == 1
    for path in (older, newest):
        path.write_text(json.dumps({"written": written_now(tmp_path)}))
    assert results_files(tmp_path)[1:] == [older, newest]
    same = {"number": 2, "at": "2026-01-01T12:00:00+02:00"}
    newest.write_text(json.dumps({"written": {**same, "at": "2026-01-01T11:00:00+00:00"}}))  # later in UTC
    older.write_text(json.dumps({"written": same}))
    assert results_files(tmp_path)[-1] == newest
    for damaged in ("[]", "{", '{"written": 3}', '{"written": {"number": "x", "at": 5}}', "[" * 10**5):
        older.write_text(damaged)
        assert results_files(tmp_path)[-1] == newest


def test_no_two_processes_get_one_results_file(tmp_path, monkeypatch):
    class Clock(report_files.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 1)

    monkeypatch.setattr(report_files, "datetime", Clock)
    first = new_results_file(tmp_path)
    second = new_results_file(tmp_path)  # while the first is being written
    first.with_name(f"{first.name}.tmp").rename(first)
    third = new_results_file(tmp_path)
    assert len({first, second, third}) == 3


def test_a_page_has_one_writer_and_is_whole_or_as_it_was(run, tmp_path, monkeypatch):
    out = tmp_path / "page.html"
    report.write_page(out, "before")
    with FolderLock(tmp_path, "eval/report.py", "x", name=".page.html.lock"), pytest.raises(FolderInUseError):
        report.write_page(out, "other")
    assert out.read_text() == "before"

    def full(path: Path, data: bytes) -> None:
        with files.replacing(path) as temporary:
            temporary.write_bytes(data[:3])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "write_file", full)
    with pytest.raises(OSError, match="No space left on device .* bytes free"):
        report.write_page(out, "after")
    assert out.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]
    with pytest.raises(ValueError, match="is not a file"):
        report.write_page(Path(os.devnull), "x")
    (tmp_path / "link.html").symlink_to(out)
    monkeypatch.undo()
    report.write_page(tmp_path / "link.html", "linked")
    assert out.read_text() == "linked"
