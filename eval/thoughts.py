"""Answers after thinking: explicit chain of thought, latent thoughts or none, what they score and cost.

python eval/thoughts.py --checkpoint runs/NAME/export --task causal_loop_v2 --num_samples N
    [--task_options variables=4,statements=6] [--mode cot|thoughts|none] [--output_path DIR]
python eval/thoughts.py --checkpoint runs/NAME/export --task gsm8k|icot|prosqa --data DATA_ROOT [--limit N]

A checkpoint with latent thoughts uses them, another one writes its chain of thought, unless --mode says
otherwise. Latents (--num_latents, --num_iterations, --tolerance), the controls (--replace) and the cache that
R-KV leaves a chain of thought (--kv_budget) can be set here, several numbers give one result each. Beside the
accuracy, by serial depth on causal loops, stand forward passes, seconds of a question alone and in a batch,
and the bytes of its cache. An answer is right if it is the reference's but for commas inside numbers.
"""

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from common.errors import user_errors
from eval.looping.tasks import TASKS as GENERATORS
from eval.looping.tasks import task_options
from eval.scoring.cli import USER_ERRORS, make_parser, positive_integer
from eval.scoring.core import Score, Scorer, mean_score
from eval.scoring.results import Setting, TaskResult, build_report, format_table, write_report
from eval.scoring.training_data import decontamination, read_training_data
from eval.thinking.answers import KV_BUFFER, MODES, Answers, Way, answer_all, try_way
from eval.thinking.tasks import (
    GENERATED,
    TASKS,
    QuestionSet,
    generated_questions,
    normalize,
    published_questions,
    read_answer,
    read_chain_answer,
)
from eval.thinking.votes import vote
from model import ModelConfig, ZeroModel

COSTS = ("forward_passes", "generated_tokens", "cache_bytes", "peak_cache_bytes")


def ways(args: argparse.Namespace, config: ModelConfig) -> list[Way]:
    """All ways to answer that were asked for. Raises ValueError for flags that do not go together."""
    c = config.latent_cot
    mode = args.mode or ("thoughts" if c.num_latents else "cot")
    of_mode = {
        "thoughts": ("num_latents", "num_iterations", "tolerance", "replace"),
        "cot": ("kv_budget", "kv_buffer", "samples"),
    }
    for needed, flags in of_mode.items():
        for flag in flags:
            if mode != needed and getattr(args, flag):
                raise ValueError(
                    f"--{flag} {_text(getattr(args, flag))} is for --mode {needed}, but the mode is {mode}:"
                    " leave it out or change --mode"
                )
    if mode == "thoughts" and not c.num_latents:
        raise ValueError("--mode thoughts: the checkpoint has no latent thoughts; choose cot or none")
    if args.kv_buffer and not args.kv_budget:
        raise ValueError(f"--kv_buffer {args.kv_buffer} belongs to --kv_budget: give both or neither")
    if args.replace == "shuffled" and args.batch_size < 2:
        raise ValueError(
            "--replace shuffled takes another question's latents: --batch_size must be 2 or more"
        )
    if mode == "cot":
        return [
            Way(mode, kv_budget=n, kv_buffer=args.kv_buffer or KV_BUFFER) for n in args.kv_budget or [None]
        ]
    if mode == "none":
        return [Way(mode)]
    return [
        Way(mode, num_latents, num_iterations, args.tolerance, args.replace)
        for num_latents, num_iterations in product(args.num_latents or [None], args.num_iterations or [None])
    ]


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def mark(way: Way, config: ModelConfig) -> str:
    """What tells the results of a way from those of the checkpoint's own, behind their names."""
    own = "thoughts" if config.latent_cot.num_latents else "cot"
    parts = [] if way.mode == own else [f"mode={way.mode}"]
    defaults = Way(way.mode)
    for name in Way._fields[1:]:
        value = getattr(way, name)
        if value != getattr(defaults, name):
            parts.append(f"{name}={value}")
    return "@" + ",".join(parts) if parts else ""


def facts(way: Way, config: ModelConfig) -> dict[str, Any]:
    """What stands in `configs`: the way, with the checkpoint's own numbers where none were given."""
    c = config.latent_cot
    kv_buffer = None if way.kv_budget is None else way.kv_buffer
    found: dict[str, Any] = {**way._asdict(), "kv_buffer": kv_buffer, "feedback": None}
    if way.mode == "thoughts":
        own_iterations = c.iterations or None
        found |= {
            "feedback": c.feedback,
            "num_latents": way.num_latents or c.num_latents,
            "num_iterations": own_iterations if way.num_iterations is None else way.num_iterations,
        }
    found["method"] = None if config.distillation is None else config.distillation.method
    return found


