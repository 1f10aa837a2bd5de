"""The published problem sets: a reader of each and, below it, the record that everything else derives from.

Prompts and targets are those of lm-evaluation-harness and are defined only here. Every reader streams;
archives are read member by member and never extracted, so a member's name cannot reach the disk. Errors name
the file and the line.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.sources.documents import MathProblem, Problem
from data_pipeline.sources.files import decode, json_lines, json_value, tar_members, text_fields, text_lines
from data_pipeline.sources.published import GITHUB, File, FixedOptions, ProblemSet, files_of

log = logging.getLogger(__name__)


def read_gsm8k(path: Path) -> Iterator[Problem]:
    """GSM8K jsonl, one `{"question", "answer"}` per line."""
    for name, question, answer in _gsm8k_rows(path):
        yield Problem(f"gsm8k-{name}", f"Question: {question}\nAnswer:", f" {answer}", group="gsm8k")


GSM8K = ProblemSet(
    "gsm8k",
    "MIT",
    "https://github.com/openai/grade-school-math",
    files_of(
        "gsm8k",
        f"{GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/",
        """
    17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465  grade_school_math/data/train.jsonl
    3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14  grade_school_math/data/test.jsonl
    86bbb73e855821d7c401912fd4bf82e34313e6e3b6fd6f909f2b6cc9e209a53b  LICENSE
    """,
    ),
    read=read_gsm8k,
    train=("gsm8k/train.jsonl",),
    test=("gsm8k/test.jsonl",),
    held_out=("gsm8k/test.jsonl",),
)


def read_gsm8k_cot(path: Path) -> Iterator[Problem]:
    """GSM8K jsonl in the prompts of lm-evaluation-harness's gsm8k_cot; the target is the final number."""
    for name, question, answer in _gsm8k_rows(path):
        number = answer.split("####")[-1].strip()
        yield Problem(f"gsm8k_cot-{name}", f"Q: {question}\nA:", f" {number}", group="gsm8k_cot")


def _gsm8k_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """(FILE-NUMBER counted from 0, question, answer) of each line."""
    keys = ("question", "answer")
    for number, row in json_lines(path, keys):
        question, answer = text_fields(row, keys, f"{path} line {number}")
        yield f"{Path(path).stem}-{number - 1}", question, answer


def read_arc(path: Path) -> Iterator[Problem]:
    """ARC jsonl; 3 to 5 choices with labels A.. or 1...  `group` is "arc_easy" or "arc_challenge" by file
    name.
    """
    stem = Path(path).stem.lower()
    group = next((f"arc_{name}" for name in ("easy", "challenge") if name in stem), stem)
    for number, row in json_lines(path, ("id", "question", "answerKey")):
        try:
            texts = [choice["text"] for choice in row["question"]["choices"]]
            labels = [choice["label"] for choice in row["question"]["choices"]]
            stem_text = row["question"]["stem"]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path} line {number}: not an ARC problem ({error!r}): download it again"
            ) from error
        if row["answerKey"] not in labels:
            raise DataError(
                f"{path} line {number}: answerKey {row['answerKey']!r} is not in {labels}: fix it"
            )
        if not all(isinstance(x, str) for x in (row["id"], stem_text, *labels, *texts)):
            raise DataError(f"{path} line {number}: a field of this ARC problem is not text: fix the file")
        if not all(text.strip() for text in texts):
            raise DataError(f"{path} line {number}: a choice of this ARC problem is empty: download it again")
        choices = tuple(f" {text}" for text in texts)
        gold = labels.index(row["answerKey"])
        yield Problem(row["id"], f"Question: {stem_text}\nAnswer:", choices[gold], choices, gold, group)


