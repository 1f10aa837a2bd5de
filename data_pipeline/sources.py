"""Readers of the published files as they are, and the one place of prompt formats.

Prompts and targets are those of lm-evaluation-harness. Every reader streams; archives are read member by
member and never extracted, so a member's name cannot reach the disk. Errors name the file and the line.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import MISSING

from data_pipeline import addition, causal_loop, causal_loop_v2, p_hop
from data_pipeline.errors import DataError
from data_pipeline.files import decode, json_lines, open_text, tar_members
from data_pipeline.recipe import nearest, structured

log = logging.getLogger(__name__)

# Characters; a plain text file is cut at blank lines into documents of at least this.
MIN_TEXT_DOCUMENT = 2000


class Document(NamedTuple):
    """One training text: what is asked ("" for running text) and what follows it."""

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        return self.prompt + self.completion


class LabelledDocument(NamedTuple):
    """One training text with its own targets, in place of the next token."""

    text: str  # every character is one token
    labels: tuple[tuple[int, str], ...]  # (index of a character in text, the one character to predict there)


@dataclass(frozen=True)
class Problem:
    """One question. `choices` are full continuations as scored (" text"); target == choices[gold] if there
    are any.
    """

    id: str
    prompt: str
    target: str
    choices: tuple[str, ...] = ()
    gold: int = -1
    group: str = ""


def read_gsm8k(path: Path) -> Iterator[Problem]:
    """GSM8K jsonl, `{"question", "answer"}` a line."""
    for number, row in json_lines(path, ("question", "answer")):
        yield Problem(
            id=f"gsm8k-{Path(path).stem}-{number - 1}",
            prompt=f"Question: {row['question']}\nAnswer:",
            target=f" {row['answer']}",
            group="gsm8k",
        )


def read_arc(path: Path) -> Iterator[Problem]:
    """ARC jsonl; 3 to 5 choices with labels A.. or 1...  `group` is "arc_easy" or "arc_challenge" by file
    name.
    """
    stem = Path(path).stem.lower()
    group = next((f"arc_{name}" for name in ("easy", "challenge") if name in stem), stem)
    for number, row in json_lines(path, ("id", "question", "answerKey")):
        try:
            choices = tuple(f" {choice['text']}" for choice in row["question"]["choices"])
            labels = [choice["label"] for choice in row["question"]["choices"]]
            stem_text = row["question"]["stem"]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path} line {number}: not an ARC problem ({error!r}): download it again"
            ) from error
        if row["answerKey"] not in labels:
            raise DataError(f"{path} line {number}: answerKey {row['answerKey']!r} is none of {labels}")
        gold = labels.index(row["answerKey"])
        yield Problem(row["id"], f"Question: {stem_text}\nAnswer:", choices[gold], choices, gold, group)


def read_logiqa(path: Path) -> Iterator[Problem]:
    """LogiQA 1.0 text: 8 lines a problem (blank, letter of the answer, context, question, four options).

    The answer's letter means the letter printed before an option: some problems print theirs as A, C, B, D,
    so the options are sorted by it. An option whose letter stands elsewhere ("City B.S has") takes the letter
    of its place.
    """
    with open_text(path) as file:
        lines = file.read().split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for start in range(0, len(lines), 8):
        block = lines[start : start + 8]
        letter = block[1].strip().lower() if len(block) == 8 else ""
        if (
            len(letter) != 1
            or letter not in "abcd"
            or block[0].strip()
            or not all(x.strip() for x in block[2:])
        ):
            raise DataError(f"{path} line {start + 1}: not a LogiQA problem of 8 lines: download it again")
        options = _logiqa_options(block[4:])
        gold = "abcd".index(letter)
        listed = "".join(f"{name}. {option}\n" for name, option in zip("ABCD", options, strict=True))
        choices = tuple(f" {option}" for option in options)
        yield Problem(
            id=f"logiqa-{Path(path).stem}-{start // 8}",
            prompt=f"Passage: {block[2].strip()}\nQuestion: {block[3].strip()}\nChoices:\n{listed}Answer:",
            target=choices[gold],
            choices=choices,
            gold=gold,
            group="logiqa",
        )


def _logiqa_options(lines: list[str]) -> list[str]:
    """The four option texts in the order of their letters, without the letters."""
    printed = [match.group(1).upper() if (match := re.match(r"([A-Da-d])[.?]", x)) else "" for x in lines]
    letters = [mark or place for mark, place in zip(printed, "ABCD", strict=True)]
    if sorted(letters) != list("ABCD"):
        letters = list("ABCD")
    options = {}
    for letter, line in zip(letters, lines, strict=True):
        text = re.sub(rf"^{letter}[.?]\s*|^{letter} ", "", line, count=1, flags=re.IGNORECASE)
        if text == line:  # the letter went into the sentence: "Researcher C.Wang is a doctor."
            text = re.sub(rf"\b{letter}\.", "", line, count=1)
        options[letter] = text.strip()
    return [options[letter] for letter in "ABCD"]


def read_babi(path: Path, split: str, size: str = "en-10k") -> Iterator[Problem]:
    """bAbI tasks 1 to 20 of `split` ("train" or "test") out of the published tar.gz; `group` is
    "qa1".."qa20".

    Each question is a problem; its passage is every statement of the story before it, one a line. The
    published en-10k lacks the training file of task 3: the one of `en` (1000 questions) is read instead, and
    logged.
    """
    members: dict[str, bytes] = {}
    for name, data in tar_members(path):
        match = re.search(rf"(?:^|/)({re.escape(size)}|en)/qa(\d+)_[^/]*_{re.escape(split)}\.txt$", name)
        if match:
            members[f"{match[1]}/{match[2]}"] = data
    for task in range(1, 21):
        folder = size
        if f"{size}/{task}" not in members and f"en/{task}" in members:
            folder = "en"
            log.warning("%s has no %s/qa%d %s file: reading en/qa%d instead", path, size, task, split, task)
        if f"{folder}/{task}" not in members:
            raise DataError(
                f"{path} has no bAbI task {task} for size {size!r}, split {split!r}: mend one of them"
            )
        where = f"{path}:{folder}/qa{task}_{split}"
        yield from _babi_task(decode(members[f"{folder}/{task}"], where), where, f"qa{task}", split)


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


def read_wiki(path: Path) -> Iterator[str]:
    """Article texts, the title first, of a tar.xz of `<doc id url title> ... </doc>` records."""
    for name, data in tar_members(path):
        article: list[str] | None = None
        for number, line in enumerate(decode(data, f"{path}:{name}").split("\n"), start=1):
            if line.startswith("<doc ") and article is None:
                article = []
            elif line == "</doc>" and article is not None:
                yield "\n".join(article).strip()
                article = None
            elif article is not None:
                article.append(line)
            elif line.strip():
                raise DataError(f"{path}:{name} line {number}: text outside <doc> records: download it again")
        if article is not None:
            raise DataError(f"{path}:{name} ends inside a <doc> record: download it again")


def read_text(path: Path) -> Iterator[str]:
    """Documents of a text file, or of a tar of text files (one document a file).

    A single file is cut at blank lines into documents of at least MIN_TEXT_DOCUMENT characters (the last may
    be shorter). White space at the ends of a document is dropped, empty documents are skipped.
    """
    if re.search(r"\.tar(\.\w+)?$|\.tgz$", Path(path).name):
        for name, data in tar_members(path):
            if text := decode(data, f"{path}:{name}").strip():
                yield text
        return
    document: list[str] = []
    size = 0
    with open_text(path) as file:
        for line in file:
            if not line.strip() and size >= MIN_TEXT_DOCUMENT:
                yield "".join(document).strip()
                document, size = [], 0
            document.append(line)
            size += len(line)
    if text := "".join(document).strip():
        yield text


# ---- training text by kind


@dataclass(frozen=True)
class FixedOptions:
    """Options of a kind whose training files are fixed, so that a test file cannot get into a corpus."""

    max_documents: int | None = None
    max_bytes: int | None = None  # UTF-8 bytes; reading stops before the document that would exceed it


@dataclass(frozen=True)
class BabiOptions(FixedOptions):
    size: str = "en-10k"  # or en


@dataclass(frozen=True)
class FileOptions(FixedOptions):
    files: list[str] = MISSING  # relative to the data folder


@dataclass(frozen=True)
class CausalLoopOptions:
    num_samples: int = MISSING
    levels: list[int] = field(default_factory=lambda: list(causal_loop.LEVELS))
    seed: int = 0
    trace_fraction: float = 0.75  # share of documents with the worked trace


@dataclass(frozen=True)
class PHopOptions:
    num_samples: int = MISSING
    hops: int = 3
    length: int = 24  # characters
    alphabet: int = 4  # letters
    seed: int = 0
    split: str = "train"


@dataclass(frozen=True)
class CausalLoopV2Options:
    num_samples: int = MISSING
    depths: list[int] = field(default_factory=lambda: list(range(1, 9)))
    families: list[str] = field(default_factory=lambda: list(causal_loop_v2.FAMILIES))
    modulus: int = 7
    variables: int = 5
    statements: int = 12
    names: int = 26
    seed: int = 0
    split: str = "train"


@dataclass(frozen=True)
class AdditionOptions:
    num_samples: int = MISSING
    operands: int = 8
    modulus: int = 10
    seed: int = 0
    split: str = "train"


def input_files(kind: str, options: Mapping[str, Any]) -> list[str]:
    """The files `read_documents` would read, relative to the data folder. Raises DataError as it does."""
    entry, parsed = _parse(kind, options)
    return list(entry.files(parsed))


def read_documents(
    kind: str, root: Path, options: Mapping[str, Any]
) -> Iterator[Document | LabelledDocument]:
    """Training text of a source kind, one document at a time; training files only.

    Raises DataError for an unknown kind or option (naming the nearest), a wrong type and a missing file.
    """
    entry, parsed = _parse(kind, options)
    size = 0
    for count, document in enumerate(entry.read([Path(root) / file for file in entry.files(parsed)], parsed)):
        size += len(document.text.encode())
        if isinstance(parsed, FixedOptions) and (
            (parsed.max_documents is not None and count >= parsed.max_documents)
            or (parsed.max_bytes is not None and size > parsed.max_bytes)
        ):
            return
        yield document


class _Kind(NamedTuple):
    options: type
    files: Callable[[Any], Sequence[str]]
    read: Callable[[list[Path], Any], Iterator[Document | LabelledDocument]]


def _parse(kind: str, options: Mapping[str, Any]) -> tuple[_Kind, Any]:
    if kind not in KINDS:
        raise DataError(f"unknown source kind {kind!r}; {nearest(kind, list(KINDS))}")
    return KINDS[kind], structured(KINDS[kind].options, options, f"options of source kind {kind!r}")


def _problems(read: Callable[[Path], Iterator[Problem]]) -> Callable[[list[Path], Any], Iterator[Document]]:
    return lambda paths, _: (Document(p.prompt, p.target) for path in paths for p in read(path))


def _texts(read: Callable[[Path], Iterator[str]]) -> Callable[[list[Path], Any], Iterator[Document]]:
    return lambda paths, _: (Document("", text) for path in paths for text in read(path))


def _read_babi_documents(paths: list[Path], options: BabiOptions) -> Iterator[Document]:
    return (Document(p.prompt, p.target) for p in read_babi(paths[0], "train", options.size))


def _read_causal_loop(_: list[Path], options: CausalLoopOptions) -> Iterator[Document]:
    for sample in causal_loop.generate(options.num_samples, options.levels, options.seed, "train"):
        yield Document(*causal_loop.training_document(sample, options.trace_fraction))


def _read_p_hop(_: list[Path], o: PHopOptions) -> Iterator[LabelledDocument]:
    for sample in p_hop.generate(o.num_samples, o.hops, o.length, o.alphabet, o.seed, o.split):
        yield LabelledDocument(sample.text, sample.labels)


def _read_addition(_: list[Path], o: AdditionOptions) -> Iterator[LabelledDocument]:
    for sample in addition.generate(o.num_samples, o.operands, o.modulus, o.seed, o.split):
        yield LabelledDocument(sample.text, sample.labels)


def _read_causal_loop_v2(_: list[Path], o: CausalLoopV2Options) -> Iterator[LabelledDocument]:
    size = (o.modulus, o.variables, o.statements, o.names)
    for sample in causal_loop_v2.generate(o.num_samples, o.depths, o.families, *size, o.seed, o.split):
        yield LabelledDocument(*sample.labelled())


_ARC_TRAIN = ("arc/ARC-Easy-Train.jsonl", "arc/ARC-Challenge-Train.jsonl")
KINDS = {
    "gsm8k": _Kind(FixedOptions, lambda _: ("gsm8k/train.jsonl",), _problems(read_gsm8k)),
    "arc": _Kind(FixedOptions, lambda _: _ARC_TRAIN, _problems(read_arc)),
    "babi": _Kind(BabiOptions, lambda _: ("babi/tasks_1-20_v1-2.tar.gz",), _read_babi_documents),
    "wiki": _Kind(FileOptions, lambda options: options.files, _texts(read_wiki)),
    "text": _Kind(FileOptions, lambda options: options.files, _texts(read_text)),
    "causal_loop": _Kind(CausalLoopOptions, lambda _: (), _read_causal_loop),
    "p_hop": _Kind(PHopOptions, lambda _: (), _read_p_hop),
    "causal_loop_v2": _Kind(CausalLoopV2Options, lambda _: (), _read_causal_loop_v2),
    "addition": _Kind(AdditionOptions, lambda _: (), _read_addition),
}
