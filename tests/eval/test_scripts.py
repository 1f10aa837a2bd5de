"""The scripts as a user runs them: on real files, and with the mistakes a user makes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.tokenization.tokenizer import train_tokenizer
from eval.scoring.results import file_sha256

EVAL = Path(__file__).parents[2] / "eval"


def results_of(directory: Path) -> dict:
    (path,) = directory.glob("results_*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def samples_of(directory: Path, task: str) -> list[dict]:
    (path,) = directory.glob(f"samples_{task}_[0-9]*.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_script_in_its_own_process(checkpoint, data_root, tmp_path):
    command = [sys.executable, str(EVAL / "gsm8k.py"), "--checkpoint", str(checkpoint), "--limit", "2"]
    command += [
        "--output_path",
        str(tmp_path),
        "--log_samples",
        "--max_new_tokens",
        "8",
        "--num_fewshot",
        "1",
    ]
    environment = {**os.environ, "DATA_ROOT": str(data_root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "strict-match" in done.stdout
    results = results_of(tmp_path)
    assert results["n-samples"]["gsm8k"] == {"original": 1319, "effective": 2}
    assert results["n-shot"]["gsm8k"] == 1
    assert set(results["results"]["gsm8k"]) >= {"exact_match,strict-match", "exact_match_stderr,strict-match"}
    digest = file_sha256(data_root / "gsm8k" / "test.jsonl")
    exemplars = file_sha256(data_root / "gsm8k" / "train.jsonl")
    assert results["configs"]["gsm8k"]["data_sha256"] == {"test.jsonl": digest, "train.jsonl": exemplars}
    first, second = samples_of(tmp_path, "gsm8k")
    assert first["prompt"].count("Question: ") == 2
    assert first["prompt"].endswith("does she make every day at the farmers' market?\nAnswer:")
    assert first["target"].endswith("#### 18")
    assert first["prompt_hash"] != second["prompt_hash"]


def test_user_mistake_in_its_own_process(tmp_path):
    command = [sys.executable, str(EVAL / "gsm8k.py"), "--checkpoint", "nowhere", "--data", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no data file ")
    assert done.stderr.count("\n") == 1


def test_all_tasks_in_one_run(checkpoint, data_root, tmp_path, run_script, capsys):
    run_script(
        "run.py", "--checkpoint", checkpoint, "--tasks", "arc,logiqa,babi,gsm8k,gsm8k_cot,causal_loop",
        "--data", data_root, "--limit", 2, "--output_path", tmp_path, "--log_samples", "--max_new_tokens", 4,
    )  # fmt: skip
    results = results_of(tmp_path)
    assert list(results["results"])[:4] == ["arc_easy", "arc_challenge", "logiqa", "babi"]
    subtasks = [f"babi_qa{i}" for i in range(1, 21)]
    assert results["group_subtasks"]["babi"] == subtasks
    assert {
        name: n["original"] for name, n in results["n-samples"].items() if name in ("babi", *subtasks)
    } == {
        "babi": 20000,
        **dict.fromkeys(subtasks, 1000),
    }
    assert results["n-samples"]["babi"]["effective"] == 40
    for name, original in {"arc_easy": 2376, "arc_challenge": 1172, "logiqa": 651}.items():
        assert results["n-samples"][name]["original"] == original
    shots = {"arc_easy": 0, "arc_challenge": 0, "logiqa": 0, "babi": 0, "gsm8k": 5, "gsm8k_cot": 8}
    assert {name: results["n-shot"][name] for name in shots} == shots  # lm-eval's own
    assert results["baselines"]["logiqa"]["chance"]["value"] == 0.25
    assert results["config"]["num_steps"] == 2
    assert len(samples_of(tmp_path, "babi")) == 40
    assert len(samples_of(tmp_path, "causal_loop")) == 8
    for sample in samples_of(tmp_path, "logiqa"):
        assert len(sample["resps"]) == 4
        assert all(score < 0 for score in sample["resps"])
        assert sample["target"] == sample["choices"][sample["gold"]]
    printed = capsys.readouterr().out
    for task in results["results"]:
        assert f"| {task} " in printed


@pytest.mark.parametrize(
    ("script", "file", "task"),
    [
        ("arc.py", "arc/ARC-Challenge-Test.jsonl", "arc_challenge"),
        ("logiqa.py", "logiqa/Test.txt", "logiqa"),
        ("babi.py", "babi/tasks_1-20_v1-2.tar.gz", "babi"),
    ],
)
def test_data_may_be_the_file_itself(checkpoint, data_root, tmp_path, run_script, script, file, task):
    run_script(
        script, "--checkpoint", checkpoint, "--data", data_root / file, "--limit", 1, "--batch_size", 3,
        "--output_path", tmp_path / "new" / "folder", "--num_fewshot", 0 if task == "babi" else 2,
    )  # fmt: skip
    results = results_of(tmp_path / "new" / "folder")
    assert next(iter(results["results"])) == task
    assert results["config"]["batch_size"] == 3
    assert results["configs"][task]["data_sha256"][Path(file).name] == file_sha256(data_root / file)


def test_causal_loop_without_data(checkpoint, tmp_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_ROOT", raising=False)
    run_script(
        "causal_loop.py", "--checkpoint", checkpoint, "--num_samples", 3, "--levels", "1,3", "--seed", 5,
        "--output_path", "out",
    )  # fmt: skip
    results = results_of(tmp_path / "out")
    assert list(results["results"]) == ["causal_loop", "causal_loop_level1", "causal_loop_level3"]
    assert results["n-samples"]["causal_loop_level3"]["effective"] == 3
    assert not list((tmp_path / "out").glob("samples_*"))


def broken_checkpoints(checkpoint: Path, directory: Path) -> dict[str, Path]:
    made = {}
    for name in (
        "cut weights",
        "no weights",
        "no config",
        "no tokenizer",
        "bad tokenizer",
        "other tokenizer",
    ):
        made[name] = directory / name.replace(" ", "_")
        shutil.copytree(checkpoint, made[name])
    weights = made["cut weights"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (made["no weights"] / "model.safetensors").unlink()
    (made["no config"] / "config.json").unlink()
    (made["no tokenizer"] / "tokenizer.model").unlink()
    (made["bad tokenizer"] / "tokenizer.model").write_bytes(b"not a model")
    other = train_tokenizer(["abc abd " * 50], vocab_size=270)
    (made["other tokenizer"] / "tokenizer.model").write_bytes(other)
    return made


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut weights", "model.safetensors"),
        ("no weights", "model.safetensors"),
        ("no config", "config.json"),
        ("no tokenizer", "tokenizer.model"),
        ("bad tokenizer", "tokenizer.model"),
        ("other tokenizer", "the tokenizer has vocab_size"),
    ],
)
def test_broken_checkpoint_is_one_line(checkpoint, tmp_path, run_script, capsys, name, message):
    broken = broken_checkpoints(checkpoint, tmp_path)[name]
    with pytest.raises(SystemExit) as exit_:
        run_script("causal_loop.py", "--checkpoint", broken, "--num_samples", 1)
    assert_error_line(exit_.value, capsys, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "argument --limit: is 0, at least 1 is needed"),
        (["--limit", "x"], "argument --limit: invalid"),
        (["--batch_size", "-3"], "argument --batch_size: is -3"),
        (["--num_fewshot", "-1"], "argument --num_fewshot: is -1, at least 0 is needed"),
        (["--num_fewshot", "10000"], "num_fewshot is 10000: it must be 0 to 3"),
        (["--max_new_tokens", "4096"], "max_new_tokens is 4096"),
        (["--log_samples"], "--log_samples needs --output_path"),
        (["--checkpoint", "nowhere"], "no checkpoint folder nowhere"),
        (["--data", "nowhere"], "no data file nowhere"),
        (["--output_path", __file__], "File exists"),
        (["--flag"], "unrecognized arguments: --flag"),
    ],
)
def test_wrong_flags_are_one_line(checkpoint, tmp_path, run_script, capsys, arguments, message):
    (tmp_path / "gsm8k").mkdir()
    for name, count in (("train", 3), ("test", 2)):
        line = json.dumps({"question": "1 + 1?", "answer": "2\n#### 2"}) + "\n"
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text(line * count)
    common = ["--checkpoint", checkpoint, "--data", tmp_path, "--limit", 1, "--max_new_tokens", 2]
    common += ["--num_fewshot", 0]
    with pytest.raises(SystemExit) as exit_:
        run_script("gsm8k.py", *common, *arguments)
    assert_error_line(exit_.value, capsys, message)


@pytest.mark.parametrize(
    ("script", "content"),
    [
        ("gsm8k.py", b'{"question": "q"}\n'),
        ("gsm8k.py", b"not json\n"),
        ("gsm8k.py", b""),
        ("gsm8k.py", b"\xff\xfe"),
        ("logiqa.py", b"\na\ncontext\n"),
        ("logiqa.py", b""),
        ("arc.py", b'{"id": "1", "answerKey": "Z"}\n'),
        ("arc.py", b""),
        ("babi.py", b"no archive"),
        ("babi.py", b""),
    ],
)
def test_data_of_the_wrong_format_is_one_line(checkpoint, tmp_path, run_script, capsys, script, content):
    path = tmp_path / "ARC-Easy-Test.jsonl"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        run_script(script, "--checkpoint", checkpoint, "--data", path)
    assert_error_line(exit_.value, capsys, path.name)


def test_arc_file_of_another_name_is_refused(checkpoint, tmp_path, run_script, capsys):
    (tmp_path / "test.jsonl").touch()
    with pytest.raises(SystemExit) as exit_:
        run_script("arc.py", "--checkpoint", checkpoint, "--data", tmp_path / "test.jsonl")
    assert_error_line(exit_.value, capsys, "which set is test.jsonl?")


def test_causal_loop_takes_no_exemplars_and_four_levels(checkpoint, run_script, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_script("run.py", "--checkpoint", checkpoint, "--tasks", "causal_loop", "--num_fewshot", 1)
    assert_error_line(exit_.value, capsys, "causal_loop has no exemplars")
    with pytest.raises(SystemExit) as exit_:
        run_script("causal_loop.py", "--checkpoint", checkpoint, "--levels", "1,5")
    assert_error_line(exit_.value, capsys, "5")


def assert_error_line(exit_: SystemExit, capsys: pytest.CaptureFixture[str], message: str) -> None:
    assert exit_.code == 2
    captured = capsys.readouterr()
    # A progress bar may stand before it; the line itself is the last one.
    lines = captured.err.replace("\r", "\n").splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert "Traceback" not in captured.err
