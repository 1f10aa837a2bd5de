"""Evaluation under attack: hostile data, models that overflow, full disks, signals, damaged files, flags."""

import errno
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.sources.problems import MATH_SUBJECTS, boxed_answer
from data_pipeline.tokenization.tokenizer import Tokenizer, train_tokenizer
from eval import causal_loop, gsm8k, gsm8k_cot, hendrycks_math
from eval import run as evaluation
from eval.looping.measures import PathJob, encode_rows
from eval.looping.tasks import TASKS as LABELLED
from eval.scoring import cli
from eval.scoring.cli import make_parser
from eval.scoring.core import Scorer
from eval.scoring.inference import Answer
from eval.scoring.journal import Journal
from eval.scoring.results import TaskResult, write_report
from eval.scoring.task import Options
from eval.thinking.answers import ThinkJob, Way
from eval.thinking.tasks import normalize, published_questions
from model import ModelConfig, ZeroModel

from ..eval.conftest import TEXT
from ..eval.thinkers import KINDS, SMALL, write_tokenizer
from .mutations import byte_mutations, config_mutations

FAST_OR_ALL = [pytest.param(60, id="fast"), pytest.param(1000, id="all", marks=pytest.mark.slow)]
LONG = 1_000_000  # characters: what takes quadratic time does not end


# ---- data files


GSM8K = [
    {"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"},
    {"question": "2?", "answer": "#### 1,000"},
]
ARC = [
    {
        "id": f"a{n}",
        "question": {"stem": "What?", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]},
        "answerKey": "B",
    }
    for n in range(2)
]
RECLOR = [{"context": "c", "question": "q", "answers": ["a", "b", "c", "d"], "label": 1, "id_string": "r"}]
MATH = {"problem": "1/2?", "level": "Level 1", "solution": "It is $\\boxed{\\frac12}$."}
PROSQA = [{"question": "Is A b or c?", "steps": ["A is b."], "answer": "A is b."}]


def babi() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for task in range(1, 21):
            text = f"1 Mary went to room {task}.\n2 Where is Mary?\troom {task}\t1\n".encode()
            member = tarfile.TarInfo(f"tasks/en-10k/qa{task}_x_test.txt")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return data.getvalue()


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# By file: its content, and the tasks of eval/run.py or of eval/thoughts.py that read it.
FILES: dict[str, tuple[bytes, str]] = {
    "gsm8k/test.jsonl": (json_lines(GSM8K), "gsm8k,gsm8k_cot,thoughts gsm8k"),
    "arc/ARC-Easy-Test.jsonl": (json_lines(ARC), "arc_easy"),
    "logiqa/Test.txt": (b"\nb\nSome text.\nWhich?\nA.a\nB.b\nC.c\nD.d\n" * 2, "logiqa"),
    "reclor/val.json": (json.dumps(RECLOR).encode(), "reclor"),
    "babi/tasks_1-20_v1-2.tar.gz": (babi(), "babi"),
    **{f"math/test/{subject}/1.json": (json.dumps(MATH).encode(), "math") for subject in MATH_SUBJECTS},
    "gsm8k_icot/test.txt": (b"What?||<<1+1=2>> #### 2\n", "thoughts icot"),
    "prosqa/prosqa_test.json": (json.dumps(PROSQA).encode(), "thoughts prosqa"),
    "text/tinyshakespeare.txt": (b"To be, or not to be.\n", "perplexity"),
}
MUTATED = [name for name in FILES if not name.startswith("math/") or "algebra/" in name]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name, (content, _) in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


