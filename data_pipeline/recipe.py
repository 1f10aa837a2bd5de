"""The recipe of a build: one YAML with dotted overrides, checked against the dataclasses below."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.nearest import nearest
from common.schema import from_plain
from data_pipeline.cleaning.quality import QualityLimits
from data_pipeline.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class TokenizerRecipe:
    vocab_size: int | None = None  # upper limit on pieces
    model_type: str = "unigram"  # unigram | bpe
    train_bytes: int = 10_000_000  # UTF-8 bytes of text to train on, shared among the sources by weight
    thought_pieces: bool = False  # <bot> and <eot>, which traced documents need
    file: str | None = None  # tokenizer.model of an export, used instead of training one


@dataclass(frozen=True)
class CleaningRecipe:
    """The `cleaning` section of a recipe; a source lists the steps it takes in its own `cleaning`."""

    near_threshold: float = 0.8  # Jaccard similarity from which a document is a near duplicate
    ngram_words: int = 13  # a run of this many words of a test problem contaminates a document
    quality: QualityLimits = field(default_factory=QualityLimits)

    def __post_init__(self) -> None:
        if not 0.5 <= self.near_threshold <= 1:  # below, LSH proposes nearly every pair
            raise DataError(f"cleaning.near_threshold {self.near_threshold} is not in [0.5, 1]: change it")
        if self.ngram_words < 8:
            raise DataError(f"cleaning.ngram_words {self.ngram_words} is below 8: raise it (13 is usual)")


@dataclass(frozen=True)
class Recipe:
    name: str
    seed: int = 0  # of the shuffle and of the choice of validation documents
    validation_fraction: float = 0.01  # of the documents, chosen by their hash
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    # Each {name, kind, weight, mask_prompt, cleaning, + the kind's options}.
    sources: list[dict[str, Any]] = field(default_factory=list)
    cleaning: CleaningRecipe = field(default_factory=CleaningRecipe)  # of the sources that ask for it

    def as_dict(self) -> dict[str, Any]:
        """The fields, as hashes and the manifest have them."""
        result = asdict(self)
        if not self.tokenizer.thought_pieces:  # builds older than the switch keep their hash
            del result["tokenizer"]["thought_pieces"]
        if self.tokenizer.file is None:
            del result["tokenizer"]["file"]
        return result


# Keys of every source; the others are options of its kind.
OWN_KEYS = ("name", "kind", "weight", "mask_prompt", "cleaning")
CLEANING_STEPS = ("exact", "near", "quality", "decontaminate")


def source_options(source: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key not in OWN_KEYS}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply overrides like `tokenizer.vocab_size=512` or `sources.0.num_samples=1000`.

    Raises DataError for a missing file, a key that does not exist (naming the nearest), a wrong type or
    value.
    """
    if not Path(path).is_file():
        raise DataError(f"recipe {path} does not exist: fix --recipe")
    try:
        config = OmegaConf.load(path)
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals or not key:
                raise DataError(f"override {override!r} is not KEY=VALUE: write KEY=VALUE")
            # As in the file: 1e-3 is a number there, which YAML alone takes for text.
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
            assert isinstance(parsed, dict)
            OmegaConf.update(config, key, parsed["value"], force_add=True)
        values = OmegaConf.to_container(config)
    except DataError:
        raise
    except _UNREADABLE as error:
        raise DataError(f"recipe {path}: {_one_line(error)}: fix it") from error
    recipe = structured(Recipe, values, f"recipe {path}")
    _check(recipe, path)
    return recipe


# What a YAML file or an override that is none raises; OmegaConf asserts where a key leads through a value.
_UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError, AssertionError,
               AttributeError, RecursionError)  # fmt: skip


def structured(kind: type[T], values: Any, where: str) -> T:
    """common.schema.from_plain, with DataErrors that begin with `where`."""
    try:
        return from_plain(kind, values, f"{where}: ")
    except ValueError as error:
        raise DataError(str(error)) from error


def _check(recipe: Recipe, path: Path) -> None:
    if not 0 <= recipe.validation_fraction < 1:
        raise DataError(
            f"recipe {path}: validation_fraction {recipe.validation_fraction} is not in [0, 1): change it"
        )
    if (recipe.tokenizer.file is None) == (recipe.tokenizer.vocab_size is None):
        raise DataError(
            f"recipe {path}: tokenizer has file {recipe.tokenizer.file!r} and vocab_size "
            f"{recipe.tokenizer.vocab_size}: set one of them and the other "
            "to null: file uses a tokenizer, vocab_size trains one"
        )
    if recipe.tokenizer.file is not None and not Path(recipe.tokenizer.file).is_file():
        raise DataError(f"recipe {path}: tokenizer.file {recipe.tokenizer.file} does not exist: fix the path")
    if recipe.tokenizer.train_bytes < 1:
        raise DataError(
            f"recipe {path}: tokenizer.train_bytes {recipe.tokenizer.train_bytes} is below 1: raise it"
        )
    if not recipe.sources:
        raise DataError(f"recipe {path}: no sources: list at least one")
    names = [source.get("name") for source in recipe.sources]
    for name, source in zip(names, recipe.sources, strict=True):
        # The name becomes part of file names and of the keys inside the shards.
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_]+", name):
            raise DataError(f"recipe {path}: source name {name!r} must be made of a-z, 0-9 and _: rename it")
        if names.count(name) > 1:
            raise DataError(f"recipe {path}: two sources are named {name!r}: rename one")
        if not isinstance(source.get("kind"), str):
            raise DataError(f"recipe {path}: source {name!r} has no kind: add one")
        weight = source.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise DataError(f"recipe {path}: source {name!r} has weight {weight!r}: give a number above 0")
        mask = source.get("mask_prompt", False)
        if not isinstance(mask, bool):
            raise DataError(f"recipe {path}: source {name!r} has mask_prompt {mask!r}: give true or false")
        steps = source.get("cleaning", [])
        if not isinstance(steps, list):
            raise DataError(f"recipe {path}: source {name!r} has cleaning {steps!r}: give a list of steps")
        for step in steps:
            if step not in CLEANING_STEPS:
                guess = nearest(str(step), CLEANING_STEPS)
                raise DataError(f"recipe {path}: source {name!r} has the cleaning step {step!r}; {guess}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
