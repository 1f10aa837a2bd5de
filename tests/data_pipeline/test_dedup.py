import os
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.cleaning.dedup import PERMUTATIONS, bands, exact_hash, keep_exact, keep_near, signature
from data_pipeline.sources.text import read_wiki


def jaccard(a: str, b: str) -> float:
    """Of the sets of 5 words, by Python's own sets; for ASCII words between single spaces."""
    x, y = (set(zip(*(t.lower().split()[i:] for i in range(5)), strict=False)) for t in (a, b))
    return len(x & y) / len(x | y)


@pytest.fixture(scope="module")
def articles(data_root) -> list[str]:
    """Texts of 60 to 2000 words between single spaces, of real articles."""
    texts = islice(read_wiki(data_root / "text/enwiki2015-AA.tar.xz"), 400)
    plain = (" ".join("".join(c for c in t if c.isascii() and (c.isalpha() or c.isspace())).split()[:2000])
             for t in texts)  # fmt: skip
    return [text for text in plain if len(text.split()) >= 60]


def changed(text: str, share: float, rng: np.random.Generator) -> str:
    """`text` with this share of its words replaced."""
    words = np.array(text.split(), dtype=object)
    indices = rng.choice(len(words), round(share * len(words)), replace=False)
    words[indices] = [f"new{index}" for index in indices]
    return " ".join(words)


# ---- exact


@given(st.lists(st.text(st.characters(), max_size=3), max_size=40))
def test_keep_exact_is_the_first_of_equal_texts(texts):
    hashes = np.array([exact_hash(text) for text in texts]).reshape(-1, 2)
    keep, duplicate_of = keep_exact(hashes)
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        original = first.setdefault(text, i)
        assert keep[i] == (original == i)
        assert duplicate_of[i] == (-1 if original == i else original)


def test_exact_hash_is_xxh3_128_of_utf8():
    # XXH3_128bits of no bytes with seed 0, from the published test vectors.
    low_first = exact_hash("").astype("<u8").tobytes()
    assert low_first.hex() == "99aa06d3014798d86001c324468d497f"
    assert exact_hash("\ud800").shape == (2,)


# ---- near


def test_banding_reaches_its_recall():
    assert bands(0.8) == (21, 6)
    for threshold in (0.5, 0.7, 0.8, 0.9, 1.0):
        count, rows = bands(threshold)
        assert count * rows <= PERMUTATIONS
        assert 1 - (1 - threshold**rows) ** count >= 0.99


def greedy(signatures: np.ndarray, threshold: float) -> list[int]:
    """The definition of keep_near, pair by pair."""
    number, rows = bands(threshold, signatures.shape[1])
    result: list[int] = []
    for i, mine in enumerate(signatures.tolist()):
        found = -1
        for j, theirs in enumerate(signatures[:i].tolist()):
            shared = any(mine[b * rows : b * rows + rows] == theirs[b * rows : b * rows + rows]
                         for b in range(number))  # fmt: skip
            equal = sum(x == y for x, y in zip(mine, theirs, strict=True)) / len(mine)
            if result[j] == -1 and shared and equal >= threshold:
                found = j
                break
        result.append(found)
    return result


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 40), st.sampled_from([0.6, 0.8, 0.9, 1.0]))
def test_keep_near_equals_its_definition(seed, count, threshold):
    rng = np.random.default_rng(seed)
    signatures = rng.integers(0, 2**32, (count, 32), dtype=np.uint32)
    for i in range(1, count):  # chains: most resemble an earlier one, which resembles an earlier one
        same = rng.random(32) < rng.uniform(0.5, 1)
        signatures[i, same] = signatures[rng.integers(i), same]
    keep, duplicate_of = keep_near(signatures, threshold)
    assert duplicate_of.tolist() == greedy(signatures, threshold)
    assert (keep == (duplicate_of == -1)).all()


def test_signature_estimates_the_jaccard_similarity(articles):
    rng = np.random.default_rng(0)
    errors = []
    for text in articles[:150]:
        other = changed(text, rng.uniform(0.005, 0.15), rng)
        true = jaccard(text, other)
        estimate = np.mean(signature(text) == signature(other))
        errors.append((estimate - true) / np.sqrt(true * (1 - true) / PERMUTATIONS))
    # Standard scores: their mean has a standard error of 0.08, and none may be far out.
    assert abs(np.mean(errors)) < 0.3
    assert np.std(errors) < 1.2
    assert np.max(np.abs(errors)) < 4.5


def test_planted_near_duplicates(articles):
    rng = np.random.default_rng(1)
    texts = list(articles)
    copies = {}
    for i, text in enumerate(articles):
        for share in (0.01, 0.3):  # similarity about 0.9, and about 0.1
            copies[len(texts)] = i
            texts.append(changed(text, share, rng))
    keep, duplicate_of = keep_near(np.stack([signature(text) for text in texts]))
    similarity = {copy: jaccard(texts[copy], texts[i]) for copy, i in copies.items()}
    near = [copy for copy in copies if similarity[copy] >= 0.88]  # 2.5 standard errors above the threshold
    assert len(near) > 100
    found = [copy for copy in near if duplicate_of[copy] == copies[copy]]
    assert len(found) >= 0.98 * len(near)
    removed = np.flatnonzero(~keep)
    assert min(jaccard(texts[i], texts[duplicate_of[i]]) for i in removed) > 0.68
    assert keep[: len(articles)].all()  # real articles differ from each other


def test_case_punctuation_and_white_space_do_not_count():
    text = "The quick brown fox jumps over the lazy dog, and then it sleeps."
    same = "the QUICK brown\tfox -- jumps over; the\n\nlazy dog and then it sleeps"
    assert (signature(text) == signature(same)).all()
    assert (signature("cafe\u0301 au lait") == signature("CAF\u00c9 AU LAIT")).all()
    assert (
        signature("soft\u00adware is written by people") == signature("software is written by people")
    ).all()


def test_short_texts_and_texts_without_words_only_meet_their_copies():
    texts = ["", "?", "??", "one", "One!", "one two", "one two three four", "one two three five", " ", "?"]
    signatures = np.stack([signature(text) for text in texts])
    assert keep_near(signatures).duplicate_of.tolist() == [-1, -1, -1, -1, 3, -1, -1, -1, -1, 1]


def test_scripts_without_spaces_are_compared_character_by_character():
    text = "人人生而自由在尊严和权利上一律平等他们赋有理性和良心并应以兄弟关系的精神相对待" * 2
    words = [chr(0x4E00 + i) for i in range(300)]
    assert (signature(text) == signature("。".join(text))).all()
    other = "".join([*words[:298], "一", "二"])
    assert np.mean(signature("".join(words)) == signature(other)) > 0.9


def test_no_documents():
    assert len(keep_exact(np.empty((0, 2), np.uint64)).keep) == 0
    assert len(keep_near(np.empty((0, PERMUTATIONS), np.uint32)).keep) == 0


def test_another_process_computes_the_same_signature():
    text = "Four score and seven years ago our fathers brought forth on this continent a new nation"
    shown = f"signature({text!r}).tobytes().hex(), exact_hash({text!r})"
    code = f"from data_pipeline.cleaning.dedup import *; print({shown})"
    for threads in ("1", "3"):
        environment = os.environ | {"PYTHONHASHSEED": threads, "RAYON_NUM_THREADS": threads}
        out = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert out.stdout.strip() == f"{signature(text).tobytes().hex()} {exact_hash(text)}"
