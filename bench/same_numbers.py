"""Whether a refactoring changed a number: what two checkouts compute, compared to the last digit.

    python bench/same_numbers.py record --checkout DIR --out BEFORE.json [--only demo,text]
    python bench/same_numbers.py record --checkout DIR --out AFTER.json --groups-from BEFORE.json
    python bench/same_numbers.py compare BEFORE.json AFTER.json

For a change that must not change behaviour: record the commit before it and the one after it, on the same
machine with the same packages, then compare. It starts documented commands and reads the files that they
write, and imports nothing of the checkout, so that one copy of it serves both. Needs DATA_ROOT, six minutes
of two cores and a gigabyte in TMPDIR. Sections:

demo      the data of `make demo` and the first 40 steps of its training, with the schedule of all 680
groups    one step of every file in pretrain/configs/groups/ on the demo's data, and the loss after it
settings  how the matrices of experiments/ train each cell, and on which data
cells     one step of every group of experiments/, as standard.yaml trains its first cell of seed 0
text      recipes/text.yaml from the first megabytes of each source
prompts   prompts, answers and scores of all evaluations, of a model that has learnt one step

With --groups-from, groups and cells train the models and settings of that record instead of the checkout's
own, whose names and files may change. Where command lines change, so do the tables below. What DATA_ROOT or
the checkout lacks is recorded as left out. An evaluation that only the later checkout has is no difference.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

JOBS = 2  # commands at once, of one thread each
DEMO_STEPS = 40
STEP = "max_steps=1 eval_every=1 eval_batches=1 save_every=1"
TRAIN = "python pretrain/main.py --ds_config ds_configs/zero1.json output_dir={out} data.path={data}"
COMMANDS = {
    "build": "python data_pipeline/build.py --recipe data_pipeline/recipes/{recipe}.yaml --out {out}",
    "demo": "deepspeed --num_accelerators 2 --master_port {port} pretrain/main.py --config"
    " pretrain/configs/demo.yaml --ds_config ds_configs/zero3_ep.json output_dir={out} data.path={data}",
    "group": f"{TRAIN} --config pretrain/configs/demo.yaml --config {{group}} ep_size=1 {STEP}",
    "cell": "python {script} output_dir={out} data.path={data}",  # and the cell's settings, and STEP
    "matrix": "python experiments/run.py --matrix {matrix} --out {out}",
    # Narrow, so that it is soon tested, with a vocabulary so short that it spells labels letter by letter.
    "model": f"{TRAIN} --config pretrain/configs/real_cpu.yaml ep_size=1 max_steps=1 eval_every=0"
    " model.hidden_size=32 model.num_attention_heads=2 model.kv_lora_rank=16 model.intermediate_size=64"
    " model.moe_intermediate_size=32",
}
OVERRIDES = {  # of a recipe; they go over a cell's own
    "real_cpu": "validation_fraction=0.2 sources.0.max_bytes=500000 tokenizer.vocab_size=512"
    " tokenizer.model_type=bpe tokenizer.train_bytes=300000 tokenizer.thought_pieces=true",
    "text": "tokenizer.vocab_size=2048 tokenizer.train_bytes=500000 sources.0.max_bytes=8000000"
    " sources.1.max_bytes=4000000 sources.2.max_bytes=2000000 sources.3.max_bytes=2000000",
    "p_hop": "sources.0.num_samples=3000",
    "distill_causal_loop": "sources.0.num_samples=3000",
}
MATRICES = ("quick", "standard", "sweep")
CELL_RECIPES = {"p_hop": "p_hop", "causal_loop_v2_traced": "distill_causal_loop"}  # they have all groups
TASKS = {  # of eval/run.py -> what of DATA_ROOT it needs
    **{"gsm8k": "gsm8k", "gsm8k_cot": "gsm8k", "logiqa": "logiqa", "babi": "babi", "arc": "arc"},
    **{"causal_loop": ".", "p_hop": ".", "perplexity": "text", "math": "math", "reclor": "reclor/val.json"},
}
SAMPLES = "--log_samples --batch_size 16 --checkpoint {checkpoint} --output_path {out}"
RUN = f"python eval/run.py --max_new_tokens 8 {SAMPLES}"
REASONING = f"python eval/reasoning.py --num_samples 20 --steps 1,3 {SAMPLES}"
THOUGHTS = f"python eval/thoughts.py --max_new_tokens 8 {SAMPLES}"
# Evaluations that older checkouts lack -> the tasks that they need of the script.
LATER = {
    "run synthetic": ("addition", "causal_loop_v2", "modular_exponent", "permutation_composition"),
    "reasoning modular_exponent": ("modular_exponent",),
    "reasoning permutation_composition": ("permutation_composition",),
}
EVALUATIONS = {
    "run": f"{RUN} --tasks {{tasks}} --limit 20 --depth 2,adaptive",
    "few-shot": f"{RUN} --tasks gsm8k,logiqa,babi,arc --limit 5 --num_fewshot 0,2 --samples 2",
    "run synthetic": f"{RUN} --tasks {','.join(LATER['run synthetic'])} --limit 20 --depth 2,adaptive",
    **{
        f"reasoning {task}": f"{REASONING} --task {task}"
        for task in ("p_hop", "addition", "causal_loop_v2", "modular_exponent", "permutation_composition")
    },
    **{
        f"thoughts {task} {mode}": f"{THOUGHTS} --task {task} --mode {mode} {how_many} 16"
        for task, how_many in (
            *(("causal_loop_v2", "--num_samples"), ("gsm8k", "--limit")),
            *(("icot", "--limit"), ("prosqa", "--limit")),
        )
        for mode in ("cot", "none")
    },
}
RENAMED = {"--steps": "--num_steps"}  # a flag that a script no longer has -> its new name
# Patterns of what results call things today -> what they called them before.
FORMER_NAMES = {
    **{"@num_steps=": "@depth=", "num_steps=": "steps=", "^num_steps$": "depth"},
    "_problem_depth": "_depth",
}
LEFT_OUT = "left_out"  # key of a record next to its sections: {what was not recorded: why}
# Clocks and the machine's memory. All else is the same in two records of one checkout.
NOT_COMPARED = re.compile(r"second|latency|data_wait|memory_bytes|^mfu$|^hfu$")
TIMESTAMP = re.compile(r"_\d{4}-\d\d-\d\dT[\d.-]+\.jsonl$")


class RecordError(Exception):
    """A command failed, what it should have written is not there, or two records cannot be compared."""


@dataclass(frozen=True)
class Side:
    """One checkout, and the folder of what its commands write."""

    checkout: Path
    work: Path
    before: Mapping[str, Any]  # sections of the record whose models are trained; empty: the checkout's own
    left_out: dict[str, str] = field(default_factory=dict)  # what could not be recorded -> why

    def call(
        self, template: str, out: Path, *more: str, watch: Callable[[], None] | None = None, code: int = 0,
        **values: Any,
    ) -> Path:  # fmt: skip
        """Runs a command line of the tables, with `watch` ten times a second; returns `out`.

        Raises:
            RecordError: it did not end with `code`; with the command and its last lines.
        """
        words = [*shlex.split(template.format(out=out, **values)), *more]
        command = [self._present(words[1], word) if word in RENAMED else word for word in words]
        out.parent.mkdir(parents=True, exist_ok=True)
        log = out.with_name(f"{out.name}.log")
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **self._surroundings())
            try:
                while process.poll() is None:
                    if watch is not None:
                        watch()
                    time.sleep(0.1)
            finally:
                process.terminate()
        if process.returncode != code:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            where = f"in {self.checkout}, code {process.returncode}"
            raise RecordError(f"{where}: {shlex.join(command)}\n{last}")
        return out

    def _surroundings(self) -> dict[str, Any]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "PYTHONPATH": str(self.checkout), "OMP_NUM_THREADS": "1"}
        return {"cwd": self.checkout, "env": {**os.environ, **own}}

    def _present(self, script: str, flag: str) -> str:
        """The flag, or its new name where the script no longer has it."""
        return flag if re.search(rf"(?<![-\w]){flag}\b", self._help(script)) else RENAMED[flag]

    def _help(self, script: str) -> str:
        command = [sys.executable, script, "--help"]
        return subprocess.run(command, capture_output=True, text=True, **self._surroundings()).stdout

    def lacks(self, script: str, tasks: Sequence[str]) -> list[str]:
        """Those of `tasks` that the script's help does not list."""
        listed = set(re.split(r"[\s,{}]+", self._help(script))) if tasks else set()
        return [task for task in tasks if task not in listed]

    def build(self, recipe: str, *overrides: str) -> Path:
        """The folder of a recipe's data, built once."""
        out, own = self.work / "data" / recipe, OVERRIDES.get(recipe, "").split()
        built = (out / "manifest.json").is_file()
        return out if built else self.call(COMMANDS["build"], out, *overrides, *own, recipe=recipe)


