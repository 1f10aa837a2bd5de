import json
from collections import Counter
from itertools import combinations_with_replacement

import pytest

from data_pipeline.errors import DataError
from data_pipeline.generate import main
from data_pipeline.tasks.addition import generate
from data_pipeline.tasks.labelled import BLOCK


def brute_force(text: str, modulus: int) -> list[tuple[int, str]]:
    """Labels from the text alone, character by character."""
    total, labels = 0, []
    for k, character in enumerate(text):
        if character.isdigit():
            total += int(character)
        if character != "+":
            labels.append((k, str(total % modulus)))
    return labels


@pytest.mark.parametrize(("operands", "modulus"), [(2, 10), (3, 7), (8, 10), (100, 2), (300, 10)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_equal_brute_force(operands, modulus, split):
    samples = list(generate(200, operands, modulus, 1, split))
    assert len({sample.id for sample in samples}) == len(samples) == 200
    for sample in samples:
        parts = sample.text.removesuffix("=").split("+")
        assert sample.text == "+".join(parts) + "="
        assert len(parts) == operands
        assert all(len(part) == 1 and 0 <= int(part) < modulus for part in parts)
        assert list(sample.labels) == brute_force(sample.text, modulus)
        assert sample.answer == str(sum(map(int, parts)) % modulus)


@pytest.mark.parametrize("split", ["train", "test"])
def test_longer_runs_begin_with_the_shorter(split):
    long = list(generate(2 * BLOCK + 5, 5, 10, 0, split))
    for count in (0, 1, BLOCK - 1, BLOCK, BLOCK + 3):
        assert list(generate(count, 5, 10, 0, split)) == long[:count]
    assert [s.text for s in long[:BLOCK]] != [s.text for s in long[BLOCK : 2 * BLOCK]]
    assert long[:50] != list(generate(50, 5, 10, 1, split))


@pytest.mark.parametrize("operands", [2, 3, 8])
def test_splits_are_disjoint_in_any_order(operands):
    train, test = (
        {"".join(sorted(s.text)) for s in generate(20_000, operands, 10, 0, split)}
        for split in ("train", "test")
    )
    assert test
    assert not train & test
    if operands <= 3:  # everything there is
        every = combinations_with_replacement("0123456789", operands)
        assert train | test == {"+" * (operands - 1) + "".join(digits) + "=" for digits in every}


def test_operands_and_answers_are_uniform():
    samples = list(generate(20_000, 8, 10, 0))
    for counts in (
        Counter("".join(s.text for s in samples).replace("+", "").replace("=", "")),
        Counter(s.answer for s in samples),
    ):
        assert set(counts) == set("0123456789")
        assert all(0.09 < count / counts.total() < 0.11 for count in counts.values())
    assert len({s.text for s in samples}) > 19_900


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 1, 10, 0), "operands 1 is not in 2"),
        ((1, 5000, 10, 0), "operands 5000"),
        ((1, 8, 11, 0), "modulus 11 is not in 2..10"),
        ((1, 8, 1, 0), "modulus 1 "),
        ((-1, 8, 10, 0), "num_samples -1"),
        ((1, 8, 10, 0, "validation"), "split 'validation' is not one of train, test"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    with pytest.raises(DataError, match=message) as error:
        list(generate(*arguments))
    assert "\n" not in str(error.value)


def test_command_line_writes_samples_and_audits(tmp_path, capsys):
    out = tmp_path / "sums.jsonl"
    sizes = ["--operands=4", "--modulus=6"]
    main(["addition", "--num_samples=2000", *sizes, "--seed=2", f"--out={out}", "--audit"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    samples = list(generate(2000, 4, 6, 2))
    assert [(row["text"], row["answer"]) for row in rows] == [(s.text, s.answer) for s in samples]
    assert rows[3]["labels"] == [list(pair) for pair in samples[3].labels]
    printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    answers = Counter(s.answer for s in samples)
    last = sum(s.text[-2] == s.answer for s in samples) / 2000
    assert float(printed["majority"]) == pytest.approx(max(answers.values()) / 2000, abs=6e-4)
    assert float(printed["last operand"]) == pytest.approx(last, abs=6e-4)
    assert float(printed["answer 5"]) == pytest.approx(answers["5"] / 2000, abs=6e-4)
