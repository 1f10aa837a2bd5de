"""ARC, the AI2 reasoning challenge: both test sets, by log-likelihood (lm-eval's arc_easy and arc_challenge).

python eval/arc.py --checkpoint runs/NAME/export --data DATA_ROOT [--limit N --num_fewshot K]

`--data FILE` evaluates that file alone. Exemplars come from the train file in the same folder; leaderboards
report acc_norm of arc_challenge with 25.
"""

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.sources.documents import Problem
from data_pipeline.sources.problems import read_arc
from eval.scoring.choices import choice_result
from eval.scoring.cli import main
from eval.scoring.core import Scorer, add_fewshot
from eval.scoring.results import TaskResult
from eval.scoring.task import Evaluation, EvaluationTask, Options, find_data, first

SETS = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}


def load(options: Options, names: Sequence[str] = tuple(SETS)) -> Evaluation:
    """Reads the test files of these sets. Raises ValueError if one is missing, bad, or not named after it."""
    if options.data.is_file():
        names = [name for name in names if options.data.name.startswith(SETS[name])]
        if not names:
            raise ValueError(
                f"which set is {options.data.name}? its name must start with ARC-Easy or ARC-Challenge"
            )
    paths = {name: find_data(options.data, f"arc/{SETS[name]}-Test.jsonl") for name in names}
    documents = {name: list(read_arc(path)) for name, path in paths.items()}
    problems = {name: _prompts(name, documents[name], paths[name], options) for name in names}

    def evaluation(scorer: Scorer) -> list[TaskResult]:
        return [
            choice_result(scorer, name, problems[name], documents[name], options.shots(), [paths[name]])
            for name in names
        ]

    return evaluation


def _prompts(name: str, documents: list[Problem], path: Path, options: Options) -> list[Problem]:
    problems = first(documents, options.limit, path)
    if options.shots():
        exemplars = list(read_arc(path.with_name(f"{SETS[name]}-Train.jsonl")))
        problems = add_fewshot(problems, exemplars, options.shots(), options.seed)
    return problems


TASK = EvaluationTask("arc", load, sets=tuple(SETS))

if __name__ == "__main__":
    main(TASK, __doc__)
