"""Questions with a chain of thought in steps: readers for training, and for evaluation as question and gold.

A problem without steps has nothing to distil: the readers for training leave it out and log how many there
were. The readers for evaluation keep it; their prompt is the bare question, as in training.

With `keep_last_step` false the last step of each chain is left out, as in CODI (arXiv 2502.21074): where it
states the answer, the teacher's state before the answer would hold a copy of it, not the result of the steps.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.sources.documents import Problem, TracedDocument
from data_pipeline.sources.files import json_lines, json_value, text_fields, text_lines
from data_pipeline.sources.published import GITHUB, DataSet, files_of

log = logging.getLogger(__name__)

_EQUATION = re.compile(r"<<[^<>]*>>")
_EQUATIONS = re.compile(r"\s*(?:<<[^<>]*>>\s*)*")


def traced_gsm8k(path: Path, keep_last_step: bool = True) -> Iterator[TracedDocument]:
    """GSM8K jsonl; the steps are the solution's annotations `<<48/2=24>>`, the answer follows `####`.

    Joined by spaces this is the line format of iCoT, equation for equation.
    """
    return _with_steps(_gsm8k(path), path, keep_last_step)


def _gsm8k(path: Path) -> Iterator[TracedDocument]:
    keys = ("question", "answer")
    for number, row in json_lines(path, keys):
        where = f"{path} line {number}"
        question, solution = text_fields(row, keys, where)
        work, mark, answer = solution.rpartition("####")
        if not mark:
            raise DataError(f"{where}: its answer has no `#### value` at the end: download it again")
        yield _document(question, _EQUATION.findall(work), answer, where)


def traced_icot(path: Path, keep_last_step: bool = True) -> Iterator[TracedDocument]:
    """Lines `question||<<a>> <<b>> #### answer` (Deng et al. 2023); GSM8K-AUG is published in this form."""
    return _with_steps(_icot(path), path, keep_last_step)


def read_icot(path: Path) -> Iterator[Problem]:
    """The questions and answers of an iCoT file (see `traced_icot`), those without steps included."""
    return _problems(_icot(path), path, "icot")


def _icot(path: Path) -> Iterator[TracedDocument]:
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        question, bars, rest = line.rpartition("||")
        work, mark, answer = rest.rpartition("####")
        if not bars or not mark or not _EQUATIONS.fullmatch(work):
            raise DataError(
                f"{where}: not `question||<<a>> <<b>> #### answer`, it ends {line.strip()[-60:]!r}: fix it"
            )
        yield _document(question, _EQUATION.findall(work), answer, where)


def traced_prosqa(path: Path, keep_last_step: bool = True) -> Iterator[TracedDocument]:
    """ProsQA, a JSON list of `{"question", "steps", "answer", ...}` (Hao et al. 2024, Coconut)."""
    return _with_steps(_prosqa(path), path, keep_last_step)


def read_prosqa(path: Path) -> Iterator[Problem]:
    """The questions and answers of a ProsQA file (see `traced_prosqa`)."""
    return _problems(_prosqa(path), path, "prosqa")


PROSQA = DataSet(
    "prosqa",
    "MIT",
    "https://github.com/facebookresearch/coconut",
    files_of(
        "prosqa",
        f"{GITHUB}/facebookresearch/coconut/main/",
        """
    99e40ce7e9107fd02e35bcd78a7a4479bd57f415bab0a6efd37cc11a72e594f6  data/prosqa_train.json
    c74e0de24f1e90ec48b1a993e6458a7be4caeef3928f5104e3c2e45d689a5249  data/prosqa_valid.json
    82ddc0afe6ee30eb31bb16fa208e293e55278a20fa987098d48519cae7e12680  data/prosqa_test.json
    cf9b17822d1fcd4ff32ccbe14183386fb3adf6f2ff92dc184130823f7fc28173  LICENSE
    """,
    ),
)


def _prosqa(path: Path) -> Iterator[TracedDocument]:
    entries = json_value(path)
    if not isinstance(entries, list):
        raise DataError(f"{path} holds {type(entries).__name__}, not a list of problems: download it again")
    keys = ("question", "answer")
    for number, row in enumerate(entries, start=1):
        where = f"{path} entry {number}"
        if not isinstance(row, dict) or (missing := [key for key in (*keys, "steps") if key not in row]):
            lacks = f"has no field {missing[0]!r}" if isinstance(row, dict) else "is not a JSON object"
            raise DataError(f"{where} {lacks}: is this a published ProsQA file?")
        question, answer = text_fields(row, keys, where)
        steps = row["steps"]
        if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
            raise DataError(f"{where}: steps are not a list of texts: download it again")
        yield _document(question, steps, answer, where)


# ---- of all


def _document(question: str, steps: Iterable[str], answer: str, where: str) -> TracedDocument:
    """Spaces at the ends are dropped. Raises DataError for an empty part."""
    document = TracedDocument(question.strip(), tuple(step.strip() for step in steps), answer.strip())
    if not document.question or not document.answer or not all(document.steps):
        raise DataError(f"{where}: an empty question, step or answer: fix the file")
    return document


def _with_steps(
    documents: Iterable[TracedDocument], path: Path, keep_last_step: bool
) -> Iterator[TracedDocument]:
    read = left_out = 0
    try:
        for document in documents:
            read += 1
            steps = document.steps if keep_last_step else document.steps[:-1]
            if steps:
                yield document._replace(steps=steps)
            else:
                left_out += 1
    finally:  # also where the limits of a source end the reading
        if left_out:
            log.warning("%s: %d of %d problems have no steps: left out", path, left_out, read)


def _problems(documents: Iterable[TracedDocument], path: Path, group: str) -> Iterator[Problem]:
    for number, (question, _, answer) in enumerate(documents):
        yield Problem(f"{group}-{Path(path).stem}-{number}", question, f" {answer}", group=group)
