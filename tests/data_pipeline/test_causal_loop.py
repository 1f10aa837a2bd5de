import json
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.tasks import causal_loop
from data_pipeline.tasks.causal_loop import Sample, audit, execute, generate, one_step_answer, split_of

SCRIPT = Path(__file__).parents[2] / "data_pipeline" / "causal_loop.py"
OPERATORS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(generate(600, [1, 2, 3, 4], seed=0)) + list(generate(80, [1, 2, 3, 4], seed=0, split="test"))


def nested(program: str) -> list:
    """Program text as a nested list of statements, by turning it into Python literals."""
    text = re.sub(r"[A-Z]=[^;{}]+", lambda m: f'"{m.group()}",', program)
    return list(eval("[" + text.replace("loop{", "[").replace("}", "],").replace(";", "") + "]"))


def expected_trace(body: list, state: dict[str, int], in_loop: bool = False) -> str:
    """The trace by brute force: plain recursion on the nested lists."""
    text = ""
    for item in body:
        if isinstance(item, list):
            passes = []
            while not passes or "!" in passes[-1]:
                passes.append(expected_trace(item, state, True))
            text += "{" + "|".join(passes) + "}"
            continue
        target, rule = item.split("=")
        values = "".join(str(state[c]) if c.isalpha() else c for c in rule)
        result = (
            OPERATORS[values[1]](int(values[0]), int(values[2])) % 10 if len(values) == 3 else int(values)
        )
        changed = in_loop and state.get(target) != result
        state[target] = result
        text += f"{item}={values}={result}" if len(values) == 3 else item
        text += "!" if changed else ";"
    return text


def test_answers_and_traces_match_brute_force(samples):
    for sample in samples:
        state: dict[str, int] = {}
        assert sample.trace == expected_trace(nested(sample.program), state)
        assert execute(sample.program) == execute(f"{sample.program}?{sample.question}") == state
        assert sample.answer == state[sample.question]


def test_every_step_needs_one_lookup_and_one_operation(samples):
    """Read the trace as a model does: each value is the last one written for its variable."""
    for sample in samples:
        last: dict[str, str] = {}
        for step in re.findall(r"[^;!{}|]+", sample.trace):
            match = re.fullmatch(r"([A-Z])=(.)([-+*])(.)=(\d)\3(\d)=(\d)", step)
            if match:
                target, left, operator, right, x, y, result = match.groups()
                assert [x, y] == [last.get(left, left), last.get(right, right)]
                assert int(result) == OPERATORS[operator](int(x), int(y)) % 10
            else:
                target, result = re.fullmatch(r"([A-Z])=(\d)", step).groups()
            last[target] = result
        assert last[sample.question] == str(sample.answer)


def test_texts_fit_together(samples):
    for s in samples:
        query = f"{s.program}?{s.question}\n"
        assert (
            s.prompt_trace + s.completion_trace == f"{query}Trace: {s.trace}?{s.question}\nAnswer: {s.answer}"
        )
        assert s.prompt_direct + s.completion_direct == f"{query}Answer: {s.answer}"
        assert len(s.prompt_trace + s.completion_trace) <= (180 if s.level in (1, 3) else 350)


def test_levels_have_their_shape(samples):
    assert [s.level for s in samples[:8]] == [1, 2, 3, 4] * 2
    for s in samples:
        assert s.program.count("loop{") == {1: 0, 2: 1, 3: 0, 4: 2}[s.level]
        variables = set(re.findall("[A-Z]", s.program))
        if s.level == 1:
            assert 3 <= len(variables) <= 6
            assert not re.search(r"[A-Z][-+*][A-Z]", s.program)
        if s.level == 3:
            assert len(re.findall(r"[A-Z][-+*][A-Z]", s.program)) == 1
        if s.level == 4:
            assert re.search(r"loop\{.*loop\{.*\}.*\}", s.program)
        if s.level == 2:
            assert 2 <= len(variables) <= 4
        # nothing that leaves its operand alone or erases it
        assert not re.search(r"[-+]0|\*[01]|([A-Z])[-+*]\1", s.program)


