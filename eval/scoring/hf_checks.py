"""What a Hugging Face folder must be before its scores mean anything: whole, used whole, finite, and as large
as its config.json says. transformers fills in what is missing with random numbers and only logs a table.
"""

import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from torch import nn

from data_pipeline.tokenization.json_tokenizer import PROBE
from model.export_files import CONFIG_NAME
from model.hf.files import FIX, HARMLESS, read_json
from model.weight_files import Stored, check_values

# Keys of config.json that choose the code of attention and experts. Other values than these can name a
# repository of compiled kernels, which transformers then downloads and runs.
CODE_KEYS = ("attn_implementation", "experts_implementation")
OWN_CODE = (None, "eager", "sdpa", "grouped_mm", "batched_mm")
SHOWN = 3  # names in an error line


def check_folder(folder: Path, stored: Mapping[str, Stored], trust_remote_code: bool) -> None:
    """Refuses what transformers must not even begin to load.

    Args:
        stored: the tensors, by the files' headers.

    Raises:
        ValueError: an adapter, quantized weights, foreign kernels, a damaged generation_config.json, or more
            layers than there are tensors.
    """
    path, generation = folder / CONFIG_NAME, folder / "generation_config.json"
    if generation.is_file():
        read_json(generation)  # transformers ignores one that is damaged
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter: merge it into its model (merge_and_unload) and save that"
        )
    widest = max((size for tensor in stored.values() for size in tensor.shape), default=0)
    for key, value in _items(read_json(path)):
        if key == "quantization_config" and value:
            raise ValueError(f"{path} has a quantization_config: convert the weights to bf16 first")
        if key == "transformers_weights" and value:
            raise ValueError(f"{path} names its own file of weights ({key}): remove the key")
        if key.removeprefix("_") in CODE_KEYS and value not in OWN_CODE and not trust_remote_code:
            raise ValueError(f"{path} has {key}={value!r}, which can load foreign code: remove the key")
        if type(value) is int:
            limit = None
            if re.search("(^|_)layers?$", key) and key != "max_window_layers":  # a threshold
                limit, what = len(stored), f"{len(stored)} tensors"
            elif "expert" in key:
                limit, what = max(len(stored), widest), f"{len(stored)} tensors of at most {widest} rows"
            if limit is not None and value > limit:
                raise ValueError(f"{path} has {key}={value}, but its weights only {what}: {FIX}")


def _items(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values at any depth."""
    ahead: list[Any] = [values]
    while ahead:
        value = ahead.pop()
        if isinstance(value, dict):
            yield from value.items()
            ahead += value.values()
        elif isinstance(value, list):
            ahead += value


def check_parameters(folder: Path, network: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Raises ValueError if the network, on the meta device, has twice the parameters that are stored.

    What is missing would be allocated; up to twice is, so that the missing tensor can be named.
    """
    needed = sum(parameter.numel() for parameter in network.parameters())
    found = sum(tensor.size for tensor in stored.values())
    if needed > 2 * found:
        raise ValueError(
            f"{folder / CONFIG_NAME} describes a model of {needed:,} parameters, but its weights have only"
            f" {found:,}: {FIX}"
        )


def check_loaded(folder: Path, network: Any, info: Mapping[str, Any]) -> None:
    """Raises ValueError unless all weights came from the folder, all of those are used, and all are finite.

    Tied weights count once, and masks and tables that older versions saved may be left over.

    Args:
        info: what transformers returns for output_loading_info.
    """
    unused = [name for name in info["unexpected_keys"] if HARMLESS.search(name) is None]
    mismatched = [f"{name} {tuple(found)}" for name, found, _ in info["mismatched_keys"]]
    for what, names in (
        ("lacks", sorted(info["missing_keys"])),
        ("has tensors that do not belong to the model,", sorted(unused)),
        ("has tensors of another shape than config.json says,", sorted(mismatched)),
        ("has tensors that cannot be read,", sorted(map(str, info["error_msgs"]))),
    ):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise ValueError(f"{folder} {what} {', '.join(names[:SHOWN])}{more}: {FIX}")
    tied = network.get_expanded_tied_weights_keys(all_submodels=True)
    if untied := sorted(set(tied) - set(network.all_tied_weights_keys)):
        raise ValueError(
            f"{folder} has an {untied[0]} that differs from {tied[untied[0]]}, but its config.json ties them:"
            " correct one of them"
        )
    kept = set(network.state_dict())
    buffers = [(n, b) for n, b in network.named_buffers() if n in kept and b.is_floating_point()]
    for name, tensor in (*network.named_parameters(), *buffers):
        check_values(name, tensor.detach(), folder, FIX)


def probe(tokenizer: Any) -> str:
    """What comes back of PROBE."""
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def check_tokenizer(folder: Path, back: str) -> None:
    """Raises ValueError if a tokenizer loses letters; warns if it only loses spaces or forms of Unicode.

    Many good models change those: their training did not see them either.

    Args:
        back: see probe.
    """
    if _letters(back) != _letters(PROBE):
        raise ValueError(
            f"the tokenizer of {folder} gives {back!r} back for {PROBE!r}: it loses text, use the one"
            " that the model was trained with"
        )
    if back != PROBE and parent_process() is None:
        print(
            f"warning: the tokenizer of {folder} gives {back!r} back for {PROBE!r}: the model does not see"
            " prompts exactly as they are written",
            file=sys.stderr,
        )


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())
