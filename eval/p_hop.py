"""p-hop induction: the letter that p hops backwards end on. eval/reasoning.py measures more.

python eval/p_hop.py --checkpoint runs/NAME/export [--limit N --depth 1,2,4,8]

Needs no data files: the test split is generated, 3 hops over 24 characters of 4 letters. Scored is the
answer, the label of the last position: whether it is the most likely of all tokens. What guessing reaches:
chance, the most common answer, and hops too few.
"""

from eval.looping.measures import encode_rows
from eval.looping.tasks import TASKS
from eval.scoring.cli import main
from eval.scoring.core import Score, Scorer, mean_score
from eval.scoring.results import TaskResult, majority, taken
from eval.scoring.task import Evaluation, EvaluationTask, Options

NUM_SAMPLES = 500


def load(options: Options) -> Evaluation:
    """Generates `options.limit` samples, else NUM_SAMPLES. Raises ValueError for exemplars."""
    if options.num_fewshot:
        raise ValueError(f"p_hop has no exemplars: num_fewshot is {options.num_fewshot}, it must be 0")
    task = TASKS["p_hop"]
    data = task.generate(options.limit or NUM_SAMPLES, options.seed, **task.options)
    answers = [item.document.labels[-1][1] for item in data.items]
    baselines = {"chance": Score(1 / task.options["alphabet"]), "majority": majority(answers)}
    for guess, given in data.guesses.items():
        baselines[guess] = mean_score([float(a == b) for a, b in zip(given, answers, strict=True)])

    def evaluation(scorer: Scorer) -> list[TaskResult]:
        rows = encode_rows("p_hop", [item.document for item in data.items], scorer)
        scores = scorer.loglikelihood_tokens([(row.tokens, row.targets[-1:]) for row in rows])
        samples = [
            {
                "doc_id": item.id,
                "group": "p_hop",
                "prompt": item.document.text,
                "target": answer,
                "resps": log_prob,
                "acc": float(greedy),
            }
            for item, answer, (log_prob, greedy) in zip(data.items, answers, scores, strict=True)
        ]
        return [
            TaskResult(
                task="p_hop",
                values={"acc,none": [float(greedy) for _, greedy in scores]},
                totals={"cross_entropy,none": mean_score([-log_prob for log_prob, _ in scores])},
                num_documents=len(rows),
                baselines=baselines,
                samples=samples,
                config={**task.options, "seed": options.seed, "split": "test"},
                **taken(scorer),
            )
        ]

    return evaluation


TASK = EvaluationTask("p_hop", load)

if __name__ == "__main__":
    main(TASK, __doc__)