def test_loops_are_needed_and_converge_in_time(samples):
    for s in samples:
        if s.level == 2:
            passes = s.trace[s.trace.index("{") :].split("|")
            assert 3 <= len(passes) <= 7
            # the queried value after the first pass is not its last one for good
            assert any(re.search(rf"(^|[{{;!]){s.question}=[^;!]*!", p) for p in passes[1:])


def canonical(program: str) -> str:
    names = list(dict.fromkeys(re.findall("[A-Z]", program)))
    return re.sub("[A-Z]", lambda m: "ABCDEFGH"[names.index(m.group())], program)


def test_programs_of_the_splits_are_disjoint():
    train = {canonical(s.program) for s in generate(3000, [1, 2, 3, 4], seed=3)}
    test = {canonical(s.program) for s in generate(1000, [1, 2, 3, 4], seed=4, split="test")}
    assert len(train) > 2600
    assert len(test) > 700
    assert not train & test


def hash_by_hand(program: str) -> int:
    """The documented hash in plain integers: Horner's rule, then fmix64."""
    value = 0
    for character in canonical(program):
        value = (value * 0x9E3779B97F4A7C15 + ord(character)) % 2**64
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = (value ^ value >> 33) * factor % 2**64
    return value ^ value >> 33


@pytest.mark.parametrize("split", ["train", "test"])
def test_generator_and_split_of_know_one_hash(split):
    for s in generate(2000, [1, 2, 3, 4], seed=8, split=split):
        assert split_of(s.program) == split
        renamed = s.program.translate(str.maketrans("ABCDEFGH", "XQWZCTRA"))
        assert ("test" if hash_by_hand(renamed) < 0.1 * 2**64 else "train") == split_of(renamed) == split


def test_samples_are_right_in_bulk():
    """More than one batch of each level, against the interpreter that reads nothing but the text."""
    for s in generate(20000, [1, 2, 3, 4], seed=9):
        assert execute(s.program)[s.question] == s.answer


@pytest.mark.parametrize(("level", "share"), [(1, 0.98), (2, 0.87), (3, 0.995), (4, 0.9)])
def test_programs_seldom_repeat(level, share):
    """One by one, every loop with its own initial values alone, they were: .983 .906 1.000 .977."""
    assert len({canonical(s.program) for s in generate(5000, [level], seed=0)}) / 5000 > share


def test_first_pass_does_not_tell_the_answer(samples):
    for s in samples:
        if s.level in (2, 4):
            once = s.program.replace("loop{", "", 1)  # the outermost loop's body, run one time
            end = once.rindex("}")
            assert execute(once[:end] + once[end + 1 :])[s.question] != s.answer


def test_split_ignores_names_and_takes_a_tenth():
    assert split_of("A=3;B=A+2") == split_of("Q=3;Z=Q+2")
    programs = {
        f"A={a};B=A{op}{b};C=B*{c}"
        for a in range(10)
        for b in range(1, 10)
        for c in range(2, 10)
        for op in "+-"
    }
    assert sum(split_of(p) == "test" for p in programs) / len(programs) == pytest.approx(0.1, abs=0.025)


def test_sample_depends_on_its_index_alone():
    long = list(generate(24, [1, 2, 3, 4], seed=5))
    assert list(generate(9, [1, 2, 3, 4], seed=5)) == long[:9]
    assert list(islice(generate(10**9, [1, 2, 3, 4], seed=5), 3)) == long[:3]
    assert list(generate(9, [1, 2, 3, 4], seed=6)) != long[:9]
    assert len({s.id for s in long}) == 24


def test_guessing_does_not_pay(samples):
    for level, row in audit(samples).items():
        print(level, row)
        assert row["samples"] == 170
        assert row["majority"] <= 0.25
        assert row["one_step"] <= 0.35


