import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.recipe import load_recipe
from data_pipeline.tasks import causal_loop_v2
from data_pipeline.tasks.causal_loop_v2 import Sample, audit, execute, generate, split_of
from data_pipeline.tasks.programs.causal_loop_v2_audit import late_half_answer, one_step_answer
from data_pipeline.tasks.programs.causal_loop_v2_programs import effective_depth, parse

SCRIPT = Path(__file__).parents[2] / "data_pipeline" / "causal_loop_v2.py"
RECIPE = SCRIPT.parent / "recipes" / "causal_loop_v2.yaml"
ALL = ("chain", "convergence", "loop", "nested")

# The language once more, written from its grammar: operator -> (operands it reads, result).
LANGUAGE = {
    "d": ("xy", lambda x, y, p: max(x - y, y - x)),
    "m": ("xy", lambda x, y, p: sorted([x, y])[1]),
    "r": ("xy", lambda x, y, p: list(reversed(range(x + 1)))[y] if y <= x else y),
    "n": ("y", lambda x, y, p: list(reversed(range(p)))[y]),
    "e": ("y", lambda x, y, p: y if y in range(1, p, 2) else [*range(1, p), 0][y]),
}


def brute(program: str, question: str, modulus: int) -> tuple[int, list[int], str, list[dict]]:
    """Answer, result of every statement, trace, and a graph node for every statement."""
    state: dict[str, int] = {}
    last: dict[str, dict] = {}
    values, trace, nodes = [], "", []
    for token in re.findall(r"[A-Z]\d+(?=[A-Z])|[A-Z][a-z](?:[A-Z]|\d+)(?:[A-Z]|\d+)", program):
        if token[1].isdigit():
            assert not values, "a constant after a statement"
            state[token[0]] = int(token[1:])
            continue
        target, operator = token[0], token[1]
        operands = dict(zip("xy", re.findall(r"[A-Z]|\d+", token[2:]), strict=True))
        numbers = {k: state[o] if o.isalpha() else int(o) for k, o in operands.items()}
        reads, function = LANGUAGE[operator]
        result = function(numbers["x"], numbers["y"], modulus)
        parents = [last[operands[k]] for k in reads if operands[k] in last]
        node = {"index": len(values), "parents": parents, "operator": operator}
        node["depth"] = 1 + max([parent["depth"] for parent in parents], default=0)
        trace += f"{token}:{','.join(str(numbers[k]) for k in reads)}={result};"
        state[target], last[target] = result, node
        values.append(result)
        nodes.append(node)
    live: dict[int, dict] = {}
    stack = [last[question]]
    while stack:
        node = stack.pop()
        live[node["index"]] = node
        stack += node["parents"]
    return state[question], values, trace, [last[question], *live.values()]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(generate(1600)) + list(generate(80, split="test"))


@pytest.fixture(scope="module")
def deep() -> list[Sample]:
    return list(generate(64, range(9, 25), statements=24))


@pytest.fixture(scope="module")
def large() -> list[Sample]:
    return [s for p in (97, 997) for s in generate(80, range(1, 11), modulus=p)]


def test_answers_values_depths_and_traces_match_brute_force(samples, deep, large):
    for s in samples + deep + large:
        answer, values, trace, (final, *_) = brute(s.program, s.question, s.modulus)
        assert (s.answer, list(s.values), s.trace, s.depth) == (answer, values, trace, final["depth"])
        assert execute(s.program, s.modulus)[s.question] == answer
        assert execute(f"{s.program}?{s.question}", s.modulus) == execute(s.program, s.modulus)


def test_families_have_their_shape(samples, deep):
    assert {s.family for s in samples} == {s.family for s in deep} == set(ALL)
    for s in samples + deep:
        _, _, _, (_, *live) = brute(s.program, s.question, 7)
        joins = sum(len(node["parents"]) == 2 for node in live)
        statements = re.findall("....", s.program[10:])
        text = " ".join(statements) + " "
        if s.family == "chain":
            assert joins == 0
            assert len(live) == s.depth
        elif s.family == "convergence":
            assert joins >= 1
        elif s.family == "loop":
            assert re.search(r"((?:\S+ )+)\1", text)
        else:
            assert re.search(r"((?:\S+ )*((?:\S+ )+)\2(?:\S+ )*)\1", text)


