"""Text -> tokenizer, shards, manifest.

    python data_pipeline/build.py --recipe RECIPE.yaml --out DIR [--workers N] [a.b=c ...]

The same recipe and input files give the same bytes, whatever the workers. A killed build
resumes when started again: units of text and shards are whole or absent, and the manifest is written last.

On several machines that share DIR, run the same command in four turns (slurm/build.sbatch does it): every
task reads its share of the input files, one process plans, every task writes its share of the shards, and one
process without further options finishes, including what a task may have left.

    build.py ... --task I --of N;  build.py ... --plan_only;  build.py ... --task I --of N;  build.py ...
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import user_errors
from common.files import write_file
from data_pipeline.cleaning.cleaner import Cleaner
from data_pipeline.cleaning.decontaminate import EVALUATION_FILES
from data_pipeline.errors import DataError
from data_pipeline.loading.sample_order import mixture_table
from data_pipeline.recipe import Recipe, load_recipe, source_options
from data_pipeline.shards.format import FORMAT, token_dtype
from data_pipeline.shards.manifest import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Manifest,
    Shard,
    Source,
    Split,
    open_manifest,
    write_manifest,
)
from data_pipeline.shards.writer import write_shard
from data_pipeline.sources.registry import read_unit, unit_files
from data_pipeline.staging.build_plan import (
    PLAN,
    BuildPlan,
    PlannedShard,
    make_plan,
    order_file,
    tokenizer_model,
)
from data_pipeline.staging.units import Units, write_unit
from data_pipeline.tokenization.encode import encoder
from data_pipeline.tokenization.tokenizer import Tokenizer

WORK = "work"  # folder of what only the build needs
OWN_FILES = re.compile(
    r"(tokenizer\.model|cleaning\.(json|txt)|[a-z0-9_]+-[a-z]+-\d{5}\.(tar|idx))(\.tmp)?|manifest\.json\.tmp"
)


@dataclass(frozen=True)
class Build:
    """One build: its recipe, its folders and its input files."""

    recipe: Recipe
    out: Path
    root: Path  # folder of the data sets
    files: dict[str, list[Path | None]]  # of each source, one per unit; None: a generator's

    @property
    def work(self) -> Path:
        return self.out / WORK

    def all_units(self) -> list[tuple[str, int]]:
        """(source, number) of every unit."""
        return [(name, n) for name, files in self.files.items() for n in range(len(files))]

    def unit(self, source: str, number: int) -> Path:
        return self.work / f"{source}-{number:05d}"

    def units(self, source: str) -> Units:
        return Units([self.unit(name, number) for name, number in self.all_units() if name == source])

    def record(self, shard: PlannedShard) -> Path:
        """Holds a written shard's row of the manifest until all shards are written."""
        return self.work / f"{shard.stem}.json"


def build(
    recipe: Recipe,
    root: Path,
    out: Path,
    workers: int = 1,
    cache: Path | None = None,
    task: tuple[int, int] | None = None,
    plan_only: bool = False,
) -> Manifest | None:
    """Build `recipe` from the data folder `root` into `out` and return its manifest.

    A complete build of the same recipe and data in `out` is returned as it is; an interrupted one resumes.

    Args:
        workers: processes.
        cache: folder of files from URLs; default: `root`/cache.
        task: (number, of): do this share of reading or, once there is a plan, of writing, and return None.
        plan_only: read what is unread, plan and return None.

    Raises:
        DataError: `out` holds anything else, input is missing, a source has no documents, a labelled source
            has a character without a piece of its own or a masked prompt.
    """
    mixture_table(_weights(recipe))  # finds a weight too small to be drawn before hours of work
    files = {
        source["name"]: unit_files(source["kind"], source_options(source), root, cache or root / "cache")
        for source in recipe.sources
    }
    this = Build(recipe, out, root, files)
    if (out / MANIFEST).is_file():
        return _finished(this)
    _claim(this, alone=task is None)
    planned = (this.work / PLAN).is_file()
    number, of = task or (0, 1)
    if not planned:
        units = [unit for unit in this.all_units()[number::of] if not this.unit(*unit).is_dir()]
        _in_processes(_read, this, units, workers, "read", " files")
    if task is None and not planned:
        _plan(this)
    if (task and not planned) or plan_only:
        return None
    shards = [s for s in BuildPlan.load(this.work).shards[number::of] if not this.record(s).is_file()]
    _in_processes(_write, this, shards, workers, "write", " shards")
    return None if task else _merge(this)


def _weights(recipe: Recipe) -> dict[str, float]:
    return {source["name"]: float(source["weight"]) for source in recipe.sources}


