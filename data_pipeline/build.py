"""Text -> tokenizer, shards, manifest.

    python data_pipeline/build.py --recipe RECIPE.yaml --out DIR [--workers N] [a.b=c ...]

The same recipe and input files give the same bytes, whatever the workers. A killed build
resumes when started again, after comparing everything that the bytes depend on: recipe, input files, test
sets of the decontamination, tokenizer.file, code. Until it is whole, all of it lies in DIR/work.

On several machines that share DIR, run the same command in four turns (slurm/build.sbatch does it): every
task reads its share of the input files, one process plans, every task writes its share of the shards, and one
process without further options finishes, including what a task may have left.

    build.py ... --task I --of N;  build.py ... --plan_only;  build.py ... --task I --of N;  build.py ...
"""

import argparse
import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import user_errors
from common.files import write_file, writing_failed
from common.locks import LOCK_NAME, FolderInUseError
from data_pipeline.cleaning.cleaner import Cleaner
from data_pipeline.errors import DataError
from data_pipeline.loading.sample_order import mixture_table
from data_pipeline.recipe import Recipe, load_recipe, source_options
from data_pipeline.shards.format import token_dtype
from data_pipeline.shards.manifest import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Manifest,
    Shard,
    Source,
    Split,
    check_size,
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
    read_order,
    tokenizer_model,
)
from data_pipeline.staging.claim import (
    REPORTS,
    WORK,
    claim,
    held,
    held_by_task,
    is_own,
    publish,
    remove_work,
)
from data_pipeline.staging.inputs import Build, build_hash, check_inputs, identity_of, sha256_of, stat_of
from data_pipeline.staging.processes import Processes
from data_pipeline.staging.sealed import damaged, read_sealed, write_sealed
from data_pipeline.staging.units import write_unit
from data_pipeline.tokenization.encode import encoder
from data_pipeline.tokenization.tokenizer import Tokenizer

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        DataError: `out` holds anything else, input is missing or changes meanwhile, a source has no
            documents, a labelled source has a character without a piece of its own or a masked prompt.
        FolderInUseError: another process builds into `out`.
        OSError: `out` cannot be written; what it holds is used by the next start.
    """
    mixture_table(_weights(recipe))  # finds a weight too small to be drawn before hours of work
    files = {
        source["name"]: unit_files(source["kind"], source_options(source), root, cache or root / "cache")
        for source in recipe.sources
    }
    this = Build(recipe, out, root, files)
    left = (out / WORK).exists() or (out / LOCK_NAME).exists()  # by a build that was killed at its very end
    if (out / MANIFEST).is_file() and not left:
        return _finished(this)  # also where nothing may be written
    with _disk_full(out), held(out, task) as lock:
        if (out / MANIFEST).is_file():
            manifest = _finished(this)
            if task is None and is_own(this.work):  # killed while it was deleted
                remove_work(this.work)
            return manifest
        claim(out, identity_of(this), may_clear=task is None and not plan_only)
        with held_by_task(this.work, task) as locks:
            return _resume(this, Processes(workers, (lock, *locks)), task, plan_only)


def _resume(
    build: Build, processes: Processes, task: tuple[int, int] | None, plan_only: bool
) -> Manifest | None:
    planned = (build.work / PLAN).is_file()
    number, of = task or (0, 1)
    share = build.all_units()[number::of]
    read = [unit for unit in share if build.unit(*unit).is_dir()]
    check_inputs(build, read, processes)
    if not planned:
        processes.map(_read, build, [unit for unit in share if unit not in read], "read", " files")
    if task is None and not planned:
        check_inputs(build, share, processes)
        _plan(build)
    if (task and not planned) or plan_only:
        return None
    shards = [s for s in BuildPlan.load(build.work).shards[number::of] if not build.record(s).is_file()]
    processes.map(_write, build, shards, "write", " shards")
    return None if task else _merge(build)


@contextmanager
def _disk_full(out: Path) -> Iterator[None]:
    """Says of a full disk what is safe."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        path, safe = Path(error.filename or out), f"what is done is kept in {out / WORK}"
        told = error if error.strerror != os.strerror(error.errno) else writing_failed(error, path)
        fix = "free some space and start the build again"
        raise OSError(error.errno, f"{told.strerror}, and {safe}: {fix}", str(path)) from error


def _weights(recipe: Recipe) -> dict[str, float]:
    return {source["name"]: float(source["weight"]) for source in recipe.sources}


