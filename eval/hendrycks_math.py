r"""MATH: competition mathematics, answered by generation (lm-eval's hendrycks_math, version 1).

python eval/hendrycks_math.py --checkpoint runs/NAME/export --data DATA_ROOT [--limit N per subject]

Reads the published folders DATA_ROOT/math/test/SUBJECT/NUMBER.json (`--data` may also be the folder math
itself). They are yours to bring: the set was withdrawn from its publisher after a claim of copyright. Of
lm-eval's two forms this is the one whose answers need no computer algebra to check: the answer is what is
between the first and the last `$` of the response, else the whole response, and it is right if both sides are
the same TeX after `normalize`. Zero-shot unless `--num_fewshot` says otherwise; exemplars come from the
subject's folder in math/train, and show their answer without the solution. lm-eval draws them in the order of
its own copy of the data, so that the same seed can give others. The majority baseline is the subject's
most common answer.
"""

import re
from pathlib import Path
from typing import Any

from data_pipeline.sources.documents import MathProblem, Problem
from data_pipeline.sources.problems import MATH_SUBJECTS, read_math
from eval.scoring.cli import main
from eval.scoring.core import Score, Scorer, add_fewshot, sample_record
from eval.scoring.generation import Ballot, Generation, values_of
from eval.scoring.results import TaskResult, majority
from eval.scoring.task import Evaluation, EvaluationTask, Options

MAX_NEW_TOKENS = 256  # lm-eval's default, which the task leaves as it is
STOP = ("Problem:",)
METRIC = "exact_match,none"
DEGREES = ("^{\\circ}", "^\\circ")


def load(options: Options) -> Evaluation:
    """Reads the test files. Raises ValueError if a subject is missing or a file is bad."""
    root = options.data if (options.data / "test").is_dir() else options.data / "math"
    if not (root / "test").is_dir():
        raise ValueError(
            f"no folder {root / 'test'}: --data or DATA_ROOT takes the folder that holds MATH's"
            " math/test/SUBJECT; MATH does not come with this project, bring your copy"
        )
    documents, problems = list[MathProblem](), list[Problem]()
    for subject in MATH_SUBJECTS:
        published = list(read_math(root / "test", subject))
        documents += published
        problems += _with_exemplars(published, root, subject, options)[: options.limit]
    levels = {document.id: document.level for document in documents}
    generation = Generation(problems, options.max_new_tokens or MAX_NEW_TOKENS, STOP, grade, ballot)

    def evaluation(scorer: Scorer) -> list[TaskResult]:
        samples, found = generation.run(scorer, options)
        for sample in samples:
            sample["level"] = levels[sample["doc_id"]]
        return summarize(samples, documents, options.shots(), found)

    return evaluation


def _with_exemplars(
    published: list[MathProblem], root: Path, subject: str, options: Options
) -> list[Problem]:
    if not options.shots():
        return list(published)
    return add_fewshot(published, list(read_math(root / "train", subject)), options.shots(), options.seed)


def summarize(
    samples: list[dict[str, Any]], documents: list[MathProblem], num_fewshot: int, found: dict[str, Any]
) -> list[TaskResult]:
    """The pooled result, with all samples, then one per subject, then one per level."""
    groups: dict[str, list[str]] = {}  # the ids of each
    for document in documents:
        groups.setdefault(f"math_{document.group}", []).append(document.id)
    for level in sorted({document.level for document in documents if document.level is not None}):
        groups[f"math_level{level}"] = [document.id for document in documents if document.level == level]
    answers = {document.id: _key(document.target.removeprefix(" ")) for document in documents}
    lines = {sample["doc_id"]: sample for sample in samples}
    steps = dict(zip(lines, found["steps"], strict=False))

    def result(task: str, ids: list[str], **fields: Any) -> TaskResult:
        return TaskResult(
            task=task,
            values=values_of([lines[i] for i in ids if i in lines], [METRIC]),
            num_documents=len(ids),
            baselines={"chance": Score(0.0), "majority": majority(answers[i] for i in ids)},
            num_fewshot=num_fewshot,
            **fields,
        )

    config = found["config"]
    scored = {name: ids for name, ids in groups.items() if any(i in lines for i in ids)}
    return [
        result("math", list(answers), samples=samples, subtasks=list(scored), **found),
        *(
            result(name, ids, config=config, steps=[steps[i] for i in ids if i in steps])
            for name, ids in scored.items()
        ),
    ]


