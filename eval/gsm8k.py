"""GSM8K: grade-school mathematics, answered by generation (lm-eval's gsm8k, version 3).

python eval/gsm8k.py --checkpoint runs/NAME/export --data DATA_ROOT [--limit N --num_fewshot K]

Exemplars come from the train file beside the test file; the default is none, since small models gain nothing
from them (lm-eval's default is 5).
"""

import re
from typing import Any

from data_pipeline.sources import Problem, read_gsm8k
from eval.cli import Evaluation, Options, find_data, first, main
from eval.core import Score, Scorer, add_fewshot, sample_record
from eval.results import TaskResult

MAX_NEW_TOKENS = 256
STOP = ("Question:", "</s>")
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED = [re.compile(pattern) for pattern in (r",", r"\$", r"(?s).*#### ", r"\.$")]
NO_MATCH = "[invalid]"


def load(options: Options) -> Evaluation:
    """Reads the test file, and the train file if exemplars are wanted. Raises ValueError for a bad one."""
    path = find_data(options.data, "gsm8k/test.jsonl")
    documents = list(read_gsm8k(path))
    problems = first(documents, options.limit, path)
    if options.num_fewshot:
        exemplars = list(read_gsm8k(path.with_name("train.jsonl")))
        problems = add_fewshot(problems, exemplars, options.num_fewshot, options.seed)
    max_new_tokens = options.max_new_tokens or MAX_NEW_TOKENS

    def evaluation(scorer: Scorer) -> list[TaskResult]:
        """Answers every problem greedily and grades it by both of lm-eval's gsm8k filters.

        Raises ValueError if max_new_tokens leaves no room for a prompt.
        """
        responses = scorer.generate([problem.prompt for problem in problems], max_new_tokens, STOP)
        samples = [grade(problem, response) for problem, response in zip(problems, responses, strict=True)]
        return [
            TaskResult(
                task="gsm8k",
                values={
                    f"exact_match,{name}": [sample[f"exact_match,{name}"] for sample in samples]
                    for name in ("strict-match", "flexible-extract")
                },
                num_documents=len(documents),
                baselines={"chance": Score(0.0)},
                samples=samples,
                num_fewshot=options.num_fewshot,
                num_truncated=scorer.take_truncated(),
                config={"max_new_tokens": max_new_tokens, "until": STOP},
                data_files=[path],
                version=3,
            )
        ]

    return evaluation


def grade(problem: Problem, response: str) -> dict[str, Any]:
    """A sample line: the response, what the two filters find in it, whether that is the target's number."""
    answers = {"strict-match": extract_strict(response), "flexible-extract": extract_flexible(response)}
    return {
        **sample_record(problem),
        "resps": response,
        "filtered_resps": answers,
        **{
            f"exact_match,{name}": float(normalize(answer) == normalize(problem.target))
            for name, answer in answers.items()
        },
    }


def extract_strict(response: str) -> str:
    """The first number after `#### `."""
    match = STRICT.search(response)
    return match.group(1) if match else NO_MATCH


def extract_flexible(response: str) -> str:
    """The last thing that looks like a number."""
    matches = [match.group(0) for match in FLEXIBLE.finditer(response)]
    return matches[-1].strip() if matches else NO_MATCH


def normalize(answer: str) -> str:
    """The answer in lower case without what lm-eval ignores: `,`, `$`, all up to `#### `, a final point."""
    for pattern in IGNORED:
        answer = pattern.sub("", answer)
    return answer.lower()


if __name__ == "__main__":
    main(load, __doc__)