# ---- sections


def record_demo(side: Side) -> dict[str, Any]:
    """The stop file ends the training, so that max_steps and with it the schedule are the full demo's."""
    data, out = side.build("demo"), side.work / "demo"

    def stop() -> None:
        path = out / "metrics.jsonl"
        if path.is_file() and path.read_text().count("\n") >= DEMO_STEPS:
            (out / "STOP").touch()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    side.call(COMMANDS["demo"], out, watch=stop, port=port, data=data)
    return {"data": digests(data), "training": metrics(out, DEMO_STEPS)}


def record_groups(side: Side) -> dict[str, Any]:
    data, files = side.build("demo"), dict[str, Path]()
    for name, group in side.before.get("groups", {}).items():
        files[name] = side.work / f"{name}.yaml"
        files[name].write_text(json.dumps({"model": group["model"]}))  # JSON is YAML
    if not side.before:
        files = {path.stem: path for path in (side.checkout / "pretrain/configs/groups").glob("*.yaml")}

    def train(name: str) -> dict[str, Any]:
        out = side.call(COMMANDS["group"], side.work / "groups" / name, group=files[name], data=data)
        resolved: Any = OmegaConf.to_container(OmegaConf.load(out / "config.yaml"))
        return {"model": resolved["model"], "training": metrics(out, 1)}

    return in_parallel(train, sorted(files))


