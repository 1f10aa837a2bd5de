"""What iterating buys: accuracy against test-time depth on the synthetic tasks with labels.

python eval/reasoning.py --checkpoint runs/NAME/export --task p_hop --num_samples N
    [--task_options hops=3,length=24,alphabet=4] [--num_steps 1,2,4,8] [--output_path DIR]

Needs no data files: the test split is generated, and no text of it is in the training split. At every depth:
accuracy and cross-entropy at the answer and over all labels, by problem depth where the task knows it, and
how long and how far the loop ran. At the trained depth: do other starts lead to the same answers (block
loops), and how much time does halting save. Next to them what guessing reaches on the same samples.
"""

from eval.looping.figures import picture
from eval.looping.summary import evaluate_depths
from eval.looping.tables import report_text
from eval.looping.tasks import TASKS
from eval.looping.tasks import task_options as read_options
from eval.scoring.cli import main, positive_integer, problem_depth_list
from eval.scoring.core import Scorer
from eval.scoring.results import TaskResult
from eval.scoring.task import Evaluation, EvaluationTask, Options

DEFAULTS = "; ".join(
    f"{name}: " + ",".join(f"{option}={value}" for option, value in task.options.items())
    for name, task in TASKS.items()
)


def load(
    options: Options, *, task: str, num_samples: int, task_options: str, problem_depth: list[int] | None
) -> Evaluation:
    """Generates the test samples of a task. Raises ValueError for options or depths that it does not have."""
    sizes = read_options(task, task_options)
    data = TASKS[task].generate(num_samples, options.seed, problem_depth, **sizes)
    config = {"task_options": sizes, "split": "test", "seed": options.seed}

    def evaluation(scorer: Scorer) -> list[TaskResult]:
        return evaluate_depths(scorer, task, data, options.num_steps, options.seed, config)

    return evaluation


TASK = EvaluationTask(
    "reasoning",
    load,
    flags={
        "--task": {"required": True, "choices": TASKS, "help": "which task"},
        "--num_samples": {
            "type": positive_integer,
            "required": True,
            "metavar": "N",
            "help": "test samples to generate",
        },
        "--task_options": {
            "default": "",
            "metavar": "A=1,B=2",
            "help": f"sizes of the task (defaults: {DEFAULTS})",
        },
        "--problem_depth": {
            "type": problem_depth_list,
            "metavar": "D,..",
            "help": "only the generated problems of these depths (default: all)",
        },
    },
    without=("data", "limit", "num_fewshot"),
    sweeps_num_steps=True,
    show=report_text,
    draw=picture,
)

if __name__ == "__main__":
    main(TASK, __doc__)
