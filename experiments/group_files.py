"""Writes groups of experiments/groups.py as files for pretrain/main.py, at the size of the preset nano.

    python experiments/group_files.py [--out pretrain/configs/groups]

A file holds a model and resets the loop that the preset, or a config it is laid over, has.
"""

import argparse
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.files import write_file
from experiments.groups import GROUPS, Model, Shape, merged
from model import ModelConfig
from model.counts import flops_per_token, num_parameters

ROOT = Path(__file__).parents[1]
WIDTH = 118  # of a header's lines
# What every file says of the loop, a group's own keys over it.
UNLOOPED: Model = {"placement": "none", "ranges": None, "num_steps": 1}
LOOPED: Model = {"ranges": None, "depth_sampling": "fixed", "halting": {"kind": "fixed"}}


@dataclass(frozen=True)
class GroupFile:
    """A group at the nano size; `about` and `compare` are its header."""

    group: str
    about: str
    compare: str
    layers: int = 1  # of the loop
    steps: int = 4
    prelude: int = 1
    coda: int = 1
    dense: bool = False  # dense feed-forward layers, as wide as the experts that a token uses
    memory_tokens: int = 4

    @property
    def shape(self) -> Shape:
        base: Model = {"preset": "nano", **({"use_moe": False} if self.dense else {}), "recurrence": UNLOOPED}
        length = 256  # the demo's
        return Shape(base, self.layers, self.steps, length, self.prelude, self.coda, self.memory_tokens)

    @property
    def model(self) -> Model:
        """The keys below `model` in the file: those that differ from the preset, and the whole loop."""
        shape = self.shape
        changes = GROUPS[self.group].build(shape)
        if "recurrence" in changes:
            changes = {**changes, "recurrence": {**LOOPED, **changes["recurrence"]}}
        nano = ModelConfig.from_dict({"preset": "nano"}).to_dict()
        said = {key: value for key, value in changes.items() if value != nano[key]}
        return merged(shape.base, said)


FILES = {
    "a_attention": GroupFile(
        "gqa",
        "Group A: plain grouped-query attention (arXiv 2305.13245) without recurrence. The group "
        "`plain` of the matrices has a key and value head for every query head.",
        "b_mla, which differs in the attention alone.",
    ),
    "b_mla": GroupFile(
        "mla",
        "Group B: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) without "
        "recurrence.",
        "a_attention (other attention, the rest the same) and c_lru_fixed (the same layers, the middle "
        "one looped).",
    ),
    "c_lru_fixed": GroupFile(
        "gated",
        "Group C: latent attention and a Latent Reasoning Unit of fixed depth: prelude, core x 4, coda. "
        "The input is added again at every step (Huginn, arXiv 2502.05171, section 3.2) and the update is"
        " gated as in a GRU. The group `loop` of the matrices has neither, nor a norm of the state.",
        "b_mla (the same layers, no loop), d_lru_adaptive (learned depth) and its dense twins "
        "dense_parameters and dense_flops.",
    ),
    "d_lru_adaptive": GroupFile(
        "gated_act",
        "Group D: c_lru_fixed with learned halting for each token (ACT, Graves 2016, arXiv 1603.08983), "
        "trained on the expected loss over the steps. The group `adaptive` of the matrices is `loop` "
        "with PonderNet.",
        "c_lru_fixed at equal mean steps; with halting.kind=fixed it is that model.",
    ),
    "dense_parameters": GroupFile(
        "gated_dense_params",
        "Dense twin of c_lru_fixed with as many distinct parameters, which takes fewer FLOPs. The same "
        "model as `python -m model.config match --like pretrain/configs/groups/c_lru_fixed.yaml --by "
        "parameters`.",
        "c_lru_fixed where the claim is equal parameters, never where it is equal FLOPs.",
    ),
    "dense_flops": GroupFile(
        "gated_dense_flops",
        "Dense twin of c_lru_fixed that takes as many forward FLOPs per token: the loop unrolled into "
        "layers of their own, with more parameters. The same model as `python -m model.config match "
        "--like pretrain/configs/groups/c_lru_fixed.yaml --by flops`.",
        "c_lru_fixed where the claim is equal FLOPs, never where it is equal parameters.",
    ),
    "pause_tokens": GroupFile(
        "pause",
        "Pause tokens (arXiv 2310.02226): b_mla with a learned token after every token, which predicts in"
        " its place, so that a token takes 6 layer runs, as many as in c_lru_fixed.",
        "b_mla (no extra computation) and c_lru_fixed (extra computation in depth; 15% fewer FLOPs at 256"
        " tokens, since pauses are attended to as well).",
    ),
    "recurrent_memory": GroupFile(
        "rmt",
        "Recurrent Memory Transformer (arXiv 2207.06881, eq. 1-3): a row is read in segments of 64 "
        "tokens, and 8 memory tokens carry over what it keeps. Rows must be longer than a segment, or the"
        " model is nothing but memory tokens. The layers are those of b_mla with dense feed-forward "
        "layers, as wide as the experts that a token of b_mla uses.",
        "b_mla (no memory) and c_lru_fixed (recurrence over depth instead of over segments).",
        dense=True,
        memory_tokens=8,
    ),
    "universal_transformer": GroupFile(
        "ut_normed",
        "Universal Transformer (arXiv 1807.03819) at fixed depth: its one layer is the whole stack and "
        "runs 6 times, as many layer runs as the 1 + 4 + 1 of c_lru_fixed. It is told which run it is in;"
        " nothing is re-injected and there is no gate. Attention and norms are those of c_lru_fixed; the "
        "feed-forward layer is dense, as wide as the experts that a token of c_lru_fixed uses. The group "
        "`ut` of the matrices does not norm the state.",
        "c_lru_fixed (8% more FLOPs at 256 tokens, four times the parameters besides the embeddings) and "
        "universal_transformer_act.",
        steps=6,
        prelude=0,
        coda=0,
        dense=True,
    ),
    "universal_transformer_act": GroupFile(
        "ut_normed_act",
        "Universal Transformer with adaptive computation time for each token (arXiv 1807.03819, section "
        "2.2): the state that is read out is the mean of the steps' states under the halting "
        "probabilities. The group `ut_act` of the matrices does not norm the state.",
        "universal_transformer at equal mean steps, and d_lru_adaptive.",
        steps=6,
        prelude=0,
        coda=0,
        dense=True,
    ),
}


def file_text(name: str) -> str:
    """A file's header and its YAML."""
    file = FILES[name]
    config = file.shape.config(GROUPS[file.group].build(file.shape))
    length = file.shape.sequence_length
    sizes = (
        f"{num_parameters(config):,} parameters, {num_parameters(config, active=True):,} active per token; "
        f"{flops_per_token(config, length):,.0f} forward FLOPs per token at {length} tokens."
    )
    made = (
        f"Made by `python experiments/group_files.py` from the group `{file.group}` of "
        "experiments/groups.py: change it there."
    )
    header = [
        *_comment(file.about),
        *_comment(f"Compare with {file.compare}"),
        *_comment(sizes),
        *_comment(made),
    ]
    body: dict[str, Any] = {"model": file.model}
    return "\n".join([*header, yaml.safe_dump(body, sort_keys=False, default_flow_style=None)])


def _comment(text: str) -> list[str]:
    return [
        f"# {line}" for line in textwrap.wrap(text, WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write experiment groups as files for pretrain/main.py.")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "pretrain/configs/groups", help="folder (default: %(default)s)"
    )
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        write_file(out / f"{name}.yaml", file_text(name).encode())
    print(f"written: {len(FILES)} files in {out}")


if __name__ == "__main__":
    main()
