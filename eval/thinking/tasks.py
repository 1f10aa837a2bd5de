"""Questions for models that think before they answer, and what guessing reaches on them."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from data_pipeline.sources.documents import ANSWER_PREFIX, Problem, TracedDocument
from data_pipeline.sources.problems import read_gsm8k
from data_pipeline.sources.traced import read_icot, read_prosqa, traced_causal_loop_v2
from data_pipeline.tasks import causal_loop_v2
from data_pipeline.tasks.programs.causal_loop_v2_audit import one_step_answer
from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.scoring.task import find_data

GENERATED = "causal_loop_v2"
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")


class Question(NamedTuple):
    """One question as training data asks it."""

    id: str
    text: str
    answer: str
    problem_depth: int | None = None  # steps that the answer needs one after the other; None: not known
    reference: TracedDocument | None = None  # with the chain of thought, where it is of a known length


class QuestionSet(NamedTuple):
    """What a task hands over."""

    questions: list[Question]
    num_documents: int  # in the data, before --limit
    chance: float
    guesses: dict[str, list[str]]  # way to guess -> its answer to each question
    data_files: list[Path]


def read_answer(text: str) -> str | None:
    """The value in what stands behind <eot>; None if that does not start with ANSWER_PREFIX."""
    return text.removeprefix(ANSWER_PREFIX).strip() if text.startswith(ANSWER_PREFIX) else None


def read_chain_answer(tokenizer: Tokenizer, tokens: list[int]) -> str | None:
    """The value that stands behind the first <eot> of what was written with a chain of thought."""
    eot = tokenizer.eot_id
    return read_answer(tokenizer.decode(tokens[tokens.index(eot) + 1 :])) if eot in tokens else None


def normalize(answer: str) -> str:
    """The answer without spaces at its ends and without the commas inside its numbers."""
    return _COMMA_IN_NUMBER.sub("", answer.strip())


def generated_questions(num_samples: int, seed: int, options: dict[str, int]) -> QuestionSet:
    """Causal loops of the test split; `options` of reasoning_tasks. Raises DataError for impossible ones."""
    size = dict(options)
    depths = range(size.pop("min_depth"), size.pop("max_depth") + 1)
    # Those that all depths from 2 on have: an accuracy by depth must not be one by family.
    families = ("chain", "convergence")
    samples = list(causal_loop_v2.generate(num_samples, depths, families, **size, seed=seed, split="test"))
    traced = [traced_causal_loop_v2(sample) for sample in samples]
    questions = [
        Question(s.id, d.question, d.answer, s.depth, d) for s, d in zip(samples, traced, strict=True)
    ]
    guesses = {"one step": [str(one_step_answer(sample)) for sample in samples]}
    return QuestionSet(questions, len(questions), 1 / options["modulus"], guesses, [])


def _gsm8k(path: Path) -> Iterable[Problem]:
    """The bare question, and the number after `####`, as data_pipeline.traced_sources has them."""
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
TASKS = (GENERATED, *_PUBLISHED)


def published_questions(task: str, data: Path, limit: int | None) -> QuestionSet:
    """The first `limit` (None: all) questions of a published test file.

    Raises ValueError for a missing, damaged or empty one.
    """
    published = _PUBLISHED[task]
    path = find_data(data, published.file)
    problems = list(published.read(path))
    if not problems:
        raise ValueError(f"{path} holds no problems: get the published file again")
    questions = [Question(p.id, p.prompt, p.target.strip()) for p in problems[:limit]]
    return QuestionSet(questions, len(problems), published.chance, {}, [path])