def test_no_result_of_the_chain_can_be_left_out(samples, deep, large):
    """Flip each initial constant through all values: for one of them the path has no shortcut."""
    for s in samples + deep + large[:40]:
        assert effective_depth(*parse(s.program), s.question, s.modulus) == s.depth
    for s in samples[:400]:
        answers = {
            name: {execute(s.program.replace(f"{name}{old}", f"{name}{v}", 1))[s.question] for v in range(7)}
            for name, old in parse(s.program)[0].items()
        }
        assert max(map(len, answers.values())) >= 3


def test_no_two_steps_are_one_operation(samples, deep):
    """In a chain every step is a function of one value: compare all pairs with all single operations."""
    single = {tuple(f(x, c, 7) for x in range(7)) for _, f in LANGUAGE.values() for c in range(7)}
    single |= {tuple(f(c, y, 7) for y in range(7)) for _, f in LANGUAGE.values() for c in range(7)}
    pairs = 0
    for s in samples + deep:
        if s.family != "chain":
            continue
        constants, body = parse(s.program)
        _, _, _, (_, *live) = brute(s.program, s.question, 7)
        steps = []
        for node in sorted(live, key=lambda node: node["index"]):
            reads, function = LANGUAGE[node["operator"]]
            computed = {body[node["parents"][0]["index"]].target} if node["parents"] else set()
            x, y = body[node["index"]].left, body[node["index"]].right
            value = {**constants, **{str(number): number for number in range(7)}}
            if "x" in reads and x in computed:
                steps.append([function(v, value[y], 7) for v in range(7)])
            elif y in computed:
                steps.append([function(value[x] if "x" in reads else 0, v, 7) for v in range(7)])
        for first, second in zip(steps, steps[1:], strict=False):
            assert tuple(second[first[v]] for v in range(7)) not in single
            pairs += 1
    assert pairs > 1000


@pytest.mark.parametrize(
    ("statements", "depth"),
    [
        ("CnAACnCC", 0),  # p-1-(p-1-A): the constant itself
        ("CmA3CmC3", 1),  # max(max(A, 3), 3)
        ("CmA3DmCC", 1),  # max(C, C)
        ("CdA2CdCC", 0),  # |C - C|
        ("CdA2CmC6", 0),  # the constant 6
        ("CdA0CmC0", 0),  # nothing done
        ("CnAACm2C", 2),
        ("Cd3ACnCCCm2C", 2),  # never below 3
        ("Cd3ACnCCCr3C", 3),
        ("Cr4ACr4C", 0),  # a reversal undone
        ("Cr4ACr5C", 2),
        ("CnAADnBBCrCD", 2),
        ("CnAACm2CDr3CDnDD", 4),
        ("DmA2CnAACnCCCmC2", 1),  # by way of C three deep, but D has the same values
    ],
)
def test_effective_depth_by_hand(statements, depth):
    question = statements[-4]
    assert effective_depth(*parse(f"A1B4C0D0{statements}"), question, 7) == depth


def test_text_and_labels(samples):
    for s in samples:
        query = f"{s.program}?{s.question}"
        traced = s.prompt_trace + s.completion_trace
        assert traced == f"{query}\nTrace: {s.trace}?{s.question}\nAnswer: {s.answer}"
        assert s.prompt_direct + s.completion_direct == f"{query}\nAnswer: {s.answer}"
        text, labels = s.labelled()
        assert text == query
        assert len(text) == 2 * 5 + 4 * 12 + 2
        ends = [m.end() - 1 for m in re.finditer(r"[A-Z][a-z](?:[A-Z]|\d){2}", text)]
        assert [place for place, _ in labels] == [*ends, len(text) - 1]
        # The label at a place is what a program that ends there answers for its last target.
        for place, label in labels[:-1]:
            assert label == str(execute(text[: place + 1])[text[place - 3]])
        assert labels[-1][1] == str(s.answer)


def test_labels_need_one_character_a_value(large):
    with pytest.raises(DataError, match="modulus 97"):
        large[0].labelled()
    ten = next(generate(1, modulus=10))
    assert ten.labelled()[1][-1][1] == str(ten.answer)


def test_depths_families_and_names_are_dealt_evenly(samples):
    train = samples[:1600]
    assert [s.depth for s in train] == list(range(1, 9)) * 200
    families = Counter((s.depth, s.family) for s in train)
    assert families[1, "chain"] == 200
    assert families[3, "chain"] == families[3, "convergence"] == 100
    assert families[4, "loop"] == pytest.approx(67, abs=1)
    assert {families[8, f] for f in ALL} == {50}
    answers = Counter(s.answer for s in train)
    expected = 1600 / 7
    assert sum((answers[v] - expected) ** 2 / expected for v in range(7)) < 22.5  # chi-square, p = 0.001
    names = Counter("".join(re.findall("[A-Z](?=[0-9])", "".join(s.program[:10] for s in train))))
    assert len(names) == 26
    assert min(names.values()) > 0.75 * max(names.values())
    assert all(len(set(re.findall("[A-Z]", s.program))) == 5 for s in train)


