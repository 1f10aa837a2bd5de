"""What a synthetic task is: one record, from which everything that knows the task derives.

A module of this folder that exports `TASK` is found by `registry.py`. From its record derive the command
`generate.py NAME`, the source kinds NAME (labelled or plain documents) and NAME_traced of recipes, the tasks
of eval/reasoning.py, eval/thoughts.py and eval/run.py, and the task of experiments/. To add a task, copy
`addition.py` and write a recipe and a test.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Protocol, TypeVar

from data_pipeline.errors import DataError
from data_pipeline.sources.documents import Document, LabelledDocument, TracedDocument


class AnySample(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def answer(self) -> Any: ...  # str() of it is what a model has to say


S = TypeVar("S", bound=AnySample)


def size(default: Any, meaning: str) -> Any:
    """A field of an options dataclass: an integer, or a list, given as a tuple; `meaning` is its --help."""
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata={"help": meaning})
    return field(default=default, metadata={"help": meaning})


def require(name: str, value: int, low: int, high: int) -> None:
    """Raises DataError unless low <= value <= high."""
    if not low <= value <= high:
        raise DataError(f"{name} {value} is not in {low}..{high}: choose a value in this range")


@dataclass(frozen=True)
class NoOptions:
    pass


@dataclass(frozen=True)
class Evaluation(Generic[S]):
    """How the test split is asked. Its sizes are integers: a command line gives them as NAME=INTEGER."""

    chance: Callable[[Any], float]  # of the options: the accuracy of a uniform guess
    depth: Callable[[S], int | None] = lambda sample: None  # serial steps to the answer; None: all the same
    options: type | None = None  # dataclass of the sizes with defaults; None: those of the task
    arguments: Callable[[Any], dict[str, Any]] = vars  # of the options: the keyword arguments of `generate`


@dataclass(frozen=True)
class SyntheticTask(Generic[S]):
    """A generator of samples with answers, and how they become training documents and questions."""

    name: str
    about: str  # one line
    options: type  # dataclass of the sizes with defaults, int, list[int] or list[str]; made with `size`
    # (num_samples, *, seed, split, and the fields of `options`) -> samples. Sample i does not depend on
    # num_samples, and no sample of one split is in the other. Raises DataError for impossible sizes.
    generate: Callable[..., Iterator[S]]
    shortcuts: Callable[
        [Sequence[S], Any], Mapping[str, Sequence[str]]
    ]  # (samples, options) -> guesses by name
    labelled: Callable[[S], LabelledDocument] | None = None  # of source kind NAME, or
    plain: Callable[[S, Any], Document] | None = None  # of source kind NAME; the second: `plain_options`
    plain_options: type = NoOptions  # dataclass of what a recipe may set in addition to the sizes
    traced: Callable[[S], TracedDocument] | None = None  # of source kind NAME_traced
    audit: Callable[[Sequence[S]], str] | None = None  # the table of --audit; None: `audit_table`
    evaluation: Evaluation[S] | None = None  # None: the task has a script of its own in eval/
    # Fields of experiments.tasks.Task; `kind`, `recipe` and `evaluation.task` are filled in. None: not a task
    # of experiments/.
    experiment: Mapping[str, Any] | None = None

    def samples(self, num_samples: int, options: Any, seed: int = 0, split: str = "train") -> Iterator[S]:
        """`options` may have more fields than `self.options`, as those of recipes do."""
        sizes = {f.name: getattr(options, f.name) for f in fields(self.options)}
        return self.generate(num_samples, **sizes, seed=seed, split=split)

    def test_samples(self, num_samples: int, seed: int, options: Any) -> list[S]:
        """Samples of the test split; `options` is an instance of `self.test_options`."""
        assert self.evaluation is not None
        arguments = self.evaluation.arguments(options)
        return list(self.generate(num_samples, **arguments, seed=seed, split="test"))

    @property
    def test_options(self) -> type:
        return (self.evaluation and self.evaluation.options) or self.options

    def audit_text(self, samples: Sequence[S], options: Any) -> str:
        """What --audit prints. Raises DataError for no samples."""
        if not samples:
            raise DataError("no samples to audit: give --num_samples 1 or more")
        if self.audit is not None:
            return self.audit(samples)
        return audit_table(self, samples, options)


def audit_table(task: SyntheticTask[S], samples: Sequence[S], options: Any) -> str:
    """The share of each answer and of the most common one, and the accuracy of each shortcut.

    Over all samples, and in further columns over those of each depth where the task has several.
    """
    answers = [str(sample.answer) for sample in samples]
    guesses = task.shortcuts(samples, options)
    depth = task.evaluation.depth if task.evaluation else lambda sample: None
    depths = [depth(sample) for sample in samples]
    known = sorted({d for d in depths if d is not None})
    columns = [range(len(samples)), *([i for i, d in enumerate(depths) if d == at] for at in known)]
    counts = [Counter(answers[i] for i in members) for members in columns]
    rows: dict[str, list[int]] = {f"answer {a}": [c[a] for c in counts] for a in sorted(counts[0])}
    rows["majority"] = [max(c.values()) for c in counts]
    for name, given in guesses.items():
        rows[name] = [sum(given[i] == answers[i] for i in members) for members in columns]
    lines = [f"{'depth':16}{'all':>8}" + "".join(f"{at:8d}" for at in known)] if known else []
    lines.append(f"{'samples':16}" + "".join(f"{len(members):8d}" for members in columns))
    for name, hits in rows.items():
        shares = (hit / len(members) for hit, members in zip(hits, columns, strict=True))
        lines.append(f"{name:16}" + "".join(f"{share:8.3f}" for share in shares))
    return "\n".join(lines)
