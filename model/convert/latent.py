"""One layer of plain attention as latent attention: which pairs stay rotated, and the latent of the rest.

1. Rotated keys. A head turns its pair number l as one complex number k_l by exp(i theta_l position). Any
   invertible complex matrix across the G key-value heads commutes with that, so keys may be mixed into
   pseudo-heads k' = B^-1 k, and queries by B, without changing a score (RoRoPE of TransMLA, arXiv 2502.07864,
   has real orthogonal matrices). B comes from the principal components of the keys, each head's weighted by
   the energy of its queries, so that the first pseudo-heads matter most to the scores.
2. R/2 of the pairs (pseudo-head, l) become the shared rotated key. The others lose their rotation: a query
   and a key at a distance n turn against each other by exp(-i theta_l n), which is replaced by its mean a_l
   over the distances that the layer attends to. What this loses, energy x (1 - |a_l|^2), decides which pairs
   are kept (by contribution, as in MHA2MLA, arXiv 2502.14837).
3. The keys without rotation and the values become a joint latent of width C (as in MHA2MLA): principal
   components of [k; v], where an error in k counts by the energy of the queries along it, and one in v by
   what the output projection makes of it, balanced against each other (as in TransMLA).

All energies are means over tokens; those of keys and values weigh each token by the attention it receives, so
that the few tokens that most heads look at come out right. docs/MODEL.md has what each of these is worth.

Shapes: D hidden, H heads, G key-value heads, d width of a head, P = d/2 pairs, R rotary width, C latent. A
map of [x; 1] has D+1 columns, the last one the bias.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import GroupedQueryAttention
from model.config.model import ModelConfig
from model.convert.moments import Moments
from model.layers import Linear, attention_scale, rotations

_DAMPING = 1e-3  # least energy of a direction, as a share of the mean
# How much an error in the scores, as a share of their energy, counts against one in the values, as a share
# of theirs; the best of those tried.
KEY_WEIGHT = 8.0


@dataclass(frozen=True)
class RotatedKeys:
    """One layer's keys as pseudo-heads, per pair the strongest first; complex fp64 unless said otherwise."""

    keys: Tensor  # (P, G, D+1), the maps to k'
    mixing: Tensor  # (P, G, G), B of k = B k'
    mean_rotation: Tensor  # (P,), a
    energy: Tensor  # (P, G) real: mean square of what a pair adds to the scores, summed over heads
    loss: Tensor  # (P, G) real: mean square by which the scores change if a pair loses its rotation


def rotated_keys(layer: GroupedQueryAttention, moments: Moments) -> RotatedKeys:
    """Step 1, and the mean rotations of step 2."""
    c = layer.config
    query, key = _pairs(affine(layer.q_proj), c), _pairs(affine(layer.k_proj), c)
    inputs, attended = moments.inputs.to(query.dtype), moments.attended.to(query.dtype)
    asked = torch.einsum("phi,ij,phj->ph", query, inputs, query.conj()).real
    asked = asked.unflatten(1, (c.kv_heads, -1)).sum(2)  # (P, G)
    weight = (asked + _DAMPING * _above_zero(asked.mean())).sqrt().to(query.dtype)
    weighted = weight[:, :, None] * key
    energy, directions = torch.linalg.eigh(
        torch.einsum("pgi,ij,phj->pgh", weighted, attended, weighted.conj())
    )
    energy, directions = energy.flip(1).clamp(min=0), directions.flip(2)
    positions = torch.arange(len(moments.distances))[None]
    rotation = torch.view_as_complex(rotations(positions, c))[0].to(query.dtype)  # (T, P)
    mean_rotation = moments.distances.to(query.dtype) @ (rotation[0] * rotation.conj())
    whole = rotation[0].abs().square()  # above 1 with YaRN
    return RotatedKeys(
        keys=directions.mH @ weighted,
        mixing=directions / weight[:, :, None],
        mean_rotation=mean_rotation,
        energy=energy * whole.square()[:, None],
        loss=energy * (whole.square() - mean_rotation.abs().square()).clamp(min=0)[:, None],
    )