def record_settings(side: Side) -> dict[str, Any]:
    """A cell stores its settings before its data are built, which the file `data` makes impossible."""

    def settings(matrix: str) -> dict[str, Any]:
        out = side.work / "settings" / matrix
        if not out.is_dir():
            out.mkdir(parents=True)
            (out / "data").touch()
            old = side.checkout / "experiments" / f"{matrix}.yaml"
            side.call(COMMANDS["matrix"], out, code=1, matrix=old if old.is_file() else matrix)
        found = {path: json.loads(path.read_text()) for path in sorted(out.rglob("settings.json"))}
        if not found:
            raise RecordError(f"no cell of {matrix}.yaml of {side.checkout} noted a settings.json")
        # Not `evaluations`: paths and flags of scripts, whose answers `prompts` compares.
        return {
            str(path.parent.relative_to(out / "cells")): as_arguments(told["training"], told["data"])
            for path, told in found.items()
        }

    return in_parallel(settings, MATRICES)


def as_arguments(training: Any, data: Any) -> dict[str, list[str]]:
    """The same lists from settings.json as arguments and, in later checkouts, as mappings; no key twice."""

    def options(overrides: Any) -> list[str]:
        if isinstance(overrides, list):
            pairs = (override.split("=", 1) for override in overrides)
            overrides = {key: OmegaConf.from_dotlist([f"value={text}"])["value"] for key, text in pairs}
        plain: Any = OmegaConf.to_container(OmegaConf.create([*overrides.values()]))
        return [f"{key}={text(value)}" for key, value in zip(overrides, plain, strict=True)]

    def text(value: Any) -> str:
        if isinstance(value, list):
            return f"[{','.join(map(text, value))}]"
        return value if isinstance(value, str) else json.dumps(value)

    if isinstance(training, list):
        return {"training": [*training[:4], *options(training[4:])], "data": options(data)}
    files = [f"ds_configs/{training['ds_config']}.json", f"experiments/{training['base']}.yaml"]
    flags = ["--ds_config", files[0], "--config", files[1]]
    return {"training": [*flags, *options(training["overrides"])], "data": options(data["overrides"])}


