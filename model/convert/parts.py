"""What loop, unit and moe share: a model of another form that keeps its weights, and the run of a command."""

import argparse
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.config.model import ModelConfig
from model.config.recurrence import LEARNED
from model.convert.calibration import perplexity, read_texts
from model.convert.folders import write, writing
from model.counts import num_parameters
from model.initialization import fill_initial
from model.pretrained import load_pretrained, open_export, shapes
from model.transformer import ZeroModel

_BYTES = 4  # of a parameter in fp32
KINDS = ("fixed", *LEARNED, "threshold")  # of halting
DEPTHS = (1, 2, 4)  # at which perplexity is measured, beside num_steps

# (config, its weights) -> (new config, its weights)
Change = Callable[[ModelConfig, Mapping[str, Tensor]], tuple[ModelConfig, Mapping[str, Tensor]]]


class Weights(Mapping[str, Tensor]):
    """Tensors that are read or made when they are asked for, so that memory holds one at a time."""

    def __init__(self, made: Mapping[str, Callable[[], Tensor]]) -> None:
        self.made = dict(made)

    def __getitem__(self, name: str) -> Tensor:
        return self.made[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.made)

    def __len__(self) -> int:
        return len(self.made)


def with_new_parts(config: ModelConfig, state: Mapping[str, Tensor]) -> Weights:
    """The weights of a config's model, in fp32: those of `state`, and initial values for whatever it lacks.

    What pretrain's init.missing=allow does with the same config, which is why the values that suit a trained
    network are set where every parameter gets its initial value, and not here.

    Raises:
        ValueError: see check_memory.
    """
    check_memory(config)
    names = shapes(config)
    fresh = _initial(config, [name for name in names if name not in state])
    return Weights({name: partial(_fp32, fresh if name in fresh else state, name) for name in names})


def check_memory(config: ModelConfig) -> None:
    """Raises ValueError if a model needs more memory than the machine has."""
    needed = _BYTES * num_parameters(config)
    if needed > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise ValueError(
            f"the converted model would take {needed / 1e9:,.1f} GB in fp32, but this machine has "
            f"{memory / 1e9:,.1f} GB of memory; ask for fewer or smaller new parts"
        )


def _fp32(state: Mapping[str, Tensor], name: str) -> Tensor:
    return state[name].float()


def _initial(config: ModelConfig, names: Collection[str]) -> dict[str, Tensor]:
    """The initial values of some of a model's tensors; nothing else of it is made."""
    with torch.device("meta"):
        model = ZeroModel(config)
    values = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        like = getattr(module, leaf)
        values[name] = torch.zeros_like(like, device="cpu")
        if isinstance(like, nn.Parameter):  # else a router's bias
            fill_initial(values[name], module, path, leaf, config.initializer_range, seed=0)
    return values


def built(config: ModelConfig, state: Mapping[str, Tensor]) -> ZeroModel:
    """The model in eval mode."""
    model = ZeroModel(config, seed=None)
    for name, value in model.state_dict().items():
        value.copy_(state[name])
    return model.eval()


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


def run(arguments: argparse.Namespace, change: Change, depths: Sequence[int] = ()) -> None:
    """Reads --checkpoint, changes it, measures perplexity before and after on --text, and writes --out.

    Memory holds the new parts and one tensor at a time; to measure on --text, one whole model.

    Args:
        depths: loop steps at which the changed model is measured; default: the config's.
    """
    checkpoint, out = arguments.checkpoint, arguments.out
    with writing(checkpoint, out):
        print(f"reading {checkpoint}", flush=True)
        with open_export(checkpoint) as (old, weights):
            texts = None
            if arguments.text is not None:
                texts = read_texts(arguments.text, checkpoint, old, arguments.evaluation_tokens)
            config, state = change(old, Weights({name: partial(weights.checked, name) for name in weights}))
            options = {name: value for name, value in vars(arguments).items() if name not in _COMMON}
            record = {"command": arguments.command, "source": str(checkpoint), **options}
            if texts is not None:
                record["text"] = arguments.text.name
                before, after = partial(load_pretrained, checkpoint), partial(built, config, state)
                record |= _measured(before, after, texts.evaluation, depths)
            write(checkpoint, out, config, state, record)
    print(f"wrote {out}")


_COMMON = ("command", "checkpoint", "out", "text", "evaluation_tokens")


def _measured(
    before: Callable[[], ZeroModel], after: Callable[[], ZeroModel], windows: Tensor, depths: Sequence[int]
) -> dict[str, Any]:
    """Perplexities for the record, printed as they are measured; those after the change by loop steps.

    Args:
        before, after: the models, of which memory holds one at a time.
    """
    first = perplexity(before(), windows)
    print(f"perplexity on {first.tokens:,} tokens: {first} before", flush=True)
    changed = after()
    if not depths:
        only = perplexity(changed, windows)
        print(f"perplexity {only} after", flush=True)
        return {"perplexity_before": first.to_dict(), "perplexity_after": only.to_dict()}
    found = {}
    for steps in depths:
        found[str(steps)] = (here := perplexity(changed, windows, steps)).to_dict()
        print(f"perplexity {here} after, with num_steps={steps}", flush=True)
    return {"perplexity_before": first.to_dict(), "perplexity_after": found}
