"""Causal-loop programs, levels 1 to 4: held-out programs, answered with a worked trace and without one.

python eval/causal_loop.py --checkpoint runs/NAME/export [--num_samples N per level --levels 1,2,3,4]

Needs no data files: the test split is generated, and no program of it (up to the names of its variables) is
in the training split. Every score comes with chance (one of ten digits) and two heuristics: the level's
most common answer (chosen knowing the test answers, so the best of all constants), and the last rule of the
queried variable applied once to the initial values. `--samples` votes over sampled traces.
"""

import re
from collections.abc import Sequence
from typing import Any

from data_pipeline.tasks.causal_loop import LEVELS, Sample, generate, majority_answer, one_step_answer
from eval.scoring.cli import main, positive_integer, problem_depth_list
from eval.scoring.core import Score, Scorer, mean_score
from eval.scoring.generation import Ballot, sample_votes, values_of
from eval.scoring.results import TaskResult, taken
from eval.scoring.task import Evaluation, EvaluationTask, Options

NUM_SAMPLES = 100  # per level
FORMS = ("trace", "direct")
ANSWER = re.compile(r"Answer: (\d+)")
NUM_ANSWERS = 10  # 0..9
SPARE_TOKENS = 8  # beyond the longest reference, for a model that writes the same trace in other pieces


def load(options: Options, num_samples: int | None = None, levels: Sequence[int] = LEVELS) -> Evaluation:
    """Generates the test samples: `num_samples` per level, else `options.limit`, else NUM_SAMPLES.

    Raises ValueError for exemplars, which this task does not have, and for an unknown level.
    """
    if options.num_fewshot:
        raise ValueError(f"causal_loop has no exemplars: num_fewshot is {options.num_fewshot}, it must be 0")
    per_level = num_samples or options.limit or NUM_SAMPLES
    samples = list(generate(per_level * len(levels), levels, options.seed, split="test"))

    def evaluation(scorer: Scorer) -> list[TaskResult]:
        lengths = {
            form: options.max_new_tokens or _longest(scorer, [_texts(sample, form)[1] for sample in samples])
            for form in FORMS
        }
        answers = [
            scorer.generate([_texts(sample, form)[0] for sample in samples], lengths[form]) for form in FORMS
        ]
        counted = taken(scorer)

        def ballot(i: int, traced: str) -> Ballot:
            line = grade(samples[i], traced, "")
            return Ballot(line["filtered_resps"]["trace"], line["exact_match,trace"])

        prompts = [sample.prompt_trace for sample in samples]
        votes, facts = sample_votes(scorer, prompts, lengths["trace"], (), options, ballot)
        graded = [grade(*sample) | vote for *sample, vote in zip(samples, *answers, votes, strict=True)]
        config = {"seed": options.seed, "split": "test", "num_samples_per_level": per_level, **facts}
        return summarize(graded, samples, config, counted)

    return evaluation


def _texts(sample: Sample, form: str) -> tuple[str, str]:
    """Prompt and reference of one of FORMS."""
    if form == "trace":
        return sample.prompt_trace, sample.completion_trace
    return sample.prompt_direct, sample.completion_direct


def _longest(scorer: Scorer, references: list[str]) -> int:
    return max(len(scorer.tokenizer.encode(text)) for text in references) + SPARE_TOKENS


def grade(sample: Sample, traced: str, direct: str) -> dict[str, Any]:
    """A sample line: both completions, the answers found in them, and whether they are right."""
    # The prompt of the direct form already ends with "Answer:".
    found = {"trace": ANSWER.search(traced), "direct": ANSWER.search(f"Answer:{direct}")}
    answers = {name: match and match.group(1) for name, match in found.items()}
    return {
        "doc_id": sample.id,
        "level": sample.level,
        "program": sample.program,
        "question": sample.question,
        "prompt": sample.prompt_trace,
        "prompt_direct": sample.prompt_direct,
        "target": sample.completion_trace,
        "answer": sample.answer,
        "resps": {"trace": traced, "direct": direct},
        "filtered_resps": answers,
        **{f"exact_match,{name}": float(answer == str(sample.answer)) for name, answer in answers.items()},
    }


def summarize(
    graded: list[dict[str, Any]], samples: Sequence[Sample], config: dict[str, Any], counted: dict[str, Any]
) -> list[TaskResult]:
    """The pooled result, with all sample lines, then one result per level; `counted` of results.taken."""
    levels = sorted({sample.level for sample in samples})
    guesses: dict[str, dict[int, list[float]]] = {"majority": {}, "one_step": {}}
    for level in levels:
        of_level = [sample for sample in samples if sample.level == level]
        common = majority_answer(of_level)
        guesses["majority"][level] = [float(sample.answer == common) for sample in of_level]
        guesses["one_step"][level] = [float(sample.answer == one_step_answer(sample)) for sample in of_level]

    def result(task: str, members: Sequence[int], **fields: Any) -> TaskResult:
        lines = [line for line in graded if line["level"] in members]
        baselines = {"chance": Score(1 / NUM_ANSWERS)}
        baselines |= {
            name: mean_score([value for level in members for value in values[level]])
            for name, values in guesses.items()
        }
        return TaskResult(
            task=task,
            values=values_of(lines, [f"exact_match,{form}" for form in FORMS]),
            num_documents=len(lines),
            baselines=baselines,
            config=config,
            **fields,
        )

    names = {f"causal_loop_level{level}": level for level in levels}
    return [
        result("causal_loop", levels, samples=graded, subtasks=list(names), **counted),
        *(result(name, [level], steps=_steps_of(samples, level, counted)) for name, level in names.items()),
    ]


def _steps_of(samples: Sequence[Sample], level: int, counted: dict[str, Any]) -> list[float]:
    """Loop steps of the level's answers, of each of FORMS; empty without recurrence."""
    asked = list(samples) * len(FORMS)
    return [steps for sample, steps in zip(asked, counted["steps"], strict=False) if sample.level == level]


TASK = EvaluationTask(
    "causal_loop",
    load,
    generates=True,
    flags={
        "--num_samples": {
            "type": positive_integer,
            "metavar": "N",
            "help": f"per level (default: {NUM_SAMPLES})",
        },
        "--levels": {
            "type": problem_depth_list,
            "default": list(LEVELS),
            "metavar": "1,2,..",
            "help": "default: 1,2,3,4",
        },
    },
    without=("data", "limit", "num_fewshot"),
)

if __name__ == "__main__":
    main(TASK, __doc__)