def test_programs_of_the_splits_are_disjoint_and_plenty():
    def canonical(program: str) -> str:
        names = list(dict.fromkeys(re.findall("[A-Z]", program)))
        return re.sub("[A-Z]", lambda m: f"v{names.index(m.group())}", program)

    # One statement, so that equal programs are likely.
    small = {"depths": [1], "families": ["chain"], "variables": 3, "statements": 1}
    train = {canonical(s.program) for s in generate(2000, **small)}
    test = {canonical(s.program) for s in generate(500, **small, split="test")}
    assert len(train & {canonical(s.program) for s in generate(2000, **small, seed=1)}) > 40
    assert len(test) > 400
    assert not train & test
    assert len({canonical(s.program) for s in generate(500, [1], split="test")}) == 500


def test_split_ignores_names_and_takes_a_tenth():
    assert split_of("A3B1CmAB") == split_of("Q3X1ZmQX")
    assert len(set(re.findall("[A-Z]", next(generate(1, variables=26)).program))) == 26  # all there are
    few = {name for s in generate(30, names=6) for name in re.findall("[A-Z]", s.program)}
    assert few == set("ABCDEF")
    programs = [f"A{a}B{b}C{o}A{c}Bm{d}C" for a in range(7) for b in range(7) for c in "123" for d in "245"
                for o in "dmrne"]  # fmt: skip
    assert sum(split_of(p) == "test" for p in programs) / len(programs) == pytest.approx(0.1, abs=0.02)


def test_constants_keep_initial_values_low_and_leave_all_else_as_it_is():
    low = list(generate(300, depths=[1, 2, 3, 4], families=["chain", "convergence"], constants=3))
    for sample in low:
        initial, body = parse(sample.program)
        assert set(initial.values()) <= {0, 1, 2}
        assert execute(sample.program)[sample.question] == sample.answer
        assert effective_depth(initial, body, sample.question, 7) == sample.depth
    assert {s.answer for s in low} == set(range(7)) == {value for s in low for value in s.values}
    assert list(generate(9, constants=7)) == list(generate(9)) != list(generate(9, constants=6))


def test_sample_depends_on_its_index_alone():
    long = list(generate(24, seed=5))
    assert list(generate(9, seed=5)) == long[:9]
    assert list(islice(generate(10**9, seed=5), 3)) == long[:3]
    assert [s.program for s in generate(9, seed=6)] != [s.program for s in long[:9]]
    assert len({s.id for s in long}) == 24


def test_guessing_does_not_pay(samples):
    for depth, row in audit(samples).items():
        print(depth, row)
        assert row["samples"] == 210
        assert row["majority"] <= 0.25
        assert row["one_step"] <= (1 if depth == 1 else 0.4)
        assert row["last_number"] <= 0.3
        assert row["operator"] <= 0.4
        assert row["late_half"] <= 0.45
        assert abs(row["position"]) <= 0.25
        assert row["plain_dead"] <= 0.4
        assert row["shortened"] == 0


def hand_made(program: str, question: str, depth: int) -> Sample:
    answer = execute(program)[question]
    return Sample("x", "chain", depth, 7, program, question, answer, (), "", "", "", "", "")


def test_heuristics_by_hand():
    assert one_step_answer(hand_made("A3B1CmAB", "C", 1)) == 3
    assert one_step_answer(hand_made("A3B1C0CnAACdCB", "C", 2)) == 1  # |0 - 1|; the answer is 2
    # Whatever stands before, the last operation yields 5 or 6, and 5 far more often.
    assert late_half_answer(hand_made("A3B1C0CnAACm5C", "C", 2)) == 5
    hand = [
        hand_made("A3B1C0CnAACm5C", "C", 2),  # no dead code; answer 5, the last number
        hand_made("A3B1C0CnAACm5CAdB2", "C", 2),  # dead and unread; 5
        hand_made("A3B1C0CnAACdC2Cm5CBdA2AnAB", "C", 3),  # B is dead but A, dead too, reads it: not plain
        hand_made("A3B1C2AdB2AnBBBnCCCdB1", "C", 2),  # the first is overwritten unread: plain; |4 - 1| = 3
        hand_made("A3B1C0CnAACnCC", "C", 2),  # shortened; 3
    ]
    rows = audit(hand)
    assert rows[2]["samples"] == 4
    assert rows[2]["majority"] == 0.5
    assert rows[2]["last_number"] == pytest.approx(1 / 4)
    assert rows[2]["operator"] == 1.0  # m: 5 and 5, d: 3, n: 3
    assert rows[2]["plain_dead"] == 0.5
    assert rows[2]["shortened"] == 0.25
    assert rows[3]["plain_dead"] == 0.0
    # places 1, 1, 3, 1 with answers 5, 5, 3, 3
    assert rows[2]["position"] == pytest.approx(-1 / 3**0.5)