def _finished(build: Build) -> Manifest:
    manifest = open_manifest(build.out)
    bar = tqdm(build.all_units(), desc="compare input", unit=" files", disable=None)
    hashes: dict[str, list[str | None]] = {name: [] for name in build.files}
    for name, number in bar:
        hashes[name].append(_sha256(build.files[name][number]))
    if manifest.build_hash != _build_hash(build, hashes):
        raise DataError(
            f"{build.out} holds a build of another recipe or data: choose another --out or delete it"
        )
    print(f"{build.out} already holds this build: nothing to do")
    return manifest


def _build_hash(build: Build, inputs: dict[str, list[str | None]]) -> str:
    """Hash of everything the bytes of a build depend on; `inputs`: of each source, `_sha256` of its units."""
    steps = {step for source in build.recipe.sources for step in source.get("cleaning", ())}
    held_out = [build.root / file for file in EVALUATION_FILES] if "decontaminate" in steps else []
    identity = {
        "format": FORMAT,
        "recipe": build.recipe.as_dict(),
        "inputs": inputs,
        "evaluation": [_sha256(file) for file in held_out],
    }
    if build.recipe.tokenizer.file is not None:
        identity["tokenizer"] = _sha256(Path(build.recipe.tokenizer.file))
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path | None) -> str | None:
    """Digest of a unit's file; None for a generator, which the recipe describes completely."""
    if path is None:
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _claim(build: Build, alone: bool) -> None:
    """Makes `out` this build's: empty, or holding a part of it.

    Deletes what another recipe left unfinished, unless tasks share the folder; never touches files that do
    not belong to a build.
    """
    build.out.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in build.out.iterdir())
    foreign = [name for name in names if name != WORK and not OWN_FILES.fullmatch(name)]
    if foreign:
        raise DataError(
            f"{build.out} holds {foreign[0]!r} and no finished build: choose another --out or empty it"
        )
    stats = {str(file): file.stat() for files in build.files.values() for file in files if file}
    inputs = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    identity = json.dumps({"format": FORMAT, "recipe": build.recipe.as_dict(), "inputs": inputs})
    # A folder, because several tasks may create it at once.
    claim = build.work / hashlib.sha256(identity.encode()).hexdigest()
    if claim.is_dir():
        return
    if names and alone:
        shutil.rmtree(build.work, ignore_errors=True)
        for path in build.out.iterdir():
            path.unlink()
    elif names and (names != [WORK] or any(build.work.iterdir())):
        raise DataError(f"{build.out} holds a part of another build: choose another --out or empty it")
    claim.mkdir(parents=True, exist_ok=True)


def _in_processes(
    function: Callable[[Build, Any], None],
    build: Build,
    jobs: Sequence[Any],
    workers: int,
    what: str,
    unit: str,
) -> None:
    """function(build, job) for every job, in this process or in worker processes."""
    if not jobs:
        return
    with tqdm(total=len(jobs), desc=what, unit=unit, disable=None) as bar:
        if min(workers, len(jobs)) == 1:
            for job in jobs:
                function(build, job)
                bar.update()
            return
        # Spawned: a fork would copy the locks of this process's threads.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(jobs)), context) as pool:
            running = [pool.submit(function, build, job) for job in jobs]
            try:
                for done in as_completed(running):
                    done.result()
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _read(build: Build, unit: tuple[str, int]) -> None:
    """Reads one input file."""
    name, number = unit
    recipe, files = build.recipe, build.files[name]
    source = next(source for source in recipe.sources if source["name"] == name)
    documents = read_unit(source["kind"], source_options(source), files, number)
    bar = tqdm(documents, desc=f"read {name} {number}", unit=" documents", disable=None, leave=False)
    about = {"source": name, "sha256": _sha256(files[number])}
    cleaner = Cleaner(source.get("cleaning", ()), recipe.cleaning, build.root)
    write_unit(build.unit(name, number), bar, about, str(recipe.seed), recipe.validation_fraction, cleaner)


def _plan(build: Build) -> None:
    units = {name: build.units(name) for name in build.files}
    hashes = {name: [unit.about["sha256"] for unit in source.units] for name, source in units.items()}
    plan, report = make_plan(build.recipe, units, _build_hash(build, hashes), build.work)
    if any(source.get("cleaning") for source in build.recipe.sources):
        report.write(build.out)
    write_file(build.out / TOKENIZER, tokenizer_model(build.recipe, units, build.work))
    plan.save(build.work)  # last: its presence says that tokenizer and orders are complete