ARC = ProblemSet(
    "arc",
    "CC BY-SA 4.0",
    "https://allenai.org/data/arc",
    files_of(
        "arc",
        "ARC-V1-Feb2018-2/",
        """
    c62e5482d8c01f2d5a7f24239ac9db3b12f9e47267c4e3f088c6ffe41d5545ef  ARC-Easy/ARC-Easy-Train.jsonl
    f4364b808a68df6bf500ce1070fb0105d40cacd2391c210deb00ff83ba75d1f4  ARC-Easy/ARC-Easy-Dev.jsonl
    ce32a0774b4beb1977d2c6b16dda5dd2b24fdc9c7f506882c452678676bd09be  ARC-Easy/ARC-Easy-Test.jsonl
    e02837c53ee86f6d73c259f91c77725c5062ef4531130b7f473a9d9b01118a77  ARC-Challenge/ARC-Challenge-Train.jsonl
    55224364abd2477f66a9a57c5cbef109fb71d83019aa5e37aec0e7ab757746ca  ARC-Challenge/ARC-Challenge-Dev.jsonl
    9fa8ffb3e3a1f88cb302d53dd95aae81e39209ad9bcf974376b319d8fd35717c  ARC-Challenge/ARC-Challenge-Test.jsonl
    """,
    ),
    archive=File(
        "arc/ARC-V1-Feb2018.zip",
        "https://ai2-public-datasets.s3.amazonaws.com/arc/ARC-V1-Feb2018.zip",  # 681 MB
        "6d2d5ab50b2ceec6ba5f79c921be77cf2de712ea25a2b3f4fff3acc101cecfa0",
    ),
    read=read_arc,
    train=("arc/ARC-Easy-Train.jsonl", "arc/ARC-Challenge-Train.jsonl"),
    test=("arc/ARC-Easy-Test.jsonl", "arc/ARC-Challenge-Test.jsonl"),
    held_out=(
        "arc/ARC-Easy-Test.jsonl",
        "arc/ARC-Easy-Dev.jsonl",
        "arc/ARC-Challenge-Test.jsonl",
        "arc/ARC-Challenge-Dev.jsonl",
    ),
)


def read_logiqa(path: Path) -> Iterator[Problem]:
    """LogiQA 1.0 text: 8 lines per problem (blank, letter of the answer, context, question, four options).

    Read as the loading script behind lm-evaluation-harness's logiqa reads it, quirks included, so that scores
    are comparable: an option is its line without the first two characters, whatever they are ("Mr.A.P wrote"
    becomes ". A. P wrote"); the answer's letter counts the lines, although some problems print their options
    as A, C, B, D (19 of Test.txt; 12 of these have the answer B or C, for which the printed letter would mean
    the other option); and a space follows every full stop ("3.5" becomes "3. 5").
    """
    lines = [line.rstrip("\n") for line in text_lines(path)]
    while lines and not lines[-1].strip():
        lines.pop()
    for start in range(0, len(lines), 8):
        block = lines[start : start + 8]
        letter = block[1].strip() if len(block) == 8 else ""
        texts = [_spaced(text) for text in (*block[2:4], *(option[2:] for option in block[4:]))]
        if len(letter) != 1 or letter not in "abcd" or block[0].strip() or not all(texts):
            raise DataError(f"{path} line {start + 1}: not a LogiQA problem of 8 lines: download it again")
        context, question, *options = texts
        choices = tuple(f" {option}" for option in options)
        gold = "abcd".index(letter)
        yield Problem(
            id=f"logiqa-{Path(path).stem}-{start // 8}",
            prompt=_passage_prompt(context, question, options),
            target=choices[gold],
            choices=choices,
            gold=gold,
            group="logiqa",
        )


def _spaced(text: str) -> str:
    return text.replace(".", ". ").strip()


LOGIQA = ProblemSet(
    "logiqa",
    "none stated by its authors; published for research",
    "https://github.com/lgw863/LogiQA-dataset",
    files_of(
        "logiqa",
        f"{GITHUB}/lgw863/LogiQA-dataset/master/",
        """
    7d5bb1f58278e33b395744cd2ad8d7600faa0b3c4d615c659a44ec1181d759fa  Train.txt
    4c49e6753b7262c001506b9151135abf722247035ab075dad93acdea5789c01f  Eval.txt
    359acb78c37802208f7fde9e2f6574b8526527c63d6a336f90a53f1932cb4701  Test.txt
    """,
    ),
    read=read_logiqa,
    train=("logiqa/Train.txt",),
    test=("logiqa/Test.txt",),
    held_out=("logiqa/Eval.txt", "logiqa/Test.txt"),
    recipe_names_files=True,
)