def grade(problem: Problem, response: str) -> dict[str, Any]:
    """A sample line: the response, the answer found in it, whether that is the target."""
    answer = extract(response)
    return {
        **sample_record(problem),
        "resps": response,
        "filtered_resps": answer,
        METRIC: float(equivalent(answer, problem.target.removeprefix(" "))),
    }


def ballot(sample: dict[str, Any]) -> Ballot:
    """Answers that are equal after `normalize` vote together."""
    return Ballot(_key(sample["filtered_resps"]) or None, sample[METRIC])


def extract(response: str) -> str:
    """The text between the first and the last dollar sign, or everything if there are not two."""
    _, *inside, _ = response.split("$") if response.count("$") > 1 else ("", response, "")
    return "$".join(inside)


def equivalent(a: str, b: str) -> bool:
    """Whether two TeX answers are the same after `normalize`; as they are if it cannot read one of them."""
    keys = normalize(a), normalize(b)
    return a == b if None in keys else keys[0] == keys[1]


def _key(answer: str) -> str:
    key = normalize(answer)
    return answer if key is None else key


def normalize(text: str) -> str | None:
    r"""The form in which the MATH authors compare answers, None where their rules fail.

    Without line ends, spaces, `\!`, `\left`, `\right`, degrees, dollar and percent signs, what follows one
    `\text{ ` (a unit), a short `x =` at the beginning; `\\` as `\`; `\tfrac` and `\dfrac` as `\frac`; braces
    around the operands of `\frac12` and `\sqrt2`; a zero before a leading point; 0.5 and a/b of integers as
    `\frac`.
    """
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac").replace("\\left", "").replace("\\right", "")
    for sign in (*DEGREES, "\\$"):
        text = text.replace(sign, "")
    text, *units = text.split("\\text{ ")
    if len(units) > 1:
        return None
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = f"0{text}"
    name, *value = text.split("=")
    if len(value) == 1 and len(name) <= 2:
        text = value[0]
    if re.search(r"\\sqrt(?=\\sqrt|$)", text):
        return None
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    braced = _braced_fractions(text)
    if braced is None:
        return None
    return _as_fraction("\\frac{1}{2}" if braced == "0.5" else braced)


def _braced_fractions(text: str) -> str | None:
    r"""`\frac12` and `\frac1{2}` as `\frac{1}{2}`; the text as it is if its first bad fraction lacks one
    operand, None if that lacks both.
    """
    head, *parts = text.split("\\frac")
    for part in parts:
        if not part:
            return None
        if len(part) == 1 and part != "{":
            return text
        if not part.startswith("{"):
            denominator = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            part = f"{{{part[0]}}}{denominator}"
        head += f"\\frac{part}"
    return head


def _as_fraction(text: str) -> str | None:
    r"""`3/4` as `\frac{3}{4}`; None for one slash between operands that are not integers."""
    parts = text.split("/")
    if len(parts) != 2:
        return text
    if not all(re.fullmatch(r"[+-]?\d+(_\d+)*", part) for part in parts):
        return None
    try:
        numerator, denominator = (int(part) for part in parts)
    except ValueError:  # more digits than Python reads (4300): lm-eval's rules fail there too
        return None
    if text != f"{numerator}/{denominator}":
        return text
    return f"\\frac{{{numerator}}}{{{denominator}}}"


TASK = EvaluationTask("math", load, generates=True)

if __name__ == "__main__":
    main(TASK, __doc__)