def _write(build: Build, planned: PlannedShard) -> None:
    """Encodes and writes one shard."""
    plan, tokenizer = BuildPlan.load(build.work), Tokenizer(build.out / TOKENIZER)
    source = next(source for source in build.recipe.sources if source["name"] == planned.source)
    encode = encoder(source, plan.labelled[planned.source], tokenizer)
    units = build.units(planned.source)
    order = np.load(order_file(build.work, planned.source, planned.split), mmap_mode="r")
    numbers = order[planned.first : planned.last]
    bar = tqdm(numbers, desc=f"encode {planned.stem}", unit=" documents", disable=None, leave=False)
    documents = [encode(units[int(number)]) for number in bar]
    shard = write_shard(build.out, planned.stem, documents, _dtype(plan, tokenizer))
    text_bytes = int(units.column("bytes")[numbers].sum())
    write_file(build.record(planned), json.dumps({"text_bytes": text_bytes, "shard": asdict(shard)}).encode())


def _dtype(plan: BuildPlan, tokenizer: Tokenizer) -> str:
    return token_dtype(tokenizer.vocab_size + any(plan.labelled.values()))  # one more value: no label


def _merge(build: Build) -> Manifest:
    """Writes the manifest of the written shards; afterwards the folder holds the build and nothing else."""
    plan, tokenizer = BuildPlan.load(build.work), Tokenizer(build.out / TOKENIZER)
    records = {shard: json.loads(build.record(shard).read_text()) for shard in plan.shards}
    weights, sources = _weights(build.recipe), {}
    for name in build.files:
        splits = {}
        for split in SPLITS:
            own = [r for shard, r in records.items() if (shard.source, shard.split) == (name, split)]
            shards = tuple(Shard(**record["shard"]) for record in own)
            splits[split] = Split(
                documents=sum(shard.documents for shard in shards),
                tokens=sum(shard.tokens for shard in shards),
                text_bytes=sum(record["text_bytes"] for record in own),
                shards=shards,
            )
        sources[name] = Source(weights[name], splits, plan.labelled[name])
    manifest = Manifest(
        path=build.out,
        sha256="",
        build_hash=plan.build_hash,
        recipe=build.recipe.as_dict(),
        tokenizer_bytes=(build.out / TOKENIZER).stat().st_size,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        dtype=_dtype(plan, tokenizer),
        sources=sources,
    )
    write_manifest(manifest)
    shutil.rmtree(build.work)
    return open_manifest(build.out)


def summary(manifest: Manifest) -> str:
    """A table of what a build holds."""
    lines = [f"{'source':20} {'split':10} {'weight':>7} {'documents':>10} {'tokens':>12} {'bytes/token':>11}"]
    for name, source in manifest.sources.items():
        for split, value in source.splits.items():
            ratio = f"{value.text_bytes / value.tokens:.2f}" if value.tokens else "-"
            counts = f"{value.documents:10d} {value.tokens:12d} {ratio:>11}"
            lines.append(f"{name:20} {split:10} {source.weight:7g} {counts}")
    lines.append(f"vocabulary: {manifest.vocab_size} pieces")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    data = Path(os.environ.get("DATA_ROOT", "data"))
    parser = argparse.ArgumentParser(description="Build tokenizer, shards and manifest from a recipe.")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="data folder to write")
    parser.add_argument(
        "--data", type=Path, default=data, help="folder of the data sets (default: DATA_ROOT, else data)"
    )
    parser.add_argument("--cache", type=Path, help="folder of files from URLs (default: DATA/cache)")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--task", type=int, help="number of this task, from 0: do its share only; with --of")
    parser.add_argument("--of", type=int, help="number of tasks that share DIR")
    parser.add_argument("--plan_only", action="store_true", help="read what is unread, plan, and stop")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. tokenizer.vocab_size=512")
    arguments = parser.parse_intermixed_args(argv)
    with user_errors(DataError, OSError):
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        task = _task(arguments)
        manifest = build(
            recipe,
            arguments.data,
            arguments.out,
            arguments.workers,
            arguments.cache,
            task,
            arguments.plan_only,
        )
        if manifest is not None:
            print(summary(manifest))


def _task(arguments: argparse.Namespace) -> tuple[int, int] | None:
    number, of = arguments.task, arguments.of
    if arguments.workers < 1:
        raise DataError(f"--workers {arguments.workers} is below 1: give 1 or more")
    if number is None and of is None:
        return None
    if number is None or of is None or not 0 <= number < of:
        raise DataError(f"--task {number} --of {of}: give both, the task from 0 to one below the number")
    if arguments.plan_only:
        raise DataError("--plan_only is for one process: drop --task and --of")
    return number, of


if __name__ == "__main__":
    main()