def choose_pairs(losses: list[Tensor], qk_rope_head_dim: int) -> list[int]:
    """rope_pairs for all layers: how many pseudo-heads of which pair stay rotated.

    Args:
        losses: of every layer, see RotatedKeys.loss.
    """
    loss = torch.stack(losses).sum(0)
    chosen = loss.flatten().topk(qk_rope_head_dim // 2).indices
    return sorted((chosen // loss.shape[1]).tolist())


def latent_config(config: ModelConfig, kv_lora_rank: int, rope_pairs: list[int]) -> ModelConfig:
    """The config of the converted model.

    Raises:
        ValueError: latent attention does not go with another switch of the model.
    """
    return ModelConfig.from_dict(
        {
            **config.to_dict(),
            "use_mla": True,
            "q_lora_rank": None,
            "kv_lora_rank": kv_lora_rank,
            "qk_nope_head_dim": config.plain_head_dim,
            "qk_rope_head_dim": 2 * len(rope_pairs),
            "v_head_dim": config.plain_head_dim,
            "latent_norm": False,
            "rope_pairs": rope_pairs,
            "rope_pairs_dim": config.plain_head_dim,
            "num_key_value_heads": None,
            "head_dim": None,
        }
    )


def latent_weights(
    layer: GroupedQueryAttention, keys: RotatedKeys, moments: Moments, config: ModelConfig
) -> tuple[dict[str, Tensor], float]:
    """Weights of MultiHeadLatentAttention's own projections in fp64, and the share of the balanced energy of
    [k; v] that the latent keeps.

    Args:
        config: the converted model's.
    """
    old = layer.config
    H, G, d = old.num_attention_heads, old.kv_heads, old.plain_head_dim
    assert config.rope_pairs is not None
    pairs = torch.tensor(config.rope_pairs)
    rank = torch.arange(len(pairs)) - torch.searchsorted(pairs, pairs)  # which pseudo-head of its pair
    plain_query = affine(layer.q_proj)
    query = _pairs(plain_query, old)[pairs].unflatten(1, (G, -1))
    query = query * keys.mixing[pairs, :, rank].conj()[:, :, None, None]
    rotated_query = _numbers(query.flatten(1, 2)).unflatten(0, (H, -1))
    rotated_key = _numbers(keys.keys[pairs, rank][:, None])
    rest = keys.keys * keys.mean_rotation[:, None, None]
    rest[pairs, rank] = 0
    whole = torch.cat((_numbers(keys.mixing @ rest), affine(layer.v_proj)))  # (2 G d, D+1), [k; v]
    down, up, kept = _joint_latent(layer, whole, moments, config.kv_lora_rank)
    per_head = up.view(2, G, d, -1).repeat_interleave(H // G, 1)  # (2, H, d, C)
    scale = attention_scale(old) / attention_scale(config)
    both = torch.cat((plain_query.unflatten(0, (H, d)), rotated_query), 1).flatten(0, 1) * scale
    weights = {"kv_b_proj.weight": per_head.transpose(0, 1).flatten(0, 2)}
    for name, value in (("q_proj", both), ("kv_a_proj_with_mqa", torch.cat((down, rotated_key)))):
        weights[f"{name}.weight"] = value[:, :-1]
        if config.qkv_bias:
            weights[f"{name}.bias"] = value[:, -1]
    return weights, kept


def _joint_latent(
    layer: GroupedQueryAttention, whole: Tensor, moments: Moments, kv_lora_rank: int
) -> tuple[Tensor, Tensor, float]:
    """Step 3: whole (2 G d, D+1) ~ up (2 G d, C) @ down (C, D+1), and the share of energy kept."""
    (key_weight, key_inverse), (value_weight, value_inverse) = _error_weights(layer, moments.inputs)
    key, value = (
        weight @ affine(projection)
        for weight, projection in ((key_weight, layer.k_proj), (value_weight, layer.v_proj))
    )
    key_energy, value_energy = ((part @ moments.attended * part).sum() for part in (key, value))
    balance = math.sqrt(KEY_WEIGHT * _above_zero(value_energy) / _above_zero(key_energy))
    weight = torch.block_diag(key_weight * balance, value_weight)
    inverse = torch.block_diag(key_inverse / balance, value_inverse)
    weighted = weight @ whole
    energy, directions = torch.linalg.eigh(weighted @ moments.attended @ weighted.T)
    first = directions[:, -kv_lora_rank:].flip(1)
    down, up = first.T @ weighted, inverse @ first
    # Both matrices get entries of one size.
    size = (_above_zero(up.square().mean()) / _above_zero(down.square().mean())) ** 0.25
    energy = energy.clamp(min=0)
    lost = energy[:-kv_lora_rank].sum() / _above_zero(energy.sum())
    return down * size, up / size, float(1 - lost)


def _error_weights(layer: GroupedQueryAttention, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For keys and for values (G d, G d): W with |W e|^2 the cost of an error e, and its inverse."""
    c = layer.config
    H, d = c.num_attention_heads, c.plain_head_dim
    query = affine(layer.q_proj).unflatten(0, (H, d))
    of_keys = query @ inputs @ query.mT
    out = layer.o_proj.weight.detach().double().unflatten(1, (H, d)).transpose(0, 1)
    of_values = out.mT @ out
    weights = []
    for cost in (of_keys, of_values):
        energy, directions = torch.linalg.eigh(cost.unflatten(0, (c.kv_heads, -1)).sum(1))
        least = _DAMPING * _above_zero(energy.mean(1, keepdim=True))
        root = (energy.clamp(min=0) + least).sqrt()[:, None]
        weights.append(
            (
                torch.block_diag(*(directions * root @ directions.mT)),
                torch.block_diag(*(directions / root @ directions.mT)),
            )
        )
    return weights


def _above_zero(energy: Tensor) -> Tensor:
    """1 in place of 0, the energy in a layer with weights of 0, where no choice loses anything."""
    return torch.where(energy == 0, 1.0, energy)


def affine(projection: Linear) -> Tensor:
    """(out, in + 1) fp64: the map of [x; 1] that the projection is."""
    weight, bias = projection.weight.detach(), projection.bias
    column = weight.new_zeros(len(weight)) if bias is None else bias.detach()
    return torch.cat((weight, column[:, None]), 1).double()


def _pairs(weight: Tensor, config: ModelConfig) -> Tensor:
    """(n d, D+1) -> (P, n, D+1) complex: rows 2l and 2l+1 of a head are one complex number."""
    split = weight.view(-1, config.plain_head_dim // 2, 2, weight.shape[1]).permute(1, 0, 3, 2)
    return torch.view_as_complex(split.contiguous())


def _numbers(pairs: Tensor) -> Tensor:
    """The inverse of _pairs: (P, n, D+1) complex -> (n 2P, D+1)."""
    return torch.view_as_real(pairs).permute(1, 0, 3, 2).flatten(0, 2)