@pytest.mark.parametrize(
    ("program", "state"),
    [
        ("A3", {"A": 3}),
        ("A3B5CdAB?C", {"A": 3, "B": 5, "C": 2}),
        ("A3Br5ACr2A", {"A": 3, "B": 2, "C": 3}),
        ("A6Be2ACeA0", {"A": 6, "B": 0, "C": 1}),
        ("A3An1A", {"A": 3}),
    ],
)
def test_execute_by_hand(program, state):
    assert execute(program) == state


@pytest.mark.parametrize(
    "program", ["", "?A", "A", "A3B", "A3BmA", "A3BmAC", "A3BxAA", "A9", "A3 BmA1", "Aé"]
)
def test_execute_refuses_what_is_no_program(program):
    with pytest.raises(DataError) as error:
        execute(program)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_samples": -1}, "-1"),
        ({"split": "dev"}, "dev"),
        ({"families": []}, "families"),
        ({"families": ["tree"]}, "tree"),
        ({"modulus": 4}, "modulus 4"),
        ({"modulus": 998}, "modulus 998"),
        ({"variables": 2}, "variables 2"),
        ({"variables": 27}, "variables 27"),
        ({"names": 4}, "names 4 is not in 5..26"),
        ({"names": 27}, "names 27"),
        ({"constants": -1}, "constants -1 is not in 1..7"),
        ({"constants": 8}, "constants 8"),
        ({"depths": []}, "depths"),
        ({"depths": [0]}, "1..12"),
        ({"depths": [13]}, "1..12"),
        ({"depths": [3], "families": ["loop", "nested"]}, "4..12"),
    ],
)
def test_generate_refuses_bad_arguments(arguments, named):
    with pytest.raises(DataError, match=re.escape(named)):
        list(generate(**{"num_samples": 1, **arguments}))


def test_a_program_that_is_not_found_is_an_error(monkeypatch):
    monkeypatch.setattr(causal_loop_v2, "ATTEMPTS", 1)
    with pytest.raises(
        DataError, match="family nested, depth 8, 5 variables and 12 statements in 1 attempts"
    ):
        list(generate(50, [8], ["nested"]))


def test_recipe_gives_samples_that_its_tokenizer_can_hold():
    recipe = load_recipe(RECIPE)
    (source,) = recipe.sources
    options = {k: v for k, v in source.items() if k not in ("name", "kind", "weight")}
    drawn = list(islice(generate(**options), 400))
    characters = set("".join(s.labelled()[0] for s in drawn))
    assert 4 + 256 + len(characters) == recipe.tokenizer.vocab_size
    assert {len(s.labelled()[0]) for s in drawn} == {60}


def test_command_line(tmp_path):
    out = tmp_path / "x.jsonl"
    command = [sys.executable, SCRIPT, "--num_samples", "24", "--depths", "2-9", "--seed", "3", "--out", out]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [*command, "--audit", "--split", "test"], capture_output=True, text=True, check=True, env=environment
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    expected = list(generate(24, range(2, 10), seed=3, split="test"))
    assert rows == [json.loads(json.dumps(asdict(s))) for s in expected]
    assert re.search(r"^depth +samples +majority", done.stdout, re.MULTILINE)
    assert len(re.findall(r"^ +[2-9] +3 ", done.stdout, re.MULTILINE)) == 8
    failed = subprocess.run([*command, "--depths", "1,x"], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: --depths '1,x'")
    assert failed.stderr.count("\n") == 1


def test_bytes_stay_the_same():
    """Published samples can be made again: a deliberate change of the generator updates this digest."""
    text = "".join(json.dumps(asdict(s)) for s in generate(64, range(1, 13), seed=1))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "1c3a43978da2e66e"