def read_reclor(path: Path) -> Iterator[Problem]:
    """ReClor, a JSON list of `{"context", "question", "answers", "label", "id_string"}`, as LogiQA asks."""
    keys = ("context", "question", "id_string")
    entries = json_value(path)
    if not isinstance(entries, list):
        raise DataError(f"{path} holds {type(entries).__name__}, not a list of problems: download it again")
    for number, row in enumerate(entries, start=1):
        where = f"{path} entry {number}"
        if not isinstance(row, dict) or (missing := [k for k in (*keys, "answers", "label") if k not in row]):
            lacks = f"has no field {missing[0]!r}" if isinstance(row, dict) else "is not a JSON object"
            raise DataError(f"{where} {lacks}: is this the published val.json or train.json?")
        context, question, name = text_fields(row, keys, where)
        answers, gold = row["answers"], row["label"]
        if not isinstance(answers, list) or len(answers) != 4 or not all(isinstance(a, str) for a in answers):
            raise DataError(f"{where}: answers are not four texts: download it again")
        if not all(answer.strip() for answer in answers):
            raise DataError(f"{where}: one of the answers is empty: download it again")
        if type(gold) is not int or gold not in range(4):
            raise DataError(f"{where}: label {gold!r} is not in 0..3: download it again")
        choices = tuple(f" {answer}" for answer in answers)
        prompt = _passage_prompt(context, question, answers)
        yield Problem(name, prompt, choices[gold], choices, gold, "reclor")


RECLOR = ProblemSet(
    "reclor",
    "for research only, not to be passed on",
    "https://whyu.me/reclor/",
    files=(),
    read=read_reclor,
    train=("reclor/train.json",),
    test=("reclor/val.json",),  # the answers of its test file are not published
)


def _passage_prompt(context: str, question: str, options: Sequence[str]) -> str:
    listed = "".join(f"{name}. {option}\n" for name, option in zip("ABCD", options, strict=True))
    return f"Passage: {context}\nQuestion: {question}\nChoices:\n{listed}Answer:"


MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def read_math(folder: Path, subject: str) -> Iterator[MathProblem]:
    """One subject of MATH (Hendrycks et al. 2021): `folder`/`subject`/NUMBER.json, in ascending
    order; the prompts of lm-evaluation-harness's hendrycks_math.
    """
    paths = list((folder / subject).glob("*.json"))
    strange = [path for path in paths if not path.stem.isdecimal()]
    if not paths or strange:
        found = strange[0].name if strange else "no such file"
        raise DataError(f"{folder / subject} holds {found}, expected MATH's NUMBER.json: download it again")
    for path in sorted(paths, key=lambda path: int(path.stem)):
        row = json_value(path)
        keys = ("problem", "level", "solution")
        if not isinstance(row, dict) or any(key not in row for key in keys):
            raise DataError(f"{path} lacks one of the fields {', '.join(keys)}: download it again")
        problem, level, solution = text_fields(row, keys, str(path))
        answer = boxed_answer(solution)
        if answer is None:
            raise DataError(f"{path}: its solution has no whole \\boxed{{...}}: download it again")
        number = re.fullmatch(r"Level ([1-5?])", level)
        if number is None:
            raise DataError(f"{path}: level {level!r} is not `Level 1` to `Level 5`: download it again")
        yield MathProblem(
            id=f"math-{folder.name}-{subject}-{path.stem}",
            prompt=f"Problem: {problem}\nAnswer:",
            target=f" {answer}",
            group=subject,
            level=None if number[1] == "?" else int(number[1]),
        )


def _read_math_subjects(folder: Path) -> Iterator[MathProblem]:
    return chain.from_iterable(read_math(folder, subject) for subject in MATH_SUBJECTS)


MATH = ProblemSet(
    "math",
    "MIT; its publisher withdrew it after a claim of copyright",
    "https://github.com/hendrycks/math",
    files=(),
    read=_read_math_subjects,
    train=("math/train",),
    test=("math/test",),
)


