"""A build and what its bytes depend on: recipe, input files, test sets, tokenizer, code."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.cleaning.decontaminate import EVALUATION_FILES
from data_pipeline.errors import DataError
from data_pipeline.recipe import Recipe
from data_pipeline.shards.format import FORMAT
from data_pipeline.staging.build_plan import PlannedShard
from data_pipeline.staging.claim import WORK, code_identity
from data_pipeline.staging.processes import Processes
from data_pipeline.staging.units import Units, about_unit
from data_pipeline.tokenization.tokenizer import Tokenizer

# Raise it when equal input gives other bytes than before: tests/data_pipeline/test_build_bytes.py notices.
OUTPUT_VERSION = 1


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


def build_hash(build: Build, inputs: dict[str, list[str | None]]) -> str:
    """Hash of all that the bytes of a build depend on; `inputs`: of each source, `sha256_of` its units."""
    identity = {
        "format": FORMAT,
        "recipe": build.recipe.as_dict(),
        "inputs": inputs,
        "evaluation": list(_test_sets(build).values()),
    }
    if OUTPUT_VERSION > 1:  # builds older than the number keep their hash
        identity["output"] = OUTPUT_VERSION
    if build.recipe.tokenizer.file is not None:
        identity["tokenizer"] = sha256_of(Path(build.recipe.tokenizer.file))
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _test_sets(build: Build) -> dict[str, str | None]:
    """File -> sha256 of what decontamination reads."""
    steps = {step for source in build.recipe.sources for step in source.get("cleaning", ())}
    return {file: sha256_of(build.root / file) for file in EVALUATION_FILES if "decontaminate" in steps}


def identity_of(build: Build) -> dict[str, Any]:
    """What unfinished work depends on, by part, except the contents of the input files: see check_inputs.

    Stricter than the hash of a finished build: the code is compared by its sources, whatever they change.

    Raises:
        DataError: tokenizer.file is not a lossless tokenizer.
    """
    file = build.recipe.tokenizer.file
    identity = {
        "recipe": build.recipe.as_dict(),
        "names of the input files": {
            name: [path.name if path else None for path in paths] for name, paths in build.files.items()
        },
        "test sets": _test_sets(build),
        "tokenizer.file": Tokenizer(file).sha256 if file is not None else None,
        "code": code_identity(),
    }
    compared: dict[str, Any] = json.loads(json.dumps(identity))
    return compared


def check_inputs(build: Build, units: Sequence[tuple[str, int]], processes: Processes) -> None:
    """Raises DataError if the input file of a unit that was read is not the same any more.

    A file with the times, size and inode of before is the same; any other is hashed.
    """
    touched = []
    for name, number in units:
        path = build.files[name][number]
        if path is not None and about_unit(build.unit(name, number))["stat"] != stat_of(path):
            touched.append((name, number))
    processes.map(_check_input, build, touched, "compare input", " files")


def _check_input(build: Build, unit: tuple[str, int]) -> None:
    path = build.files[unit[0]][unit[1]]
    if about_unit(build.unit(*unit))["sha256"] != sha256_of(path):
        raise DataError(
            f"{path} has changed since this build read it: restore it, or delete {build.work} and start the "
            "build again"
        )


def stat_of(path: Path | None) -> list[int] | None:
    """Differs after every change of a file, whatever it does to the times that a user can set."""
    if path is None:
        return None
    stat = path.stat()
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def sha256_of(path: Path | None) -> str | None:
    """Digest of a unit's file; None for a generator, which the recipe describes completely."""
    if path is None:
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