def record_cells(side: Side) -> dict[str, Any]:
    """One step of a cell of every group: of the record before, or of the checkout's own first cells."""
    if side.before:
        cells = {name: cell["settings"] for name, cell in side.before["cells"].items()}
    else:
        cells, groups = {}, set()
        for name, settings in record_settings(side)["standard"].items():
            task, *_, group, seed = name.split("/")
            if task in CELL_RECIPES and seed == "0" and group not in groups:
                groups.add(group)
                cells[name] = settings
    for name, settings in cells.items():  # here, so that no two cells build the same
        side.build(CELL_RECIPES[name.split("/")[0]], *settings["data"])

    def train(name: str) -> dict[str, Any]:
        told, out = cells[name]["training"], side.work / "cells" / name
        taught = any(word.startswith("model.distillation.method=") for word in told)
        script = "distill/main.py" if taught else "pretrain/main.py"
        data = side.build(CELL_RECIPES[name.split("/")[0]])
        side.call(COMMANDS["cell"], out, *told, *STEP.split(), script=script, data=data)
        return {"settings": cells[name], "training": metrics(out, 1)}

    return in_parallel(train, sorted(cells))


def record_text(side: Side) -> dict[str, Any]:
    return digests(side.build("text"))


def record_prompts(side: Side) -> dict[str, Any]:
    """All evaluations of a model that has trained one step."""
    model = side.call(COMMANDS["model"], side.work / "model", data=side.build("real_cpu"))
    tasks, names = [], []
    for task, needed in TASKS.items():
        if Path(os.environ["DATA_ROOT"], needed).exists():
            tasks.append(task)
        else:
            side.left_out[f"run: {task}"] = f"DATA_ROOT has no {needed}"
    for name, command in EVALUATIONS.items():
        lacking = side.lacks(shlex.split(command)[1], LATER.get(name, ()))
        if lacking:
            side.left_out[name] = f"the checkout has no task {', '.join(lacking)}"
        else:
            names.append(name)

    def evaluate(name: str) -> dict[str, Any]:
        out = side.work / "eval" / name.replace(" ", "_")
        side.call(EVALUATIONS[name], out, checkpoint=model / "export", tasks=",".join(tasks))
        return evaluation(out)

    return in_parallel(evaluate, names)


