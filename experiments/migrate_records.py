"""Once: experiments/results/NAME/ with files per cell -> experiments/results/NAME.jsonl, all numbers checked.

Dropped, and only this: `command` (the matrix and the cell say it), --log_samples and --data DATA (the same in
every evaluation of their kind), and overrides that a later one of the same key supersedes. Added: the recipe.
"""

import json
from pathlib import Path
from typing import Any

from experiments.matrix import read_matrix
from experiments.settings import cell_settings, mapping, task_options
from experiments.tasks import read_tasks

RESULTS = Path(__file__).parent / "results"
KINDS = {
    "eval/reasoning.py": "reasoning",
    "eval/thoughts.py": "thoughts",
    "eval/perplexity.py": "perplexity",
    "eval/run.py": "few_shot",
}
NAMES = {"--steps": "num_steps", "--depth": "num_steps", "--tasks": "task"}
LISTS, WORDS = ("num_steps", "num_fewshot"), ("task", "mode")


def evaluation(flags: list[str]) -> dict[str, Any]:
    """From the old flags alone."""
    script, *rest = flags
    found: dict[str, Any] = {"kind": KINDS[script]}
    while rest:
        flag = rest.pop(0)
        if flag == "--log_samples":
            assert found["kind"] in ("reasoning", "thoughts")
            continue
        value = rest.pop(0)
        if flag == "--data":
            assert (value, found["kind"]) == ("DATA", "perplexity")
            continue
        name = NAMES.get(flag, flag.removeprefix("--"))
        if name == "task_options":
            found[name] = task_options(value)
            assert ",".join(f"{k}={v}" for k, v in found[name].items()) == value
        elif name in LISTS:
            found[name] = [int(part) for part in value.split(",")]
            assert ",".join(map(str, found[name])) == value
        else:
            found[name] = value if name in WORDS else int(value)
            assert str(found[name]) == value
    return found


def settings(old: dict[str, Any], recipe: str) -> dict[str, Any]:
    head, overrides = old["training"][:4], old["training"][4:]
    assert set(old) == {"training", "data", "evaluations"}
    assert head == ["--ds_config", "ds_configs/zero1.json", "--config", "experiments/base.yaml"]
    return {
        "training": {"base": "base", "ds_config": "zero1", "overrides": mapping(overrides)},
        "data": {"recipe": recipe, "overrides": mapping(old["data"])},
        "evaluations": {name: evaluation(flags) for name, flags in old["evaluations"].items()},
    }


def same(mapped: dict[str, Any], overrides: list[str]) -> None:
    """Every override is there, as it would be written; a key's last one."""
    last = dict(override.split("=", 1) for override in overrides)
    assert list(last) == list(mapped)
    for key, text in last.items():
        value = mapped[key]
        written = (
            json.dumps(value).replace(" ", "").replace('"', "") if not isinstance(value, float) else text
        )
        assert written == text, (key, value, text)
        assert not isinstance(value, float) or value == float(text), (key, value, text)


def main() -> None:
    tasks = read_tasks()[0]
    total = 0
    for path in sorted(RESULTS.glob("*/*.matrix.json")):
        name = path.parent.name
        listed = json.loads(path.read_text())
        assert listed["matrix"] == name
        assert set(listed) == {"matrix", "cells"}
        matrix_path = RESULTS.parent / f"{name}.yaml"
        matrix = read_matrix(
            matrix_path if matrix_path.is_file() else RESULTS.parent / f"studies/{name}.yaml"
        )
        plans = {plan.cell.name: plan for plan in matrix.plans}
        cells = {
            p.parent.relative_to(path.parent / "cells").as_posix(): p for p in path.parent.rglob("cell.json")
        }
        assert set(cells) == set(listed["cells"]) == set(plans)
        lines = [listed]
        for cell in listed["cells"]:
            record = json.loads(cells[cell].read_text())
            old = json.loads((cells[cell].parent / "settings.json").read_text())
            new = settings(old, tasks[record["task"]].recipe)
            same(new["training"]["overrides"], old["training"][4:])
            same(new["data"]["overrides"], old["data"])
            assert new == cell_settings(plans[cell], not matrix.is_sweep), cell
            assert (record["cell"], record["matrix"]) == (cell, name)
            del record["command"]
            lines.append({**record, "settings": new})
        out = RESULTS / f"{name}.jsonl"
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))
        back = [json.loads(line) for line in out.read_text().splitlines()]
        assert back[0] == listed
        for entry in back[1:]:
            before = json.loads(cells[entry["cell"]].read_text())
            before.pop("command")
            entry.pop("settings")
            assert json.dumps(entry) == json.dumps(before), entry[
                "cell"
            ]  # to the last digit, NaN and order too
        total += len(back) - 1
        print(name, len(back) - 1, out.stat().st_size)
    assert total == len(list(RESULTS.rglob("cell.json"))) == len(list(RESULTS.rglob("settings.json")))
    print(total, "records")


if __name__ == "__main__":
    main()
