"""A loop over some layers of a trained network (retrofitted recurrence, arXiv 2511.07384).

With one loop step and no dropped layers the result is the original network: the core reads its input as it
is, the first step takes its output whole, and nothing is normed on the way. Further steps start as
model/recurrence.py says.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from model.config.model import ModelConfig
from model.config.recurrence import HaltingConfig, RecurrenceConfig
from model.convert.calibration import add_text_arguments
from model.convert.parts import (
    DEPTHS,
    Weights,
    add_depth_arguments,
    layer_ranges,
    refuse_second_loop,
    run,
    with_new_parts,
)

HELP = "loop some of the layers; with one step it is the original network"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `loop`."""
    parser.add_argument(
        "--core", required=True, help="looped layers, from 0: 11-18, or several loops: 3-5,8-9"
    )
    parser.add_argument(
        "--prelude",
        type=int,
        help="keep this many layers before the core, drop the others (default: keep all)",
    )
    parser.add_argument(
        "--coda", type=int, help="keep this many layers after the core, drop the others (default: keep all)"
    )
    parser.add_argument(
        "--injection",
        choices=("none", "concat", "gate"),
        default="none",
        help="how the loop's input re-enters at every step (default %(default)s)",
    )
    parser.add_argument(
        "--update",
        choices=("retrofit", "simple"),
        default="retrofit",
        help="later steps move towards the core's output by a gate, or take it whole (default %(default)s)",
    )
    add_depth_arguments(parser)
    add_text_arguments(parser)


def convert(arguments: argparse.Namespace) -> None:
    """Reads --checkpoint and writes --out; see parts.run."""

    def change(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[ModelConfig, Mapping[str, Tensor]]:
        refuse_second_loop(config)
        core = layer_ranges(arguments.core, "--core", config.num_hidden_layers)
        kept = kept_layers(config.num_hidden_layers, core, arguments.prelude, arguments.coda)
        dropped = sorted(set(range(config.num_hidden_layers)) - set(kept))
        if dropped:
            print(f"drops layers {dropped}: one loop step is not the original network", flush=True)
        config, state = keep_layers(config, state, kept)
        core = [[kept.index(first), kept.index(last)] for first, last in core]
        loop = block_loop(core, arguments.num_steps, arguments.injection, arguments.update, arguments.halting)
        return looped(config, state, loop)

    run(arguments, change, sorted({*DEPTHS, arguments.num_steps}))


def block_loop(
    core: list[list[int]], num_steps: int, injection: str, update: str, halting: str
) -> RecurrenceConfig:
    """A loop over whole layers in a trained network.

    Args:
        core: first and last layer of each loop.
    """
    learned = HaltingConfig(halting).learned
    return RecurrenceConfig(
        placement="block",
        ranges=core,
        num_steps=num_steps,
        max_steps=max(num_steps, RecurrenceConfig.max_steps),
        injection=injection,
        update=update,
        state_norm=False,
        output_norm=False,
        # Reading the loss out after every step needs a single loop.
        halting=HaltingConfig(halting, expectation="state" if learned and len(core) > 1 else None),
    )


def looped(
    config: ModelConfig, state: Mapping[str, Tensor], loop: RecurrenceConfig
) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """A model with this loop, and its weights: the old ones and initial values for what the loop adds.

    Raises:
        ValueError: the config allows no such loop; one line.
    """
    changed = dataclasses.replace(config, recurrence=loop)
    return changed, with_new_parts(changed, state)


def kept_layers(num_layers: int, core: list[list[int]], prelude: int | None, coda: int | None) -> list[int]:
    """Numbers of the layers that stay: the first `prelude`, from the first to the last loop, the last `coda`.

    Raises:
        ValueError: there are not so many layers before or after the core.
    """
    first, last = core[0][0], core[-1][1]
    before, after = first, num_layers - 1 - last
    for option, wanted, there, where in (
        ("--prelude", prelude, before, "before"),
        ("--coda", coda, after, "after"),
    ):
        if wanted is not None and not 0 <= wanted <= there:
            raise ValueError(
                f"{option} {wanted} must lie in 0..{there}, the layers {where} the core {first}-{last} of "
                f"{num_layers}; change it or --core"
            )
    prelude, coda = before if prelude is None else prelude, after if coda is None else coda
    return [*range(prelude), *range(first, last + 1), *range(num_layers - coda, num_layers)]


def keep_layers(
    config: ModelConfig, state: Mapping[str, Tensor], kept: list[int]
) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """The model of some of the layers, renumbered."""
    numbers = {old: new for new, old in enumerate(kept)}
    layers: dict[str, Callable[[], Tensor]] = {}
    for name in state:
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if found is None:
            layers[name] = partial(state.__getitem__, name)
        elif int(found[1]) in numbers:
            new = f"model.layers.{numbers[int(found[1])]}.{found[2]}"
            layers[new] = partial(state.__getitem__, name)
    dropped = set(range(config.num_hidden_layers)) - set(kept)
    dense = config.first_k_dense_replace - sum(layer < config.first_k_dense_replace for layer in dropped)
    return dataclasses.replace(config, num_hidden_layers=len(kept), first_k_dense_replace=dense), Weights(
        layers
    )