def in_parallel(function: Callable[[str], dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    with ThreadPoolExecutor(JOBS) as pool:
        return dict(zip(names, pool.map(function, names), strict=True))


SECTIONS: dict[str, Callable[[Side], dict[str, Any]]] = {
    "demo": record_demo, "groups": record_groups, "settings": record_settings,
    "cells": record_cells, "text": record_text, "prompts": record_prompts,
}  # fmt: skip


# ---- what commands have written


def metrics(run: Path, steps: int) -> dict[str, Any]:
    """The first lines of metrics.jsonl, by step."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:steps]]
    if len(found) < steps:
        raise RecordError(f"{run}/metrics.jsonl has {len(found)} lines, not {steps}")
    return {f"step {record.pop('step')}": compared(record) for record in found}


def compared(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not NOT_COMPARED.search(key)}


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.iterdir()) if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def evaluation(folder: Path) -> dict[str, Any]:
    """The scores, and of each samples file digests of what was asked and what was answered, in any order."""
    results, files = list(folder.glob("results_*.json")), sorted(folder.glob("samples_*.jsonl"))
    if len(results) != 1 or not files:
        raise RecordError(
            f"{folder} has {len(results)} results and {len(files)} samples files, not 1 and some"
        )
    samples = {}
    for path in files:
        documents = [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]
        asked = [[d["doc_id"], d["prompt"], d["target"]] for d in documents]
        answered = [[d["doc_id"], d.get("resps"), d.get("filtered_resps")] for d in documents]
        name = former(TIMESTAMP.sub("", path.name).removeprefix("samples_"))
        samples[name] = {"lines": len(documents), "prompts": _digest(asked), "answers": _digest(answered)}
    scores = {
        former(task): {former(key): former(value) for key, value in compared(found).items()}
        for task, found in json.loads(results[0].read_text("utf-8"))["results"].items()
    }
    return {"samples": samples, "scores": scores}


def former(name: Any) -> Any:
    for new, old in FORMER_NAMES.items():
        name = re.sub(new, old, name) if isinstance(name, str) else name
    return name


def _digest(values: Sequence[Any]) -> str:
    return hashlib.sha256("\n".join(sorted(map(json.dumps, values))).encode()).hexdigest()


# ---- the two commands


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, value as JSON, which has every digit) of all that is in dicts and lists."""
    items = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(items, dict) or not items:
        yield path, json.dumps(value)
        return
    for key, inner in items.items():
        yield from leaves(inner, f"{path} > {key}")


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Prints a table, a line for each difference, and what was left out. Returns whether none differs.

    Raises:
        RecordError: the records differ in their sections, or one has nothing in a section, or none.
    """
    sections = [[name for name in record if name != LEFT_OUT] for record in (before, after)]
    for names, record in zip(sections, (before, after), strict=True):
        empty = [name for name in names if not record[name]]
        if not names or empty:
            raise RecordError(f"a record has nothing in {', '.join(empty) or 'it'}: record it again")
    if set(sections[0]) != set(sections[1]):
        first, second = (",".join(sorted(names)) for names in sections)
        raise RecordError(f"one record has {first}, the other {second}: record both with the same --only")
    later = set(after.get("prompts", {})) - set(before.get("prompts", {}))
    after = {**after, "prompts": {k: v for k, v in after.get("prompts", {}).items() if k not in later}}
    differences = []
    print(f"{'section':10} {'values':>8} {'different':>10}")
    for section in sections[0]:
        one, two = (dict(leaves(side[section], section)) for side in (before, after))
        unequal = [path for path in {**one, **two} if one.get(path) != two.get(path)]
        print(f"{section:10} {len(one):8} {len(unequal):10}")
        differences += [f"{p}: {one.get(p, 'absent')} -> {two.get(p, 'absent')}" for p in unequal]
    notes = [f"prompts > {name}: only in the second record, not compared" for name in sorted(later)]
    for which, record in (("first", before), ("second", after)):
        notes += [f"left out of the {which}: {k} ({v})" for k, v in record.get(LEFT_OUT, {}).items()]
    print("".join(f"{line}\n" for line in (*differences, *notes)), end="")
    return not differences


def main() -> None:
    parser = argparse.ArgumentParser(description="Whether two checkouts compute the same numbers.")
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run a checkout")
    recording.add_argument("--checkout", type=Path, required=True, metavar="DIR")
    recording.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    recording.add_argument("--only", default=",".join(SECTIONS), metavar="A,B", help="default: %(default)s")
    recording.add_argument("--groups-from", type=Path, metavar="FILE.json", help="train this record's models")
    comparing = commands.add_parser("compare", help="exit code 1 where two records differ")
    comparing.add_argument("records", type=Path, nargs=2, metavar="FILE.json")
    arguments = parser.parse_args()
    if arguments.command == "compare":
        try:
            sys.exit(not compare(*(json.loads(path.read_text()) for path in arguments.records)))
        except RecordError as error:
            sys.exit(f"error: {error}")
    only = arguments.only.split(",")
    for name in only:
        if name not in SECTIONS:
            parser.error(f"--only names {name!r}; choose from {','.join(SECTIONS)}")
    if "DATA_ROOT" not in os.environ:
        parser.error("DATA_ROOT is not set; set it to the folder of the data sets")
    before = json.loads(arguments.groups_from.read_text()) if arguments.groups_from else {}
    found = {}
    with tempfile.TemporaryDirectory(prefix="same_numbers-") as work:
        side = Side(arguments.checkout.resolve(), Path(work), before)
        for name in only:
            print(f"recording {name} of {side.checkout}", flush=True)
            try:
                found[name] = SECTIONS[name](side)
            except RecordError as error:
                sys.exit(f"error: {error}")
            arguments.out.write_text(json.dumps({**found, LEFT_OUT: side.left_out}, indent=1) + "\n")


if __name__ == "__main__":
    main()
