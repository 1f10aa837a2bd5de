"""eval/thoughts.py as a user runs it, with a model whose answers are known and with mistakes."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.sources.documents import TracedDocument
from data_pipeline.tasks import causal_loop_v2
from data_pipeline.tasks.programs.causal_loop_v2_audit import one_step_answer
from data_pipeline.tokenization.tokenizer import BOS_ID, BOT_ID, EOS_ID, EOT_ID, Tokenizer
from eval import thoughts
from eval.reports.runs import read_results
from eval.thinking.answers import SPARE_TOKENS
from eval.thinking.tasks import generated_questions, published_questions
from model import ModelConfig, ZeroModel

from .thinkers import KINDS, SIZE, SMALL, C, T, encoded, write_random_model, write_tokenizer

FLAGS = ["--task", "causal_loop_v2", "--task_options", "max_depth=4,variables=4,statements=6"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["thoughts.py", *map(str, arguments)])
    thoughts.main(thoughts.TASK, thoughts.__doc__)


def report_in(directory: Path) -> dict:
    (path,) = directory.glob("results_*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def samples_in(directory: Path, task: str) -> list[dict]:
    (path,) = directory.glob(f"samples_{task}_[0-9]*.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def taught(model: ZeroModel, tokenizer: Tokenizer, documents: list[TracedDocument]) -> None:
    """Teaches `CmA4 <eot> Answer: 3` after every question, with a trace and without one."""
    answer = [EOT_ID, *tokenizer.encode("\nAnswer: 3"), EOS_ID]
    rows, targets = [], []
    for document in documents:
        question = [BOS_ID, *tokenizer.encode(document.question), BOT_ID]
        for trace in (tokenizer.encode("CmA4"), []):
            row = question + trace + answer
            rows.append(row + [0] * (len(question) + 40 - len(row)))
            start = len(question) + (not trace)  # whether to write <eot> at once is not to be learned
            targets.append([-100] * start + row[start:] + [-100] * (len(rows[-1]) - len(row)))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    tokens, wanted = torch.tensor(rows), torch.tensor(targets)
    for _ in range(400):
        logits: Tensor = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 5e-3:
            return
    raise AssertionError(f"the answer was not learned: {loss}")


@pytest.fixture(scope="module")
def constant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that answers 3 to everything, in every mode."""
    folder = tmp_path_factory.mktemp("constant") / "export"
    tokenizer = write_tokenizer(folder)
    config = {**SMALL, **KINDS["thinker"], "vocab_size": tokenizer.vocab_size, "initializer_range": 0.05}
    model = ZeroModel(ModelConfig.from_dict(config), seed=1)
    data = generated_questions("causal_loop_v2", 16, 1, SIZE)
    taught(model.train(), tokenizer, [question.reference for question in data.questions])
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_random_model(tmp_path_factory.mktemp(kind) / "export", kind) for kind in KINDS}


@pytest.mark.parametrize("mode", ["thoughts", "cot", "none"])
def test_command(constant, mode, tmp_path, monkeypatch, capsys):
    run(
        monkeypatch, "--checkpoint", constant, *FLAGS, "--num_samples", 22, "--mode", mode, "--seed", 7,
        "--batch_size", 8, "--output_path", tmp_path, "--log_samples",
    )  # fmt: skip
    samples = list(
        causal_loop_v2.generate(22, range(1, 5), ("chain", "convergence"), 7, 4, 6, seed=7, split="test")
    )
    name = "thoughts_causal_loop_v2" + ("" if mode == "thoughts" else f"@mode={mode}")
    report, lines = report_in(tmp_path), samples_in(tmp_path, name)
    assert [line["prompt"] for line in lines] == [f"{s.program}?{s.question}" for s in samples]
    assert [line["filtered_resps"] for line in lines] == ["3"] * 22
    assert 0 < sum(line["acc"] for line in lines) < 22
    parts = report["group_subtasks"][name]
    assert parts == [name.replace("_v2", f"_v2_problem_depth{d}") for d in range(1, 5)]
    for task, depths in ((name, range(1, 5)), *((part, [d]) for d, part in enumerate(parts, start=1))):
        members = [i for i, s in enumerate(samples) if s.depth in depths]
        n, found = len(members), report["results"][task]
        share = sum(samples[i].answer == 3 for i in members) / n
        assert found["acc,none"] == pytest.approx(share)
        assert found["acc_stderr,none"] == pytest.approx(math.sqrt(share * (1 - share) / (n - 1)))
        baselines = {key: score["value"] for key, score in report["baselines"][task].items()}
        answers = [samples[i].answer for i in members]
        assert baselines == {
            "chance": pytest.approx(1 / 7),
            "majority": pytest.approx(max(map(answers.count, answers)) / n),
            "one step": pytest.approx(
                sum(one_step_answer(samples[i]) == samples[i].answer for i in members) / n
            ),
        }
        for metric in ("forward_passes", "generated_tokens", "cache_bytes", "peak_cache_bytes"):
            mean = sum(lines[i][metric] for i in members) / n
            assert found[f"{metric},none"] == pytest.approx(mean)
        assert found["latency_seconds,batch=8"] > 0
        assert found["latency_seconds,batch=1"] > 0
        config = report["configs"][task]
        assert (config["mode"], config["problem_depth"]) == (mode, None if task == name else depths[0])
        of_thoughts = (C, T, "jacobi") if mode == "thoughts" else (None, None, None)
        assert tuple(config[key] for key in ("num_latents", "num_iterations", "feedback")) == of_thoughts
        assert config["replace"] is config["kv_budget"] is config["kv_buffer"] is None
    written = {"cot": 4 + 1, "thoughts": 0, "none": 0}[mode] + len("\nAnswer: 3") + 1
    thinking = 1 + 1 + T + 1 if mode == "thoughts" else 1  # question, iteration 0, T more, <eot>
    assert {line["generated_tokens"] for line in lines} == {written}
    assert {line["forward_passes"] for line in lines} == {thinking + written - 1}
    for result in read_results(report):  # for eval/report.py
        assert (result.main, result.group) == ("acc,none", None if result.task == name else name)
    printed = capsys.readouterr().out
    assert f"| {name} " in printed
    assert "forward passes" in printed


