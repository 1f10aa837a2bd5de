import json
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.cleaning.quality import RULES, QualityLimits, _Text, first_failure
from data_pipeline.cleaning.report import EXAMPLES, CleaningReport, Removed
from data_pipeline.errors import DataError
from data_pipeline.recipe import CleaningRecipe, structured
from data_pipeline.sources.text import read_text, read_wiki

LIMITS = QualityLimits()


def prose(words: int, seed: int = 0) -> str:
    """Lines of ten words, a sixth of them stop words: from 50 words on it keeps every rule."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    text = ["".join(rng.choices(letters, k=rng.randint(4, 7))) for _ in range(words)]
    text[::6] = [rng.choice(["the", "of", "and", "that", "with"]) for _ in text[::6]]
    return "\n".join(" ".join(text[i : i + 10]) for i in range(0, words, 10))


def lines(count: int, make: str) -> str:
    """`count` lines of prose, each put into `make`."""
    return "\n".join(make.format(line) for line in prose(10 * count).split("\n"))


def only(rule: str) -> QualityLimits:
    """The default limit of this rule, all others off."""
    off = {r.limit: 0 if r.limit.startswith("min_") else 10**9 for r in RULES if r.limit != rule}
    return replace(LIMITS, **off)


LINE = prose(10, seed=1)
# Rule -> (a text that breaks it, one just inside its limit).
AT_THE_LIMIT = {
    "min_words": (prose(49), prose(50)),
    "max_words": ("of " * 1_000_001, "of " * 1_000_000),
    "min_mean_word_length": ("of a tool " * 20, "of the tool " * 20),
    "max_mean_word_length": ("elevenchars", "ten" + "x" * 7),
    "max_lorem_ipsum": (prose(60) + " Lorem ipsum dolor", prose(60) + " lorem dolor"),
    "min_stop_words": ("the cat, the hat, The bat", "the cat and the hat"),
    "max_symbols_per_word": ("word " * 16 + "#1 ...", "word " * 18 + "#1 wait…"),
    "min_alphabetic_words": ("one two three 4 +", "one two three f0ur 5"),
    "max_bullet_lines": (lines(10, "- {}"), lines(9, "• {}") + "\n" + LINE),
    "max_ellipsis_lines": (lines(4, "{}...") + "\n" + prose(60, 3), lines(3, "{} …") + "\n" + prose(70, 3)),
    "max_short_lines": (f"{'x' * 29}\n\n{'y' * 30}\nz\nw", f"{'x' * 29}\n{'y' * 30}\n{'z' * 30}\nw"),
    "max_duplicate_lines": ("a\n\na\n a", "a\na\nb\n b "),
    "max_duplicate_line_characters": ("abcd\nabcd\nefghijk", "abc\nabc\ndefghijklm"),
    "max_duplicate_paragraphs": ("a\n\na\n \nb", "a\n\nb\nb\n\nc"),
    "max_duplicate_paragraph_characters": ("ab\nab\n\nab\nab\n\nefghijk", "abc\n\nabc\n\ndefghijklm"),
}  # fmt: skip


@pytest.mark.parametrize("rule", AT_THE_LIMIT)
def test_rule_at_its_limit(rule):
    breaks, keeps = AT_THE_LIMIT[rule]
    assert first_failure(breaks, only(rule)) == rule
    assert first_failure(keeps, only(rule)) is None


def test_every_rule_is_tested_and_sourced():
    names = {rule.limit for rule in RULES}
    assert names - set(AT_THE_LIMIT) == {
        n for n in names if re.fullmatch(r"max_(top|duplicate)_\d+grams?", n)
    }
    assert {rule.source for rule in RULES} == {"Gopher", "C4", "FineWeb"}
    assert len({rule.formula for rule in RULES if "words" not in rule.limit}) > 12


def repetition(words: list[str], n: int) -> tuple[float, float]:
    """The shares of characters of _Text.repeats, with a Counter and word by word."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    total = max(1, sum(map(len, words)))
    top = max((count * sum(map(len, gram)) for gram, count in Counter(grams).items() if count > 1), default=0)
    inside = {i + k for i, gram in enumerate(grams) if gram in grams[:i] for k in range(n)}
    return top / total, sum(len(words[i]) for i in inside) / total


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["a", "bb", "ccc", "é", "\ud800", "字字"]), max_size=60))
def test_repeated_ngrams_equal_their_definition(words):
    repeats = _Text(" ".join(words)).repeats
    assert repeats == {n: pytest.approx(repetition(words, n)) for n in range(2, 11)}


@pytest.mark.parametrize("n", range(2, 11))
def test_repeated_ngrams_break_their_rule(n):
    rule = f"max_top_{n}gram" if n < 5 else f"max_duplicate_{n}grams"
    phrase = " ".join(prose(n, seed=7).split())
    text = " ".join(f"{a} {b} {c} {phrase}" for a, b, c in zip(*[iter(prose(60).split())] * 3, strict=True))
    assert first_failure(text, only(rule)) == rule
    assert first_failure(prose(60), only(rule)) is None
    assert first_failure(text, replace(only(rule), **{rule: 10})) is None


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters()))
def test_any_text_is_judged(text):
    assert first_failure(text, LIMITS) == "min_words"  # hypothesis makes no text of 50 words
    assert first_failure(text, replace(LIMITS, min_words=0)) in {None, *(rule.limit for rule in RULES)}