def boxed_answer(solution: str) -> str | None:
    """The content of the last box of a TeX text, None without a whole one.

    As lm-evaluation-harness reads it: where boxes are written without braces, `\\boxed 5$`, the last of them
    extends to the next dollar sign.
    """
    if "\\boxed " in solution:
        return solution.split("\\boxed ")[-1].split("$")[0]
    command = "\\boxed" if "\\boxed" in solution else "\\fbox"
    _, found, rest = solution.rpartition(command)
    if not found or not rest.startswith("{"):
        return None
    depth = 0
    for i, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:i]
    return None


def read_babi(path: Path, split: str, size: str = "en-10k") -> Iterator[Problem]:
    """bAbI tasks 1 to 20 of `split` ("train" or "test") out of the published tar.gz; `group` is
    "qa1".."qa20".

    Each question is a problem; its passage is every statement of the story before it, one per line. The
    published en-10k lacks the training file of task 3: the file of `en` (1000 questions) is read instead,
    with a warning.
    """
    members: dict[str, bytes] = {}
    wanted = re.compile(rf"(?:^|/)({re.escape(size)}|en)/qa(\d+)_[^/]*_{re.escape(split)}\.txt$").search
    for name, data in tar_members(path, wanted):
        match = wanted(name)
        assert match
        members[f"{match[1]}/{match[2]}"] = data
    for task in range(1, 21):
        folder = size
        if f"{size}/{task}" not in members and f"en/{task}" in members:
            folder = "en"
            log.warning("%s has no %s/qa%d %s file: reading en/qa%d instead", path, size, task, split, task)
        if f"{folder}/{task}" not in members:
            raise DataError(
                f"{path} has no bAbI task {task} for size {size!r}, split {split!r}: change one of them"
            )
        where = f"{path}:{folder}/qa{task}_{split}"
        problems = list(_babi_task(decode(members[f"{folder}/{task}"], where), where, f"qa{task}", split))
        if not problems:
            raise DataError(f"{where} holds no question: download it again")
        yield from problems


def _babi_task(text: str, where: str, group: str, split: str) -> Iterator[Problem]:
    statements: list[str] = []
    count = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        index, _, rest = line.partition(" ")
        if not index.isdecimal() or not rest:
            raise DataError(f"{where} line {number}: {line[:40]!r} is not `NUMBER text`: download it again")
        if index == "1":
            statements = []
        question, *answer = rest.split("\t")
        if not answer:
            statements.append(rest.strip())
            continue
        passage = "".join(f"{statement}\n" for statement in statements)
        yield Problem(
            id=f"babi-{group}-{split}-{count}",
            prompt=f"Passage: {passage}Question: {question.strip()}\nAnswer:",
            target=f" {answer[0].strip()}",
            group=group,
        )
        count += 1


def _read_babi_tests(path: Path) -> Iterator[Problem]:
    return chain(read_babi(path, "test", "en"), read_babi(path, "test", "en-10k"))


@dataclass(frozen=True)
class BabiOptions(FixedOptions):
    size: str = "en-10k"  # or en


def _read_babi_train(path: Path, options: BabiOptions) -> Iterator[Problem]:
    return read_babi(path, "train", options.size)


BABI = ProblemSet(
    "babi",
    "CC BY 3.0",
    "https://research.facebook.com/downloads/babi/",
    # The address of the paper is gone; its authors' laboratory serves version 1.2 with ParlAI.
    (
        File(
            "babi/tasks_1-20_v1-2.tar.gz",
            "https://dl.fbaipublicfiles.com/parlai/babi/babi.tar.gz",
            "f7f0bee187efca0d81c3daac1b162cda4eb7f9505dee5ad6846eabbed3dbf92e",
        ),
    ),
    read=_read_babi_tests,
    train=("babi/tasks_1-20_v1-2.tar.gz",),  # one archive of all splits
    test=("babi/tasks_1-20_v1-2.tar.gz",),
    held_out=("babi/tasks_1-20_v1-2.tar.gz",),
    templated=True,
    options=BabiOptions,
    read_train=_read_babi_train,
)

# In the order that a build's hash has them in.
PROBLEM_SETS = (GSM8K, ARC, LOGIQA, BABI, RECLOR, MATH)
