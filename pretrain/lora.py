"""Low-rank adaptation (LoRA, Hu et al., arXiv 2106.09685) of a model that starts from given weights.

The only file that imports peft, the optional extra [lora]. Linear layers compute W x + alpha/r B A dropout(x)
with W frozen, A (r, in) random and B (out, r) initially zero. Embeddings, head, norms, routers and routed
experts are frozen as well; new parameters, those of latent thoughts, are trained in full.

Checkpoints hold only what is trained. init.BASE holds the frozen weights, once per run; exports are merged.
"""

import hashlib
import importlib.util
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.layers import Linear
from pretrain.config import LoraConfig
from pretrain.init import base_weights
from pretrain.parts import Part

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"  # as peft names them


def identity(config: LoraConfig, base: str | None) -> dict[str, Any]:
    """What a checkpoint's adapters depend on: the weights they adapt, and their scale.

    Args:
        base: sha256 of the weights that the run starts from; None: it starts from initial ones.

    Raises:
        ValueError: one line; no weights to start from, or no peft.
    """
    if base is None:
        raise ValueError(
            "lora freezes the weights that a run starts from, but this one has none; give them with --init, "
            "or leave lora out"
        )
    if importlib.util.find_spec("peft") is None:
        raise ValueError("lora needs peft, which is not installed: pip install -e '.[lora]'")
    return {"r": config.r, "alpha": config.alpha, "base": base[:16]}


def adapt(model: nn.Module, config: LoraConfig, seed: int, new: Collection[str]) -> None:
    """Wraps every Linear in an adapter, except for the `new` parameters, and freezes everything except those.

    The adapters' initial weights are a function of (seed, model): A uniform in +-1/sqrt(in), B zero.
    """
    import peft

    linears = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    targets = [name for name in linears if f"{name}.weight" not in new]
    settings = peft.LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        if name in new:
            parameter.requires_grad_(True)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Makes the adapters' dropout in an optimizer step a function of (seed, step, rank)."""
    digest = hashlib.sha256(f"dropout:{seed}:{step}:{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "little"))


def merged(run: Path, trained: Iterable[Part], adapters: dict[str, Any]) -> Iterator[Part]:
    """The plain model's weights, fp32: W + alpha/r B A instead of W. Memory holds all adapters.

    Args:
        run: folder that holds init.BASE.
        trained: what was trained, in fp32 and perhaps flat, and buffers.
        adapters: see `identity`.

    Raises:
        FileNotFoundError, ValueError: see init.base_weights.
    """
    scale = adapters["alpha"] / adapters["r"]
    base = base_weights(run, adapters["base"])
    matrices: dict[str, Tensor] = {}
    replaced = set[str]()
    for part in trained:
        if part.name.endswith((_A, _B)):
            matrices[part.name] = part.value.cpu()
        else:
            replaced.add(part.name)
            yield part
    for name, value in base:
        layer = name.removesuffix(".weight")
        if layer + _A in matrices:
            rows, columns = value.shape
            up, down = matrices[layer + _B].view(rows, -1), matrices[layer + _A].view(-1, columns)
            yield Part(name, value + scale * up @ down)
        elif name not in replaced:
            yield Part(name, value)
