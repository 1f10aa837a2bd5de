"""GSM8K: grade-school mathematics, answered by generation (lm-eval's gsm8k, version 3).

python eval/gsm8k.py --checkpoint runs/NAME/export --data DATA_ROOT [--limit N --num_fewshot K]
    [--kv_budget all,64]

Five exemplars before each problem, as in lm-eval, drawn from the train file in the same folder.
With --kv_budget R-KV cuts the cache, and results tell an answer's length and the most bytes its cache held.
"""

import re
from functools import partial
from typing import Any

from data_pipeline.sources.documents import Problem
from data_pipeline.sources.problems import read_gsm8k
from eval.scoring.cli import main
from eval.scoring.core import Score, Scorer, add_fewshot, sample_record
from eval.scoring.generation import Ballot, Generation, values_of
from eval.scoring.kv_flags import KV_FLAGS, KVFlags
from eval.scoring.results import TaskResult, majority
from eval.scoring.task import Evaluation, EvaluationTask, Options, find_data, first

NUM_FEWSHOT = 5
MAX_NEW_TOKENS = 256
STOP = ("Question:", "</s>", "<|im_end|>")
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
FINAL_POINT = re.compile(r"\.$")  # also before a line end at the end
NO_MATCH = "[invalid]"


def load(options: Options, **kv_flags: Any) -> Evaluation:
    """Reads the test file, and the train file if exemplars are wanted. Raises ValueError for a bad one."""
    path = find_data(options.data, "gsm8k/test.jsonl")
    documents = list(read_gsm8k(path))
    problems = first(documents, options.limit, path)
    data_files = [path]
    if options.shots(NUM_FEWSHOT):
        data_files.append(path.with_name("train.jsonl"))
        exemplars = list(read_gsm8k(data_files[-1]))
        problems = add_fewshot(problems, exemplars, options.shots(NUM_FEWSHOT), options.seed)
    generation = Generation(problems, options.max_new_tokens or MAX_NEW_TOKENS, STOP, grade, ballot)

    def evaluation(scorer: Scorer) -> list[TaskResult]:
        fields: dict[str, Any] = {
            "documents": documents,
            "task": "gsm8k",
            "num_fewshot": options.shots(NUM_FEWSHOT),
            "default_fewshot": NUM_FEWSHOT,
            "data_files": data_files,
        }
        return generation.at_limits(scorer, options, KVFlags(**kv_flags), partial(summarize, **fields))

    return evaluation


def summarize(
    samples: list[dict[str, Any]], found: dict[str, Any], documents: list[Problem], **fields: Any
) -> TaskResult:
    """The result of graded samples; `found` and `fields` are the other fields of TaskResult."""
    return TaskResult(
        values=values_of(samples, [f"exact_match,{name}" for name in ("strict-match", "flexible-extract")]),
        samples=samples,
        baselines={
            "chance": Score(0.0),
            "majority": majority(normalize(problem.target.removeprefix(" ")) for problem in documents),
        },
        num_documents=len(documents),
        version=3,
        **found,
        **fields,
    )


def ballot(sample: dict[str, Any]) -> Ballot:
    """The number that strict-match finds votes, as in lm-eval's gsm8k_cot_self_consistency."""
    answer = sample["filtered_resps"]["strict-match"]
    return Ballot(None if answer == NO_MATCH else normalize(answer), sample["exact_match,strict-match"])


def grade(problem: Problem, response: str, strict: re.Pattern[str] = STRICT) -> dict[str, Any]:
    """A sample line: the response, what the two filters find in it, whether that is the target's number."""
    answers = {
        "strict-match": extract_strict(response, strict),
        "flexible-extract": extract_flexible(response),
    }
    gold = normalize(problem.target.removeprefix(" "))  # the space divides prompt and answer
    return {
        **sample_record(problem),
        "resps": response,
        "filtered_resps": answers,
        **{f"exact_match,{name}": float(normalize(answer) == gold) for name, answer in answers.items()},
    }


def extract_strict(response: str, strict: re.Pattern[str] = STRICT) -> str:
    """The first number after the words that announce it, by default `#### `."""
    match = strict.search(response)
    return match.group(1) if match else NO_MATCH


def extract_flexible(response: str) -> str:
    """The last thing that looks like a number."""
    matches = [match.group(0) for match in FLEXIBLE.finditer(response)]
    return matches[-1].strip() if matches else NO_MATCH


def normalize(answer: str) -> str:
    """The answer in lower case without what lm-eval ignores: `,`, `$`, all up to `#### `, a final point."""
    # lm-eval's third pattern, `(?s).*#### `, takes quadratic time where there is no mark.
    _, _, answer = answer.replace(",", "").replace("$", "").rpartition("#### ")
    return FINAL_POINT.sub("", answer).lower()


TASK = EvaluationTask("gsm8k", load, generates=True, flags=KV_FLAGS)

if __name__ == "__main__":
    main(TASK, __doc__)
