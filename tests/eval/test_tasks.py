"""Filters, metrics and tables on hand-made predictions."""

import pytest

from data_pipeline.sources.documents import Problem
from data_pipeline.tasks.causal_loop import Sample, generate, majority_answer, one_step_answer
from eval import babi, causal_loop, gsm8k, gsm8k_cot
from eval.run import select_tasks
from eval.scoring.results import TABLE_HEADER, TaskResult, build_report, format_table, table_rows
from eval.scoring.task import Options


@pytest.mark.parametrize(
    ("response", "strict", "flexible"),
    [
        (" She makes 9 * 2 = $<<9*2=18>>18.\n#### 18", "18", "18"),
        ("#### 1,234", "1234", "1234"),
        ("#### -7", "-7", "-7"),
        ("#### 72.", "72", "72"),
        ("#### 3.50", "3.50", "3.50"),
        ("#### 5\n#### 6", "5", "6"),  # strict takes the first, flexible the last
        ("The answer is $18.", gsm8k.NO_MATCH, "18"),
        ("It costs $1,000 or 7", gsm8k.NO_MATCH, "7"),
        ("####18", gsm8k.NO_MATCH, "18"),  # strict wants the space
        ("#### eighteen", gsm8k.NO_MATCH, gsm8k.NO_MATCH),
        ("", gsm8k.NO_MATCH, gsm8k.NO_MATCH),
        ("no digits -", gsm8k.NO_MATCH, gsm8k.NO_MATCH),
        ("-", gsm8k.NO_MATCH, gsm8k.NO_MATCH),
    ],
)
def test_gsm8k_filters(response, strict, flexible):
    assert gsm8k.normalize(gsm8k.extract_strict(response)) == strict
    assert gsm8k.normalize(gsm8k.extract_flexible(response)) == flexible


@pytest.mark.parametrize(
    ("response", "strict", "flexible"),
    [
        (" 2 + 2 = 4. The answer is 4.\n\n", "4", "4."),
        (" The answer is 1,234. The answer is 5.", "1,234.", "5."),
        (" The answer is 7", gsm8k.NO_MATCH, "7"),  # one more character must follow
        (" The answer is 12", "1", "12"),  # the pattern gives up a digit for it
        (" The answer is $9.", gsm8k.NO_MATCH, "$9."),
        (" the answer is 9.", gsm8k.NO_MATCH, "9."),
    ],
)
def test_gsm8k_cot_filters(response, strict, flexible):
    problem = Problem(id="0", prompt="Q: q\nA:", target=" 4")
    graded = gsm8k.grade(problem, response, gsm8k_cot.STRICT)
    assert graded["filtered_resps"] == {"strict-match": strict, "flexible-extract": flexible}
    assert graded["exact_match,strict-match"] == float(strict == "4")


def test_gsm8k_cot_takes_at_most_its_exemplars(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "2\\n#### 2"}\n')
    for bad in (9, -1):
        with pytest.raises(ValueError, match=f"num_fewshot is {bad}: it must be 0 to 8"):
            gsm8k_cot.load(Options(data=tmp_path / "test.jsonl", num_fewshot=bad))


def test_gsm8k_grade_compares_with_the_number_of_the_target():
    problem = Problem(id="0", prompt="Question: q\nAnswer:", target=" It is #9.\nSo 1,000.\n#### 1,000")
    right = gsm8k.grade(problem, " thus\n#### 1000.")
    assert (right["exact_match,strict-match"], right["exact_match,flexible-extract"]) == (1.0, 1.0)
    loose = gsm8k.grade(problem, " the answer is $1,000")
    assert (loose["exact_match,strict-match"], loose["exact_match,flexible-extract"]) == (0.0, 1.0)
    wrong = gsm8k.grade(problem, " #### 10000")
    assert (wrong["exact_match,strict-match"], wrong["exact_match,flexible-extract"]) == (0.0, 0.0)


def babi_problem(task: str, i: int, answer: str) -> Problem:
    return Problem(id=f"{task}-{i}", prompt="Passage: p", target=f" {answer}", group=task)


def test_babi_counts_failed_tasks_and_majority():
    # qa2: 20 questions with one wrong is an error of exactly 5%, not failed; 19 of 21 right is failed.
    problems = [babi_problem("qa10", i, "yes" if i < 14 else "no") for i in range(21)]
    problems += [babi_problem("qa2", i, "football") for i in range(20)]
    documents = babi.group_by_task(problems)
    assert list(documents) == ["qa2", "qa10"]
    samples = [
        babi.grade(problem, "  wrong" if i in (0, 25, 26) else f"{problem.target} ")
        for i, problem in enumerate(documents["qa2"] + documents["qa10"])
    ]
    steps = [float(i) for i in range(41)]
    pooled, qa2, qa10 = babi.summarize(samples, documents, {}, {"steps": steps})
    assert (qa2.steps, qa10.steps) == (steps[:20], steps[20:])
    assert pooled.baselines["chance"].value == pytest.approx((20 * 1 + 21 / 2) / 41)
    assert pooled.totals == {"failed_tasks,none": 1}
    assert sum(pooled.values["exact_match,stripped"]) == 38
    assert (sum(qa2.values["exact_match,stripped"]), sum(qa10.values["exact_match,stripped"])) == (19, 19)
    assert sum(pooled.values["exact_match,none"]) == 0  # as in lm-eval, the space after each answer counts
    assert (qa2.baselines["majority"].value, qa10.baselines["majority"].value) == (
        1.0,
        pytest.approx(14 / 21),
    )
    assert pooled.baselines["majority"].value == pytest.approx((20 + 14) / 41)