class Parrot:
    """A scorer without a model, which holds requests to what a model needs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.max_length = tokenizer, 64

    def loglikelihood(self, requests: list[tuple[str, str]]) -> list[tuple[float, bool]]:
        for context, continuation in requests:
            assert Scorer.encode_pair(self, context, continuation)[1]  # type: ignore[arg-type]
        return [(-1.0, False)] * len(requests)

    def loglikelihood_tokens(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(-1.0, False)] * len(requests)

    def generate(self, prompts: list[str], *_: Any) -> list[str]:
        for prompt in prompts:
            self.tokenizer.encode(prompt, bos=True)
        return ["#### 2 $\\frac12$ The answer is 2."] * len(prompts)

    def take_truncated(self) -> int:
        return 0

    def take_steps(self) -> list[float]:
        return []

    def take_seconds(self) -> float:
        return 0.0


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Parrot:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer([TEXT] * 4, vocab_size=360))
    return Parrot(Tokenizer(path))


def evaluated_or_line(data: Path, names: str, parrot: Parrot) -> None:
    """Reads, asks and scores by these tasks, or refuses in one line. Raises anything else."""
    options = Options(data=data, num_fewshot=0)
    for name in names.split(","):
        command, _, task = name.rpartition(" ")
        try:
            if command:
                assert [normalize(question.answer) for question in published_questions(task, data, None)[0]]
            else:
                for result in evaluation.TASKS[name].load(options)(parrot):  # type: ignore[arg-type]
                    assert result.num_samples
        except (ValueError, OSError) as error:
            line = str(error)
            assert "\n" not in line, line
            assert str(data) in line, line  # it names the file


@pytest.mark.parametrize("count", FAST_OR_ALL)
@pytest.mark.parametrize("name", MUTATED)
def test_damaged_data_is_read_or_refused_in_one_line(data, parrot, name, count):
    path = data / name
    before, names = FILES[name]
    try:
        for what, damaged in byte_mutations(before, count // 3, seed=3):
            path.write_bytes(damaged)
            try:
                evaluated_or_line(data, names, parrot)
            except Exception as error:
                raise AssertionError(what) from error
    finally:
        path.write_bytes(before)
    evaluated_or_line(data, names, parrot)


@pytest.mark.parametrize("count", FAST_OR_ALL)
@pytest.mark.parametrize("name", [name for name in MUTATED if ".json" in name])
def test_wrong_types_in_data_are_read_or_refused_in_one_line(data, parrot, name, count):
    path = data / name
    before, names = FILES[name]
    rows = [json.loads(line) for line in before.splitlines()]
    try:
        for what, mutated in config_mutations({"rows": rows}, count, seed=4):
            found = mutated.get("rows")
            if not isinstance(found, list):
                continue  # the list of lines itself, which no file holds
            path.write_text("".join(json.dumps(row) + "\n" for row in found))
            try:
                evaluated_or_line(data, names, parrot)
            except Exception as error:
                raise AssertionError(what) from error
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", MUTATED)
def test_an_empty_file_or_a_folder_is_one_line(data, parrot, name):
    path = data / name
    before, names = FILES[name]
    try:
        path.write_bytes(b"")
        evaluated_or_line(data, names, parrot)
        path.unlink()
        path.mkdir()
        evaluated_or_line(data, names, parrot)
        path.rmdir()
        evaluated_or_line(data, names, parrot)
    finally:
        path.write_bytes(before)


def test_an_empty_choice_is_refused(data, parrot):
    for name, row, place in (
        ("arc/ARC-Easy-Test.jsonl", ARC[0], ("question", "choices", 0, "text")),
        ("reclor/val.json", RECLOR[0], ("answers", 0)),
    ):
        changed = json.loads(json.dumps(row))
        holder: Any = changed
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = " "
        path = data / name
        path.write_text(json.dumps(changed if name.startswith("arc") else [changed]))
        with pytest.raises(ValueError, match="is empty: download it again"):
            evaluation.TASKS[FILES[name][1]].load(Options(data=data))
        path.write_bytes(FILES[name][0])


# ---- answers


def test_reading_answers_takes_linear_time():
    """In quadratic time each of these would take hours."""
    readers: list[Callable[[str], Any]] = [
        gsm8k.normalize,
        gsm8k.extract_strict,
        gsm8k.extract_flexible,
        lambda text: gsm8k.extract_strict(text, gsm8k_cot.STRICT),
        hendrycks_math.extract,
        lambda text: hendrycks_math.equivalent(text, f"{text}1"),
        causal_loop.ANSWER.search,
        boxed_answer,
        normalize,
    ]
    pieces = ["#", "#### ", "#### 9", "9", "9,", "$", "\\frac", "\\frac1", "\\sqrt2", "1/", "1_1", "\\text{ "]
    for piece in (*pieces, "=", ".", "-", "{", "Answer: ", "The answer is 9", "\\boxed{", " ", "\n"):
        text = piece * (LONG // len(piece))
        for read in readers:
            read(text)


def test_the_linear_rules_are_those_of_lm_eval():
    ignored = [re.compile(pattern) for pattern in (r",", r"\$", r"(?s).*#### ", r"\.$")]
    draw = random.Random(0)
    for _ in range(20_000):
        text = "".join(draw.choice(("#", "#### ", " ", ",", "$", ".", "\n", "1", "A")) for _ in range(12))
        expected = text
        for pattern in ignored:
            expected = pattern.sub("", expected)
        assert gsm8k.normalize(text) == expected.lower()


def test_numbers_of_thousands_of_digits_are_compared_as_text():
    number = "9" * 5000
    for text in (number, f"{number}/3", f"3/{number}"):
        assert hendrycks_math.equivalent(text, text)
        assert not hendrycks_math.equivalent(text, f"{text}1")
    assert gsm8k.normalize(f"#### {number}.") == number


# ---- models whose outputs are not finite


@pytest.fixture
def broken(make_scorer) -> Scorer:
    scorer = make_scorer()
    with torch.no_grad():
        scorer.model.lm_head.weight[7] = float("nan")
    return scorer


@pytest.mark.parametrize("name", [name for name in evaluation.TASKS if name not in ("arc", "arc_challenge")])
def test_a_model_whose_outputs_are_not_finite_is_refused(broken, data, name):
    options = Options(data=data, limit=1, num_fewshot=0, max_new_tokens=2)
    with pytest.raises(ValueError, match="its weights are not finite, or its activations overflow"):
        evaluation.TASKS[name].load(options)(broken)


def test_votes_and_other_starts_of_such_a_model_are_refused(broken):
    with pytest.raises(ValueError, match="a logit of nan"):
        broken.generate(["a"], 2, temperature=0.7)
    items = LABELLED["p_hop"].generate(2, 0).items
    rows = encode_rows("p_hop", [item.document for item in items], broken)
    with pytest.raises(ValueError, match="a logit of nan"):
        broken.compute([PathJob(rows, 2, 1)], "test")


@pytest.mark.parametrize("way", [Way("thoughts"), Way("cot"), Way("cot", temperature=0.7), Way("none")])
def test_thoughts_of_such_a_model_are_refused(tmp_path, way):
    tokenizer = write_tokenizer(tmp_path / "export")
    model = ZeroModel(
        ModelConfig.from_dict({**SMALL, **KINDS["thinker"], "vocab_size": tokenizer.vocab_size})
    )
    with torch.no_grad():
        model.lm_head.weight[7] = float("inf")
    with pytest.raises(ValueError, match="its weights are not finite, or its activations overflow"):
        Scorer(model, tokenizer).compute([ThinkJob([[2, 300, 301]], way, 2, 0)], "test")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_not_written(tmp_path, wrong):
    report = {"results": {"arc_easy": {"acc,none": wrong}}}
    with pytest.raises(ValueError, match="results > arc_easy > acc,none = .* is not a finite number"):
        write_report(tmp_path, report, [], log_samples=False)
    assert list(tmp_path.iterdir()) == []


# ---- what is written


class Full:
    """Files may have this many bytes: beyond, the operating system refuses as it does on a full disk."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __enter__(self) -> None:
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def __exit__(self, *_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


def result() -> TaskResult:
    samples = [{"prompt": "p\ud800", "target": "t" * 50, "resps": n} for n in range(50)]
    return TaskResult("arc_easy", {"acc,none": [1.0]}, 1, {}, samples=samples)


@pytest.mark.parametrize("limit", [0, 1, 100, 4000])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, limit):
    report = {"results": {"x" * 5000: 1}}
    (before,) = write_report(tmp_path, {}, [], log_samples=False)
    content = before.read_bytes()
    with Full(limit), pytest.raises(OSError, match="File too large .* bytes free"):
        write_report(tmp_path, report, [result()], log_samples=True)
    assert list(tmp_path.iterdir()) == [before]
    assert before.read_bytes() == content
    write_report(tmp_path, report, [result()], log_samples=True)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("limit", [200, 301, 450])