def _finished(build: Build) -> Manifest:
    manifest = open_manifest(build.out)
    bar = tqdm(build.all_units(), desc="compare input", unit=" files", disable=None)
    hashes: dict[str, list[str | None]] = {name: [] for name in build.files}
    for name, number in bar:
        hashes[name].append(sha256_of(build.files[name][number]))
    if manifest.build_hash != build_hash(build, hashes):
        raise DataError(
            f"{build.out} holds a build of another recipe or data: choose another --out or delete it"
        )
    print(f"{build.out} already holds this build: nothing to do")
    return manifest


def _read(build: Build, unit: tuple[str, int]) -> None:
    """Reads one input file."""
    name, number = unit
    recipe, files = build.recipe, build.files[name]
    path = files[number]
    source = next(source for source in recipe.sources if source["name"] == name)
    before = stat_of(path)
    about = {"source": name, "file": str(path), "sha256": sha256_of(path), "stat": before}
    documents = read_unit(source["kind"], source_options(source), files, number)
    bar = tqdm(documents, desc=f"read {name} {number}", unit=" documents", disable=None, leave=False)

    def unchanged() -> Iterator[Any]:
        yield from bar
        if stat_of(path) != before:
            raise DataError(f"{path} changed while it was read: start the build again")

    cleaner = Cleaner(source.get("cleaning", ()), recipe.cleaning, build.root)
    salt = str(recipe.seed)
    write_unit(build.unit(name, number), unchanged(), about, salt, recipe.validation_fraction, cleaner)


def _plan(build: Build) -> None:
    units = {name: build.units(name) for name in build.files}
    hashes = {name: [unit.about["sha256"] for unit in source.units] for name, source in units.items()}
    plan, report = make_plan(build.recipe, units, build_hash(build, hashes), build.work)
    if any(source.get("cleaning") for source in build.recipe.sources):
        report.write(build.work)
    write_file(build.work / TOKENIZER, tokenizer_model(build.recipe, units, plan, build.work))
    _check_unchanged(build)
    written = (build.work / name for name in (TOKENIZER, *REPORTS) if (build.work / name).is_file())
    files = {path.name: str(sha256_of(path)) for path in written}
    replace(plan, files=files).save(build.work)  # last: its presence says that all of it is complete


def _check_unchanged(build: Build) -> None:
    """Raises DataError if what the build depends on is not what it began with."""
    claim(build.out, identity_of(build), may_clear=False)


def _checked(build: Build, plan: BuildPlan, name: str) -> Path:
    """A file that the plan came with, wherever it is by now. Raises DataError for a damaged one."""
    path = build.work / name
    if not path.is_file():
        path = build.out / name  # once it is published
    if not path.is_file() or sha256_of(path) != plan.files[name]:
        raise damaged(path, "its checksum differs" if path.is_file() else "it is missing")
    return path


def _write(build: Build, planned: PlannedShard) -> None:
    """Encodes and writes one shard."""
    plan = BuildPlan.load(build.work)
    tokenizer = Tokenizer(_checked(build, plan, TOKENIZER))
    source = next(source for source in build.recipe.sources if source["name"] == planned.source)
    encode = encoder(source, plan.labelled[planned.source], tokenizer)
    units = build.units(planned.source)
    numbers = read_order(build.work, planned)
    bar = tqdm(numbers, desc=f"encode {planned.stem}", unit=" documents", disable=None, leave=False)
    documents = [encode(units[int(number)]) for number in bar]
    shard = write_shard(build.work, planned.stem, documents, _dtype(plan, tokenizer))
    text_bytes = int(units.column("bytes")[numbers].sum())
    write_sealed(build.record(planned), {"text_bytes": text_bytes, "shard": asdict(shard)})


def _dtype(plan: BuildPlan, tokenizer: Tokenizer) -> str:
    return token_dtype(tokenizer.vocab_size + any(plan.labelled.values()))  # one more value: no label


def _merge(build: Build) -> Manifest:
    """Writes the manifest of the written shards; afterwards the folder holds the build and nothing else."""
    _check_unchanged(build)
    plan = BuildPlan.load(build.work)
    kept = {name: _checked(build, plan, name) for name in plan.files}
    tokenizer = Tokenizer(kept[TOKENIZER])
    records = {shard: read_sealed(build.record(shard)) for shard in plan.shards}
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
        path=build.work,
        sha256="",
        build_hash=plan.build_hash,
        recipe=build.recipe.as_dict(),
        tokenizer_bytes=kept[TOKENIZER].stat().st_size,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        dtype=_dtype(plan, tokenizer),
        sources=sources,
    )
    for shard in manifest.shards():
        for name, size in ((shard.file, shard.bytes), (shard.index_file, shard.index_bytes)):
            path = build.work / name
            check_size(path if path.is_file() else build.out / name, size)
    write_manifest(manifest)
    publish(build.out)
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
    with user_errors(DataError, FolderInUseError, OSError):
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
