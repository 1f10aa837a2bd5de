"""All synthetic tasks by name: the records that the modules of this folder export as `TASK`."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from data_pipeline import tasks
from data_pipeline.tasks.task import SyntheticTask


def _find() -> dict[str, SyntheticTask[Any]]:
    found: dict[str, SyntheticTask[Any]] = {}
    for module in iter_modules(tasks.__path__, f"{tasks.__name__}."):
        if module.name == __name__:
            continue
        task = getattr(import_module(module.name), "TASK", None)
        if task is not None:
            assert task.name not in found, f"two synthetic tasks are called {task.name}"
            found[task.name] = task
    return found


TASKS = _find()
