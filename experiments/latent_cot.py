"""A matrix of methods of latent chain of thought: a teacher per seed, then students from its export.

    latent_cot: causal_loop_v2        # the task, of experiments/latent_cot.yaml
    examples: 130000                  # generated for training; omit for tasks read from files
    teacher_steps: 1800
    student_steps: 1200
    num_questions: 600
    training: [model.hidden_size=32]  # overrides of every training (default: none)
    parts:                            # the union of their cells; the seeds determine the teachers
      - {methods: [cot, kava, lotus], seeds: [0, 1, 2]}

distill/main.py trains every cell: a teacher from scratch, with the method cot, which writes its chain of
thought out; a student from the export of its seed's teacher. eval/thoughts.py evaluates each, with its
controls at test time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.nearest import nearest
from common.schema import from_plain
from data_pipeline.errors import DataError
from distill.methods import METHODS
from experiments.jobs import ROOT, Data, Job
from experiments.settings import DS_CONFIG
from experiments.tasks import HERE, at_least, read_yaml
from pretrain.run_config import load_run_config

TASKS = HERE / "latent_cot.yaml"
KIND = "latent_cot"  # the key that tells such a matrix from one of groups
TEACHER = "teacher"
ITERATIONS = {"jacobi": "0,1,2,3,6,12", "lotus": "1,2,3,6,12"}
KV_BUFFER = "8"


@dataclass(frozen=True, kw_only=True)
class LatentCotTask:
    """A problem set of eval/thoughts.py, with a recipe for its training data and a config for its runs."""

    about: str
    recipe: str  # data_pipeline/recipes/NAME.yaml
    config: str
    kv_budgets: list[int]  # of R-KV's cache, in tokens of an answer
    task_options: str | None = None  # of generated questions; None: the questions are files
    methods: dict[str, list[str]] = field(default_factory=dict)  # method -> overrides of `model`


@dataclass(frozen=True, kw_only=True)
class LatentCotPart:
    methods: list[str]  # of distill/methods.py
    seeds: list[int]


@dataclass(frozen=True, kw_only=True)
class LatentCotFile:
    latent_cot: str
    teacher_steps: int
    student_steps: int
    num_questions: int
    parts: list[LatentCotPart]
    examples: int | None = None
    training: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LatentCotCell:
    """One run."""

    method: str  # of METHODS, or TEACHER
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.seed}"

    @property
    def teacher(self) -> str | None:
        """The cell that this one starts from."""
        return None if self.method == TEACHER else f"{TEACHER}-{self.seed}"


@dataclass(frozen=True)
class LatentCotMatrix:
    path: Path
    file: LatentCotFile
    task: LatentCotTask
    cells: list[LatentCotCell]  # in starting order: teachers, then their students

    @property
    def name(self) -> str:
        return self.path.stem

    def job(self, cell: LatentCotCell) -> Job:
        """All that is run for a cell. Results share one folder, where eval/report.py looks for them."""
        file, task = self.file, self.task
        data = file.latent_cot if file.examples is None else f"{file.latent_cot}-{file.examples}"
        examples = () if file.examples is None else (f"sources.0.num_samples={file.examples}",)
        return Job(
            name=cell.name,
            max_steps=self.steps(cell),
            script="distill/main.py",
            training=tuple(self.training(cell)),
            data=Data(data, task.recipe, examples),
            evaluations=self.evaluations(cell.method),
            results="eval",
            teacher=cell.teacher,
        )

    def steps(self, cell: LatentCotCell) -> int:
        return self.file.teacher_steps if cell.method == TEACHER else self.file.student_steps

    def training(self, cell: LatentCotCell) -> list[str]:
        """Arguments of distill/main.py, except --init, data.path and output_dir."""
        return ["--ds_config", DS_CONFIG, "--config", self.task.config, *self.overrides(cell)]

    def overrides(self, cell: LatentCotCell) -> list[str]:
        """Those among the arguments of distill/main.py."""
        is_teacher, steps = cell.method == TEACHER, self.steps(cell)
        method = "cot" if is_teacher else cell.method
        return [
            *([] if is_teacher else ["optimizer.lr=1e-3"]),
            *(f"max_steps={steps}", f"save_every={steps}", f"seed={cell.seed}"),
            f"model.distillation.method={method}",
            *(f"model.{override}" for override in self.task.methods.get(method, [])),
            *self.file.training,
        ]

    def evaluations(self, method: str) -> dict[str, list[str]]:
        """By name: eval/thoughts.py and its flags, except checkpoint and output."""
        count, options = str(self.file.num_questions), self.task.task_options
        questions = ["--task", self.file.latent_cot, *(["--limit", count] if options is None else [])]
        if options is not None:
            questions += ["--task_options", options, "--num_samples", count]
        tests = _tests(method, ",".join(map(str, self.task.kv_budgets)))
        return {
            name: ["eval/thoughts.py", *questions, *flags, "--batch_size", "64"]
            for name, flags in tests.items()
        }


def _tests(method: str, kv_budgets: str) -> dict[str, list[str]]:
    """By name: flags of the method as trained, of other iteration counts or cache budgets, of controls."""
    own = {"own": ["--mode", "cot"]}
    if method == TEACHER:
        return own
    if method == "cot":
        return own | {"budget": ["--mode", "cot", "--kv_budget", kv_budgets, "--kv_buffer", KV_BUFFER]}
    if method == "no_cot":
        return {"own": ["--mode", "none"]}
    feedback = METHODS[method].latent_cot["feedback"]
    own = {"own": ["--num_iterations", ITERATIONS[feedback]] if feedback in ITERATIONS else []}
    return own | {name: ["--replace", name] for name in ("shuffled", "zeroed")}


def is_latent_cot(values: Mapping[str, Any]) -> bool:
    """Whether a matrix file compares methods of latent chain of thought rather than groups."""
    return KIND in values


def read_latent_cot(path: Path) -> LatentCotMatrix:
    """Plans all cells.

    Raises:
        ValueError: one line; an unknown task or method, a number below 1, or an empty matrix.
    """
    where = f"matrix {path}"
    file = from_plain(LatentCotFile, read_yaml(path), f"{where}: ")
    tasks = {
        name: from_plain(LatentCotTask, values, f"{TASKS.name}, task {name}: ")
        for name, values in read_yaml(TASKS).items()
    }
    if file.latent_cot not in tasks:
        raise DataError(f"{where}: unknown task {file.latent_cot!r}; {nearest(file.latent_cot, tasks)}")
    for key in ("teacher_steps", "student_steps", "num_questions", "examples"):
        at_least(1, f"{where}: ", **{key: getattr(file, key)})
    matrix = LatentCotMatrix(path, file, tasks[file.latent_cot], _cells(where, file.parts))
    _check_training(matrix)
    return matrix


def _check_training(matrix: LatentCotMatrix) -> None:
    """Raises ValueError for an override that distill/main.py would refuse after the data is built."""
    one_of_each = {cell.method: cell for cell in matrix.cells}
    for cell in one_of_each.values():
        try:
            load_run_config(
                str(ROOT / matrix.task.config), [*matrix.overrides(cell), "data.path=of-the-cell"]
            )
        except ValueError as error:
            raise ValueError(f"matrix {matrix.path}, cell {cell.name}: {error}") from None


def _cells(where: str, parts: list[LatentCotPart]) -> list[LatentCotCell]:
    """Each once: the teachers that have students, then the students, part by part and seed by seed."""
    for method in (method for part in parts for method in part.methods):
        if method not in METHODS:
            raise DataError(f"{where}: unknown method {method!r}; {nearest(method, METHODS)}")
    at_least(0, f"{where}: ", seeds=[seed for part in parts for seed in part.seeds])
    students = [
        LatentCotCell(method, seed) for part in parts for seed in part.seeds for method in part.methods
    ]
    if not students:
        raise DataError(f"{where}: parts name no cells: give one or more methods and seeds")
    teachers = [LatentCotCell(TEACHER, student.seed) for student in students]
    return list(dict.fromkeys((*teachers, *students)))
