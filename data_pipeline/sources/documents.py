"""What a reader yields: training documents, and the problems of a published set."""

from dataclasses import dataclass
from typing import NamedTuple

ANSWER_PREFIX = "\nAnswer:"  # between a chain of thought and " value"


class Document(NamedTuple):
    """One training text: what is asked ("" for running text) and what follows it."""

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        return self.prompt + self.completion


class LabelledDocument(NamedTuple):
    """One training text with its own targets instead of the next token."""

    text: str  # every character is one token
    labels: tuple[tuple[int, str], ...]  # (index of a character in text, the one character to predict there)


class TracedDocument(NamedTuple):
    """A question, its chain of thought in steps, and the answer's value; encode.py says how it is encoded."""

    question: str
    steps: tuple[str, ...]  # each non-empty
    answer: str

    @property
    def text(self) -> str:
        """What its tokens decode to."""
        return f"{self.question}{' '.join(self.steps)}{ANSWER_PREFIX} {self.answer}"


AnyDocument = Document | LabelledDocument | TracedDocument


@dataclass(frozen=True)
class Problem:
    """One question. `choices` are full continuations as scored (" text"); target == choices[gold] if there
    are choices.
    """

    id: str
    prompt: str
    target: str
    choices: tuple[str, ...] = ()
    gold: int = -1
    group: str = ""


@dataclass(frozen=True)
class MathProblem(Problem):
    """A problem of MATH; `group` is the subject's folder, `target` the answer in the solution's box."""

    level: int | None = None  # 1 to 5; None where the file says "Level ?"