def test_several_ways_in_one_call(constant, exports, tmp_path, monkeypatch):
    common = ["--checkpoint", constant, *FLAGS, "--num_samples", 8, "--output_path"]
    latents = ["--num_latents", "2,4", "--num_iterations", "0,3", "--replace", "shuffled"]
    run(monkeypatch, *common, tmp_path / "a", *latents, "--batch_size", 4)
    report = report_in(tmp_path / "a")
    base = "thoughts_causal_loop_v2"
    named = {
        f"{base}@num_latents={c},num_iterations={t},replace=shuffled": (c, t) for c in (2, 4) for t in (0, 3)
    }
    assert [name for name in report["results"] if "depth" not in name] == list(named)
    for name, (c, t) in named.items():
        config, found = report["configs"][name], report["results"][name]
        assert (config["num_latents"], config["num_iterations"], config["replace"]) == (c, t, "shuffled")
        # The question, the iterations, the shuffled latents, and a pass for each token of the answer.
        assert found["forward_passes,none"] == 1 + (1 + t) + 1 + found["generated_tokens,none"]
        assert "latency_seconds,batch=1" not in found
    run(
        monkeypatch, "--checkpoint", exports["teacher"], *FLAGS, "--num_samples", 8, "--output_path",
        tmp_path / "b", "--kv_budget", "9,60", "--kv_buffer", 2, "--max_new_tokens", 50,
    )  # fmt: skip
    report = report_in(tmp_path / "b")
    small, large = (report["results"][f"{base}@kv_budget={n},kv_buffer=2"] for n in (9, 60))
    assert small["peak_cache_bytes,none"] < large["peak_cache_bytes,none"]
    config = report["configs"][f"{base}@kv_budget=9,kv_buffer=2"]
    assert (config["mode"], config["kv_budget"], config["kv_buffer"]) == ("cot", 9, 2)


@pytest.mark.parametrize("task", ["gsm8k", "icot", "prosqa"])
def test_published_data_by_command(constant, data_root, task, tmp_path, monkeypatch):
    run(
        monkeypatch, "--checkpoint", constant, "--task", task, "--data", data_root, "--limit", 3,
        "--output_path", tmp_path, "--tolerance", 0.01,
    )  # fmt: skip
    report = report_in(tmp_path)
    name = f"thoughts_{task}@tolerance=0.01"
    assert report["n-samples"][name] == {"original": 500 if task == "prosqa" else 1319, "effective": 3}
    tokenizer = Tokenizer(constant / "tokenizer.model")
    data = published_questions(task, data_root, 3)
    longest = max(len(tokenizer.encode(f" {question.answer}")) for question in data.questions)
    room = 160 - (len("\nAnswer:") + longest + 1 + SPARE_TOKENS) - C - 1
    cut = sum(len(row) > room for row in encoded(tokenizer, data))
    assert report["configs"][name]["num_truncated"] == cut > 0
    assert len(report["configs"][name]["data_sha256"]) == 1


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("teacher", ["--mode", "thoughts"], "has no latent thoughts; choose cot or none"),
        ("teacher", ["--num_latents", "2"], "--num_latents 2 is for --mode thoughts, but the mode is cot"),
        ("thinker", ["--mode", "none", "--replace", "zeroed"], "--replace zeroed is for --mode thoughts"),
        ("thinker", ["--kv_budget", "16"], "--kv_budget 16 is for --mode cot, but the mode is thoughts"),
        ("teacher", ["--kv_buffer", "16"], "--kv_buffer 16 belongs to --kv_budget"),
        ("teacher", ["--kv_budget", "16,8"], "kv_budget=8 and kv_buffer=128: the budget must be at least 9"),
        ("thinker", ["--num_latents", "2,0"], "num_latents=0 must be at least 1"),
        ("thinker", ["--num_latents", "2,2"], "is 2,2, different numbers from 0 are needed"),
        ("thinker", ["--tolerance", "-1"], "tolerance=-1.0 must not be negative"),
        ("thinker", ["--replace", "shuffled", "--batch_size", "1"], "--batch_size must be 2 or more"),
        ("thinker", ["--max_new_tokens", "200"], "leaves no room for a question"),
        ("thinker", ["--limit", "3"], "--limit 3 does not go with --task causal_loop_v2"),
        ("thinker", ["--task", "gsm8k"], "--num_samples 4 does not go with --task gsm8k"),
        ("thinker", ["--task_options", "depth=3"], "causal_loop_v2 has no option 'depth'"),
        ("thinker", ["--log_samples"], "--log_samples needs --output_path"),
        ("thinker", ["--checkpoint", "nowhere"], "no checkpoint folder nowhere"),
    ],
)
def test_mistakes_are_one_line(exports, monkeypatch, capsys, name, arguments, message):
    common = ["--checkpoint", exports[name], "--task", "causal_loop_v2", "--num_samples", 4]
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, *common, *arguments)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.replace("\r", "\n").splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in captured.err


def test_a_tokenizer_without_thought_pieces_is_one_line(checkpoint, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--checkpoint", checkpoint, *FLAGS, "--num_samples", 2)
    assert "error: the tokenizer has no <bot> and <eot>" in capsys.readouterr().err
