import gzip
import json
import logging
from collections import Counter
from collections.abc import Callable

import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources.documents import Problem
from data_pipeline.sources.problems import PROBLEM_SETS, read_arc, read_babi, read_gsm8k, read_logiqa
from data_pipeline.sources.registry import KINDS, input_files, read_documents
from data_pipeline.sources.text import read_text, read_wiki
from tests.data_pipeline.archives import tar


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- the published files


@pytest.mark.parametrize(("file", "count"), [("train", 7473), ("test", 1319)])
def test_gsm8k_published(data_root, file, count):
    path = data_root / "gsm8k" / f"{file}.jsonl"
    problems = list(read_gsm8k(path))
    assert len(problems) == len({p.id for p in problems}) == count
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for p, row in zip(problems, rows, strict=True):
        assert p.prompt + p.target == f"Question: {row['question']}\nAnswer: {row['answer']}"
    assert all("\n#### " in p.target for p in problems)


ARC = {"Easy-Train": 2251, "Easy-Dev": 570, "Easy-Test": 2376,
       "Challenge-Train": 1119, "Challenge-Dev": 299, "Challenge-Test": 1172}  # fmt: skip


@pytest.mark.parametrize("file", ARC)
def test_arc_published(data_root, file):
    problems = list(read_arc(data_root / "arc" / f"ARC-{file}.jsonl"))
    assert len(problems) == len({p.id for p in problems}) == ARC[file]
    assert {p.group for p in problems} == {"arc_easy" if "Easy" in file else "arc_challenge"}
    assert set(map(len, (p.choices for p in problems))) <= {3, 4, 5}
    for p in problems:
        assert p.target == p.choices[p.gold]
        assert p.target.startswith(" ")
        assert p.prompt.startswith("Question: ")
        assert p.prompt.endswith("\nAnswer:")


@pytest.mark.parametrize("file", ["Eval", "Test"])
def test_logiqa_published(data_root, file):
    problems = list(read_logiqa(data_root / "logiqa" / f"{file}.txt"))
    assert len(problems) == 651
    for p in problems:
        assert len(p.choices) == 4
        assert p.target == p.choices[p.gold]
        assert all(len(choice) > 1 and choice == f" {choice.strip()}" for choice in p.choices)
        assert p.prompt.count("\nChoices:\nA. ") == 1
        assert p.prompt.endswith(f"\nD. {p.choices[3].strip()}\nAnswer:")