def test_junk_goes():
    menu = "\n".join(f"Article{i} | Price: {i * 7} | Order now" for i in range(40))
    template = "#if: \n #switch: \n }}{{\n" * 100
    assert first_failure(menu, LIMITS) == "min_stop_words"
    assert first_failure(template, LIMITS) is not None
    assert first_failure("The end of the affair. " * 50, LIMITS) is not None


# Source -> (how many documents are judged, highest share of bytes that may go). Measured on whole files:
# Wikipedia 0.9%, PEPs 1.9%, tinyshakespeare 0.2%, LitBank 0.
GOOD = {
    "enwiki2015-AA.tar.xz": (500, 0.02),
    "python-peps.tar.xz": (200, 0.04),
    "tinyshakespeare.txt": (500, 0.005),
    "litbank-original.tar.xz": (4, 0.0),
}


@pytest.mark.parametrize("file", GOOD)
def test_good_text_stays(data_root, file):
    count, most = GOOD[file]
    read = read_wiki if "wiki" in file else read_text
    texts = list(islice(read(data_root / "text" / file), count))
    gone = sum(len(text.encode()) for text in texts if first_failure(text, LIMITS))
    assert gone <= most * sum(len(text.encode()) for text in texts)


# ---- the recipe section


def test_recipe_section():
    recipe = structured(CleaningRecipe, {"quality": {"min_words": 5}, "near_threshold": 0.9}, "cleaning")
    assert recipe == CleaningRecipe(near_threshold=0.9, quality=QualityLimits(min_words=5))
    assert structured(CleaningRecipe, {}, "cleaning") == CleaningRecipe()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"near_threshold": 1.5}, "near_threshold 1.5 is not in"),
        ({"near_threshold": 0.1}, "near_threshold 0.1 is not in"),
        ({"ngram_words": 3}, "ngram_words 3 is below 8"),
        ({"quality": {"min_word": 3}}, "min_word"),
        ({"quality": {"min_words": "many"}}, "many"),
    ],
)
def test_wrong_recipe_section(values, named):
    with pytest.raises(DataError, match=named) as error:
        structured(CleaningRecipe, values, "cleaning")
    assert "\n" not in str(error.value)


# ---- the report

WEB = Removed("web", "quality", "min_words")
COPY = Removed("web", "near", "duplicate")


def report_of(events: list[tuple[Removed, str]]) -> CleaningReport:
    report = CleaningReport()
    for removed, text in events:
        size = len(text.encode("utf-8", "surrogatepass"))
        report.read(removed.source, 1, size)
        report.remove(removed, 1, size)
        report.example(removed, text, f"like {text}" if removed.step == "near" else "")
    return report


events = st.lists(st.tuples(st.sampled_from([WEB, COPY, Removed("books", "exact", "duplicate")]), st.text()))


@settings(max_examples=60, deadline=None)
@given(st.lists(events, max_size=6), st.randoms(use_true_random=False))
def test_merged_reports_do_not_depend_on_the_order(units, rng):
    whole = report_of([event for unit in units for event in unit]).to_json()
    reports = [CleaningReport.from_json(report_of(unit).to_json()) for unit in units]
    rng.shuffle(reports)
    while len(reports) > 1:  # in any grouping
        first = reports.pop(rng.randrange(len(reports)))
        reports[rng.randrange(len(reports))].merge(first)
    assert [report.to_json() for report in reports] == [whole] * bool(units)


def test_written_report(tmp_path):
    texts = [f"text {i} \ud800" + "x" * 300 for i in range(8)]
    report = report_of([(WEB, text) for text in texts] + [(COPY, "a copy"), (COPY, "a copy")])
    report.read("web", 10, 1000)
    report.write(tmp_path)
    data = json.loads((tmp_path / "cleaning.json").read_text())
    sizes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    assert (data["web"]["documents"], data["web"]["bytes"]) == (20, sizes + 12 + 1000)
    near, quality = data["web"]["removed"]
    assert (near["step"], near["reason"], near["documents"], near["bytes"]) == ("near", "duplicate", 2, 12)
    assert near["examples"][0]["matched"] == "like a copy"
    assert (quality["documents"], quality["bytes"], len(quality["examples"])) == (8, sizes, EXAMPLES)
    assert all(len(example["text"]) == 200 for example in quality["examples"])
    table = (tmp_path / "cleaning.txt").read_text()
    rows = [line.split() for line in table.splitlines() if line.startswith("web ")]
    assert rows == [
        ["web", "read", "20", "100.00%", str(sizes + 1012), "100.00%"],
        ["web", "near", "duplicate", "2", "10.00%", "12", f"{1200 / (sizes + 1012):.2f}%"],
        ["web", "quality", "min_words", "8", "40.00%", str(sizes), f"{100 * sizes / (sizes + 1012):.2f}%"],
        ["web", "stays", "10", "50.00%", "1000", f"{100000 / (sizes + 1012):.2f}%"],
    ]
    assert "matched 'like a copy'" in table
