"""Latent attention against the equations, one token and one head at a time."""

import pytest
import torch

from model import ModelConfig
from model.attention import SCORED_QUERIES, MultiHeadLatentAttention
from model.cache import LatentCache
from model.config.execution import ExecutionConfig
from model.context import build_context
from model.layers import rotate, rotations

from .conftest import SMALL, YARN


def rotated(vector: torch.Tensor, position: int, config: ModelConfig) -> torch.Tensor:
    """RoPE as multiplication of complex numbers formed from neighbouring pairs."""
    width = config.rope_pairs_dim or len(vector)
    pairs = range(width // 2) if config.rope_pairs is None else config.rope_pairs
    angle = torch.tensor([position * config.rope_theta ** (-2 * i / width) for i in pairs])
    turned = torch.view_as_complex(vector.reshape(-1, 2)) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten()


def rms_normed(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return (1 if weight is None else weight) * x / (x.pow(2).mean() + 1e-6).sqrt()


def affine(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return layer.weight @ x + (0 if layer.bias is None else layer.bias)


def literal_attention(layer: MultiHeadLatentAttention, x: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V3 eq. 1-11 for x (T, D), with the biases and norms that a config may add or leave out."""
    c, out = layer.config, []
    C, N, V = c.kv_lora_rank, c.qk_nope_head_dim, c.v_head_dim
    up = layer.kv_b_proj.weight.view(c.num_attention_heads, N + V, C)
    latents, rope_keys = [], []
    for h in x:
        down = affine(layer.kv_a_proj_with_mqa, h)
        latents.append(rms_normed(down[:C], layer.kv_a_layernorm.weight) if c.latent_norm else down[:C])
        rope_keys.append(down[C:])

    def turned(whole: torch.Tensor, position: int) -> torch.Tensor:
        return torch.cat((whole[:N], rotated(whole[N:], position, c)))

    for position, h in enumerate(x):
        if c.q_lora_rank is None:
            query = affine(layer.q_proj, h)
        else:
            query = layer.q_b_proj.weight @ rms_normed(layer.q_a_proj.weight @ h, layer.q_a_layernorm.weight)
        heads = []
        for head, q in enumerate(query.view(c.num_attention_heads, -1)):
            keys = [torch.cat((up[head, :N] @ latents[s], rope_keys[s])) for s in range(position + 1)]
            if c.qk_norm:
                q = rms_normed(q, layer.q_norm.weight)
                keys = [rms_normed(k, layer.k_norm.weight) for k in keys]
            q = turned(q, position)
            scores = torch.stack([q @ turned(k, s) / c.qk_head_dim**0.5 for s, k in enumerate(keys)])
            heads.append(sum(w * (up[head, N:] @ latents[s]) for s, w in enumerate(scores.softmax(0))))
        out.append(layer.o_proj.weight @ torch.cat(heads))
    return torch.stack(out)


@pytest.mark.parametrize("R", [2, 6, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_in_real_numbers_is_the_complex_product(R, dtype):
    """On a CPU to the last digit, where eager rotation is that product; while compiling, to rounding."""
    generator = torch.Generator().manual_seed(R)
    position = torch.arange(17)[None] * 31
    turn = rotations(position, ModelConfig.from_dict({**SMALL, "qk_rope_head_dim": R}))
    angles = position[..., None].float() * 10_000.0 ** -(torch.arange(0, R, 2) / R)
    whole = torch.randn(3, 17, 5, R + 3, generator=generator).to(dtype)
    for x in (whole[..., 3:], whole[..., :R].contiguous(), whole[:, :, 0, :R]):
        x = x.requires_grad_()
        upstream = torch.randn(x.shape, generator=generator).to(dtype)
        wide = x.detach().float()
        if any(n % 2 for n in (wide.storage_offset(), *wide.stride()[:-1])):  # no complex view of that
            wide = wide.clone(memory_format=torch.contiguous_format)
        factor = torch.polar(torch.ones(1, 17, R // 2), angles)
        factor = factor[:, :, None] if x.dim() == 4 else factor
        expected = torch.view_as_real(torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * factor).flatten(-2)
        results = []
        for compiling in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
                out = rotate(x, turn)
            results.append((out, *torch.autograd.grad(out, x, upstream)))
        assert torch.equal(results[0][0], expected.to(dtype))
        limit = 1e-6 if dtype == torch.float32 else 0.01
        for found, exact in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(found, exact, rtol=limit, atol=limit)


FORMS = {
    "deepseek": {},
    "q_lora": {"q_lora_rank": 12},
    "wide_values": {"v_head_dim": 16},
    "biases": {"qkv_bias": True},
    "free latents": {"latent_norm": False, "qkv_bias": True},
    "pairs": {"rope_pairs": [3, 0], "rope_pairs_dim": 10},
    "normed": {"qk_norm": True, "qkv_bias": True},
    "normed without scales": {"qk_norm": True, "rms_norm_affine": False, "q_lora_rank": 12},
    "normed free latents": {"qk_norm": True, "latent_norm": False, "rope_pairs": [0, 0], "rope_pairs_dim": 4},
}


def make_attention(**form) -> MultiHeadLatentAttention:
    """Latent attention with no parameter at a value that would hide a mistake."""
    layer = MultiHeadLatentAttention(ModelConfig.from_dict({**SMALL, **form}), 0, ExecutionConfig())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(0, 0.3, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
    return layer


def random_states(rows: int, length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, length, 24, generator=torch.Generator().manual_seed(3)).to(dtype)


def context_of(layer: MultiHeadLatentAttention, x: torch.Tensor, **given):
    tokens = torch.zeros(x.shape[:2], dtype=torch.long)
    return build_context(layer.config, ExecutionConfig(), x.dtype, tokens, **given)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_attention_follows_the_equations(form):
    layer, x = make_attention(**FORMS[form]), random_states(2, 9)
    expected = torch.stack([literal_attention(layer, row) for row in x])
    torch.testing.assert_close(layer(x, context_of(layer, x)).out, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 4]])
@torch.no_grad()
def test_the_form_over_cached_latents_computes_the_same(monkeypatch, form, chunks):
    """Forced where the expanded form would be cheaper too; the cache holds what `held_widths` says."""
    layer, x = make_attention(**FORMS[form]), random_states(2, 9)
    expected = layer(x, context_of(layer, x)).out
    monkeypatch.setattr(MultiHeadLatentAttention, "_absorbing_is_cheaper", lambda *_: True)
    monkeypatch.setattr(MultiHeadLatentAttention, "_keys_and_values", None)
    cache, parts = LatentCache(), []
    for part in x.split(chunks, 1):
        parts.append(layer(part, context_of(layer, part, cache=cache)).out)
        cache.advance(part.shape[1])
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=2e-5)
    heads = layer.config.num_attention_heads if layer.config.qk_norm else 0
    assert cache.numel() == 18 * (layer.config.kv_lora_rank + layer.config.qk_rope_head_dim + heads)


@torch.no_grad()
def test_the_scores_of_a_long_prefill_over_normed_keys_are_never_held():
    """Latents so narrow that the form over them would be cheaper; a prefill in it would hold T x T scores."""
    layer = make_attention(qk_norm=True, kv_lora_rank=2, v_head_dim=32)
    assert layer._absorbing_is_cheaper(SCORED_QUERIES, SCORED_QUERIES)
    assert not layer._absorbing_is_cheaper(SCORED_QUERIES + 1, SCORED_QUERIES + 1)
    assert make_attention(kv_lora_rank=2, v_head_dim=32)._absorbing_is_cheaper(1000, 1000)


@torch.no_grad()
def test_padded_rows_of_normed_keys_decode_alike(monkeypatch):
    """A mask of its own for every row, in the form that multiplies scores by 1/rms."""
    layer, x = make_attention(qk_norm=True, rope_scaling=YARN), random_states(2, 9)
    real = torch.ones(2, 9)
    real[0, :4] = 0
    expected = layer(x, context_of(layer, x, attention_mask=real)).out
    monkeypatch.setattr(MultiHeadLatentAttention, "_absorbing_is_cheaper", lambda *_: True)
    cache = LatentCache()
    layer(x[:, :6], context_of(layer, x[:, :6], attention_mask=real[:, :6], cache=cache))
    cache.advance(6)
    found = layer(x[:, 6:], context_of(layer, x[:, 6:], attention_mask=real, cache=cache)).out
    torch.testing.assert_close(found, expected[:, 6:], rtol=0, atol=2e-5)


@torch.no_grad()
def test_normed_keys_in_16_bits_stay_close_in_both_forms(monkeypatch):
    layer, x = make_attention(qk_norm=True), random_states(2, 9)
    expected = layer(x, context_of(layer, x)).out
    layer, half = layer.bfloat16(), x.bfloat16()
    limit = 0.03 * float(expected.abs().max())
    assert (layer(half, context_of(layer, half)).out - expected).abs().max() < limit
    monkeypatch.setattr(MultiHeadLatentAttention, "_absorbing_is_cheaper", lambda *_: True)
    found = layer(half, context_of(layer, half, cache=LatentCache())).out
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < limit


@pytest.mark.parametrize("form", ["normed", "normed without scales", "free latents"])
def test_gradients_equal_finite_differences(form):
    layer, x = make_attention(**FORMS[form]).double(), random_states(1, 5, torch.float64)
    context = context_of(layer, x)
    assert torch.autograd.gradcheck(
        lambda x, *_: layer(x, context).out, (x.requires_grad_(), *layer.parameters()), fast_mode=True
    )


def literal_grouped_query_attention(layer, x: torch.Tensor) -> torch.Tensor:
    """Softmax attention for x (T, D), every query head with the key-value head of its group."""
    c, out = layer.config, []
    width, group = c.plain_head_dim, c.num_attention_heads // c.kv_heads
    for position, h in enumerate(x):
        heads = []
        for head in range(c.num_attention_heads):
            rows, kv_rows = (slice(i * width, (i + 1) * width) for i in (head, head // group))
            query = affine(layer.q_proj, h)[rows]
            keys = [affine(layer.k_proj, x[s])[kv_rows] for s in range(position + 1)]
            if c.qk_norm:
                query = rms_normed(query, layer.q_norm.weight)
                keys = [rms_normed(k, layer.k_norm.weight) for k in keys]
            query = rotated(query, position, c)
            keys = torch.stack([rotated(k, s, c) for s, k in enumerate(keys)])
            weights = (keys @ query / width**0.5).softmax(0)
            heads.append(sum(w * affine(layer.v_proj, x[s])[kv_rows] for s, w in enumerate(weights)))
        out.append(layer.o_proj.weight @ torch.cat(heads))
    return torch.stack(out)


def test_grouped_query_attention_follows_its_definition(build):
    for variant in ("grouped_query", "plain", "qwen2"):
        model = build(variant)
        layer = model.model.layers[0].self_attn
        x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            context = model.attention_context(torch.zeros(2, 9, dtype=torch.long))
            expected = torch.stack([literal_grouped_query_attention(layer, row) for row in x])
            torch.testing.assert_close(layer(x, context).out, expected, rtol=0, atol=2e-5)