def reference_completions(samples: list[Sample]) -> tuple[list[str], list[str]]:
    return [s.completion_trace for s in samples], [s.completion_direct for s in samples]


def test_causal_loop_grades_references_as_right():
    samples = list(generate(40, [1, 2, 3, 4], seed=3, split="test"))
    graded = [
        causal_loop.grade(s, t, d) for s, t, d in zip(samples, *reference_completions(samples), strict=True)
    ]
    pooled, *levels = causal_loop.summarize(graded, samples, {}, {"steps": [1.0] * 40 + [2.0] * 40})
    assert [result.task for result in levels] == [f"causal_loop_level{level}" for level in (1, 2, 3, 4)]
    for result in (pooled, *levels):
        assert set(result.values["exact_match,trace"] + result.values["exact_match,direct"]) == {1.0}
    assert [sum(result.steps) for result in levels] == [30.0] * 4
    level2 = [sample for sample in samples if sample.level == 2]
    answer = majority_answer(level2)
    assert levels[1].baselines["majority"].value == sum(s.answer == answer for s in level2) / 10
    assert levels[1].baselines["one_step"].value == sum(one_step_answer(s) == s.answer for s in level2) / 10


@pytest.mark.parametrize(
    ("traced", "direct", "expected"),
    [
        (" K=3;\nAnswer: 7", " 7", (1.0, 1.0)),
        (" K=3;\nAnswer: 72", " 72", (0.0, 0.0)),
        (" K=3;\nAnswer: 7\nAnswer: 1", " 7;", (1.0, 1.0)),  # the first answer counts
        (" K=3; 7", "", (0.0, 0.0)),
        (" K=3;\nAnswer:7", "7", (0.0, 0.0)),
        ("", " x", (0.0, 0.0)),
    ],
)
def test_causal_loop_answer_parsing(traced, direct, expected):
    sample = next(generate(1, [1], seed=0, split="test"))
    seven = Sample(**{**vars(sample), "answer": 7})
    graded = causal_loop.grade(seven, traced, direct)
    assert (graded["exact_match,trace"], graded["exact_match,direct"]) == expected


def test_report_and_table(make_scorer):
    result = TaskResult(
        task="t",
        values={"acc,none": [1.0, 0.0, 0.0, 0.0], "acc_norm,none": [1.0, 1.0, 1.0, 1.0]},
        num_documents=9,
        baselines={},
        totals={"failed_tasks,none": 3},
        num_fewshot=2,
    )
    single = TaskResult(task="one", values={"acc,none": [1.0]}, num_documents=1, baselines={})
    report = build_report([result, single], make_scorer(), {"limit": 4})
    assert report["results"]["t"]["acc,none"] == 0.25
    assert report["results"]["t"]["acc_stderr,none"] == pytest.approx((0.25 * 0.75 / 3) ** 0.5)
    assert report["results"]["one"]["acc_stderr,none"] == "N/A"
    assert report["n-samples"]["t"] == {"original": 9, "effective": 4}
    assert report["n-shot"]["t"] == 2
    assert report["higher_is_better"]["t"] == {"acc": True, "acc_norm": True, "failed_tasks": False}
    assert report["config"]["num_steps"] == 2
    rows = table_rows(report)
    assert rows[0] == ("t", "4", "2", "none", "acc", "0.25", "0.2500", "")
    assert rows[2][4:7] == ("failed_tasks", "3", "N/A")
    lines = format_table(TABLE_HEADER, rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 2 + len(rows)


def test_unknown_task_names_the_nearest():
    assert [task.name for task in select_tasks("math,arc,gsm8k")] == ["math", "arc", "gsm8k"]
    with pytest.raises(ValueError, match="has gsm8k twice: name it once"):
        select_tasks("gsm8k,arc,gsm8k")
    with pytest.raises(ValueError, match="arc is arc_easy and arc_challenge"):
        select_tasks("arc,arc_easy")
    with pytest.raises(ValueError, match="no task 'gsm8': did you mean 'gsm8k'?"):
        select_tasks("arc,gsm8")
    with pytest.raises(ValueError, match="no task '': known: .*arc, arc_challenge, arc_easy"):
        select_tasks("arc,")
