"""ReClor: reading comprehension that takes logic, four options, by log-likelihood, in the prompts of logiqa.

python eval/reclor.py --checkpoint runs/NAME/export --data DATA_ROOT [--limit N --num_fewshot K]

Its licence allows research only and forbids passing the data on, so that no copy comes with this project: ask
its authors for it (Yu et al. 2020, arXiv:2002.04326) and put val.json, and for exemplars train.json, into
DATA_ROOT/reclor. The answers of its test file are not published.
"""

from data_pipeline.sources.problems import read_reclor
from eval.scoring.choices import choice_result
from eval.scoring.cli import main
from eval.scoring.core import Scorer, add_fewshot
from eval.scoring.results import TaskResult
from eval.scoring.task import Evaluation, EvaluationTask, Options, find_data, first


def load(options: Options) -> Evaluation:
    """Reads val.json. Raises ValueError if it is missing or bad."""
    try:
        path = find_data(options.data, "reclor/val.json")
    except ValueError as error:
        raise ValueError(f"{error}; ReClor's licence forbids shipping it, ask its authors") from None
    documents = list(read_reclor(path))
    problems = first(documents, options.limit, path)
    data_files = [path]
    if options.shots():
        data_files.append(path.with_name("train.json"))
        problems = add_fewshot(problems, list(read_reclor(data_files[-1])), options.shots(), options.seed)

    def evaluation(scorer: Scorer) -> list[TaskResult]:
        return [choice_result(scorer, "reclor", problems, documents, options.shots(), data_files)]

    return evaluation


TASK = EvaluationTask("reclor", load)

if __name__ == "__main__":
    main(TASK, __doc__)