def summarize(
    args: argparse.Namespace, data: QuestionSet, way: Way, answers: Answers, scorer: Scorer
) -> list[TaskResult]:
    """The result of all questions, with their sample lines, and one of each serial depth."""
    suffix, config = mark(way, scorer.model.config), facts(way, scorer.model.config)
    config |= {"problem_set": args.task, "max_new_tokens": answers.max_new_tokens}
    loops = scorer.model.config.recurrence
    loop_depth = loops.num_steps if loops.halting.kind == "fixed" else "adaptive"
    setting = Setting() if loops.placement == "none" else Setting(loop_depth, loops.num_steps)
    lines = sample_lines(args.task, data, answers, scorer)
    gold = [normalize(question.answer) for question in data.questions]

    def result(name: str, members: Sequence[int], depth: int | None, **fields: Any) -> TaskResult:
        """Majority knows the test answers: it is the best of all constants."""
        common, _ = Counter(gold[i] for i in members).most_common(1)[0]
        guesses = {"majority": [common] * len(gold), **data.guesses}
        return TaskResult(
            task=name + suffix,
            values={"acc,none": [lines[i]["acc"] for i in members]},
            totals=costs(members, lines, answers, args.batch_size),
            num_documents=data.num_documents if depth is None else len(members),
            baselines={
                "chance": Score(data.chance),
                **{
                    guess: mean_score([float(normalize(given[i]) == gold[i]) for i in members])
                    for guess, given in guesses.items()
                },
            },
            config={**config, "serial_depth": depth},
            seconds=sum(answers.rows[i].seconds for i in members),
            setting=setting,
            **fields,
        )

    whole, everything = f"thoughts_{args.task}", range(len(gold))
    depths = sorted({question.depth for question in data.questions if question.depth is not None})
    parts = [
        result(f"{whole}_depth{d}", [i for i in everything if data.questions[i].depth == d], d)
        for d in depths
    ]
    top = {"samples": lines, "num_truncated": answers.num_truncated, "data_files": data.data_files}
    return [result(whole, everything, None, subtasks=[part.task for part in parts], **top), *parts]


def costs(
    members: Sequence[int], lines: Sequence[dict[str, Any]], answers: Answers, batch_size: int
) -> dict[str, float | Score]:
    """Means over questions, and medians of seconds."""
    found: dict[str, float | Score] = {
        f"{name},none": mean_score([lines[i][name] for i in members]) for name in COSTS
    }
    in_batch = [answers.rows[i].seconds for i in members]
    found[f"latency_seconds,batch={batch_size}"] = statistics.median(in_batch)
    alone = [answers.alone[i] for i in members if i in answers.alone]
    if alone and batch_size > 1:
        found["latency_seconds,batch=1"] = statistics.median(alone)
    return found


def sample_lines(task: str, data: QuestionSet, answers: Answers, scorer: Scorer) -> list[dict[str, Any]]:
    """What --log_samples writes: the answer to each question, whether it is right, and its costs."""
    lines = []
    for question, row in zip(data.questions, answers.rows, strict=True):
        if answers.mode == "cot":
            found = read_chain_answer(scorer.tokenizer, row.tokens)
        else:
            found = read_answer(scorer.tokenizer.decode(row.tokens))
        right = found is not None and normalize(found) == normalize(question.answer)
        lines.append(
            {
                "doc_id": question.id,
                "group": task,
                "depth": question.depth,
                "prompt": question.text,
                "target": question.answer,
                "resps": scorer.tokenizer.decode(row.tokens),
                "filtered_resps": found,
                "acc": float(right),
                "forward_passes": row.passes,
                "generated_tokens": len(row.tokens),
                "cache_bytes": row.cache_bytes,
                "peak_cache_bytes": row.peak_cache_bytes,
            }
        )
    return lines


def print_table(results: Sequence[TaskResult], batch_size: int) -> None:
    """One row a result; columns are accuracy, what it is to beat, and costs."""
    timed = [f"latency_seconds,batch={n}" for n in sorted({1, batch_size})]
    rows = []
    for result in results:
        beat = ", ".join(f"{name} {score.value:.4f}" for name, score in result.baselines.items())
        score = mean_score(result.values["acc,none"])
        accuracy = f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")
        means = [result.totals[f"{name},none"] for name in COSTS]
        cost = [f"{mean.value:.5g}" for mean in means if isinstance(mean, Score)]
        seconds = [f"{result.totals[key]:.4g}" if key in result.totals else "n/a" for key in timed]
        rows.append((result.name, str(result.num_samples), accuracy, beat, *cost, *seconds))
    heading = [name.replace("_", " ") for name in (*COSTS, *timed)]
    print(format_table(("task", "n", "accuracy", "to beat", *heading), rows))
    for result in results:
        if result.num_truncated:
            print(f"{result.name}: {result.num_truncated} questions were too long and were cut from the left")


