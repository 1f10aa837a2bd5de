"""Test-time depth against plain loops: one sample at a time, no padding, ranks by counting."""

import dataclasses
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.sources.documents import LabelledDocument
from data_pipeline.tasks import addition, p_hop
from data_pipeline.tokenization.tokenizer import BOS_ID, Tokenizer, train_tokenizer
from eval import reasoning
from eval.looping import tasks as reasoning_tasks
from eval.looping.measures import (
    Row,
    encode_rows,
    fixed_depth,
    measure,
    path_independence,
    pooled,
    spearman,
    unrolled_parameters,
)
from eval.looping.summary import measure_depths
from eval.scoring.core import Scorer, mean_score
from eval.scoring.results import table_rows
from model import RecurrenceConfig, ZeroModel
from model.config.recurrence import HaltingConfig

from .conftest import tiny_config

TRAINED = 3
LOOP = {"placement": "block", "ranges": [[1, 1]], "num_steps": TRAINED}
# Probabilities of one half: tokens of these random models halt after 1 to 6 steps.
HALTS = HaltingConfig(kind="act", threshold=0.8)
RECURRENCES = {
    "fixed": RecurrenceConfig(**LOOP),
    "act": RecurrenceConfig(**LOOP, halting=HALTS),
    "threshold": RecurrenceConfig(**LOOP, halting=HaltingConfig(kind="threshold", threshold=0.9)),
    "kv": RecurrenceConfig(placement="kv", num_steps=TRAINED, halting=HALTS),
    "none": RecurrenceConfig(),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By kind of recurrence: a random model and a tokenizer with all characters of both tasks."""
    tokenizer = train_tokenizer(["abcd+=0123456789"] * 20, vocab_size=290, model_type="bpe")
    folders = {}
    for name, recurrence in RECURRENCES.items():
        folder = folders[name] = tmp_path_factory.mktemp(name) / "export"
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(tokenizer)
        vocab_size = Tokenizer(folder / "tokenizer.model").vocab_size
        config = dataclasses.replace(tiny_config(vocab_size, 64), recurrence=recurrence)
        model = ZeroModel(config, seed=5)
        for parameter_name, parameter in model.named_parameters():
            if "halting" in parameter_name and parameter_name.endswith("bias"):
                parameter.data.zero_()
        model.save_pretrained(folder)
    return folders


def scorer_of(exports: dict[str, Path], name: str, batch_size: int = 4) -> Scorer:
    return Scorer.from_checkpoint(exports[name], batch_size)


def documents_of_many_lengths() -> list[LabelledDocument]:
    samples = [
        sample
        for length, hops in ((9, 1), (17, 2), (12, 3), (24, 3))
        for sample in p_hop.generate(3, hops, length, 4, seed=1, split="test")
    ]
    samples += addition.generate(3, 5, 10, seed=1, split="test")
    random.Random(0).shuffle(samples)
    return [LabelledDocument(sample.text, sample.labels) for sample in samples]


@torch.inference_mode()
def one_by_one(scorer: Scorer, document: LabelledDocument, num_steps: int) -> dict:
    """A sample alone: no batch, no padding, labels looked up one at a time."""
    ids = {c: scorer.tokenizer.encode(c) for c in document.text + "".join(c for _, c in document.labels)}
    tokens = [BOS_ID] + [ids[c][0] for c in document.text]
    out = scorer.model(torch.tensor([tokens]), num_steps=num_steps)
    log_probs = out.logits[0].double().log_softmax(-1)
    result = {
        "correct": [int(log_probs[1 + i].argmax()) == ids[c][0] for i, c in document.labels],
        "losses": [-float(log_probs[1 + i, ids[c][0]]) for i, c in document.labels],
    }
    if out.num_iterations is not None:
        result["iterations"] = out.num_iterations[:, 0].tolist()
        result["probabilities"] = out.halt_probs[:, 0].tolist()
        result["ponder"] = out.ponder_cost[:, 0].tolist()
        result["residuals"] = out.residuals.tolist()
    return result


@pytest.mark.parametrize(
    ("name", "batch_size"), [("act", 1), ("act", 64), *((name, 4) for name in RECURRENCES)]
)
def test_measures_equal_one_sample_at_a_time(exports, name, batch_size):
    scorer, documents = scorer_of(exports, name, batch_size), documents_of_many_lengths()
    rows = encode_rows("mixed", documents, scorer)
    for num_steps in (1, 7) if name != "none" else (1,):
        measured = measure_depths(scorer, rows, [num_steps])
        outcome, correct = measured.outcomes[num_steps], measured.correct[num_steps]
        alone = [one_by_one(scorer, document, num_steps) for document in documents]
        assert correct == [one["correct"] for one in alone]
        for losses, one in zip(outcome.losses, alone, strict=True):
            assert losses == pytest.approx(one["losses"], abs=1e-4)
        if name == "none":
            assert (outcome.answer_steps, outcome.figures) == ([], {})
            continue
        at_answer = [sum(loop[-1] for loop in one["iterations"]) / len(one["iterations"]) for one in alone]
        assert outcome.answer_steps == pytest.approx(at_answer)
        steps = [n for one in alone for loop in one["iterations"] for n in loop]
        assert outcome.figures["steps_mean"] == pytest.approx(sum(steps) / len(steps))
        shares = [steps.count(n) / len(steps) for n in range(1, num_steps + 1)]
        assert outcome.figures["steps_histogram"] == pytest.approx(shares)
        spread = [0.0] * num_steps
        for one in alone:
            for loop in one["probabilities"]:
                for token in loop:
                    for n, p in enumerate(token):
                        spread[n] += p / len(steps)
        assert outcome.figures["halting_distribution"] == pytest.approx(spread, abs=1e-5)
        costs = [c for one in alone for loop in one["ponder"] for c in loop]
        assert outcome.figures["ponder_cost"] == pytest.approx(sum(costs) / len(costs), rel=1e-4)
        for n, residual in enumerate(outcome.figures["residuals"], start=1):
            moved, ran = 0.0, 0
            for one in alone:
                for loop, changes in zip(one["iterations"], one["residuals"], strict=True):
                    count = sum(steps_run >= n for steps_run in loop)
                    moved, ran = moved + count * sum(changes[n - 1 : n]), ran + count
            assert residual == pytest.approx(moved / max(ran, 1), rel=1e-3)
        if name == "act" and num_steps == 7:
            assert len(set(steps)) > 2  # the test would not see adaptive halting otherwise


def test_a_character_of_several_tokens_and_a_long_text_are_refused(exports):
    """ASCII characters always are one token, if need be their byte's."""
    scorer = scorer_of(exports, "none", 1)
    with pytest.raises(ValueError, match="source 'greek' has the character 'α' in text or labels, .* 2 tok"):
        encode_rows("greek", [LabelledDocument("abα", ((1, "a"),))], scorer)
    fits = LabelledDocument("a" * 63, ((62, "b"),))
    assert len(encode_rows("long", [fits], scorer)[0].tokens) == 64
    with pytest.raises(ValueError, match="65 tokens, more than the model's max_position_embeddings 64"):
        encode_rows("long", [fits, LabelledDocument("a" * 64, ((0, "b"),))], scorer)


def test_accuracies_follow_from_the_predictions(exports):
    """A model that is told the right answers scores 1, and 0 when told others."""
    scorer = scorer_of(exports, "fixed")
    rows = encode_rows("mixed", documents_of_many_lengths(), scorer)
    predictions = measure(scorer, rows, 2).predictions
    right = [Row(row.tokens, row.positions, chosen) for row, chosen in zip(rows, predictions, strict=True)]
    wrong = [Row(row.tokens, row.positions, [t + 1 for t in row.targets]) for row in right]
    for told, value in ((right, 1.0), (wrong, 0.0)):
        correct = measure_depths(scorer, told, [2]).correct[2]
        assert {x for row in correct for x in row} == {value}


def test_path_independence_equals_one_batch_by_hand(exports):
    scorer = scorer_of(exports, "act", batch_size=64)
    documents = [
        LabelledDocument(s.text, s.labels) for s in p_hop.generate(6, 2, 20, 4, seed=3, split="test")
    ]
    rows = encode_rows("p_hop", documents, scorer)
    found = path_independence(scorer, rows, TRAINED, seed=9)
    with torch.inference_mode():
        tokens = torch.tensor([row.tokens for row in rows])
        outs = [scorer.model(tokens, num_steps=TRAINED, noise_seed=seed) for seed in (None, 9, 10)]
    agreements = []
    for i, row in enumerate(rows):
        for k, place in enumerate(row.positions):
            guesses = [int(out.logits[i, place].argmax()) for out in outs]
            agreements.append(float(len(set(guesses)) == 1))
            assert found.agrees[i][k] == agreements[-1]
            far = []
            for a, b in ((0, 1), (0, 2), (1, 2)):
                x, y = outs[a].hidden[i, place].double(), outs[b].hidden[i, place].double()
                far.append(float((x - y).norm() / ((x.norm() + y.norm()) / 2)))
            assert found.distance[i][k] == pytest.approx(sum(far) / 3, abs=1e-5)
    assert 0 < sum(agreements) < len(agreements)


@pytest.mark.parametrize("name", ["act", "threshold", "kv"])
def test_fixed_depth_runs_all_steps_with_the_same_weights(exports, name):
    model = scorer_of(exports, name).model
    tokens = torch.tensor([[2, 260, 261, 262, 263, 264]])
    with torch.inference_mode():
        fixed = fixed_depth(model)
        out = fixed(tokens, num_steps=5)
    assert out.num_iterations.unique().tolist() == [5]
    shared = dict(model.named_parameters())
    for parameter_name, parameter in fixed.named_parameters():
        assert parameter.data_ptr() == shared[parameter_name].data_ptr()
    assert all("halting" in n for n in shared.keys() - dict(fixed.named_parameters()).keys())


def test_unrolled_parameters_are_those_of_the_unrolled_model(exports):
    for name, runs in (("fixed", [1, 4, 1]), ("none", [1, 1, 1])):
        model = scorer_of(exports, name).model
        layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
        rest = sum(p.numel() for p in model.parameters()) - sum(layers)
        expected = rest + sum(n * size for n, size in zip(runs, layers, strict=True))
        assert unrolled_parameters(model, 4) == expected


def test_spearman_against_counted_ranks_and_known_values():
    assert spearman([1, 2, 3, 4], [10, 20, 25, 90]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # 1 - 6 * sum d^2 / (n (n^2 - 1)) without ties: d = 0, 1, -1, 1, -1
    assert spearman([1, 2, 3, 4, 5], [1, 3, 2, 5, 4]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([], []) is None
    random_ = random.Random(0)
    for _ in range(20):
        pairs = [(random_.randrange(5), random_.randrange(4) / 3) for _ in range(30)]
        a, b = (list(column) for column in zip(*pairs, strict=True))
        assert spearman(a, b) == pytest.approx(counted_spearman(a, b))


def counted_spearman(a: list[float], b: list[float]) -> float:
    ranks = [[sum(y < x for y in values) + (values.count(x) + 1) / 2 for x in values] for values in (a, b)]
    middle = (len(a) + 1) / 2
    products = [
        [(x - middle) * (y - middle) for x, y in zip(p, q, strict=True)] for p in ranks for q in ranks
    ]
    aa, ab, _, bb = (sum(p) for p in products)
    return ab / math.sqrt(aa * bb)


def test_pooled_mean_is_exact_and_its_error_counts_samples():
    values = [[1.0, 0.0, 1.0], [1.0], [0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]
    score = mean_score(pooled(values))
    assert score.value == pytest.approx(6 / 10)
    # Cochran (6.13) without the finite population: sum (y - r x)^2 / (n - 1) / n / mean(x)^2
    square = sum((sum(row) - 0.6 * len(row)) ** 2 for row in values) / 3 / 4 / 2.5**2
    assert score.stderr == pytest.approx(math.sqrt(square))
    repeated = mean_score(pooled([[x] * 50 for x in (0.0, 1.0, 1.0, 0.0)]))
    assert repeated == pytest.approx(mean_score([0.0, 1.0, 1.0, 0.0]))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["reasoning.py", *map(str, arguments)])
    reasoning.main(reasoning.TASK, reasoning.__doc__)


def report_in(directory: Path) -> dict:
    (path,) = directory.glob("results_*.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["fixed", "act", "none"])
def test_command(exports, name, tmp_path, monkeypatch, capsys):
    run(
        monkeypatch, "--checkpoint", exports[name], "--task", "p_hop", "--num_samples", 12, "--log_samples",
        "--task_options", "hops=2,length=16", "--output_path", tmp_path, "--seed", 7,
    )  # fmt: skip
    report, printed = report_in(tmp_path), capsys.readouterr().out
    expected = [1] if name == "none" else [1, 3, 6, 9, 12]
    found = report["facts"]["reasoning_p_hop"]
    assert [int(n) for n in found["by_steps"]] == expected
    scorer = scorer_of(exports, name)
    samples = list(p_hop.generate(12, 2, 16, 4, seed=7, split="test"))
    accuracies = {}
    for n in expected:
        ones = [one_by_one(scorer, LabelledDocument(s.text, s.labels), n) for s in samples]
        accuracies[n] = sum(one["correct"][-1] for one in ones) / 12
        scores = report["results"]["reasoning_p_hop"]
        assert scores[f"acc,num_steps={n}"] == pytest.approx(accuracies[n])
        error = math.sqrt(accuracies[n] * (1 - accuracies[n]) / 11)
        assert scores[f"acc_stderr,num_steps={n}"] == pytest.approx(error)
        loss = sum(one["losses"][-1] for one in ones) / 12
        assert scores[f"cross_entropy,num_steps={n}"] == pytest.approx(loss, abs=1e-4)
        all_labels = [x for one in ones for x in one["correct"]]
        value = report["results"]["reasoning_p_hop_labels"][f"acc,num_steps={n}"]
        assert value == pytest.approx(sum(all_labels) / len(all_labels))
    answers = [s.answer for s in samples]
    one_hop = [s.text[max(k for k in range(1, 16) if s.text[k - 1] == s.text[15])] for s in samples]
    baselines = report["baselines"]["reasoning_p_hop"]
    assert baselines["majority"]["value"] == max(map(answers.count, answers)) / 12
    right = sum(guess == answer for guess, answer in zip(one_hop, answers, strict=True))
    assert baselines["1-hop"]["value"] == right / 12
    assert (found["path_independence"] is None) == (name == "none")
    assert (found["time"] is None) == (name != "act")
    if found["time"] is not None:
        assert set(found["time"]) == {"batch", "decode"}
    if name == "none":
        assert found["overthinking_gap"] is None
    else:
        assert found["overthinking_gap"]["value"] == pytest.approx(max(accuracies.values()) - accuracies[12])
        assert "| convergence |" in printed
    assert f"| {report['n-samples']['reasoning_p_hop']['effective']} " in printed
    assert len(table_rows(report)) == 2 * 2 * len(expected)  # the run's HTML report shows them too
    (picture,) = tmp_path.glob("reasoning_p_hop_*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    (lines,) = tmp_path.glob("samples_reasoning_p_hop_*.jsonl")
    logged = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    for n in expected:
        told = [line["resps"][str(n)] == line["target"] for line in logged]
        assert sum(told) / 12 == pytest.approx(accuracies[n])


def test_depths_that_a_task_knows(exports, tmp_path, monkeypatch, capsys):
    """A task that mixes 1, 2 and 3 hops: results, heuristics and rank correlation by depth."""

    def mixed(num_samples: int, seed: int, problem_depths: None) -> reasoning_tasks.TaskData:
        items = [
            reasoning_tasks.Item(sample.id, LabelledDocument(sample.text, sample.labels), hops)
            for hops in (1, 2, 3)
            for sample in p_hop.generate(num_samples, hops, 20, 4, seed, split="test")
        ]
        return reasoning_tasks.TaskData(items, {"always a": ["a"] * len(items)})

    monkeypatch.setitem(reasoning.TASKS, "mixed", reasoning_tasks.ReasoningTask({}, mixed))
    run(
        monkeypatch, "--checkpoint", exports["act"], "--task", "mixed", "--num_samples", 8,
        "--num_steps", "7,2", "--output_path", tmp_path,
    )  # fmt: skip
    report = report_in(tmp_path)
    scorer = scorer_of(exports, "act")
    iterations: dict[int, list[float]] = {2: [], 7: []}
    for hops in (1, 2, 3):
        samples = list(p_hop.generate(8, hops, 20, 4, seed=1234, split="test"))
        for n in (2, 7):
            ones = [one_by_one(scorer, LabelledDocument(s.text, s.labels), n) for s in samples]
            accuracy = report["results"][f"reasoning_mixed_problem_depth{hops}"][f"acc,num_steps={n}"]
            assert accuracy == pytest.approx(sum(one["correct"][-1] for one in ones) / 8)
            iterations[n] += [one["iterations"][0][-1] for one in ones]
        share = sum(s.answer == "a" for s in samples) / 8
        assert report["baselines"][f"reasoning_mixed_problem_depth{hops}"]["always a"]["value"] == share
    depths = [1.0] * 8 + [2.0] * 8 + [3.0] * 8
    for n in (2, 7):
        found = report["facts"]["reasoning_mixed"]["by_steps"][str(n)]["problem_depth_correlation"]
        assert found == pytest.approx(counted_spearman(iterations[n], depths))
    assert (
        report["facts"]["reasoning_mixed"]["overthinking_gap"] is None
    )  # 4 times the trained depth was not asked for
    assert "The trained depth is not among --num_steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("act", ["--task", "sorting"], "argument --task: invalid choice: 'sorting'"),
        ("act", ["--task_options", "hop=3"], "p_hop has no option 'hop': did you mean 'hops'?"),
        ("act", ["--task_options", "hops=x"], "hops is 'x', an integer is needed"),
        ("act", ["--task_options", "hops"], "hops is '', an integer is needed"),
        ("act", ["--task_options", "hops=0"], "hops 0 is not in 1.."),
        (
            "act",
            ["--task_options", "length=64"],
            "65 tokens, more than the model's max_position_embeddings 64",
        ),
        ("act", ["--num_steps", "0"], "argument --num_steps: is 0, at least 1 is needed"),
        ("act", ["--num_steps", "1,,2"], "argument --num_steps: has '', which is not a number of loop steps"),
        ("act", ["--num_steps", "1,adaptive"], "only numbers of steps are measured here"),
        ("act", ["--problem_depth", "2"], "--problem_depth 2: no sample of p_hop has it"),
        ("act", ["--problem_depth", "0"], "argument --problem_depth: is 0, at least 1 is needed"),
        ("act", ["--num_samples", "0"], "argument --num_samples: is 0"),
        ("act", ["--log_samples"], "--log_samples needs --output_path"),
        ("act", ["--checkpoint", "nowhere"], "no checkpoint folder nowhere"),
        ("none", ["--num_steps", "1,2"], "the checkpoint has no recurrence"),
    ],
)
def test_mistakes_are_one_line(exports, monkeypatch, capsys, name, arguments, message):
    common = ["--checkpoint", exports[name], "--task", "p_hop", "--num_samples", 2]
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, *common, *arguments)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.replace("\r", "\n").splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in captured.err


def test_weights_that_overflow_are_one_line(exports, tmp_path, monkeypatch, capsys):
    scorer = scorer_of(exports, "none")
    scorer.model.lm_head.weight.data.fill_(3e38)
    scorer.model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((exports["none"] / "tokenizer.model").read_bytes())
    with pytest.raises(SystemExit):
        run(monkeypatch, "--checkpoint", tmp_path, "--task", "addition", "--num_samples", 2)
    assert "at 1 steps the model gives a cross-entropy of nan" in capsys.readouterr().err
