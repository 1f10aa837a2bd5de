"""MATH, ReClor, perplexity and p-hop, on small files in the published formats.

Neither MATH nor ReClor is here (see the heads of their scripts): no test reads a published file of them.
"""

import json
import lzma
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from data_pipeline.sources.problems import MATH_SUBJECTS, boxed_answer, read_math, read_reclor
from data_pipeline.tokenization.tokenizer import Tokenizer
from eval import hendrycks_math, perplexity, reclor
from eval.hendrycks_math import equivalent, extract, normalize
from eval.looping.answers import load as load_labelled
from eval.scoring.task import Options

from .test_scripts import assert_error_line, results_of, samples_of

# ---- MATH


def math_file(folder: Path, subject: str, number: int, answer: str, level: str = "Level 3") -> Path:
    path = folder / subject / f"{number}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    solution = f"First \\boxed{{0}}, so the answer is $\\boxed{{{answer}}}$."
    row = {"problem": f"Find $x_{{{number}}}$.", "level": level, "type": subject, "solution": solution}
    path.write_text(json.dumps(row))
    return path


@pytest.fixture
def math_root(tmp_path: Path) -> Path:
    for subject in MATH_SUBJECTS:
        for number, answer in ((10, "\\frac{1}{2}"), (2, "7"), (0, "7")):
            math_file(tmp_path / "math/test", subject, number, answer, f"Level {number % 5 + 1}")
        for number in range(3):
            math_file(tmp_path / "math/train", subject, number, f"{number}", "Level ?")
    return tmp_path


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("so $\\boxed{\\frac{1}{2}}$ and $\\boxed{x^{2}}$.", "x^{2}"),
        ("so $\\boxed 5$ dollars", "5"),
        ("so \\fbox{3}", "3"),
        ("so \\boxed{\\text{a {b} c}} or {d}", "\\text{a {b} c}"),
        ("so \\boxed{3", None),
        ("so 3", None),
    ],
)
def test_boxed_answer(solution, answer):
    assert boxed_answer(solution) == answer


# As lm-eval 0.4.13's hendrycks_math.is_equiv judges them.
EQUIVALENT = [
    ("\\frac12", "\\dfrac{1}{2}"), ("0.5", "1/2"), (".5", "0.5"), ("\\sqrt3", "\\sqrt{3}"), ("x = 4", "4"),
    ("90^\\circ", "90"), ("\\left(1, 2\\right)", "(1,2)"), ("5\\text{ cm}", "5"), ("50\\%", "50"),
    ("\\$3", "3"), ("3/4", "\\frac{3}{4}"), ("1\\\\2", "1\\2"), ("\\tfrac1{72}", "\\frac{1}{72}"), ("", ""),
]  # fmt: skip
DIFFERENT = [
    ("x/2", "x / 2"),  # a slash between operands that are not integers: compared as they are
    ("0.25", "\\frac{1}{4}"), ("1,000", "1000"), ("2", "2.0"), ("a\\text{ b}\\text{ c}", "a"), ("abc=4", "4"),
    ("\\frac", "\\frac{}{}"), ("03/4", "\\frac{3}{4}"), ("1/2/3", "\\frac{1}{2}/3"),
]  # fmt: skip


def test_equivalent_answers():
    assert [pair for pair in EQUIVALENT if not equivalent(*pair)] == []
    assert [pair for pair in DIFFERENT if equivalent(*pair)] == []
    assert extract("So $x$ is $\\frac12$, or $2$") == "x$ is $\\frac12$, or $2"  # first dollar sign to last
    assert extract(" it costs $5") == " it costs $5"


def test_normalize_is_lm_evals_on_random_tex():
    utils = pytest.importorskip(
        "lm_eval.tasks.hendrycks_math.utils",
        reason="lm-eval is not installed: the tables above are compared instead",
    )
    pieces = ["\\frac", "\\dfrac", "\\sqrt", "{", "}", "1", "12", "x", "=", "/", ".", " ", "\\text{ ",
              "\\left(", "\\!", "\\\\", "^\\circ", "\\$", "$", "\\%", "0.5", "0", "-", "\n", "_"]  # fmt: skip
    rng = random.Random(0)
    for _ in range(20_000):
        a, b = ("".join(rng.choices(pieces, k=rng.randint(0, 7))) for _ in range(2))
        assert equivalent(a, b) == utils.is_equiv(a, b), (a, b)
        try:
            expected = utils.strip_string(a)
        except Exception:
            expected = None
        assert normalize(a) == expected, a