def read_questions(args: argparse.Namespace) -> tuple[QuestionSet, dict[str, int]]:
    """The questions, and the sizes of generated ones. Raises ValueError for flags of another kind of task."""
    generated = args.task in GENERATED
    for flag, fits in (("num_samples", generated), ("task_options", generated), ("limit", not generated)):
        if getattr(args, flag) and not fits:
            raise ValueError(
                f"--{flag} {getattr(args, flag)} does not go with --task {args.task}, which"
                f" {'generates its questions' if generated else 'reads them from a file'}: leave it out"
            )
    if not generated:
        return published_questions(args.task, args.data, args.limit), {}
    if not args.num_samples:
        raise ValueError(f"--task {args.task} generates its questions: say how many by --num_samples N")
    options = task_options(args.task, args.task_options)
    return generated_questions(args.task, args.num_samples, args.seed, options), options


def evaluate(args: argparse.Namespace) -> None:
    """Reads, answers in all ways, prints and writes. Raises ValueError or OSError for a user's mistake."""
    if args.log_samples and args.output_path is None:
        raise ValueError("--log_samples needs --output_path, the folder to write them to")
    data, options = read_questions(args)
    training_data = read_training_data(args.checkpoint)
    scorer = Scorer.from_checkpoint(args.checkpoint, args.batch_size)
    model, tokenizer = scorer.model, scorer.tokenizer
    if not isinstance(model, ZeroModel):
        raise ValueError(
            f"{args.checkpoint} is a Hugging Face folder, which has no <bot> and <eot>: import it"
        )
    wanted = ways(args, model.config)
    for way in wanted:  # all are tried before the first has run for an hour
        try_way(model, tokenizer, data, way, args.seed)
    start, results = time.monotonic(), list[TaskResult]()
    for way in wanted:
        found = answer_all(model, tokenizer, data, way, args.batch_size, args.max_new_tokens, args.seed)
        whole, *parts = summarize(args, data, way, found, scorer)
        if args.samples:
            flags = (args.batch_size, args.max_new_tokens, args.seed, args.samples)
            whole.values.update(vote(model, tokenizer, data, way, *flags))
        results += [whole, *parts]
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    config |= {"task_options": options, "split": "test"}
    config |= {"total_evaluation_time_seconds": time.monotonic() - start}
    config |= {"decontamination": decontamination(training_data), "training_data": training_data}
    print_table(results, args.batch_size)
    if args.output_path is not None:
        report = build_report(results, scorer, config)
        print(f"written: {write_report(args.output_path, report, results, args.log_samples)}")


def counts(text: str) -> list[int]:
    """An argparse type: different numbers from 0."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 0 or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"is {text}, different numbers from 0 are needed: 1,2,4")
    return values


def main() -> None:
    """The command line; a user's mistake ends with one line and exit code 2."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--task", required=True, choices=TASKS, help="which task")
    add(
        "--num_samples",
        type=positive_integer,
        metavar="N",
        help=f"questions to generate ({', '.join(GENERATED)})",
    )
    defaults = "; ".join(
        f"{task}: " + ",".join(f"{name}={value}" for name, value in GENERATORS[task].options.items())
        for task in GENERATED
    )
    add("--task_options", default="", metavar="A=1,B=2", help=f"sizes of the task (defaults: {defaults})")
    add(
        "--data",
        type=Path,
        default=Path(os.environ.get("DATA_ROOT", "data")),
        metavar="PATH",
        help="the folder that holds all sets, or the task's file (default: $DATA_ROOT, else data)",
    )
    add("--limit", type=positive_integer, metavar="N", help="only the first N questions of the file")
    add("--mode", choices=MODES, help="default: thoughts where the checkpoint has latents, else cot")
    add("--num_latents", type=counts, metavar="C,..", help="default: the checkpoint's")
    add("--num_iterations", type=counts, metavar="T,..", help="over the latents (default: the checkpoint's)")
    add(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="X",
        help="stop where latents change by less than this",
    )
    add("--replace", choices=("shuffled", "zeroed"), help="control: not the question's own latents")
    add(
        "--kv_budget", type=counts, metavar="N,..", help="tokens of the answer that R-KV keeps (default: all)"
    )
    add(
        "--kv_buffer",
        type=positive_integer,
        metavar="N",
        help=f"tokens between two cuts (default: {KV_BUFFER})",
    )
    add(
        "--samples",
        type=positive_integer,
        metavar="K",
        help="also sample K chains of thought, whose answers vote: the first 1, 4, 16, ... and all of them",
    )
    add("--max_new_tokens", type=positive_integer, metavar="N", help="of an answer (default: the task's)")
    args = parser.parse_args()
    with user_errors(*USER_ERRORS):
        evaluate(args)


if __name__ == "__main__":
    main()
