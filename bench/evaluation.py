"""Evaluation against lm-evaluation-harness's own Hugging Face path: same weights, token ids and documents.

    OMP_NUM_THREADS=1 python bench/evaluation.py [--data DIR] [--tasks arc_challenge] [--out FILE.json]

A DeepSeek-V3 with random weights, as our checkpoint and as exported by model/hf; the tokenizer is trained on
the tasks' training files. Random weights seldom end an answer, so gsm8k_cot is measured with all 256 tokens,
and again with a model whose end-of-text token is made likely. Both run the same task code: prompts, grading
and scores come from eval/, only the answers differ. CPU-seconds (on a GPU wall-clock seconds), interleaved.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import (
    CPU_SIZES,
    Seconds,
    check_at_least,
    check_choices,
    interleaved,
    json_object,
    listed,
    print_table,
    spread,
)
from tokenizers.processors import TemplateProcessing

from common.errors import user_errors
from common.files import write_json
from data_pipeline.sources.problems import read_arc, read_gsm8k, read_logiqa
from data_pipeline.tokenization.tokenizer import Tokenizer, train_tokenizer
from eval.run import TASKS as EVALUATIONS
from eval.scoring.core import Scorer
from eval.scoring.results import TaskResult
from eval.scoring.task import Evaluation, Options
from model import ModelConfig, ZeroModel
from model.hf.deepseek import export_folder

NOT_INSTALLED = "lm-eval's Hugging Face path is not installed: pip install -e '.[lmeval]'"
# Nats by which sums of fp32 log-probabilities may differ.
TOLERANCE = 1e-3
# Scale and seed of the end-of-text token's weights in the model that ends its answers, found by trial:
# answers of 7 to 256 tokens, 96 on average over 32.
ENDING, ENDING_SEED = 1.1, 1


@dataclass(frozen=True)
class Setting:
    """How a task is measured."""

    task: str
    num_fewshot: int
    limit: int
    target: float
    ends: bool = False  # whether to use the model that ends its answers


SETTINGS = {
    "arc_challenge": Setting("arc_challenge", 25, 8, 3.0),
    "logiqa": Setting("logiqa", 0, 32, 3.0),
    "gsm8k_cot": Setting("gsm8k_cot", 8, 16, 8.0),
    "gsm8k_cot_ending": Setting("gsm8k_cot", 8, 32, 8.0, ends=True),
}


@dataclass
class Line:
    """One task's figures."""

    task: str
    documents: int
    ours: list[float]  # seconds per run
    theirs: list[float]  # empty: not installed
    target: float
    scores: dict[str, float]  # equal on both sides unless `differences` is filled
    differences: list[str]
    note: str

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.theirs) / statistics.median(self.ours) if self.theirs else None

    @property
    def met(self) -> bool | None:
        return None if self.ratio is None else self.ratio >= self.target and not self.differences


