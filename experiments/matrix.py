"""Plans a matrix of groups: what every cell is trained as, and whether pairs are equal.

experiments/matrix_file.py reads the file and names the cells.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.nearest import nearest
from common.schema import from_plain
from data_pipeline.errors import DataError
from experiments.groups import GROUPS, PAIRS, Model, Shape, measured, merged, unequal
from experiments.matrix_file import Cell, MatrixFile, cells_of
from experiments.tasks import HERE, EvaluationSpec, Task, read_tasks, read_yaml
from model import ModelConfig
from pretrain.config import RunConfig
from pretrain.run_config import load_run_config

BASE = HERE / "base.yaml"


@dataclass(frozen=True)
class PlannedCell:
    """A cell and all that decides its training and evaluation, except folders."""

    cell: Cell
    task: Task
    model: ModelConfig
    method: str | None  # of distill/methods.py
    max_steps: int
    tokens_per_step: int
    overrides: tuple[str, ...]
    data: tuple[str, ...]  # overrides of the recipe

    @property
    def data_name(self) -> str:
        """Name of its data folder; cells with the same data share it."""
        return f"{self.cell.task}-{self.task.examples}" if self.task.examples else self.cell.task


@dataclass(frozen=True)
class Matrix:
    path: Path
    file: MatrixFile
    plans: list[PlannedCell]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def is_sweep(self) -> bool:
        return isinstance(self.file.learning_rates, list)


def read_matrix(path: Path) -> Matrix:
    """Plans all cells and compares pairs.

    Raises:
        ValueError, FileNotFoundError: one line; an unknown name, a group without a learning rate, an
            impossible model, or a pair that is not equal.
    """
    file = from_plain(MatrixFile, read_yaml(path), f"matrix {path}: ")
    tasks, sizes = read_tasks()
    planner = Planner(file, tasks, sizes)
    plans = [planner.plan(cell) for cell in cells_of(path, file, tasks, sizes)]
    _check_pairs(path, plans)
    return Matrix(path, file, plans)


class Planner:
    """Plans cells; computes once what they share."""

    def __init__(self, file: MatrixFile, tasks: Mapping[str, Task], sizes: Mapping[str, list[str]]) -> None:
        self.file, self.sizes = file, sizes
        self.tasks = {name: _with_evaluation(task, file.evaluation) for name, task in tasks.items()}
        self.models: dict[tuple[str, str, str, tuple[str, Any] | None], tuple[Model, ModelConfig]] = {}
        self.configs: dict[tuple[str, str], RunConfig] = {}

    def task(self, cell: Cell) -> Task:
        """The cell's task, with the changes of the matrix and of the cell."""
        task = self.tasks[cell.task]
        if self.file.examples is not None and task.examples:
            task = replace(task, examples=self.file.examples)
        key, value = cell.vary or ("", 0)
        if key == "steps":
            task = replace(task, steps=int(value))
        if key == "examples":
            task = replace(task, examples=int(value))
        return task

    def plan(self, cell: Cell) -> PlannedCell:
        """Raises ValueError for an impossible model."""
        task, group = self.task(cell), GROUPS[cell.group]
        config = self.config(cell)
        changes, model = self.model(cell)
        steps = self.max_steps(cell)
        overrides = [
            *self.base_overrides(cell),
            *(f"model.{key}={_text(value)}" for key, value in _flat(changes)),
            *_method_override(group.method),
            *_varied(cell),
            f"optimizer.lr={cell.learning_rate:g}",
            f"optimizer.min_lr={cell.learning_rate / 10:g}",
            f"optimizer.warmup_steps={min(config.optimizer.warmup_steps, max(1, steps // 10))}",
            *(f"{name}={steps}" for name in ("max_steps", "eval_every")),
            f"save_every={max(1, steps // 4)}",  # at most this much is lost to a kill
            "keep_last=1",
            f"seed={cell.seed}",
        ]
        data = [*task.data, *([f"sources.0.num_samples={task.examples}"] if task.examples else [])]
        return PlannedCell(
            cell, task, model, group.method, steps, config.tokens_per_step, tuple(overrides), tuple(data)
        )

    def base_overrides(self, cell: Cell) -> list[str]:
        """Overrides of base.yaml for all groups; later ones win: task, size, matrix."""
        task = self.tasks[cell.task]
        return [
            f"data.sequence_length={task.sequence_length}",
            f"model.vocab_size={task.vocab_size}",
            *task.training,
            *self.sizes[cell.size],
            *self.file.training,
        ]

    def config(self, cell: Cell) -> RunConfig:
        """The run config that all groups of a task and size share."""
        key = cell.task, cell.size
        if key not in self.configs:
            self.configs[key] = load_run_config(
                str(BASE), [*self.base_overrides(cell), "data.path=of-the-cell"]
            )
        return self.configs[key]

    def model(self, cell: Cell) -> tuple[Model, ModelConfig]:
        """The keys that the group changes, and the whole config."""
        key = cell.task, cell.size, cell.group, cell.vary
        if key not in self.models:
            config, task = self.config(cell), self.task(cell)
            shape = Shape(config.model, task.layers, task.steps, task.sequence_length)
            try:
                changes = GROUPS[cell.group].build(shape)
                whole = ModelConfig.from_dict(_with_varied(merged(config.model, changes), cell))
            except ValueError as error:
                raise ValueError(f"cell {cell.name}: {error}") from None
            self.models[key] = changes, whole
        return self.models[key]

    def max_steps(self, cell: Cell) -> int:
        """Optimizer steps of the cell's budget, at least 1. Raises DataError for an unknown group in it."""
        like = cell.budget.training_flops_of
        if like is None:
            return cell.budget.steps
        if like not in GROUPS:
            raise DataError(f"training_flops_of: unknown group {like!r}; {nearest(like, list(GROUPS))}")
        length = self.config(cell).data.sequence_length
        wanted = measured(
            "training_flops", self.model(replace(cell, group=like))[1], length, cell.budget.steps
        )
        return max(1, round(wanted / measured("training_flops", self.model(cell)[1], length, 1)))


