"""What gpu_check.py times: decoding, and every backend on packed rows."""

import statistics
from functools import partial
from typing import Any

import torch
from gpu import measure
from gpu_rows import MEASURED, Setting
from measuring import GPU_SIZES, now, our_model, random_tokens

from model import ModelConfig
from model.config.execution import ATTENTION_BACKENDS, EXPERT_BACKENDS, ExecutionConfig
from model.generate import generate
from pretrain.plan import read_model

SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
# Two layers as wide as a model of 1B, with the heads of DeepSeek-V3.
WIDE = {
    **GPU_SIZES,
    "num_hidden_layers": 2,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def decode(setting: Setting) -> None:
    """Tokens per second of greedy generation in bf16 by the real configuration, with initial weights."""
    config = ModelConfig.from_dict(SMALL) if setting.small else read_model(setting.config)
    batch, prompt, new = (2, 16, 8) if setting.small else (8, 512, 128)
    model = our_model(config, setting.device, "bf16", ExecutionConfig()).eval()
    tokens = random_tokens(config, batch, prompt, setting.device)
    with torch.no_grad():
        generate(model, tokens, 2)  # kernels are loaded and tuned
        started = now(tokens)
        generate(model, tokens, 1)
        middle = now(tokens)
        generate(model, tokens, new)
        ended = now(tokens)
    per_token = (ended - middle - (middle - started)) / (new - 1)
    setting.note(
        f"decoding, {batch} rows after {prompt} tokens",
        MEASURED,
        f"{batch / per_token:,.0f} tokens/s, {1000 * per_token:.2f} ms per token; prompt "
        f"{batch * prompt / (middle - started):,.0f} tokens/s",
        tokens_per_second=batch / per_token,
    )


def backends(setting: Setting) -> None:
    """A training step of every backend on packed rows, in two wide layers."""
    config = ModelConfig.from_dict(SMALL if setting.small else WIDE)
    sizes = (setting.device, 2, 64, 1) if setting.small else (setting.device, 4, 4096, 5)
    names = sorted(ATTENTION_BACKENDS, key=lambda name: name == "flex")  # which compiles: last
    pairs = [("auto", name) for name in EXPERT_BACKENDS[1:]] + [(name, "auto") for name in names]
    for attention, experts in pairs:
        what = f"attention {attention}, experts {experts}"
        found = setting.attempt(what, partial(measure, config, attention, experts, *sizes))
        if found is None:
            continue
        middle = statistics.median(found["seconds"])
        text = f"{1000 * middle:.2f} ms for {sizes[1]} x {sizes[2]} tokens, {found['bytes'] / 2**20:,.0f} MiB"
        setting.note(what, MEASURED, text, **found)