def test_logiqa_irregular_options(data_root):
    """The first two characters go, a space follows every full stop, the answer's letter counts the lines."""
    evaluation = list(read_logiqa(data_root / "logiqa" / "Eval.txt"))
    test = list(read_logiqa(data_root / "logiqa" / "Test.txt"))
    assert evaluation[216 // 8].choices[2].startswith(" st of the spirits on the C. S City market")
    assert evaluation[312 // 8].choices[3].startswith(" The fertility rate")  # "d."
    assert evaluation[1056 // 8].choices[2].startswith(" The retired professional")  # "C The"
    assert evaluation[1904 // 8].choices[2] == " searcher C. Wang is a doctor."
    assert test[16 // 8].choices == (" No dangshen", " No Shouwu", " 有 白 术", " 不 白 术")
    assert test[80 // 8].choices[0].startswith(" Many Chinese people")  # "A? Many"
    # Printed as A, C, B, D with the answer "b": the second line is gold, although it is printed as "C.".
    assert test[864 // 8].gold == 1
    assert test[864 // 8].target == " No. 3 valve and No. 5 valve."


def test_babi_published(data_root):
    path = data_root / "babi" / "tasks_1-20_v1-2.tar.gz"
    for split, size, each, third in (
        ("train", "en", 1000, 1000), ("test", "en", 1000, 1000), ("test", "en-10k", 1000, 1000),
        ("train", "en-10k", 10_000, 1000),
    ):  # fmt: skip
        problems = list(read_babi(path, split, size))
        counts = Counter(p.group for p in problems)
        assert counts == {f"qa{task}": third if task == 3 else each for task in range(1, 21)}
        assert list(counts) == [f"qa{task}" for task in range(1, 21)]
        assert len({p.id for p in problems}) == len(problems)
    first, second = list(read_babi(path, "train", "en"))[:2]
    passage = "Passage: Mary moved to the bathroom.\nJohn went to the hallway.\n"
    assert first.prompt == f"{passage}Question: Where is Mary?\nAnswer:"
    assert first.target == " bathroom"
    assert second.prompt == first.prompt.split("Question")[0] + (
        "Daniel went back to the hallway.\nSandra moved to the garden.\nQuestion: Where is Daniel?\nAnswer:"
    )


def test_babi_says_which_file_it_takes_instead(data_root, caplog):
    with caplog.at_level(logging.WARNING):
        list(read_babi(data_root / "babi" / "tasks_1-20_v1-2.tar.gz", "train"))
    assert [r.getMessage().split(" has ")[1] for r in caplog.records] == [
        "no en-10k/qa3 train file: reading en/qa3 instead"
    ]


def test_training_text_of_every_kind(data_root):
    files = {"files": ["text/tinyshakespeare.txt"]}
    for kind, options in {
        "gsm8k": {}, "arc": {}, "babi": {"size": "en"}, "text": files,
        "wiki": {"files": ["text/enwiki2015-AA.tar.xz"]}, "causal_loop": {"num_samples": 5},
    }.items():  # fmt: skip
        first = next(read_documents(kind, data_root, options))
        assert len(first.text) > 30, kind
        assert all("test" not in f.lower() for f in input_files(kind, options)), kind
    assert sum(1 for _ in read_documents("arc", data_root, {})) == 2251 + 1119
    assert sum(1 for _ in read_documents("gsm8k", data_root, {"max_documents": 7})) == 7
    assert sum(1 for _ in read_documents("gsm8k", data_root, {"max_documents": 0})) == 0
    some = list(read_documents("text", data_root, {**files, "max_bytes": 10_000}))
    size = sum(len(d.text.encode()) for d in some)
    assert 7000 < size <= 10_000


# ---- the records


def test_a_record_names_the_files_that_are_fetched(data_root):
    assert len({problem_set.name for problem_set in PROBLEM_SETS}) == len(PROBLEM_SETS)
    for problem_set in PROBLEM_SETS:
        paths = {*problem_set.train, *problem_set.test, *problem_set.held_out}
        if problem_set.files:
            assert paths <= {file.path for file in problem_set.files}, problem_set.name
            assert set(problem_set.test) <= set(problem_set.held_out), problem_set.name
        for path in problem_set.held_out:
            assert next(problem_set.read(data_root / path)).target.startswith(" ")
        if len(paths) > 1:  # else one archive of all splits
            assert not set(problem_set.train) & {*problem_set.test, *problem_set.held_out}, problem_set.name


def test_a_record_with_fetched_files_is_a_kind_of_source():
    """Over the training files only, unless the recipe names the files."""
    for problem_set in PROBLEM_SETS:
        assert (problem_set.name in KINDS) == bool(problem_set.files)
        if problem_set.files and not problem_set.recipe_names_files:
            assert input_files(problem_set.name, {}) == list(problem_set.train)


# ---- made-up files


def test_gsm8k_keeps_text_as_it_is(tmp_path):
    path = tmp_path / "train.jsonl"
    row = {"question": " É\u2028日本? ", "answer": "x\n#### 1"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n\n" + json.dumps(row) + "\n")
    first, second = read_gsm8k(path)
    assert first.prompt == second.prompt == "Question:  É\u2028日本? \nAnswer:"
    assert (first.id, second.id) == ("gsm8k-train-0", "gsm8k-train-2")


def test_arc_labels_may_be_numbers(tmp_path):
    choices = [{"text": text, "label": label} for text, label in zip("abc", "123", strict=True)]
    row = {"id": "x", "question": {"stem": "S", "choices": choices}, "answerKey": "3"}
    path = tmp_path / "ARC-Easy-Dev.jsonl"
    path.write_text(json.dumps(row))
    assert list(read_arc(path)) == [
        Problem("x", "Question: S\nAnswer:", " c", (" a", " b", " c"), 2, "arc_easy")
    ]


@pytest.mark.parametrize(
    ("reader", "text", "message"),
    [
        (read_gsm8k, '{"question": "q", "answer": "a"}\n{"question"', "line 2: not JSON"),
        (read_gsm8k, '{"question": "q"}', "line 1: no field 'answer'"),
        (read_gsm8k, "[1]", "line 1: no field 'question'"),
        (read_arc, '{"id": 1, "question": {"stem": "s"}, "answerKey": "A"}', "line 1: not an ARC problem"),
        (read_arc, '{"id": 1, "question": 3, "answerKey": "A"}', "line 1: not an ARC problem"),
        (read_arc, '{"id": 1, "question": {"stem": "", "choices": []}, "answerKey": 2}', "line 1: answerKey"),
        (read_logiqa, "\na\nc\nq\nA.1\nB.2\nC.3\n", "line 1: not a LogiQA"),
        (read_logiqa, "\na\nc\nq\nA.1\nB.2\nC.3\nD.4\n\ne\nc\nq\nA.1\nB.2\nC.3\nD.4", "line 9: not a LogiQA"),
        (read_logiqa, "\n\nc\nq\nA.1\nB.2\nC.3\nD.4\n", "line 1: not a LogiQA"),
    ],
)  # fmt: skip
def test_malformed_text_names_file_and_line(tmp_path, reader, text, message):
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    error = error_of(lambda: list(reader(path)))
    assert f"{path} {message}" in error


@pytest.mark.parametrize("reader", [read_gsm8k, read_arc, read_logiqa, read_text, read_wiki])
def test_missing_empty_and_binary_files(tmp_path, reader):
    assert "absent does not exist" in error_of(lambda: list(reader(tmp_path / "absent")))
    path = tmp_path / "x.txt"
    path.write_bytes(b"\x80\xff\n" * 3)
    assert str(path) in error_of(lambda: list(reader(path)))
    path.write_bytes(b"")
    if reader is not read_wiki:
        assert list(reader(path)) == []


def test_babi_stories_restart_and_questions_stay_out_of_passages(tmp_path):
    story = "1 A b.\n2 Who? \tMary\t1\n3 C d.\n4 Who now?\tx,y\t1 3\n1 New.\n2 Q?\tz\t1\n"
    files = {f"t/en/qa{n}_n_test.txt": story for n in range(1, 21)}
    problems = list(read_babi(tar(tmp_path / "b.tar.gz", files, gzip.compress), "test", "en"))
    assert [(p.prompt, p.target) for p in problems[:3]] == [
        ("Passage: A b.\nQuestion: Who?\nAnswer:", " Mary"),
        ("Passage: A b.\nC d.\nQuestion: Who now?\nAnswer:", " x,y"),
        ("Passage: New.\nQuestion: Q?\nAnswer:", " z"),
    ]
    del files["t/en/qa7_n_test.txt"]
    path = tar(tmp_path / "b.tar.gz", files, gzip.compress)
    assert "no bAbI task 7" in error_of(lambda: list(read_babi(path, "test", "en")))
    files["t/en/qa7_n_test.txt"] = "1 fine\nx bad\n"
    path = tar(tmp_path / "b.tar.gz", files, gzip.compress)
    assert "en/qa7_test line 2" in error_of(lambda: list(read_babi(path, "test", "en")))
