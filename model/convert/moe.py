"""Dense feed-forward layers -> mixtures of experts (sparse upcycling, arXiv 2212.05055).

Every expert is a copy, and the weights of the chosen ones sum to 1, so that the layer gives what it gave.
With shared experts, which every token takes, they and the routed ones give one half each.

Shapes: E experts, D hidden, F width of an expert, S shared experts.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from model.config.model import ModelConfig
from model.convert.calibration import add_text_arguments
from model.convert.parts import Weights, check_memory, run, with_new_parts
from model.pretrained import shapes

# By hidden_act, the projections of a dense layer by their names in stacked experts.
_PARTS = {
    "silu": {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"},
    "relu2": {"w1": "up_proj", "w2": "down_proj"},
}
HELP = "dense feed-forward layers to mixtures of their copies"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `moe`."""
    parser.add_argument("--n_routed_experts", type=int, required=True, help="copies to choose from")
    parser.add_argument("--num_experts_per_tok", type=int, required=True, help="copies that a token takes")
    parser.add_argument(
        "--n_shared_experts", type=int, default=0, help="copies that every token takes (default %(default)s)"
    )
    parser.add_argument(
        "--first_k_dense_replace",
        type=int,
        default=0,
        help="leading layers that stay dense (default %(default)s)",
    )
    add_text_arguments(parser)


def convert(arguments: argparse.Namespace) -> None:
    """Reads --checkpoint and writes --out; see parts.run."""

    def change(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[ModelConfig, Mapping[str, Tensor]]:
        return upcycled(
            config,
            state,
            arguments.n_routed_experts,
            arguments.num_experts_per_tok,
            arguments.n_shared_experts,
            arguments.first_k_dense_replace,
        )

    run(arguments, change)


def upcycled(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    n_routed_experts: int,
    num_experts_per_tok: int,
    n_shared_experts: int = 0,
    first_k_dense_replace: int = 0,
) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """A model whose dense layers are mixtures of experts, and its weights.

    Raises:
        ValueError: the model has experts or feed-forward layers of another kind, or the config allows no such
            mixture; one line.
    """
    _check(config, num_experts_per_tok, first_k_dense_replace)
    changed = dataclasses.replace(
        config,
        use_moe=True,
        n_routed_experts=n_routed_experts,
        num_experts_per_tok=num_experts_per_tok,
        n_shared_experts=n_shared_experts,
        first_k_dense_replace=first_k_dense_replace,
        moe_intermediate_size=config.intermediate_size,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    check_memory(changed)
    shared, share = n_shared_experts, 0.5 if n_shared_experts else 1.0
    made: dict[str, Callable[[], Tensor]] = {name: partial(state.__getitem__, name) for name in state}
    for mlp in [n.removesuffix("experts.w1") for n in shapes(changed) if n.endswith(".experts.w1")]:
        for part, name in _PARTS[config.hidden_act].items():
            weight, down = made.pop(f"{mlp}{name}.weight"), part == "w2"
            made[f"{mlp}experts.{part}"] = partial(_routed, weight, share if down else 1.0, n_routed_experts)
            if shared:
                scale = share / shared if down else 1.0
                made[f"{mlp}shared_experts.{name}.weight"] = partial(
                    _side_by_side, weight, scale, shared, down
                )
    # Of what a mixture adds, only the router has initial values.
    return changed, with_new_parts(changed, Weights(made))


def _routed(weight: Callable[[], Tensor], scale: float, count: int) -> Tensor:
    """(E, out, in), which memory holds once."""
    return (scale * weight().float()).expand(count, -1, -1)


def _side_by_side(weight: Callable[[], Tensor], scale: float, count: int, down: bool) -> Tensor:
    """Shared experts: their widths side by side make one layer."""
    return (scale * weight().float()).repeat(*((1, count) if down else (count, 1)))


def _check(config: ModelConfig, num_experts_per_tok: int, first_k_dense_replace: int) -> None:
    if config.has_experts:
        raise ValueError(
            f"the checkpoint already has experts (n_routed_experts={config.n_routed_experts}); choose a "
            "dense model"
        )
    if config.hidden_act not in _PARTS or config.use_bias:
        raise ValueError(
            f"the checkpoint has hidden_act={config.hidden_act} and use_bias={str(config.use_bias).lower()}, "
            f"but experts are of {' or '.join(_PARTS)} and without biases; choose a model of that kind"
        )
    if num_experts_per_tok < 2:
        raise ValueError(
            f"--num_experts_per_tok {num_experts_per_tok} must be at least 2: the one expert's weight would "
            "always be 1, and the router would learn nothing from the loss"
        )
    if not 0 <= first_k_dense_replace < config.num_hidden_layers:
        raise ValueError(
            f"--first_k_dense_replace {first_k_dense_replace} must lie in 0..{config.num_hidden_layers - 1}, "
            f"so that a layer is left to convert (num_hidden_layers={config.num_hidden_layers})"
        )
