"""Where each tensor of a folder goes in another, so that they are converted one at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.config.model import ModelConfig
from model.weight_files import OpenWeights, Stored
from model.weight_writer import DTYPES, WeightWriter, describe

Shapes = Mapping[str, tuple[int, ...]]
FIX = "config.json describes another model"


class Place(NamedTuple):
    """Where a tensor goes, or a part of it."""

    name: str
    row: int | None = None  # the first of the rows that it fills there; None: it is all of it
    change: Callable[[Tensor], Tensor] = lambda tensor: tensor


Places = Mapping[str, Sequence[Place]]  # by the tensor's own name


def renamed(stored: Mapping[str, Stored], places: Places) -> dict[str, Stored]:
    """What a folder will hold whose tensors come from one place each."""
    return {
        place.name: describe(place.change(_like(stored[name]))) for name in stored for place in places[name]
    }


def fitted(stored: Mapping[str, Stored], places: Places, expected: Shapes) -> dict[str, Stored]:
    """What a model's export will hold, in its order; a stack of rows has the widest of their types.

    Args:
        places: of the stored tensors, and of those that have to be there.

    Raises:
        ValueError: a tensor is missing, has another shape, or does not belong to the model.
    """
    dtypes: dict[str, torch.dtype] = {}
    beyond = [name for name in stored if name not in places]
    order = {name: number for number, name in enumerate(expected)}
    for name, targets in sorted(places.items(), key=lambda item: [order.get(p.name, -1) for p in item[1]]):
        for place in targets:
            if name not in stored:
                raise _missing(name)
            if place.name not in expected:
                beyond.append(place.name)
                continue
            given, wanted = place.change(_like(stored[name])), expected[place.name]
            if place.row is not None:
                wanted = (len(given), *wanted[1:])
            if given.shape != wanted:
                raise ValueError(f"{name} is {tuple(given.shape)}, expected {wanted}; {FIX}")
            dtypes[place.name] = torch.promote_types(given.dtype, dtypes.get(place.name, given.dtype))
    for name in expected:
        if name not in dtypes:
            raise _missing(name)
    if beyond:
        raise ValueError(f"{len(beyond)} tensors do not belong to the model, {min(beyond)} among them; {FIX}")
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {name: Stored(shape, names[dtypes[name]]) for name, shape in expected.items()}


def _missing(name: str) -> ValueError:
    return ValueError(f"{name} is missing; the folder is not complete or {FIX}")


def _like(stored: Stored) -> Tensor:
    return torch.empty(stored.shape, dtype=DTYPES[stored.dtype], device="meta")


def write_places(
    tensor: Tensor, targets: Sequence[Place], planned: Mapping[str, Stored], writer: WeightWriter
) -> None:
    """Changes and writes a tensor. Its last name is the argument: the next one is read when it is gone."""
    for place in targets:
        value = place.change(tensor).to(DTYPES[planned[place.name].dtype])
        writer.write(place.name, value, place.row)


@dataclass(frozen=True)
class Imported:
    """A model in a Hugging Face folder, to be written as an export."""

    config: ModelConfig
    weights: OpenWeights
    places: Places  # of the tensors in `weights`
    planned: Mapping[str, Stored]  # the export's tensors

    def write(self, writer: WeightWriter) -> None:
        """Reads, changes and writes one tensor after another.

        Raises:
            ValueError: a tensor is not finite, or its file is damaged. OSError: the disk is full or fails.
        """
        for name, targets in self.places.items():
            if not targets:
                continue
            write_places(self.weights.checked(name), targets, self.planned, writer)