def test_a_full_disk_keeps_the_answers_that_were_written(tmp_path, limit):
    journal = Journal.open(tmp_path, {})
    kept = {}

    def fill() -> None:
        for n in range(9):
            journal.put({f"key {n}": Answer([-float(n), True], None, 0.5)})
            kept[f"key {n}"] = n

    with Full(limit), pytest.raises(OSError, match=r"bytes free\); \d answers are kept in .*resumes"):
        fill()
    journal.close(finished=False)
    again = Journal.open(tmp_path, {})
    assert {key for key in (f"key {n}" for n in range(9)) if again.get(key)} == set(kept)
    again.put({"last": Answer([1.0, True], None, 0.5)})
    again.close(finished=False)
    assert Journal.open(tmp_path, {}).get("last") is not None


@pytest.mark.parametrize(
    "count", [pytest.param(150, id="fast"), pytest.param(3000, id="all", marks=pytest.mark.slow)]
)
def test_a_damaged_journal_never_blocks_and_never_lies(tmp_path, capsys, count):
    journal = Journal.open(tmp_path, {"model": "a"})
    answers = {f"key {n}": Answer([-n / 7, n % 2 == 0], None, 0.5) for n in range(12)}
    for key, answer in answers.items():
        journal.put({key: answer})
    journal.close(finished=False)
    whole = journal.path.read_bytes()
    for what, damaged in byte_mutations(whole, count, seed=5):
        journal.path.write_bytes(damaged)
        capsys.readouterr()
        again = Journal.open(tmp_path, {"model": "a"})
        said = capsys.readouterr().out
        found = {key: again.get(key) for key in answers}
        again.close(finished=False)
        assert all(answer in (None, answers[key]) for key, answer in found.items()), what
        cut = whole.startswith(damaged)  # a torn end is normal
        assert None not in found.values() or cut or "is damaged" in said or damaged.count(b"\n") < 13, what


