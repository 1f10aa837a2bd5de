"""Latent attention against the equations, one token and one head at a time."""

import torch


def rotated(vector: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """RoPE as multiplication of complex numbers formed from neighbouring pairs."""
    width = len(vector)
    angle = torch.tensor([position * theta ** (-2 * i / width) for i in range(width // 2)])
    turned = torch.view_as_complex(vector.reshape(-1, 2)) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten()


def rms_normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.pow(2).mean() + 1e-6).sqrt()


def literal_attention(layer, x: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V3 eq. 1-11 for x (T, D)."""
    c, out = layer.config, []
    N, V = c.qk_nope_head_dim, c.v_head_dim
    latents, rope_keys = [], []
    for position, h in enumerate(x):
        down = layer.kv_a_proj_with_mqa.weight @ h
        latents.append(rms_normed(down[: c.kv_lora_rank], layer.kv_a_layernorm.weight))
        rope_keys.append(rotated(down[c.kv_lora_rank :], position, c.rope_theta))
    for position, h in enumerate(x):
        if c.q_lora_rank is None:
            query = layer.q_proj.weight @ h
        else:
            query = layer.q_b_proj.weight @ rms_normed(layer.q_a_proj.weight @ h, layer.q_a_layernorm.weight)
        heads = []
        for head, q in enumerate(query.view(c.num_attention_heads, -1)):
            up = layer.kv_b_proj.weight.view(c.num_attention_heads, N + V, -1)[head]
            q_rope = rotated(q[N:], position, c.rope_theta)
            scores = torch.stack(
                [
                    (q[:N] @ (up[:N] @ latents[s]) + q_rope @ rope_keys[s]) / (c.qk_head_dim**0.5)
                    for s in range(position + 1)
                ]
            ).softmax(0)
            heads.append(sum(w * (up[N:] @ latents[s]) for s, w in enumerate(scores)))
        out.append(layer.o_proj.weight @ torch.cat(heads))
    return torch.stack(out)


def test_attention_follows_the_equations(build):
    for variant in ("deepseek", "q_lora", "wide_values"):
        model = build(variant)
        layer = model.model.layers[0].self_attn
        x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            torch.nn.init.uniform_(layer.kv_a_layernorm.weight, 0.5, 1.5)
            context = model.attention_context(torch.zeros(2, 9, dtype=torch.long))
            expected = torch.stack([literal_attention(layer, row) for row in x])
            torch.testing.assert_close(layer(x, context).out, expected, rtol=0, atol=2e-5)


def literal_grouped_query_attention(layer, x: torch.Tensor) -> torch.Tensor:
    """Softmax attention for x (T, D), every query head with the key-value head of its group."""
    c, out = layer.config, []
    width, group = c.plain_head_dim, c.num_attention_heads // c.kv_heads
    for position, h in enumerate(x):
        heads = []
        for head in range(c.num_attention_heads):
            rows, kv_rows = (slice(i * width, (i + 1) * width) for i in (head, head // group))
            query = layer.q_proj.weight[rows] @ h
            keys = [layer.k_proj.weight[kv_rows] @ x[s] for s in range(position + 1)]
            if c.qk_norm:
                query, keys = rms_normed(query, torch.ones(())), [rms_normed(k, torch.ones(())) for k in keys]
            query = rotated(query, position, c.rope_theta)
            keys = torch.stack([rotated(k, s, c.rope_theta) for s, k in enumerate(keys)])
            weights = (keys @ query / width**0.5).softmax(0)
            heads.append(sum(w * (layer.v_proj.weight[kv_rows] @ x[s]) for s, w in enumerate(weights)))
        out.append(layer.o_proj.weight @ torch.cat(heads))
    return torch.stack(out)


def test_grouped_query_attention_follows_its_definition(build):
    for variant in ("grouped_query", "plain"):
        model = build(variant)
        layer = model.model.layers[0].self_attn
        x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            context = model.attention_context(torch.zeros(2, 9, dtype=torch.long))
            expected = torch.stack([literal_grouped_query_attention(layer, row) for row in x])
            torch.testing.assert_close(layer(x, context).out, expected, rtol=0, atol=2e-5)
