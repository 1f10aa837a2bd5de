"""lm-evaluation-harness 0.4.13 over the published files, as the reference of test_agreement.py.

DATA_ROOT=... python tests/eval/lm_eval_reference.py

writes prompt_digests.json beside it (needs `pip install -e '.[lmeval]'`): digests of what lm-eval asks for
every document, so that the tests hold the prompts where lm-eval is not installed. No text of a data set is in
it.

The published files are read here as lm-eval's copies on the hub were made of them, and not by
data_pipeline/sources/problems.py, which is under test.
"""

import hashlib
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DIGESTS = Path(__file__).with_name("prompt_digests.json")
CHARACTERS = 8  # of each digest
# Documents that share a digest; bAbI has 20,000.
BLOCK = {"babi": 50}
# (task, exemplars): lm-eval's own numbers, and what leaderboards and few-shot curves use
SETTINGS = [
    ("gsm8k", 5), ("gsm8k_cot", 8), ("arc_easy", 0), ("arc_easy", 25), ("arc_challenge", 0),
    ("arc_challenge", 25), ("logiqa", 0), ("babi", 0),
]  # fmt: skip
FOLDERS = ("gsm8k", "arc", "logiqa", "babi")
Row = dict[str, Any]
Asked = dict[str, Any]  # prompt: str, choices: list[str], target: str, as the model sees them


def logiqa_rows(path: Path) -> list[Row]:
    """As the loading script of EleutherAI/logiqa."""

    def normalize(text: str) -> str:
        return text.replace(".", ". ").strip()

    rows = []
    for record in path.read_text(encoding="utf-8").strip().split("\n\n"):
        letter, context, question, *options = record.split("\n")
        rows.append(
            {
                "label": letter.strip(),
                "context": normalize(context),
                "question": normalize(question),
                "options": [normalize(option[2:]) for option in options],
            }
        )
    return rows


def arc_rows(path: Path) -> list[Row]:
    """As the columns of allenai/ai2_arc."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        choices = item["question"]["choices"]
        columns = {key: [choice[key] for choice in choices] for key in ("text", "label")}
        rows.append(
            {"question": item["question"]["stem"], "choices": columns, "answerKey": item["answerKey"]}
        )
    return rows


def babi_rows(path: Path, split: str) -> list[Row]:
    """As Muennighoff/babi was made, from en-10k; the answers of task 19 stay as published."""
    rows = []
    with tarfile.open(path) as archive:
        for task in range(1, 21):
            folder = "en" if (task, split) == (3, "train") else "en-10k"  # no such file in the archive
            (name,) = [n for n in archive.getnames() if f"/{folder}/qa{task}_" in n and f"_{split}.txt" in n]
            member = archive.extractfile(name)
            assert member
            story: list[str] = []
            for line in member.read().decode().splitlines(keepends=True):
                number, fact = line.split(" ", 1)
                if number == "1":
                    story = []
                if "?" in fact:
                    question, answer = (part.strip() for part in fact.split("\t")[:2])
                    rows.append({"passage": "".join(story), "question": question, "answer": answer})
                else:
                    story.append(fact)
    return rows


def local_tasks(
    data: Path, folder: Path, names: Sequence[str], num_fewshot: int | None, limit: int | None
) -> list[Row]:
    """Configs of lm-eval's own tasks over files written to `folder`: the exemplars, and the test rows up to
    `limit`.
    """

    def written(name: str, rows: list[Row]) -> str:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def arc(stem: str) -> dict[str, Callable[[], list[Row]]]:
        return {
            "train": lambda: arc_rows(data / f"arc/ARC-{stem}-Train.jsonl"),
            "test": lambda: arc_rows(data / f"arc/ARC-{stem}-Test.jsonl"),
        }

    def gsm8k(split: str) -> list[Row]:
        return [json.loads(line) for line in (data / f"gsm8k/{split}.jsonl").read_text().splitlines()]

    archive = data / "babi/tasks_1-20_v1-2.tar.gz"
    readers: dict[str, dict[str, Callable[[], list[Row]]]] = {
        "gsm8k": {"train": lambda: gsm8k("train"), "test": lambda: gsm8k("test")},
        "gsm8k_cot": {"test": lambda: gsm8k("test")},
        "arc_easy": arc("Easy"),
        "arc_challenge": arc("Challenge"),
        "logiqa": {
            "validation": lambda: logiqa_rows(data / "logiqa/Eval.txt"),
            "test": lambda: logiqa_rows(data / "logiqa/Test.txt"),
        },
        "babi": {"train": lambda: babi_rows(archive, "train"), "test": lambda: babi_rows(archive, "test")},
    }
    configs = []
    for name in names:
        splits = dict(readers[name])
        config: Row = {"task": name, "dataset_path": "json", "dataset_name": None}
        if not num_fewshot:  # its large train file need not be read
            splits = {"test": splits["test"]} if name == "babi" else splits
        for split, key in (("train", "training_split"), ("validation", "validation_split")):
            if split not in splits:
                config[key] = None
        files = {split: written(f"{name}-{split}", read()[: limit if split == "test" else None])
                 for split, read in splits.items()}  # fmt: skip
        config["dataset_kwargs"] = {"data_files": files}
        if num_fewshot is not None:
            config["num_fewshot"] = num_fewshot
        configs.append(config)
    return configs


def evaluate(
    model: Any, data: Path, names: Sequence[str], num_fewshot: int | None = None, limit: int | None = None,
    gen_kwargs: str | None = None,
) -> dict[str, list[Row]]:  # fmt: skip
    """lm-eval's sample lines by task, in the order of the documents, from its own entry point."""
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    tasks = Path(lm_eval.__file__).parent / "tasks"
    manager = TaskManager(include_defaults=False, include_path=[str(tasks / name) for name in FOLDERS])
    with tempfile.TemporaryDirectory() as folder:
        group = {"group": "local", "task": local_tasks(data, Path(folder), names, num_fewshot, limit)}
        result = lm_eval.simple_evaluate(
            model=model, tasks=[group], task_manager=manager, bootstrap_iters=0, gen_kwargs=gen_kwargs
        )
    assert result
    return {
        name: sorted(samples, key=lambda sample: sample["doc_id"])
        for name, samples in result["samples"].items()
    }


