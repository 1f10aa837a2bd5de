import json
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.generate import main
from data_pipeline.tasks.labelled import BLOCK
from data_pipeline.tasks.p_hop import generate, hop_labels

SIZES = [(1, 6, 3), (2, 9, 4), (3, 24, 4), (5, 40, 2), (16, 64, 4), (3, 30, 26)]


def find(text: str, i: int) -> int | None:
    """One hop, letter by letter: the position after the previous place of the letter at i."""
    for j in range(i, 0, -1):
        if text[j - 1] == text[i]:
            return j
    return None


def brute_force(text: str, hops: int) -> dict[int, str]:
    labels = {}
    for i in range(len(text)):
        place: int | None = i
        for _ in range(hops):
            place = None if place is None else find(text, place)
        if place is not None:
            labels[i] = text[place]
    return labels


def canonical(text: str) -> tuple[int, ...]:
    """A text up to the names of its letters: for every place, where its letter was first seen."""
    return tuple(text.index(letter) for letter in text)


@pytest.mark.parametrize(("hops", "length", "alphabet"), SIZES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_equal_brute_force(hops, length, alphabet, split):
    samples = list(generate(200, hops, length, alphabet, 3, split))
    assert len(samples) == 200
    letters = "abcdefghijklmnopqrstuvwxyz"[:alphabet]
    for sample in samples:
        assert len(sample.text) == length
        assert set(sample.text) <= set(letters)
        assert dict(sample.labels) == brute_force(sample.text, hops)
        assert list(sample.labels) == sorted(sample.labels)
        assert sample.labels[-1] == (length - 1, sample.answer)
    assert len({sample.id for sample in samples}) == 200


def test_shortest_text():
    """Two letters have a label only if they are equal, which is one text up to names, and it is in train."""
    assert {(s.text, s.labels) for s in generate(100, 1, 2, 2, 0)} == {
        ("aa", ((1, "a"),)),
        ("bb", ((1, "b"),)),
    }


def test_worked_example():
    """abcab, last b: the one before is at 1, so the first hop goes to 2 (c), and no c stands before that."""
    text = np.frombuffer(b"abcabaab", dtype=np.uint8)[None]
    assert hop_labels(text, 1)[0].tobytes() == b"\0\0\0bcbaa"
    assert hop_labels(text, 2)[0].tobytes() == b"\0\0\0\0\0cab"


@pytest.mark.parametrize("split", ["train", "test"])
def test_longer_runs_begin_with_the_shorter(split):
    """Across the edge of a block too."""
    long = list(generate(2 * BLOCK + 5, 2, 8, 3, 0, split))
    for count in (0, 1, BLOCK - 1, BLOCK, BLOCK + 3):
        assert list(generate(count, 2, 8, 3, 0, split)) == long[:count]
    assert [s.text for s in long[:BLOCK]] != [s.text for s in long[BLOCK : 2 * BLOCK]]
    texts = [s.text for s in long[:50]]
    assert texts != [s.text for s in generate(50, 2, 8, 3, 1, split)]
    assert texts != [s.text for s in generate(50, 3, 8, 3, 0, split)]


@pytest.mark.parametrize(("length", "alphabet"), [(5, 3), (6, 4), (12, 2), (24, 4)])
def test_splits_are_disjoint_up_to_the_names_of_letters(length, alphabet):
    """Short texts, all of which occur: what one split has by chance the other would have as well."""
    train, test = (
        {canonical(s.text) for s in generate(5000, 1, length, alphabet, 0, split)}
        for split in ("train", "test")
    )
    assert test
    assert not train & test
    if length <= 6:  # everything there is: strings with a label at the end, one for each renaming
        every = {
            canonical(text)
            for text in map("".join, product("abcd"[:alphabet], repeat=length))
            if length - 1 in brute_force(text, 1)
        }
        assert train | test == every


def test_letters_and_answers_are_uniform():
    samples = list(generate(20_000, 3, 24, 4, 0))
    for counts in (Counter("".join(s.text for s in samples)), Counter(s.answer for s in samples)):
        assert set(counts) == set("abcd")
        assert all(0.235 < count / counts.total() < 0.265 for count in counts.values())
    assert len({s.text for s in samples}) > 19_990
    labelled = np.mean([len(s.labels) for s in samples])
    assert 14 < labelled < 20  # of 24: most positions teach


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 1, 24, 1, 0), "alphabet 1 is not in 2..26"),
        ((1, 1, 24, 27, 0), "alphabet 27"),
        ((1, 1, 1, 4, 0), "length 1 is not in 2"),
        ((1, 0, 24, 4, 0), "hops 0 is not in 1..24"),
        ((1, 25, 24, 4, 0), "hops 25"),
        ((-1, 1, 24, 4, 0), "num_samples -1"),
        ((1, 1, 24, 4, 0, "dev"), "split 'dev' is not one of train, test"),
        ((1, 1, 2, 2, 0, "test"), "only 0 of 1024000 draws"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    with pytest.raises(DataError, match=message) as error:
        list(generate(*arguments))
    assert "\n" not in str(error.value)


def test_command_line_writes_samples_and_audits(tmp_path, capsys):
    out = tmp_path / "hops.jsonl"
    main(["p_hop", "--num_samples=3000", "--hops=2", "--split=test", "--seed=4", f"--out={out}", "--audit"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    samples = list(generate(3000, 2, 24, 4, 4, "test"))
    assert [row["text"] for row in rows] == [s.text for s in samples]
    assert rows[7]["labels"] == [list(pair) for pair in samples[7].labels]
    assert rows[7]["answer"] == samples[7].answer
    printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    answers = Counter(s.answer for s in samples)
    one_hop = np.mean([brute_force(s.text, 1)[23] == s.answer for s in samples])
    assert printed["samples"] == "3000"
    assert float(printed["majority"]) == pytest.approx(max(answers.values()) / 3000, abs=6e-4)
    assert float(printed["answer b"]) == pytest.approx(answers["b"] / 3000, abs=6e-4)
    assert float(printed["1-hop"]) == pytest.approx(one_hop, abs=6e-4)
    assert "2-hop" not in printed  # the answer itself


def test_mistakes_on_the_command_line_end_with_one_line(tmp_path):
    script = str(Path(__file__).parents[2] / "data_pipeline" / "p_hop.py")
    for options, message in (
        (["--num_samples", "3"], "nothing to do"),
        (["--num_samples", "0", "--audit"], "no samples"),
        (["--num_samples", "3", "--alphabet", "99", "--audit"], "alphabet 99"),
        (["--num_samples", "3", "--out", str(tmp_path / "no" / "file")], "no does not exist: create it"),
    ):
        done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