# ---- flags and signals


@pytest.fixture
def command(checkpoint, data, tmp_path, monkeypatch) -> Callable[..., None]:
    def run(*flags: object) -> None:
        given = ["--checkpoint", checkpoint, "--data", data, *flags]
        monkeypatch.setattr(sys, "argv", ["eval/run.py", *map(str, given)])
        evaluation.main()

    return run


@pytest.mark.parametrize(
    "flag",
    ["num_steps", "num_fewshot", "limit", "batch_size", "samples", "num_processes", "max_new_tokens", "seed"],
)
@pytest.mark.parametrize(
    "value", ["", ",", "[3,2]", "1.5", "nan", "1,1", "1e3", "\x00", "9" * 5000, "-1", "x" * 300]
)
def test_odd_values_of_flags_are_one_line(flag, value, capsys):
    if value == "-1" and flag == "seed":
        return  # any integer seeds
    with pytest.raises(SystemExit) as end:
        make_parser(None).parse_args(["--checkpoint", "x", f"--{flag}={value}"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: argument ")
    assert error.count("\n") == 1


def test_huge_numbers_are_taken_as_all(command, tmp_path, capsys):
    command(
        "--tasks",
        "arc_easy",
        "--limit",
        10**20,
        "--batch_size",
        10**20,
        "--seed",
        -(10**30),
        "--output_path",
        tmp_path,
    )
    (path,) = tmp_path.glob("results_*.json")
    assert json.loads(path.read_text())["n-samples"]["arc_easy"] == {"original": 2, "effective": 2}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("kept", [True, False])
def test_a_signal_is_one_line_that_says_what_is_kept(command, tmp_path, monkeypatch, capsys, number, kept):
    run, calls = Scorer._computed, []

    def interrupted(self: Scorer, jobs: Any) -> Iterator[Any]:
        for answers in run(self, jobs):
            yield answers
            calls.append(1)
            if len(calls) == 1:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(Scorer, "_computed", interrupted)
    before = signal.getsignal(number)
    flags = ["--tasks", "arc_easy", "--batch_size", 1, *(["--output_path", tmp_path] if kept else [])]
    with pytest.raises(SystemExit) as end:
        command(*flags)
    assert end.value.code == 128 + number
    assert signal.getsignal(number) is before
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    said = (
        "2 answers are kept in .*, the same command resumes from them"
        if kept
        else "nothing is kept; with --output"
    )
    assert re.match(f"error: stopped by {number.name}: {said}", error[0])
    if kept:
        assert len(list(tmp_path.iterdir())) == 1  # the journal, free
        monkeypatch.undo()
        command(*flags)
        assert "2 answers of an interrupted evaluation are reused" in capsys.readouterr().out
        assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_a_full_disk_at_the_end_says_what_is_kept(command, tmp_path, monkeypatch, capsys):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device (0 bytes free)", "results.json")

    flags = ["--tasks", "arc_easy", "--output_path", tmp_path]
    monkeypatch.setattr(cli, "write_report", full)
    with pytest.raises(SystemExit):
        command(*flags)
    said = (
        r"error: results.json: No space left on device \(0 bytes free\); 2 answers are kept in .*, the same"
    )
    assert re.search(said, capsys.readouterr().err)
    monkeypatch.undo()
    command(*flags)
    assert "2 answers of an interrupted evaluation are reused" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_all_processes(checkpoint, data, tmp_path, number):
    """Those of --num_processes too; after SIGKILL they end with the batch that they compute."""
    flags = ["--checkpoint", checkpoint, "--tasks", "causal_loop", "--limit", 200]
    flags += ["--batch_size", 1, "--num_processes", 2]
    command = [
        sys.executable,
        cli.__file__.replace("scoring/cli.py", "run.py"),
        *flags,
        "--output_path",
        tmp_path,
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    process = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    while sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("unfinished_*.jsonl")) < 4:
        assert process.poll() is None
    process.send_signal(number)
    _, error = process.communicate()  # waits for all that hold the pipe: the processes too
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        lines = [line for line in re.split("[\r\n]", error) if line.startswith("error: ")]
        assert len(lines) == 1
        assert f"stopped by {number.name}: " in lines[0]