def test_answers_and_names_are_spread_evenly():
    chains = list(generate(2000, [1], seed=1))
    answers = Counter(s.answer for s in chains)
    assert sum((answers[d] - 200) ** 2 / 200 for d in range(10)) < 27.9  # chi-square, 9 degrees, p = 0.001
    assert set("".join(s.question for s in chains)) == set("CDEF")  # two to five operations deep


@pytest.mark.parametrize(
    ("program", "state"),
    [
        ("A=3", {"A": 3}),
        ("A=3;B=A-7;C=B*B?C", {"A": 3, "B": 6, "C": 6}),
        ("A=1;loop{A=A*2;A=A*5}", {"A": 0}),
        # L Z per pass: 4 8, 2 4, 8 6, 8 6
        ("Z=2;L=7;loop{L=Z*L;H=L*3;Z=H-L}", {"Z": 6, "L": 8, "H": 4}),
        # inner Q E: 9 5, 9 5, then S=7; inner 2 5, 2 5, then S=7
        ("S=4;E=5;loop{loop{Q=S-E;E=Q-S};S=E-8}", {"S": 7, "E": 5, "Q": 2}),
    ],
)
def test_execute_by_hand(program, state):
    assert execute(program) == state


def test_execute_refuses_a_loop_without_an_end():
    with pytest.raises(DataError, match="does not converge"):
        execute("A=1;loop{A=A+3}")


@pytest.mark.parametrize(
    "program",
    ["", "A", "A=B", "A=3;", "A=3}", "loop{A=3", "A=3 ;B=2", "a=3", "A=12", "A=3;loop{}", "A=3?B?C", "A=é"],
)
def test_execute_refuses_what_is_no_program(program):
    with pytest.raises(DataError) as error:
        execute(program)
    assert "\n" not in str(error.value).replace("\\n", "")


def test_one_step_answer_by_hand():
    def sample(program: str, question: str) -> Sample:
        return Sample("", 1, program, question, 0, "", "", "", "", "")

    assert one_step_answer(sample("A=3;B=A+2;C=B*2", "B")) == 5
    assert one_step_answer(sample("A=3;B=A+2;C=B-1", "C")) == 9  # B starts at 0
    assert one_step_answer(sample("A=3;C=2;loop{A=C*A;C=A+1}", "A")) == 6
    assert one_step_answer(sample("A=3", "A")) == 3


def test_training_document_takes_the_asked_share(samples):
    traced = [causal_loop.training_document(s, 0.75)[0].count("Trace:") for s in samples]
    assert sum(traced) / len(traced) == pytest.approx(0.75, abs=0.06)
    assert all("Trace:" in causal_loop.training_document(s, 1.0)[0] for s in samples)
    assert all("Trace:" not in causal_loop.training_document(s, 0.0)[0] for s in samples)
    with pytest.raises(DataError, match="1.5"):
        causal_loop.training_document(samples[0], 1.5)


@pytest.mark.parametrize(
    ("levels", "split", "count"), [([], "train", 1), ([5], "train", 1), ([1], "dev", 1), ([1], "train", -1)]
)
def test_generate_refuses_bad_arguments(levels, split, count):
    with pytest.raises(DataError):
        list(generate(count, levels, 0, split))


def test_command_line(tmp_path):
    out = tmp_path / "x.jsonl"
    command = [
        sys.executable,
        SCRIPT,
        "--num_samples",
        "8",
        "--seed",
        "3",
        "--split",
        "test",
        "--out",
        out,
        "--audit",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [Sample(**row) for row in rows] == list(generate(8, [1, 2, 3, 4], 3, "test"))
    assert "majority" in done.stdout
    failed = subprocess.run([*command[:4], "--levels", "1,x", "--audit"], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: --levels '1,x'")
    assert failed.stderr.count("\n") == 1