def test_math_problems_in_their_order(math_root):
    problems = list(read_math(math_root / "math/test", "geometry"))
    assert [problem.id for problem in problems] == [f"math-test-geometry-{n}" for n in (0, 2, 10)]
    assert [problem.level for problem in problems] == [1, 3, 1]
    assert problems[2].prompt == "Problem: Find $x_{10}$.\nAnswer:"
    assert problems[2].target == " \\frac{1}{2}"
    assert next(read_math(math_root / "math/train", "geometry")).level is None


class Oracle:
    """Answers with the target."""

    def __init__(self, targets: dict[str, str]) -> None:
        self.targets = targets

    def generate(self, prompts, max_new_tokens, stop=(), temperature=0.0, seed=0):
        return [f" It is ${self.targets[prompt].strip()}$." for prompt in prompts]

    def take_truncated(self):
        return 0

    def take_steps(self):
        return []

    def take_seconds(self):
        return 6.0


def test_math_scores_by_subject_and_level(math_root):
    problems = [p for subject in MATH_SUBJECTS for p in read_math(math_root / "math/test", subject)]
    targets = {p.prompt: p.target for p in problems}
    assert len(targets) == 3  # the same problems in each subject
    (whole, *parts) = hendrycks_math.load(Options(data=math_root, samples=4))(Oracle(targets))
    assert (whole.num_samples, whole.num_documents) == (21, 21)
    assert set(whole.values["exact_match,none"]) == {1.0}
    assert whole.baselines["majority"].value == pytest.approx(2 / 3)
    assert [part.task for part in parts] == [
        *(f"math_{subject}" for subject in MATH_SUBJECTS), "math_level1", "math_level3",
    ]  # fmt: skip
    assert [part.num_documents for part in parts] == [3] * 7 + [14, 7]
    assert whole.config["num_samples"] == 4
    assert whole.config["seconds_per_vote"] == pytest.approx(6 / 21)


def test_math_exemplars_come_from_the_subject(math_root):
    options = Options(data=math_root / "math", num_fewshot=2, limit=1)
    (whole, *_) = hendrycks_math.load(options)(Oracle(_Everything()))
    assert whole.num_samples == 7
    for sample in whole.samples:
        *shots, asked = sample["prompt"].split("\n\n")
        assert len(shots) == 2
        assert asked == "Problem: Find $x_{0}$.\nAnswer:"
        for shot in shots:  # x_0 has the answer 0, and so on
            number = shot.split("x_{")[1][0]
            assert shot == f"Problem: Find $x_{{{number}}}$.\nAnswer: {number}"


class _Everything(dict):
    def __missing__(self, key):
        return " 1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"problem": "p",\n "level": ', "3.json line 2: not JSON"),
        (b"[]", "3.json lacks one of the fields problem, level, solution"),
        (b'{"problem": "p", "level": "Level 1", "solution": 3}', "3.json: field 'solution' is int"),
        (b'{"problem": "p", "level": "Level 1", "solution": "so 3"}', "3.json: its solution has no whole"),
        (b'{"problem": "p", "level": "hard", "solution": "\\\\boxed{3}"}', "3.json: level 'hard'"),
        (b"\xff\xfe", "3.json is not UTF-8"),
    ],
)
def test_malformed_math_file_is_named(math_root, checkpoint, run_script, capsys, content, message):
    (math_root / "math/test/algebra/3.json").write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        run_script("run.py", "--checkpoint", checkpoint, "--data", math_root, "--tasks", "math")
    assert_error_line(exit_.value, capsys, message)


def test_missing_math_is_one_line(tmp_path, math_root):
    with pytest.raises(ValueError, match="MATH does not come with this project"):
        hendrycks_math.load(Options(data=math_root / "elsewhere"))
    (math_root / "math/test/algebra/a.json").touch()
    with pytest.raises(ValueError, match=r"algebra holds a.json, expected MATH's NUMBER.json"):
        hendrycks_math.load(Options(data=math_root))
    for path in (math_root / "math/test/algebra").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="algebra holds no such file"):
        hendrycks_math.load(Options(data=math_root))


# ---- ReClor

ENTRY = {"context": "All A are B.", "question": "Which follows?", "label": 2, "id_string": "val_0",
         "answers": ["A is C.", "B is A.", "Some B are A.", "None."]}  # fmt: skip