def asked(sample: Row) -> Asked:
    """What lm-eval asked a model in one sample line, in the terms of our sample lines."""
    arguments = sample["arguments"]
    prompt = arguments[0][0]
    if isinstance(arguments[0][1], str):  # the continuations to choose from
        choices = [continuation for _, continuation in arguments]
        return {"prompt": prompt, "choices": choices, "target": choices[int(sample["target"])]}
    return {"prompt": prompt, "choices": [], "target": f" {sample['target'].removeprefix(' ')}"}


def digests(name: str, documents: Sequence[Asked]) -> list[str]:
    """One digest for each document, or each BLOCK of them."""
    size = BLOCK.get(name, 1)
    blocks = [documents[start : start + size] for start in range(0, len(documents), size)]
    return [hashlib.sha256(json.dumps(block).encode()).hexdigest()[:CHARACTERS] for block in blocks]


def silent_model() -> Any:
    """A model that answers nothing: for the prompts alone."""
    from lm_eval.api.model import LM

    class Silent(LM):
        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return [(-1.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: Any) -> list[str]:
            return [""] * len(requests)

    return Silent()


def lm_eval_asks(data: Path, name: str, num_fewshot: int, limit: int | None = None) -> list[Asked]:
    """What lm-eval asks for each document."""
    samples = evaluate(silent_model(), data, [name], num_fewshot, limit)[name]
    unique = {sample["doc_id"]: sample for sample in samples}  # a line for each filter
    return [asked(sample) for sample in unique.values()]


def main() -> None:
    data = Path(os.environ["DATA_ROOT"])
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HF_DATASETS_CACHE"] = cache
        made = {f"{name} {shots}": "".join(digests(name, lm_eval_asks(data, name, shots)))
                for name, shots in SETTINGS}  # fmt: skip
    DIGESTS.write_text(json.dumps(made, indent=0) + "\n")
    print(f"written: {DIGESTS} ({DIGESTS.stat().st_size} bytes)", file=sys.stderr)


if __name__ == "__main__":
    main()
