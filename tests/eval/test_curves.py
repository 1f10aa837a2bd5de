"""Several depths and shots in one call, majority votes, resuming, baselines, training data."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.sources.documents import Problem
from eval import gsm8k, gsm8k_cot
from eval.scoring.cli import make_parser
from eval.scoring.generation import Ballot, majority_vote, sample_votes
from eval.scoring.task import Options
from eval.scoring.training_data import decontamination, read_training_data
from model import RecurrenceConfig, ZeroModel

from .conftest import tiny_config
from .test_scripts import assert_error_line, results_of, samples_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of two sets."""
    root = tmp_path_factory.mktemp("sets")
    for name in ("gsm8k", "arc"):
        (root / name).mkdir()
    for name, count in (("train", 4), ("test", 3)):
        lines = [
            json.dumps({"question": f"{i} + 1?", "answer": f"One more.\n#### {i}"}) for i in range(count)
        ]
        (root / "gsm8k" / f"{name}.jsonl").write_text("\n".join([*lines, lines[-1]]))
    for name, key in (("Train", "B"), ("Test", "A")):
        lines = [
            {"id": f"{name}{i}", "answerKey": answer, "question": {"stem": f"Which of {i}?", "choices": [
                {"text": text, "label": label}
                for text, label in (("Sun", "A"), ("rain water", "B"), ("it", "C"))]}}
            for i, answer in enumerate([key, "B", key])
        ]  # fmt: skip
        (root / "arc" / f"ARC-Easy-{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def test_depths_and_shots_in_one_results_file(checkpoint, data, tmp_path, run_script, capsys):
    """Each equals a call of its own; every setting is recorded next to its name."""
    common = (
        "run.py",
        "--checkpoint",
        checkpoint,
        "--data",
        data,
        "--tasks",
        "arc_easy,gsm8k",
        "--max_new_tokens",
        4,
    )
    run_script(
        *common, "--num_steps", "1,2,adaptive", "--num_fewshot", "0,1", "--output_path", tmp_path / "all",
        "--log_samples",
    )  # fmt: skip
    results, printed = results_of(tmp_path / "all"), capsys.readouterr().out
    names = [f"{task}{suffix}" for task, suffixes in (
        ("arc_easy", ("@num_steps=1", "", "@num_steps=adaptive",
                      "@num_steps=1,shots=1", "@shots=1", "@num_steps=adaptive,shots=1")),
        # gsm8k's own number is 5
        ("gsm8k", ("@num_steps=1,shots=0", "@shots=0", "@num_steps=adaptive,shots=0",
                   "@num_steps=1,shots=1", "@shots=1", "@num_steps=adaptive,shots=1")),
    ) for suffix in suffixes]  # fmt: skip
    assert list(results["results"]) == names
    found = [
        tuple(results["configs"][name][key] for key in ("task", "num_steps", "num_fewshot")) for name in names
    ]
    assert found == [
        (task, num_steps, shots)
        for task in ("arc_easy", "gsm8k") for shots in (0, 1)
        for num_steps in (1, 2, "adaptive")
    ]  # fmt: skip
    for name in names:
        entry = results["results"][name]
        num_steps = results["configs"][name]["num_steps"]
        assert entry["num_steps"] == num_steps
        assert entry["mean_steps"] == num_steps if num_steps != "adaptive" else 1 <= entry["mean_steps"] <= 2
        assert entry["seconds_per_answer"] > 0
        assert f"| {name} " in printed
    run_script(
        *common, "--num_steps", 1, "--num_fewshot", 1, "--output_path", tmp_path / "one", "--log_samples"
    )
    alone = results_of(tmp_path / "one")
    assert list(alone["results"]) == [
        "arc_easy@num_steps=1",
        "gsm8k@num_steps=1",
    ]  # one number of shots adds no suffix
    for task in ("arc_easy", "gsm8k"):
        ours = samples_of(tmp_path / "all", f"{task}@num_steps=1,shots=1")
        theirs = samples_of(tmp_path / "one", f"{task}@num_steps=1")
        assert [line["prompt"] for line in ours] == [line["prompt"] for line in theirs]
        assert [line["resps"] for line in ours] == [line["resps"] for line in theirs]
    assert samples_of(tmp_path / "all", "arc_easy@num_steps=1") != samples_of(tmp_path / "all", "arc_easy")


def test_model_without_recurrence_runs_once(tmp_path, checkpoint, data, run_script, capsys):
    """No depth, no steps, no suffix; any depth but 1 is refused before anything is computed."""
    folder = tmp_path / "plain"
    shutil.copytree(checkpoint, folder)
    config = tiny_config(json.loads((folder / "config.json").read_text())["vocab_size"])
    ZeroModel(replace(config, recurrence=RecurrenceConfig())).save_pretrained(folder)
    common = ("run.py", "--checkpoint", folder, "--data", data, "--tasks", "arc_easy")
    run_script(*common, "--num_steps", 1, "--output_path", tmp_path / "out")
    results = results_of(tmp_path / "out")
    assert list(results["results"]) == ["arc_easy"]
    assert results["results"]["arc_easy"]["mean_steps"] is None
    for table in ("results", "configs"):
        assert results[table]["arc_easy"]["num_steps"] is None
    with pytest.raises(SystemExit) as exit_:
        run_script(*common, "--num_steps", "1,4")
    assert_error_line(exit_.value, capsys, "num_steps is 4: a model without recurrence")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_steps", "0"], "argument --num_steps: is 0, at least 1 is needed"),
        (["--num_steps", "1,adaptve"], "argument --num_steps: has 'adaptve', which is not a number of loop"),
        (["--num_steps", "4,4"], "argument --num_steps: names '4' twice"),
        (["--num_steps", ""], "argument --num_steps: has '', which is not a number of loop steps"),
        (["--num_steps", "1.5"], "argument --num_steps: has '1.5'"),
        (["--num_fewshot", "0,-1"], "argument --num_fewshot: is -1, at least 0 is needed"),
        (["--num_fewshot", "0,"], "argument --num_fewshot: has '', which is not a number of examples"),
        (["--num_fewshot", "0,99"], "num_fewshot is 99: it must be 0 to"),
        (["--samples", "0"], "argument --samples: is 0"),
        (["--num_processes", "0"], "argument --num_processes: is 0"),
        (["--tasks", "arc_easy", "--samples", "2"], "--samples 2: no task of arc_easy generates answers"),
        (["--tasks", "gsmk"], "there is no task 'gsmk': did you mean 'gsm8k'?"),
        (["--tasks", "perplexty"], "did you mean 'perplexity'?"),
    ],
)  # fmt: skip
def test_bad_lists_are_one_line(checkpoint, data, run_script, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        run_script("run.py", "--checkpoint", checkpoint, "--data", data, "--tasks", "gsm8k", *arguments)
    assert_error_line(exit_.value, capsys, message)


def test_num_steps_has_two_aliases():
    parser = make_parser(None)
    for flag in ("--num_steps", "--depth", "--steps"):
        args = parser.parse_args(["--checkpoint", "export", flag, "1,adaptive"])
        assert args.num_steps == [1, "adaptive"]
    assert "--depth" not in parser.format_help()


# ---- majority vote


@pytest.mark.parametrize(
    ("votes", "right"),
    [
        ([("a", 1.0)], 1.0),
        ([("a", 0.0), ("b", 1.0), ("b", 1.0)], 1.0),
        ([("b", 1.0), ("a", 0.0)], 1.0),  # of equals the first seen
        ([("a", 0.0), ("b", 1.0)], 0.0),
        ([("a", 0.0), ("b", 1.0), ("b", 1.0), ("a", 0.0)], 0.0),
        ([(None, 0.0), (None, 0.0), ("b", 1.0)], 1.0),  # no answer is no vote
        ([(None, 0.0)] * 3, 0.0),
    ],
)
def test_majority_vote(votes, right):
    assert majority_vote([Ballot(*vote) for vote in votes]) == right


def test_votes_of_a_prompt_are_its_own_samples():
    """Sample k of prompt i comes from row k n + i of the call, so that more samples keep the first ones."""

    class Rows:
        def generate(self, prompts, max_new_tokens, stop, temperature, seed):
            assert (temperature, seed) == (0.7, 9)
            return [f"{prompt} {i // 3}" for i, prompt in enumerate(prompts)]

        def take_truncated(self):
            return 0

        def take_steps(self):
            return []

        def take_seconds(self):
            return 12.0

    lines, facts = sample_votes(
        Rows(),
        ["x", "y", "z"],
        5,
        (),
        Options(samples=4, seed=9),
        lambda i, text: Ballot(text, float(i == 1)),
    )
    assert lines[1]["sampled_resps"] == ["y 0", "y 1", "y 2", "y 3"]
    assert [line["exact_match,maj@4"] for line in lines] == [0.0, 1.0, 0.0]
    assert facts == {"num_samples": 4, "temperature": 0.7, "seconds_per_vote": 4.0}


def test_gsm8k_votes_by_the_strict_number():
    problem = Problem(id="0", prompt="Q", target=" 1,000\n#### 1,000")
    lines = [gsm8k.grade(problem, text) for text in ("#### 1,000", "It is 5", "#### 1000.", "#### 7")]
    assert [gsm8k.ballot(line) for line in lines] == [("1000", 1.0), (None, 0.0), ("1000", 1.0), ("7", 0.0)]


def test_vote_beside_greedy_of_every_generating_task(checkpoint, data, data_root, tmp_path, run_script):
    run_script(
        "run.py", "--checkpoint", checkpoint, "--data", data_root,
        "--tasks", "gsm8k,gsm8k_cot,babi,causal_loop", "--limit", 1, "--num_fewshot", 0,
        "--max_new_tokens", 6, "--samples", 3, "--output_path", tmp_path,
        "--log_samples",
    )  # fmt: skip
    results = results_of(tmp_path)
    for task in ("gsm8k", "gsm8k_cot", "babi", "babi_qa7", "causal_loop", "causal_loop_level2"):
        assert "exact_match_stderr,maj@3" in results["results"][task]
        assert results["configs"][task]["num_samples"] == 3
        assert {"chance", "majority"} <= set(results["baselines"][task])
    for line in samples_of(tmp_path, "babi"):
        votes = [text.strip() or None for text in line["sampled_resps"]]
        assert line["votes"] == votes
        ballots = [Ballot(vote, float(vote == line["target"].strip())) for vote in votes]
        assert line["exact_match,maj@3"] == majority_vote(ballots)
    # hot samples differ from the greedy answer and from each other
    assert len({text for line in samples_of(tmp_path, "gsm8k_cot") for text in line["sampled_resps"]}) == 3


# ---- resuming


def test_interrupted_evaluation_goes_on(checkpoint, data, tmp_path, run_script, monkeypatch, capsys):
    """Killed in the second task: the first is not computed again, and the results are the same."""
    common = ("run.py", "--checkpoint", checkpoint, "--data", data, "--tasks", "arc_easy,gsm8k_cot",
              "--max_new_tokens", 4, "--num_fewshot", 1, "--log_samples")  # fmt: skip
    run_script(*common, "--output_path", tmp_path / "whole")

    def interrupted(*arguments, **fields):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gsm8k_cot, "summarize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_script(*common, "--output_path", tmp_path / "broken")
    assert list((tmp_path / "broken").glob("unfinished_*.jsonl"))
    assert not list((tmp_path / "broken").glob("results_*.json"))
    capsys.readouterr()

    def recomputed(*arguments):
        raise AssertionError("an answer was computed twice")

    monkeypatch.setattr("eval.scoring.inference.Engine.run", recomputed)
    run_script(*common, "--output_path", tmp_path / "broken")
    assert "answers of an interrupted evaluation are reused" in capsys.readouterr().out
    assert not list((tmp_path / "broken").glob("unfinished_*.jsonl"))
    for task in ("arc_easy", "gsm8k_cot"):
        assert samples_of(tmp_path / "broken", task) == samples_of(tmp_path / "whole", task)


# ---- baselines and training data


def test_majority_baselines(checkpoint, data, tmp_path, run_script):
    """Counted over the whole file, also under --limit: ARC's letters A, B, A; GSM8K's numbers 0, 1, 2, 2."""
    run_script(
        "run.py", "--checkpoint", checkpoint, "--data", data, "--tasks", "arc_easy,gsm8k", "--limit", 1,
        "--num_fewshot", 0, "--max_new_tokens", 1, "--output_path", tmp_path,
    )  # fmt: skip
    baselines = results_of(tmp_path)["baselines"]
    assert baselines["arc_easy"]["majority"]["value"] == pytest.approx(2 / 3)
    assert baselines["arc_easy"]["chance"]["value"] == pytest.approx(1 / 3)
    assert baselines["gsm8k"]["majority"]["value"] == 0.5
    assert results_of(tmp_path)["config"]["decontamination"].startswith("unknown: the checkpoint names no")


def test_training_data_of_an_export(data_folder, tmp_path):
    """What pretrain/export.py writes of a real manifest is what evaluation reads."""
    from data_pipeline.shards.manifest import open_manifest
    from pretrain.export import describe_data

    manifest = open_manifest(data_folder)
    (tmp_path / "training_data.json").write_text(json.dumps(describe_data(manifest)))
    found = read_training_data(tmp_path)
    assert found["manifest_sha256"] == manifest.sha256
    (source,) = found["sources"].values()
    assert source["tokens"] > 0
    assert decontamination(found) == f"none: {next(iter(found['sources']))} not cleaned of test problems"
    manifest.recipe["sources"][0]["cleaning"] = ["exact", "decontaminate"]
    cleaned = describe_data(manifest)
    assert decontamination(cleaned).startswith(
        f"all: {next(iter(cleaned['sources']))} cleaned of the problems of gsm8k/test"
    )
    cleaned["sources"]["other"] = {"decontaminated": False}
    assert decontamination(cleaned).startswith("in part: ")
    assert decontamination(cleaned).endswith("; not other")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"sources": 3, "manifest_sha256": "", "decontaminated_against": []}']
)
def test_damaged_training_data_is_one_line(checkpoint, tmp_path, run_script, capsys, content):
    broken = tmp_path / "export"
    shutil.copytree(checkpoint, broken)
    (broken / "training_data.json").write_text(content)
    with pytest.raises(SystemExit) as exit_:
        run_script("causal_loop.py", "--checkpoint", broken, "--num_samples", 1)
    assert_error_line(exit_.value, capsys, "training_data.json is damaged")