def test_reclor_is_asked_as_logiqa(tmp_path, checkpoint, run_script):
    (tmp_path / "reclor").mkdir()
    others = [{**ENTRY, "label": label, "id_string": f"val_{i}"} for i, label in enumerate([2, 1, 2])]
    (tmp_path / "reclor/val.json").write_text(json.dumps(others))
    (tmp_path / "reclor/train.json").write_text(json.dumps([ENTRY]))
    (problem, *_) = read_reclor(tmp_path / "reclor/val.json")
    assert problem.prompt == (
        "Passage: All A are B.\nQuestion: Which follows?\nChoices:\nA. A is C.\nB. B is A.\n"
        "C. Some B are A.\nD. None.\nAnswer:"
    )
    assert (problem.id, problem.target, problem.gold) == ("val_0", " Some B are A.", 2)
    run_script(
        "run.py", "--checkpoint", checkpoint, "--tasks", "reclor", "--data", tmp_path, "--num_fewshot", "0,1",
        "--output_path", tmp_path / "out", "--log_samples",
    )  # fmt: skip
    results = results_of(tmp_path / "out")
    assert list(results["results"]) == ["reclor", "reclor@shots=1"]
    assert results["baselines"]["reclor"]["majority"]["value"] == pytest.approx(2 / 3)
    assert results["baselines"]["reclor"]["chance"]["value"] == 0.25
    (first, *_) = samples_of(tmp_path / "out", "reclor@shots=1")
    assert first["prompt"].startswith(f"{problem.prompt} Some B are A.\n\nPassage:")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(ENTRY), "holds dict, not a list"),
        (json.dumps([ENTRY, {"context": "c"}]), "entry 2 has no field 'question'"),
        (json.dumps([3]), "entry 1 is not a JSON object"),
        (json.dumps([{**ENTRY, "label": 4}]), r"entry 1: label 4 is not in 0..3"),
        (json.dumps([{**ENTRY, "label": True}]), "entry 1: label True"),
        (json.dumps([{**ENTRY, "answers": ["a"]}]), "entry 1: answers are not four texts"),
        (json.dumps([{**ENTRY, "context": 1}]), "entry 1: field 'context' is int"),
        (json.dumps([ENTRY], indent=1)[:-20], "line 1[0-9]: not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "holds no problems"),
    ],
)
def test_malformed_reclor_is_named_by_entry(tmp_path, content, message):
    path = tmp_path / "val.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        reclor.load(Options(data=path))


def test_absent_reclor_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"no data file .*reclor/val.json.* licence forbids shipping it"):
        reclor.load(Options(data=tmp_path))


# ---- perplexity


@pytest.mark.parametrize("max_length", [1, 2, 3, 7])
def test_windows_score_every_token_once_after_its_neighbours(max_length):
    for n in range(25):
        tokens = list(range(100, 100 + n))
        windows = perplexity.disjoint_windows(tokens, 9, max_length)
        assert [token for _, target in windows for token in target] == tokens
        padded, start = [9, *tokens], 0
        for context, target in windows:
            assert len(context) >= 1
            assert len(context) + len(target) <= max_length + 1
            assert padded[start + 1 - len(context) : start + 1] == context
            start += len(target)
        # only the last window is not full, and it has all the context that fits
        assert all(len(target) == max_length for _, target in windows[:-1])
        if len(windows) > 1:
            assert sum(map(len, windows[-1])) == max_length + 1


