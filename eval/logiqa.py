"""LogiQA 1.0: logical reasoning over a passage, four options, by log-likelihood (lm-eval's logiqa).

python eval/logiqa.py --checkpoint runs/NAME/export --data DATA_ROOT [--limit N --num_fewshot K]

Exemplars come from Train.txt next to Test.txt as in lm-eval, or from Eval.txt where there is none; the
results file says which.
"""

from data_pipeline.sources.problems import read_logiqa
from eval.scoring.choices import choice_result
from eval.scoring.cli import main
from eval.scoring.core import Scorer, add_fewshot
from eval.scoring.results import TaskResult
from eval.scoring.task import Evaluation, EvaluationTask, Options, find_data, first


def load(options: Options) -> Evaluation:
    """Reads the test file. Raises ValueError if it is missing or bad."""
    path = find_data(options.data, "logiqa/Test.txt")
    documents = list(read_logiqa(path))
    problems = first(documents, options.limit, path)
    data_files = [path]
    if options.shots():
        train = path.with_name("Train.txt")
        data_files.append(train if train.is_file() else path.with_name("Eval.txt"))
        exemplars = list(read_logiqa(data_files[-1]))
        problems = add_fewshot(problems, exemplars, options.shots(), options.seed)

    def evaluation(scorer: Scorer) -> list[TaskResult]:
        return [choice_result(scorer, "logiqa", problems, documents, options.shots(), data_files)]

    return evaluation


TASK = EvaluationTask("logiqa", load)

if __name__ == "__main__":
    main(TASK, __doc__)