class Peer(Scorer):
    """lm-eval's HFLM in place of our scorer."""

    def __init__(self, folder: Path, own: Scorer) -> None:
        from lm_eval.models.huggingface import HFLM

        super().__init__(own.model, own.tokenizer, own.batch_size)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # Our evaluation starts every prompt with bos, as every training document does.
        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=[bos[0], "$A"], special_tokens=[bos]
        )
        device, size = own.device.type, own.batch_size
        self.peer = HFLM(
            str(folder),
            tokenizer=tokenizer,
            dtype="float32",
            batch_size=size,
            device=device,
            add_bos_token=True,
        )

    def _asked(self, kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        from lm_eval.api.instance import Instance

        return [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        return self.peer.loglikelihood(self._asked("loglikelihood", requests), disable_tqdm=True)

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        options = {"until": list(stop), "max_gen_toks": max_new_tokens, "do_sample": False}
        asked = self._asked("generate_until", [(prompt, options) for prompt in prompts])
        return self.peer.generate_until(asked, disable_tqdm=True)


def main() -> None:
    with user_errors(ValueError, OSError):
        _run(_parse())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the speed of evaluation with lm-eval's.")
    add = parser.add_argument
    data = Path(os.environ.get("DATA_ROOT", "data"))
    add("--data", type=Path, default=data, help="folder of the data sets (default: DATA_ROOT, else data)")
    add(
        "--tasks",
        type=listed,
        default=list(SETTINGS),
        help=f"comma-separated (default: {','.join(SETTINGS)})",
    )
    add("--limit", type=int, help="documents per task (default: about a minute of lm-eval)")
    add("--runs", type=int, default=3, help="counted runs of each (default: 3)")
    add("--batch_size", type=int, default=16, help="rows (default: 16)")
    add("--sizes", type=json_object, default={}, metavar="JSON", help="model config keys to change")
    add("--out", type=Path, metavar="FILE.json", help="machine, versions, command and every timing")
    return parser.parse_args()


def _run(arguments: argparse.Namespace) -> None:
    check_choices("tasks", arguments.tasks, tuple(SETTINGS))
    check_at_least({flag: (getattr(arguments, flag), 1) for flag in ("runs", "batch_size")})
    if arguments.limit is not None:
        check_at_least({"limit": (arguments.limit, 1)})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    settings = [SETTINGS[name] for name in arguments.tasks]
    evaluations = [_evaluation(arguments, setting) for setting in settings]
    with tempfile.TemporaryDirectory() as name:
        tokenizer = train_tokenizer(_texts(arguments.data), CPU_SIZES["vocab_size"])
        pairs = {
            ends: _pair(arguments, Path(name) / str(ends), tokenizer, ends)
            for ends in {setting.ends for setting in settings}
        }
        lines = [
            _line(name, setting, evaluation, *pairs[setting.ends], arguments.runs)
            for name, setting, evaluation in zip(arguments.tasks, settings, evaluations, strict=True)
        ]
    if arguments.out:
        chosen = {key: str(v) if isinstance(v, Path) else v for key, v in vars(arguments).items()}
        rows = [asdict(line) | {"ratio": line.ratio, "met": line.met} for line in lines]
        report = {"machine": machine(), "arguments": chosen, "results": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out, report, indent=2)
    _print_lines(arguments, lines)


def _evaluation(arguments: argparse.Namespace, setting: Setting) -> Evaluation:
    limit = arguments.limit or setting.limit
    return EVALUATIONS[setting.task].load(Options(arguments.data, limit, setting.num_fewshot))


def _pair(
    arguments: argparse.Namespace, folder: Path, tokenizer_model: bytes, ends: bool
) -> tuple[Scorer, Peer | None]:
    """Ours and theirs over the same random weights."""
    checkpoint, exported = folder / "export", folder / "hf"
    checkpoint.mkdir(parents=True)
    (checkpoint / "tokenizer.model").write_bytes(tokenizer_model)
    tokenizer = Tokenizer(checkpoint / "tokenizer.model")
    sizes = {**CPU_SIZES, **arguments.sizes, "vocab_size": tokenizer.vocab_size}
    model = ZeroModel(ModelConfig.from_dict(sizes), seed=0)
    if ends:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(ENDING_SEED)
            row = torch.randn(model.config.hidden_size, generator=generator)
            model.lm_head.weight[tokenizer.eos_id] = ENDING * model.config.initializer_range * row
    model.save_pretrained(checkpoint)
    export_folder(checkpoint, exported)
    own = Scorer.from_checkpoint(checkpoint, arguments.batch_size)
    installed = find_spec("lm_eval") is not None and find_spec("accelerate") is not None
    return own, Peer(exported, own) if installed else None


def _texts(data: Path) -> list[str]:
    """The tokenizer's training text: training files, and LogiQA's validation file."""
    problems = [
        *read_arc(data / "arc/ARC-Challenge-Train.jsonl"),
        *read_gsm8k(data / "gsm8k/train.jsonl"),
        *read_logiqa(data / "logiqa/Eval.txt"),
    ]
    return [problem.prompt + problem.target for problem in problems]


def _line(
    name: str, setting: Setting, evaluation: Evaluation, own: Scorer, peer: Peer | None, runs: int
) -> Line:
    results: dict[str, TaskResult] = {}

    def run(who: str, scorer: Scorer) -> Seconds:
        clock = time.process_time if scorer.device.type == "cpu" else time.perf_counter
        start = clock()
        results[who] = evaluation(scorer)[0]
        return {"seconds": clock() - start}

    functions: dict[str, Callable[[], Seconds]]
    functions = {"ours": partial(run, "ours", own)}
    if peer is not None:
        functions["theirs"] = partial(run, "theirs", peer)
    seconds = interleaved(runs, name, functions)["seconds"]
    ours, theirs = results["ours"], results.get("theirs")
    scores = {key: sum(values) / len(values) for key, values in ours.values.items()}
    note = ""
    if "max_new_tokens" in ours.config:
        lengths = [len(own.tokenizer.encode(sample["resps"])) for sample in ours.samples]
        note = f"answers of {min(lengths)}-{max(lengths)} tokens, mean {statistics.mean(lengths):.0f}"
    return Line(
        name, ours.num_samples, seconds["ours"], seconds.get("theirs", []), setting.target, scores,
        [] if theirs is None else differences(ours, theirs), note,
    )  # fmt: skip


def differences(ours: TaskResult, theirs: TaskResult) -> list[str]:
    """Documents whose answers or scores differ between the two, described."""
    found = []
    for i, (a, b) in enumerate(zip(ours.samples, theirs.samples, strict=True)):
        first, second = a["resps"], b["resps"]
        if isinstance(first, str):
            same = first == second
        else:
            same = max(abs(x - y) for x, y in zip(first, second, strict=True)) <= TOLERANCE
        scores = [[result.values[key][i] for key in ours.values] for result in (ours, theirs)]
        if not same or scores[0] != scores[1]:
            found.append(f"document {i}: {first!r} and {second!r}, scores {scores[0]} and {scores[1]}")
    return found


# ---- the report


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "command": sys.argv,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "lm_eval": version("lm_eval") if find_spec("lm_eval") else None,
    }


def _print_lines(arguments: argparse.Namespace, lines: list[Line]) -> None:
    here = machine()
    versions = ", ".join(f"{name} {here[name]}" for name in ("torch", "transformers", "lm_eval"))
    unit = "s" if here["gpu"] else "CPU-s"
    print(f"\nbatches of {arguments.batch_size}; load {here['load']:.1f}; {versions}; ", end="")
    print(f"medians of {arguments.runs} (smallest-largest), {unit}\n")
    table: list[tuple[str, ...]] = [
        ("task", "documents", "ours", "lm-eval", "ratio", "target", "", "scores and answers", "")
    ]
    for line in lines:
        head = line.task, str(line.documents), spread(line.ours, 2)
        if line.ratio is None:
            table.append((*head, NOT_INSTALLED, "", "", "", "", line.note))
            continue
        values = spread(line.theirs, 2), f"{line.ratio:.1f}", f">= {line.target:g}"
        verdict = "met" if line.met else "MISSED"
        same = f"{len(line.differences)} differ" if line.differences else "the same"
        table.append((*head, *values, verdict, same, line.note))
    print_table(table)
    for line in lines:
        for difference in line.differences:
            print(f"{line.task}, {difference}")


if __name__ == "__main__":
    main()