def test_bits_per_byte_of_the_models_own_probabilities(make_scorer, tmp_path):
    """Against the logits of whole texts, one at a time, where they fit into one window."""
    texts = ["Sunlight is the source.\nOf energy?", "Straße 東京", "one"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    scorer = make_scorer()
    (result,) = perplexity.load(Options(data=tmp_path / "t.jsonl"))(scorer)
    nats, expected = 0.0, []
    for text in texts:
        ids = torch.tensor([scorer.tokenizer.encode(text, bos=True)])
        with torch.inference_mode():
            log_probs = scorer.model(ids).logits[0, :-1].double().log_softmax(-1)
        expected.append(log_probs.gather(-1, ids[0, 1:, None]).sum().item())
        nats -= expected[-1]
    size = sum(len(text.encode()) for text in texts)
    assert [sample["resps"] for sample in result.samples] == pytest.approx(expected, rel=1e-5)
    assert result.totals["bits_per_byte,none"].value == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert result.totals["byte_perplexity,none"].value == pytest.approx(math.exp(nats / size), rel=1e-5)
    assert result.totals["word_perplexity,none"].value == pytest.approx(math.exp(nats / 9), rel=1e-5)
    assert result.num_samples == 3
    joined = "".join(texts).encode()
    entropy = -sum(n / size * math.log2(n / size) for n in Counter(joined).values())
    assert result.baselines["byte frequencies"].value == pytest.approx(entropy)
    # the linearised ratio, by its definition
    a, b = [-x for x in expected], [len(text.encode()) for text in texts]
    ratio = sum(a) / sum(b)
    variance = sum((x - ratio * y) ** 2 for x, y in zip(a, b, strict=True)) / 2
    stderr = math.sqrt(variance / 3) / (sum(b) / 3) / math.log(2)
    assert result.totals["bits_per_byte,none"].stderr == pytest.approx(stderr, rel=1e-4)


@pytest.mark.parametrize("asked", [None, 7])
def test_long_documents_go_through_windows(make_scorer, tmp_path, asked):
    """A context of 16 positions, or fewer: each window against a pass of its own."""
    text = (
        "Question: Which statement best explains why photosynthesis is the foundation of most food webs?" * 4
    )
    (tmp_path / "t.txt").write_text(text)
    scorer = make_scorer(max_length=16)
    (result,) = perplexity.load(Options(data=tmp_path / "t.txt"), max_length=asked)(scorer)
    ids = scorer.tokenizer.encode(text)
    total = 0.0
    for context, target in perplexity.disjoint_windows(ids, scorer.tokenizer.bos_id, asked or 16):
        row = torch.tensor([context + target])
        with torch.inference_mode():
            log_probs = scorer.model(row[:, :-1]).logits[0].double().log_softmax(-1)[-len(target) :]
        total += log_probs.gather(-1, row[0, -len(target) :, None]).sum().item()
    assert result.samples[0]["resps"] == pytest.approx(total, rel=1e-5)
    assert result.totals["bits_per_byte,none"].stderr is None
    assert result.num_truncated == 0
    with pytest.raises(ValueError, match="--max_length 17 exceeds the model's 16 positions"):
        perplexity.load(Options(data=tmp_path / "t.txt"), max_length=17)(scorer)


def test_held_out_split_of_a_build(data_folder, make_scorer):
    """The texts are those of the folder's validation split, whatever the model's tokenizer."""
    (result,) = perplexity.load(Options(data=data_folder, limit=4))(make_scorer())
    manifest = json.loads((data_folder / "manifest.json").read_text())
    (source,) = manifest["sources"].values()
    assert result.num_documents == source["splits"]["validation"]["documents"]
    assert result.num_samples == 4
    held_out = [text for text in perplexity.read_texts(data_folder)]
    assert sum(len(text.encode()) for text in held_out) == source["splits"]["validation"]["text_bytes"]
    encode = Tokenizer(data_folder / "tokenizer.model").encode
    tokens = sum(len(encode(text, bos=True, eos=True)) for text in held_out)
    assert tokens == source["splits"]["validation"]["tokens"]


def test_perplexity_from_the_command_line(checkpoint, tmp_path, run_script, capsys):
    path = tmp_path / "text.jsonl.xz"
    path.write_bytes(lzma.compress(b'{"text": "Mary moved to the bathroom."}\n{"text": "John."}\n'))
    run_script("perplexity.py", "--checkpoint", checkpoint, "--data", path, "--output_path", tmp_path / "out")
    results = results_of(tmp_path / "out")
    assert 1 < results["results"]["perplexity"]["bits_per_byte,none"] < 20
    assert results["higher_is_better"]["perplexity"] == dict.fromkeys(
        ("bits_per_byte", "byte_perplexity", "word_perplexity"), False
    )
    assert "uniform bytes 8.0000" in capsys.readouterr().out
    whole = path.read_bytes()
    for name, content, message in (
        ("empty.txt", b"", "holds no text"),
        ("other.jsonl", b"{}", "no field 'text'"),
        ("cut.jsonl.xz", whole[:-9], "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit) as exit_:
            run_script("perplexity.py", "--checkpoint", checkpoint, "--data", tmp_path / name)
        assert_error_line(exit_.value, capsys, message)


def test_overflowing_perplexity_is_left_out():
    found = perplexity.metrics(["x" * 1000], [-5000.0])
    assert set(found) == {"bits_per_byte,none", "byte_perplexity,none"}


# ---- p-hop


def test_p_hop_scores_the_likeliest_token(make_scorer):
    """Against the logits of each text's last position."""
    scorer = make_scorer()
    (result,) = load_labelled(Options(limit=40), "p_hop")(scorer)
    expected, losses = [], []
    for sample in result.samples:
        ids = [scorer.tokenizer.bos_id, *(scorer.tokenizer.encode(c)[0] for c in sample["prompt"])]
        with torch.inference_mode():
            log_probs = scorer.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        answer = scorer.tokenizer.encode(sample["target"])[0]
        expected.append(float(log_probs.argmax() == answer))
        losses.append(-log_probs[answer].item())
    assert result.values["acc,none"] == expected
    assert result.totals["cross_entropy,none"].value == pytest.approx(sum(losses) / 40, rel=1e-5)
    assert result.steps == [2.0] * 40
    answers = Counter(sample["target"] for sample in result.samples)
    assert result.baselines["majority"].value == max(answers.values()) / 40
    assert set(result.baselines) == {"chance", "majority", "2-hop", "1-hop"}
    with pytest.raises(ValueError, match="p_hop has no exemplars"):
        load_labelled(Options(num_fewshot=1), "p_hop")