def _method_override(method: str | None) -> list[str]:
    return [] if method is None else [f"model.distillation.method={method}"]


def _varied(cell: Cell) -> list[str]:
    if cell.vary is None or cell.vary[0] in ("steps", "examples"):
        return []
    return [f"{cell.vary[0]}={_text(cell.vary[1])}"]


def _with_varied(model: Model, cell: Cell) -> Model:
    """A copy of the model's keys with the cell's variation applied."""
    key, value = cell.vary or ("", None)
    if not key.startswith("model."):
        return model
    whole = copy.deepcopy(model)
    *sections, last = key.split(".")[1:]
    inner = whole
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last] = value
    return whole


def _with_evaluation(task: Task, changes: Mapping[str, Any]) -> Task:
    values = {**vars(task.evaluation), **changes}
    return replace(task, evaluation=from_plain(EvaluationSpec, values, "evaluation of the matrix: "))


def _flat(values: Model, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _check_pairs(path: Path, plans: Sequence[PlannedCell]) -> None:
    """Raises ValueError for the first of PAIRS whose two sides are in the matrix but are not equal."""
    compared: dict[tuple[str, str, str, Any], dict[str, PlannedCell]] = {}
    for plan in plans:
        cell = plan.cell
        compared.setdefault((cell.task, cell.size, cell.budget.name, cell.vary), {})[cell.group] = plan
    for (task, size, budget, _), groups in compared.items():
        for pair in PAIRS:
            sides = [groups[name] for name in (pair.a, pair.b) if name in groups]
            if len(sides) < 2 or (pair.equal == "training_flops") != ("flops-of" in budget):
                continue
            values = [
                measured(pair.equal, p.model, p.task.sequence_length, p.max_steps * p.tokens_per_step)
                for p in sides
            ]
            problem = unequal(pair, *values)
            if problem is not None:
                raise ValueError(f"matrix {path}, {task}, size {size}, budget {budget}: {problem}")
