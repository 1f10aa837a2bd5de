"""Questions for models that think before they answer, and what guessing achieves on them."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data_pipeline.sources.documents import ANSWER_PREFIX, Problem, TracedDocument
from data_pipeline.sources.problems import read_gsm8k
from data_pipeline.sources.traced import read_icot, read_prosqa
from data_pipeline.tasks.registry import TASKS as SYNTHETIC_TASKS
from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.looping.tasks import test_samples
from eval.scoring.task import find_data, first

# Synthetic tasks with a chain of thought, whose questions are generated.
GENERATED = tuple(name for name, task in SYNTHETIC_TASKS.items() if task.traced and task.evaluation)
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")


class Question(NamedTuple):
    """One question as training data asks it."""

    id: str
    text: str
    answer: str
    problem_depth: int | None = None  # serial steps to the answer; None: not known
    reference: TracedDocument | None = None  # with the chain of thought, where it is of a known length


class QuestionSet(NamedTuple):
    """What a task hands over."""

    questions: list[Question]
    num_documents: int  # in the data, before --limit
    chance: float
    guesses: Mapping[str, Sequence[str]]  # way to guess -> its answer to each question
    data_files: list[Path]


def read_answer(text: str) -> str | None:
    """The value in the text after <eot>; None if that does not start with ANSWER_PREFIX."""
    return text.removeprefix(ANSWER_PREFIX).strip() if text.startswith(ANSWER_PREFIX) else None


def read_chain_answer(tokenizer: Tokenizer, tokens: list[int]) -> str | None:
    """The value after the first <eot> of an answer with a chain of thought."""
    eot = tokenizer.eot_id
    return read_answer(tokenizer.decode(tokens[tokens.index(eot) + 1 :])) if eot in tokens else None


def normalize(answer: str) -> str:
    """The answer without spaces at its ends and without the commas inside its numbers."""
    return _COMMA_IN_NUMBER.sub("", answer.strip())


def generated_questions(
    task: str,
    num_samples: int,
    seed: int,
    sizes: Mapping[str, int],
    problem_depths: Sequence[int] | None = None,
) -> QuestionSet:
    """Questions of the test split of a task of GENERATED; `sizes` as eval.looping.tasks.task_options gives
    them. Raises ValueError for impossible sizes and for depths that no question has.
    """
    record = SYNTHETIC_TASKS[task]
    assert record.traced is not None
    assert record.evaluation is not None
    options = record.test_options(**sizes)
    samples = test_samples(record, num_samples, seed, options, problem_depths)
    questions = []
    for sample in samples:
        document = record.traced(sample)
        depth = record.evaluation.depth(sample)
        questions.append(Question(sample.id, document.question, document.answer, depth, document))
    chance, guesses = record.evaluation.chance(options), record.shortcuts(samples, options)
    return QuestionSet(questions, len(questions), chance, guesses, [])


def _gsm8k(path: Path) -> Iterable[Problem]:
    """The bare question, and the number after `####`, as data_pipeline.sources.traced has them."""
    for problem in read_gsm8k(path):
        question = problem.prompt.removeprefix("Question: ").removesuffix("\nAnswer:").strip()
        yield Problem(problem.id, question, problem.target.rpartition("####")[2])


class _Published(NamedTuple):
    file: str  # below the data folder
    read: Callable[[Path], Iterable[Problem]]
    chance: float


_PUBLISHED = {
    "gsm8k": _Published("gsm8k/test.jsonl", _gsm8k, 0.0),
    "icot": _Published("gsm8k_icot/test.txt", read_icot, 0.0),
    "prosqa": _Published("prosqa/prosqa_test.json", read_prosqa, 0.5),  # it asks which of two
}
TASKS = (*GENERATED, *_PUBLISHED)


def published_questions(task: str, data: Path, limit: int | None) -> QuestionSet:
    """The first `limit` (None: all) questions of a published test file.

    Raises ValueError for a missing, damaged or empty one.
    """
    published = _PUBLISHED[task]
    path = find_data(data, published.file)
    problems = list(published.read(path))
    questions = [Question(p.id, p.prompt, p.target.strip()) for p in first(problems, limit, path)]
    return QuestionSet(questions, len(problems), published.chance, {}, [path])
