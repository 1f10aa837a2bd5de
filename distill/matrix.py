"""Every method and control of latent chain of thought, from one teacher a seed, on one task.

    python distill/matrix.py --out DIR [--task causal_loop_v2|gsm8k] [--quick] [--jobs 2]
        [--methods kava,lotus] [--seeds 0,1,2] [a.b=c ...]

Builds the data, trains a teacher for each seed (cot from scratch) and from its export every method by
distill/main.py, one rank and one thread each; evaluates each with eval/thoughts.py, its test-time controls
included; writes results.json, table.md and pictures. Started again, it goes on where it was; a cell that
fails is reported with its log, and the rest is not lost. `python eval/report.py DIR/*-[0-9]` makes a page.

Measured for a whole step of 32 documents, in CPU-seconds, with another cell on the other core: teacher, cot
0.19, no_cot 0.07, pause 0.11, coconut 0.14, codi 0.34, pccot 0.41, no_distillation 0.42, lotus 0.43, kava
0.49. All of it is 187 CPU-minutes, 95 minutes with --jobs 2 on two quiet cores. --quick is 18 CPU-minutes and
took 15 with --jobs 2 and tests on the same cores; --task gsm8k is 124 and took 88, likewise.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import user_errors
from common.files import write_json
from distill.matrix_tasks import REPEATED, TASKS, Size, Task
from distill.methods import METHODS
from eval.reports.runs import read_runs
from eval.reports.thoughts import Arm, figures, read_arms, tables
from eval.scoring.results import format_table
from experiments.jobs import SETTINGS, call, changed_setting, run_all, train

TEACHER = "teacher"
ITERATIONS = {"jacobi": "0,1,2,3,6,12", "lotus": "1,2,3,6,12"}
BATCH = ("--batch_size", "64")
NUMBERS = ("num_documents", "teacher_steps", "student_steps", "num_questions")


@dataclass(frozen=True)
class Cell:
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


def plan(methods: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """The cells in the order of their start: teachers, then their students, seed by seed.

    Raises:
        ValueError: a method is unknown, or there is none, or a seed stands twice.
    """
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"--methods: {method!r} is unknown; choose from {', '.join(METHODS)}")
    if not methods or not seeds or len(set(seeds)) < len(seeds) or len(set(methods)) < len(methods):
        raise ValueError(
            f"--methods {','.join(methods)} --seeds {','.join(map(str, seeds))}: give one or more of each, "
            "none of them twice"
        )
    students = [
        Cell(method, seed) for seed in seeds for method in methods if seed == seeds[0] or method in REPEATED
    ]
    used = [seed for seed in seeds if any(cell.seed == seed for cell in students)]
    return [*(Cell(TEACHER, seed) for seed in used), *students]


def training(cell: Cell, task: Task, size: Size, out: Path, overrides: Sequence[str]) -> list[str]:
    """What distill/main.py is told, but for output_dir."""
    method = "cot" if cell.teacher is None else cell.method
    steps = size.teacher_steps if cell.teacher is None else size.student_steps
    given = ["--ds_config", "ds_configs/zero1.json", "--config", task.config]
    if cell.teacher is not None:
        given += ["--init", str((out / cell.teacher / "export").absolute()), "optimizer.lr=1e-3"]
    given += [f"max_steps={steps}", f"save_every={steps}", f"seed={cell.seed}"]
    given += [f"data.path={(out / 'data').absolute()}", f"model.distillation.method={method}"]
    return [*given, *(f"model.{override}" for override in task.methods.get(method, [])), *overrides]


def evaluations(method: str, task: Task) -> dict[str, list[str]]:
    """By name, what eval/thoughts.py is told of each call beyond the task."""
    if method in (TEACHER, "cot"):
        own = {"own": ["--mode", "cot"]}
        budgets = {"budget": ["--mode", "cot", "--kv_budget", task.budgets, "--kv_buffer", "8"]}
        return own if method == TEACHER else own | budgets
    if method == "no_cot":
        return {"own": ["--mode", "none"]}
    feedback = METHODS[method].latent_cot["feedback"]
    own = {"own": ["--num_iterations", ITERATIONS[feedback]] if feedback in ITERATIONS else []}
    return own | {name: ["--replace", name] for name in ("shuffled", "zeroed")}


def evaluate(cell: Cell, name: str, size: Size, run: Path) -> None:
    """Every evaluation that was not made with the same flags.

    Raises:
        ValueError: one failed; the line names its log.
    """
    for kind, flags in evaluations(cell.method, TASKS[name]).items():
        given = [*TASKS[name].test_flags(name, size), *flags]
        done = run / "eval" / f"{kind}.done"
        if done.is_file() and done.read_text() == " ".join(given):
            continue
        where = ("--checkpoint", run.absolute() / "export", "--output_path", run.absolute() / "eval")
        call(run / "eval" / f"{kind}.log", sys.executable, "eval/thoughts.py", *where, *given, *BATCH)
        done.write_text(" ".join(given))


def keep_settings(out: Path, settings: dict[str, Any]) -> None:
    """Notes what all runs of a folder share.

    Raises:
        ValueError: those that are there were made with other settings.
    """
    changed = changed_setting(out / SETTINGS, settings)
    if changed is not None:
        key, before, now = changed
        raise ValueError(
            f"--out {out} holds runs with {key}={before}, but {key}={now} is asked for; give another folder"
        )
    write_json(out / SETTINGS, settings)


def build_data(out: Path, task: Task, size: Size) -> None:
    """The training data; what is there already stays."""
    call(
        out / "build.log",
        *(sys.executable, "data_pipeline/build.py", "--out", (out / "data").absolute()),
        *("--recipe", task.recipe, *task.build_flags(size)),
    )


def run_matrix(name: str, size: Size, out: Path, jobs: int, overrides: Sequence[str]) -> dict[str, str]:
    """Data, runs, evaluations, and what is written of them.

    Args:
        name: of TASKS.

    Returns:
        The cells that failed, and why.

    Raises:
        ValueError: the settings do not fit, the data cannot be built, or no cell was evaluated.
    """
    cells, task = plan(size.methods, size.seeds), TASKS[name]
    shared = ("num_documents", "teacher_steps", "student_steps")
    settings = {"task": name, **{key: getattr(size, key) for key in shared}, "overrides": list(overrides)}
    keep_settings(out, settings)
    build_data(out, task, size)

    def job(cell: Cell) -> None:
        train(out / cell.name, "distill/main.py", *training(cell, task, size, out, overrides))
        evaluate(cell, name, size, out / cell.name)

    after = {cell.name: cell.teacher for cell in cells if cell.teacher is not None}
    failed = run_all({cell.name: partial(job, cell) for cell in cells}, jobs, after)
    write_results(out, [out / cell.name for cell in cells], {**settings, "jobs": jobs}, failed)
    return failed


def write_results(
    out: Path, folders: Sequence[Path], settings: dict[str, Any], failed: dict[str, str]
) -> None:
    """results.json, table.md and pictures of what these run folders hold, those of failed cells included.

    Raises:
        ValueError: none holds an evaluation.
    """
    folders = [folder for folder in folders if any(folder.glob("eval/results_*.json"))]
    if not folders:
        raise ValueError(f"no cell was evaluated: {'; '.join(f'{n}: {p}' for n, p in failed.items())}")
    task = settings["task"]
    arms = read_arms(read_runs(folders)[0]).get(task, [])
    report = {"settings": settings, "failed": failed, "arms": {arm.name: arm_record(arm) for arm in arms}}
    write_json(out / "results.json", report)
    text = (
        f"{TASKS[task].about}; "
        f"teachers {settings['teacher_steps']:,} steps, then every method {settings['student_steps']:,}. "
        "± one standard error: of one seed over its questions, of several over the seeds. Milliseconds: "
        f"one thread, with up to {settings['jobs'] - 1} other cells running.\n"
    )
    for table in tables(task, arms):
        text += f"\n## {table.title}\n\n{format_table(table.header, table.rows)}\n"
    text += "".join(f"\nFailed: {name}: {problem}\n" for name, problem in failed.items())
    (out / "table.md").write_text(text)
    for name, figure in figures(task, arms).items():
        figure.savefig(out / f"{name}.png", dpi=110)
    print(text)
    print(f"written: {out / 'results.json'}, table.md and pictures")


def arm_record(arm: Arm) -> dict[str, Any]:
    """One method as JSON: by way of answering, its seeds."""
    ways = [{**way._asdict(), "runs": [asdict(one) for one in found]} for way, found in arm.ways.items()]
    return {"trained": arm.trained, "own": arm.own._asdict(), "ways": ways}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare all methods of latent chain of thought.")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of data, runs and results")
    add("--task", choices=TASKS, default="causal_loop_v2", help="default: causal_loop_v2")
    add("--quick", action="store_true", help="a cut of minutes: one seed, fewer methods, steps and samples")
    add("--jobs", type=int, default=1, help="cells at once, one thread each (default: 1)")
    add("--methods", help=f"comma-separated, of {', '.join(METHODS)}")
    add("--seeds", metavar="0,1,..", help=f"of {', '.join(REPEATED)}; the others take the first")
    for name in NUMBERS:
        add(f"--{name}", type=int, metavar="N", help="default: the task's, see distill/matrix_tasks.py")
    add("overrides", nargs="*", metavar="a.b=c", help="of all trainings, e.g. model.hidden_size=128")
    return parser.parse_intermixed_args()


def sized(arguments: argparse.Namespace) -> Size:
    """The size asked for. Raises ValueError for a number that is none or below 1."""
    task = TASKS[arguments.task]
    values = asdict(task.quick if arguments.quick else task.full)
    for name in NUMBERS:
        given = getattr(arguments, name)
        if given is not None and given < 1:
            raise ValueError(f"--{name} {given} must be at least 1")
        values[name] = given or values[name]
    if arguments.methods is not None:
        values["methods"] = tuple(arguments.methods.split(","))
    if arguments.seeds is not None:
        if not all(part.isdecimal() for part in arguments.seeds.split(",")):
            raise ValueError(f"--seeds {arguments.seeds} must be whole numbers from 0, as 0,1,2")
        values["seeds"] = tuple(map(int, arguments.seeds.split(",")))
    return Size(**values)


def main() -> None:
    arguments = parse()
    with user_errors(ValueError, OSError):
        if arguments.jobs < 1:
            raise ValueError(f"--jobs {arguments.jobs} must be at least 1")
        failed = run_matrix(
            arguments.task, sized(arguments), arguments.out, arguments.jobs, arguments.overrides
        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
