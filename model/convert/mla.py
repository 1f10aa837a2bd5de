"""Grouped-query attention -> multi-head latent attention: `python -m model.convert mla`.

With qk_rope_head_dim = num_key_value_heads x head_dim = kv_lora_rank the logits stay the same. Smaller ranks
approximate; latent.py says how. Memory holds the whole model, which calibration runs, and maps of all layers'
keys in fp64, since the choice of pairs compares layers; the converted model shares the other weights.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.schema import Count, as_type
from model.config.model import ModelConfig
from model.convert import folders
from model.convert.calibration import Texts, add_text_arguments, perplexity, read_texts
from model.convert.latent import RotatedKeys, choose_pairs, latent_config, latent_weights, rotated_keys
from model.convert.moments import Moments, assumed, attention_layers, measured
from model.counts import cached_numbers
from model.pretrained import load_pretrained
from model.transformer import ZeroModel

HELP = "grouped-query attention to latent attention, exact at full rank"
CALIBRATION_TOKENS = 8192
OWN_WEIGHTS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Ranks:
    """What is chosen, and what it saves."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    cached_before: int  # numbers per token in one layer
    cached_after: int
    saving_percent: float


@dataclass(frozen=True)
class Prepared:
    """What all ranks share: the model and what its layers were seen to do."""

    model: ZeroModel
    moments: Mapping[str, Moments]  # by the attention layer's name
    keys: Mapping[str, RotatedKeys]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mla`."""
    parser.add_argument("--kv_lora_rank", type=int, required=True, help="width of the cached latent")
    parser.add_argument(
        "--qk_rope_head_dim", type=int, required=True, help="width of the rotated key that all heads share"
    )
    add_calibration_arguments(parser)


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """--text and how much of it is used."""
    add_text_arguments(parser)
    parser.add_argument(
        "--calibration_tokens",
        type=int,
        default=CALIBRATION_TOKENS,
        help="from the start of --text, to choose pairs and latents by (default %(default)s)",
    )


def convert(arguments: argparse.Namespace) -> None:
    """Converts a folder and reports perplexity before and after.

    Raises:
        ValueError, OSError: see load_pretrained, folders.writing, read_texts and check_source.
    """
    checkpoint, out = arguments.checkpoint, arguments.out
    model = load_pretrained(checkpoint)
    ranks = check_ranks(model.config, arguments.kv_lora_rank, arguments.qk_rope_head_dim)
    with folders.writing(checkpoint, out):
        texts = calibration_texts(arguments, model)
        prepared = prepare(model, texts)
        new, kept = converted(prepared, ranks)
        record: dict[str, Any] = {"command": "mla", "source": str(checkpoint), **asdict(ranks)}
        record |= {"rope_pairs": new.config.rope_pairs, "energy_kept": kept}
        if texts is not None:
            old, now = perplexity(model, texts.evaluation), perplexity(new, texts.evaluation)
            record |= texts_record(arguments.text, texts)
            record |= {"perplexity_before": old.to_dict(), "perplexity_after": now.to_dict()}
            print(f"perplexity on {old.tokens:,} tokens: {old} before, {now} after")
        folders.write(checkpoint, out, new.config, new.state_dict(), record)
    print(f"latents keep {min(kept.values()):.1%} to {max(kept.values()):.1%} of keys and values, by layer")
    before, after = cached_numbers(model.config), cached_numbers(new.config)
    print(f"cache: {before:,} numbers per token before, {after:,} after, {ranks.saving_percent}% saved")
    print(f"wrote {out}")


def calibration_texts(arguments: argparse.Namespace, model: ZeroModel) -> Texts | None:
    """Of --text; None without one, and a line that says what that means."""
    if arguments.text is None:
        print(
            "note: without --text, what is cut depends on the weights alone, which is far less accurate, and "
            "perplexity is not measured",
            file=sys.stderr,
        )
        return None
    as_type(Count, arguments.calibration_tokens, "--calibration_tokens")
    return read_texts(
        arguments.text,
        arguments.checkpoint,
        model.config,
        arguments.evaluation_tokens,
        arguments.calibration_tokens,
    )


def texts_record(path: Path, texts: Texts) -> dict[str, Any]:
    """For conversion.json."""
    return {"text": path.name, "calibration_tokens": texts.calibration[:, 1:].numel()}


def check_source(config: ModelConfig) -> None:
    """Raises ValueError, one line, unless a model has plain attention that latent attention can express."""
    refusals = (
        (config.use_mla, "use_mla=true: it has latent attention already"),
        (config.qk_norm, "qk_norm=true: a norm of whole heads is not a linear map of the cached latent"),
        (config.learned_positions, "position_embedding=learned: latent attention has rotated positions"),
        (config.use_bias, "use_bias=true: latent attention has no bias on its output"),
        (config.norm != "rms_norm", f"norm={config.norm}: models with latent attention have RMSNorm"),
        (
            config.recurrence.query_conditioned,
            "recurrence.query_conditioned=true: its units read queries, whose width changes",
        ),
    )
    for refused, reason in refusals:
        if refused:
            raise ValueError(f"the checkpoint has model.{reason}; convert another model")


def check_ranks(config: ModelConfig, kv_lora_rank: int, qk_rope_head_dim: int) -> Ranks:
    """The ranks, if a model of plain attention has them.

    Raises:
        ValueError: a rank is above what the model has or not possible; see also check_source.
    """
    check_source(config)
    C = as_type(Count, kv_lora_rank, "--kv_lora_rank")
    R = as_type(Count, qk_rope_head_dim, "--qk_rope_head_dim")
    keys = config.kv_heads * config.plain_head_dim
    if R % 2:
        raise ValueError(f"--qk_rope_head_dim={R} must be even: it rotates in pairs")
    if keys < R:
        raise ValueError(
            f"--qk_rope_head_dim={R} is above {keys}, the width of all keys (num_key_value_heads="
            f"{config.kv_heads} x head_dim={config.plain_head_dim}); choose at most {keys}"
        )
    most = full_latent(config, R)
    if most < C:
        raise ValueError(
            f"--kv_lora_rank={C} is above {most}, the rank of the values and the keys that are not rotated; "
            f"choose at most {most}"
        )
    before = 2 * keys
    return Ranks(C, R, before, C + R, round(100 * (1 - (C + R) / before), 1))


def full_latent(config: ModelConfig, qk_rope_head_dim: int) -> int:
    """The rank of the values and the keys that are not rotated: a latent of this width loses nothing."""
    keys = config.kv_heads * config.plain_head_dim
    return min(2 * keys - qk_rope_head_dim, config.hidden_size + config.qkv_bias)


def prepare(model: ZeroModel, texts: Texts | None) -> Prepared:
    """Runs the calibration texts; without them, all inputs count as equally likely."""
    moments = assumed(model) if texts is None else measured(model, texts.calibration)
    keys = {}
    for name, layer in attention_layers(model).items():
        with _decomposing(name):
            keys[name] = rotated_keys(layer, moments[name])
    return Prepared(model, moments, keys)


@contextmanager
def _decomposing(name: str) -> Iterator[None]:
    """Says which layer's energies have no principal components: they are not finite."""
    try:
        yield
    except torch.linalg.LinAlgError:
        raise ValueError(
            f"the weights of {name} are too large to convert: the energies of its keys and values are not "
            "finite; choose another checkpoint"
        ) from None


@torch.no_grad()
def converted(prepared: Prepared, ranks: Ranks) -> tuple[ZeroModel, dict[str, float]]:
    """The model with latent attention, in eval mode, and by layer the share of the energy of values and
    unrotated keys that its latents keep. The weights that stay are shared with the prepared model.

    Raises:
        ValueError: the model has another switch that does not go with latent attention.
    """
    model = prepared.model
    pairs = choose_pairs([keys.loss for keys in prepared.keys.values()], ranks.qk_rope_head_dim)
    config = latent_config(model.config, ranks.kv_lora_rank, pairs)
    state: dict[str, Tensor] = dict(model.state_dict())
    kept = {}
    for name, layer in attention_layers(model).items():
        with _decomposing(name):
            weights, kept[name] = latent_weights(layer, prepared.keys[name], prepared.moments[name], config)
        for own in OWN_WEIGHTS:
            for kind in ("weight", "bias"):
                state.pop(f"{name}.{own}.{kind}", None)
        state |= {f"{name}.{part}": value for part, value in weights.items()}
    new = ZeroModel(config, seed=None)
    new.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return new.eval(), kept
