"""What loop, unit and moe share: a model of another form that keeps its weights, and the run of a command."""

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from model.config.model import ModelConfig
from model.config.recurrence import LEARNED
from model.convert.calibration import perplexity, read_texts
from model.convert.folders import write, writing
from model.pretrained import load_pretrained
from model.transformer import ZeroModel

KINDS = ("fixed", *LEARNED, "threshold")  # of halting
DEPTHS = (1, 2, 4)  # at which perplexity is measured, beside num_steps

# (config, its weights) -> (new config, its weights)
Change = Callable[[ModelConfig, dict[str, Tensor]], tuple[ModelConfig, dict[str, Tensor]]]


def with_new_parts(config: ModelConfig, state: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The weights of a config's model: those of `state`, and initial values for whatever it lacks.

    What pretrain's init.missing=allow does with the same config, which is why the values that suit a trained
    network are set where every parameter gets its initial value, and not here.
    """
    fresh = ZeroModel(config, seed=seed).state_dict()
    for name in state.keys() & fresh.keys():
        fresh[name].copy_(state[name])
    return fresh


def layer_ranges(text: str, option: str, num_layers: int) -> list[list[int]]:
    """`11-18` or `3-5,8-9` or `7` -> first and last layer of each range.

    Raises:
        ValueError: not ranges that rise and lie apart within the model's layers.
    """
    ranges, end = [], -1
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", part)
        if found is None:
            raise ValueError(f"{option} {text!r} is not ranges of layers; write e.g. 11-18 or 3-5,8-9")
        first = int(found[1])
        last = int(found[2] or first)
        if not end < first <= last < num_layers:
            raise ValueError(
                f"{option} {text} must name ranges that rise and lie apart, with every layer in "
                f"0..{num_layers - 1} (num_hidden_layers={num_layers}); {part.strip()} does not"
            )
        ranges.append([first, last])
        end = last
    return ranges


def refuse_second_loop(config: ModelConfig) -> None:
    """Raises ValueError for a model that has a loop or units: it has one section `recurrence`."""
    if config.recurrence.placement != "none":
        raise ValueError(
            f"the checkpoint already has a loop (recurrence.placement={config.recurrence.placement}), and a "
            "model has one kind; convert the model that it was made from"
        )


def add_depth_arguments(parser: argparse.ArgumentParser) -> None:
    """--num_steps and --halting."""
    parser.add_argument("--num_steps", type=int, required=True, help="loop steps R")
    parser.add_argument(
        "--halting", choices=KINDS, default="fixed", help="when a token stops (default %(default)s)"
    )


def run(arguments: argparse.Namespace, change: Change, depths: Iterable[int]) -> None:
    """Reads --checkpoint, changes it, measures perplexity before and after on --text, and writes --out.

    Args:
        depths: loop steps at which the changed model is measured.
    """
    with writing(arguments.checkpoint, arguments.out):
        print(f"reading {arguments.checkpoint}", flush=True)
        model = load_pretrained(arguments.checkpoint)
        config, state = change(model.config, model.state_dict())
        given = {name: str(v) if name in _PATHS and v else v for name, v in vars(arguments).items()}
        record: dict[str, Any] = {**given}
        if arguments.text is not None:
            record["perplexity"] = _measured(arguments, model, config, state, depths)
        write(arguments.checkpoint, arguments.out, config, state, record)
    print(f"wrote {arguments.out}")


_PATHS = ("checkpoint", "out", "text")


def _measured(
    arguments: argparse.Namespace,
    model: ZeroModel,
    config: ModelConfig,
    state: dict[str, Tensor],
    depths: Iterable[int],
) -> dict[str, Any]:
    """Perplexity before and after, printed as it is measured."""
    texts = read_texts(arguments.text, arguments.checkpoint, model, arguments.evaluation_tokens)
    before = perplexity(model, texts.evaluation)
    print(f"perplexity before {before} ({before.tokens:,} tokens)", flush=True)
    changed = ZeroModel(config)
    changed.load_state_dict(state)
    after = {}
    for steps in depths:
        found = perplexity(changed.eval(), texts.evaluation, steps)
        print(f"perplexity after, {steps} loop steps: {found}", flush=True)
        after[str(steps)] = found.to_dict()
    return {"before": before.to_dict(), "after": after}
