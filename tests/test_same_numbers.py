"""bench/same_numbers.py: that a digit, a missing value and another prompt are found, and nothing else."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
RECORD = {"demo": {"training": {"step 1": {"loss": 5.941263645311381, "expert_load": [[0.25, 0.75], []]}}}}
LINES = [
    {"doc_id": "a", "prompt": "1+1=", "target": "2", "resps": [-1.5, -2.5], "filtered_resps": [0, 0]},
    {"doc_id": "b", "prompt": "1+2=\u2028", "target": "3", "resps": "3"},
]


@pytest.fixture
def module(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import same_numbers

    return same_numbers


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    record = json.loads(json.dumps(RECORD))
    change(record["demo"]["training"]["step 1"])
    return record


def compare(folder: Path, before: Any, after: Any) -> subprocess.CompletedProcess[str]:
    """As a user runs it."""
    files = [folder / "before.json", folder / "after.json"]
    for file, record in zip(files, (before, after), strict=True):
        file.write_text(json.dumps(record))
    command = [sys.executable, str(BENCH / "same_numbers.py"), "compare", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_equal_records(tmp_path):
    done = compare(tmp_path, RECORD, RECORD)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:] == ["demo              4          0"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda step: step.update(loss=5.941263645311382), "loss: 5.941263645311381 -> 5.941263645311382"),
        (
            lambda step: step.update(loss="5.941263645311381"),
            'loss: 5.941263645311381 -> "5.941263645311381"',
        ),
        (lambda step: step.pop("loss"), "loss: 5.941263645311381 -> absent"),
        (lambda step: step.update(new=None), "new: absent -> null"),
        (lambda step: step["expert_load"][0].reverse(), "expert_load > 0 > 0: 0.25 -> 0.75"),
        (lambda step: step["expert_load"].pop(), "expert_load > 1: [] -> absent"),
    ],
)
def test_a_difference_is_named(tmp_path, change, difference):
    done = compare(tmp_path, RECORD, changed(change))
    assert (done.returncode, done.stderr) == (1, "")
    assert f"demo > training > step 1 > {difference}" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ({}, {}, "a record has nothing in it: record it again"),
        (RECORD, {"left_out": {}}, "a record has nothing in it: record it again"),
        ({"demo": {}}, {"demo": {}}, "a record has nothing in demo: record it again"),
        (
            RECORD,
            {**RECORD, "text": {"a": 1}},
            "one record has demo, the other demo,text: record both with the same --only",
        ),
    ],
)
def test_records_that_cannot_be_compared(tmp_path, before, after, complaint):
    done = compare(tmp_path, before, after)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {complaint}\n")


def test_what_was_left_out_is_told(tmp_path):
    """An evaluation that only the later checkout has is no difference; one that it lost is."""
    old = {"prompts": {"run": {"lines": 1}}, "left_out": {"run later": "the checkout has no task x"}}
    new = {"prompts": {"run": {"lines": 1}, "run later": {"lines": 2}}}
    done = compare(tmp_path, old, new)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:] == [
        "prompts           1          0",
        "prompts > run later: only in the second record, not compared",
        "left out of the first: run later (the checkout has no task x)",
    ]
    done = compare(tmp_path, new, old)
    assert done.returncode == 1
    assert "prompts > run later > lines: 2 -> absent" in done.stdout.splitlines()


def write_answers(
    folder: Path, lines: list[dict[str, Any]], timestamp: str = "2026-01-01T00-00-00.5"
) -> Path:
    folder.mkdir()
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / f"samples_arc_easy@depth=2_{timestamp}.jsonl").write_text(text)
    scores = {"acc,none": 0.5, "acc,num_steps=2": 0.25, "num_steps": 2, "seconds_per_answer": 1.0}
    (folder / f"results_{timestamp}.json").write_text(
        json.dumps({"results": {"arc_easy@num_steps=2": scores}})
    )
    return folder


def test_digests_of_samples(module, tmp_path):
    found = module.evaluation(write_answers(tmp_path / "one", LINES))
    assert found["scores"] == {"arc_easy@depth=2": {"acc,none": 0.5, "acc,steps=2": 0.25, "depth": 2}}
    assert list(found["samples"]) == ["arc_easy@depth=2"]
    same = found["samples"]["arc_easy@depth=2"]
    assert same["lines"] == 2
    later = "2027-12-31T23-59-59.123456"
    assert module.evaluation(write_answers(tmp_path / "two", LINES[::-1], later)) == found

    def with_first(**values: Any) -> dict[str, Any]:
        lines = [{**LINES[0], **values}, LINES[1]]
        return module.evaluation(write_answers(tmp_path / "-".join(values), lines))["samples"][
            "arc_easy@depth=2"
        ]

    assert with_first(seconds=3.0) == same
    for values, key in (
        ({"prompt": "1+1= "}, "prompts"),
        ({"target": "3"}, "prompts"),
        ({"resps": [-1.5, -2.5000000000000004]}, "answers"),
        ({"filtered_resps": [0, 1]}, "answers"),
    ):
        assert {k for k, value in with_first(**values).items() if value != same[k]} == {key}
    (tmp_path / "none").mkdir()
    with pytest.raises(module.RecordError, match="has 0 results and 0 samples files"):
        module.evaluation(tmp_path / "none")


def test_metrics_without_clocks(module, tmp_path):
    step = {"step": 1, "loss": 0.1, "lr": 1e-5, "seconds": 2.0, "tokens_per_second": 9.0, "mfu": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    assert module.metrics(tmp_path, 1) == {"step 1": {"loss": 0.1, "lr": 1e-5}}
    with pytest.raises(module.RecordError, match="has 1 lines, not 2"):
        module.metrics(tmp_path, 2)


def test_a_failed_command_is_shown_with_its_last_lines(module, tmp_path):
    (tmp_path / "fails.py").write_text("import sys\nprint('early')\nsys.exit('no such key')")
    side = module.Side(tmp_path, tmp_path / "work", {})
    with pytest.raises(module.RecordError, match=r"code 1: python fails\.py --x 3\nearly\nno such key"):
        side.call("python fails.py --x {x}", tmp_path / "work/out", x=3)


def test_a_renamed_flag(module, tmp_path):
    told = "import sys\nprint('{}') if '--help' in sys.argv else open('flags', 'w').write(' '.join(sys.argv))"
    for flags, used in (("--steps --num_steps", "--steps"), ("--num_steps", "--num_steps")):
        (tmp_path / "script.py").write_text(told.format(flags))
        module.Side(tmp_path, tmp_path / "work", {}).call("python script.py --steps 1", tmp_path / "work/out")
        assert (tmp_path / "flags").read_text() == f"script.py {used} 1"


def test_the_tasks_that_a_script_lacks(module, tmp_path):
    (tmp_path / "script.py").write_text("print('--task {p_hop,sums}  of babi, arc,\\n  gsm8k_cot')")
    side = module.Side(tmp_path, tmp_path / "work", {})
    assert side.lacks("script.py", ("p_hop", "hop", "sums", "gsm8k", "babi", "gsm8k_cot")) == ["hop", "gsm8k"]
