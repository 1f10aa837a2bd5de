"""Latent Reasoning Units in the attention of a trained network, which start as the identity."""

import argparse
import dataclasses
from collections.abc import Mapping

from torch import Tensor

from model.config.model import ModelConfig
from model.config.recurrence import HaltingConfig, RecurrenceConfig
from model.convert.calibration import add_text_arguments
from model.convert.parts import (
    add_depth_arguments,
    layer_ranges,
    refuse_second_loop,
    run,
    with_new_parts,
)

HELP = "add units inside attention; they start as the identity at any depth"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `unit`."""
    parser.add_argument(
        "--placement",
        choices=("kv", "post_attention"),
        required=True,
        help="kv: refine the latent of latent attention; post_attention: refine attention's output",
    )
    parser.add_argument("--layers", help="layers with a unit, from 0: 10-19, or 3-5,8-9 (default: all)")
    add_depth_arguments(parser)
    add_text_arguments(parser)


def convert(arguments: argparse.Namespace) -> None:
    """Reads --checkpoint and writes --out; see parts.run."""

    def change(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[ModelConfig, Mapping[str, Tensor]]:
        layers = None
        if arguments.layers is not None:
            layers = layer_ranges(arguments.layers, "--layers", config.num_hidden_layers)
        return with_units(config, state, arguments.placement, layers, arguments.num_steps, arguments.halting)

    run(arguments, change, (arguments.num_steps,))


def with_units(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    placement: str,
    layers: list[list[int]] | None,
    num_steps: int,
    halting: str = "fixed",
) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """A model with units, and its weights: the old ones and initial values for the units.

    A unit's core adds nothing at the start, so that every step hands on what it was given.

    Args:
        layers: first and last layer of each range with a unit; None: all layers.

    Raises:
        ValueError: the model has a loop, the config allows no such unit, or kv without latent attention.
    """
    refuse_second_loop(config)
    if placement == "kv" and not config.use_mla:
        raise ValueError(
            "--placement kv refines the latent of latent attention, but the model has grouped-query "
            "attention (use_mla=false); run python -m model.convert mla first, or choose --placement "
            "post_attention"
        )
    units = RecurrenceConfig(
        placement=placement,
        ranges=layers,
        num_steps=num_steps,
        max_steps=max(num_steps, RecurrenceConfig.max_steps),
        injection="none",
        update="simple",
        state_norm=False,
        output_norm=False,
        halting=HaltingConfig(halting),
    )
    changed = dataclasses.replace(config, recurrence=units)
    return changed, with_new_parts(changed, state)
