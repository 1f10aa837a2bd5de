"""Low-rank adaptation (LoRA, Hu et al., arXiv 2106.09685) of a model that starts from given weights.

The only file that imports peft, the optional extra [lora]. Linear layers compute W x + alpha/r B A dropout(x)
with W frozen, A (r, in) random and B (out, r) initially zero. Embeddings, head, norms, routers and routed
experts are frozen as well; new parameters, those of latent thoughts, are trained in full.

Checkpoints hold only what is trained. BASE holds the frozen weights, once per run; exports are merged.
"""

import hashlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from common.files import replacing
from model.export_files import TRAINING_ONLY
from model.layers import Linear
from pretrain.config import LoraConfig

NEW = ("latent_thoughts.", TRAINING_ONLY)  # the parameters that the given weights lack
BASE = "base.safetensors"  # in the run's folder: the weights that training started from
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"  # as peft names them


def identity(config: LoraConfig, weights: Path | None) -> dict[str, Any]:
    """What a checkpoint's adapters depend on: the weights they adapt, and their scale.

    Args:
        weights: safetensors to start from.

    Raises:
        ValueError, FileNotFoundError: one line; no weights to start from, or no peft.
    """
    if weights is None:
        raise ValueError(
            "lora freezes the weights that a run starts from, but this one has none; start distill/main.py "
            "with --init, or leave lora out"
        )
    if importlib.util.find_spec("peft") is None:
        raise ValueError("lora needs peft, which is not installed: pip install -e '.[lora]'")
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing; give --init the export/ folder of a run")
    return {"r": config.r, "alpha": config.alpha, "base": _digest(weights)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def adapt(model: nn.Module, config: LoraConfig, seed: int) -> None:
    """Wraps every Linear in an adapter, except in latent thoughts, and freezes everything except those.

    The adapters' initial weights are a function of (seed, model): A uniform in +-1/sqrt(in), B zero.
    """
    import peft

    linears = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    targets = [name for name in linears if not name.startswith(NEW)]
    settings = peft.LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        if name.startswith(NEW):
            parameter.requires_grad_(True)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Makes the adapters' dropout in an optimizer step a function of (seed, step, rank)."""
    digest = hashlib.sha256(f"dropout:{seed}:{step}:{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "little"))


def save_base(run: Path, weights: Path) -> None:
    """Copies the weights that training starts from to BASE, in the run's folder."""
    with replacing(run / BASE) as temporary:
        shutil.copyfile(weights, temporary)


def merged(run: Path, trained: dict[str, Tensor], adapters: dict[str, Any]) -> dict[str, Tensor]:
    """The plain model's weights, fp32: W + alpha/r B A instead of W.

    Args:
        run: folder that holds BASE.
        trained: name -> fp32 value of what was trained, perhaps flat, and of buffers.
        adapters: see `identity`.

    Raises:
        FileNotFoundError: BASE is missing.
        ValueError: BASE is damaged.
    """
    if not (run / BASE).is_file():
        raise FileNotFoundError(
            f"{run / BASE} is missing, the weights that the run's adapters adapt; copy --init's "
            "model.safetensors there"
        )
    if _digest(run / BASE) != adapters["base"]:
        raise ValueError(
            f"{run / BASE} is damaged: it does not hold the weights that the run's adapters adapt; copy "
            "--init's model.safetensors over it"
        )
    scale = adapters["alpha"] / adapters["r"]
    weights = {name: value.float() for name, value in load_file(run / BASE).items()}
    for name, value in trained.items():
        if name.endswith(_A):
            layer = name.removesuffix(_A)
            base, up = weights[f"{layer}.weight"], trained[layer + _B].cpu()
            rows, columns = base.shape
            weights[f"{layer}.weight"] = base + scale * up.view(rows, -1) @ value.cpu().view(-1, columns)
        elif not name.endswith(_B):
            weights[name] = value
    return weights
