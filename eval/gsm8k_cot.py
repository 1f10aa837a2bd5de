"""GSM8K with chain-of-thought prompts (lm-eval's gsm8k_cot, version 3).

python eval/gsm8k_cot.py --checkpoint runs/NAME/export --data DATA_ROOT [--limit N --num_fewshot K]
    [--kv_budget all,64]

The same eight worked exemplars precede every problem: they are from Wei et al. 2022 (arXiv:2201.11903,
appendix), in gsm8k_cot.json as lm-eval words them. `--num_fewshot K` takes the first K. For --kv_budget see
gsm8k.py.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.sources.documents import Problem
from data_pipeline.sources.problems import read_gsm8k_cot
from eval.gsm8k import MAX_NEW_TOKENS, ballot, grade, summarize
from eval.scoring.cli import main
from eval.scoring.core import Scorer, with_shots
from eval.scoring.generation import Generation
from eval.scoring.kv_flags import KV_FLAGS, KVFlags
from eval.scoring.results import TaskResult
from eval.scoring.task import Evaluation, EvaluationTask, Options, find_data, first

EXEMPLARS = Path(__file__).with_suffix(".json")
STOP = ("Q:", "</s>", "<|im_end|>")
STRICT = re.compile(r"The answer is (\-?[0-9\.\,]+).")


def load(options: Options, **kv_flags: Any) -> Evaluation:
    """Reads the test file. Raises ValueError if it is missing or bad, or for more than the exemplars."""
    path = find_data(options.data, "gsm8k/test.jsonl")
    documents = list(read_gsm8k_cot(path))
    exemplars = read_exemplars()
    num_fewshot = options.shots(len(exemplars))
    if not 0 <= num_fewshot <= len(exemplars):
        raise ValueError(
            f"num_fewshot is {num_fewshot}: it must be 0 to {len(exemplars)}, the exemplars there"
        )
    problems = [
        with_shots(problem, exemplars[:num_fewshot]) for problem in first(documents, options.limit, path)
    ]
    max_new_tokens = options.max_new_tokens or MAX_NEW_TOKENS
    generation = Generation(problems, max_new_tokens, STOP, partial(grade, strict=STRICT), ballot)

    def evaluation(scorer: Scorer) -> list[TaskResult]:
        fields: dict[str, Any] = {
            "documents": documents,
            "task": "gsm8k_cot",
            "num_fewshot": num_fewshot,
            "default_fewshot": len(exemplars),
            "data_files": [path],
        }
        return generation.at_limits(scorer, options, KVFlags(**kv_flags), partial(summarize, **fields))

    return evaluation


def read_exemplars() -> list[Problem]:
    """The eight exemplars, in their published order."""
    rows = json.loads(EXEMPLARS.read_text(encoding="utf-8"))["exemplars"]
    return [
        Problem(
            f"gsm8k_cot-exemplar-{i}", f"Q: {row['question']}\nA:", f" {row['target']}", group="gsm8k_cot"
        )
        for i, row in enumerate(rows)
    ]


TASK = EvaluationTask("gsm8k_cot", load, generates=True, flags=KV_FLAGS)

if __name__ == "__main__":
    main(TASK, __doc__)
