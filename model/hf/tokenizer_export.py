"""The tokenizer of an export as files that AutoTokenizer loads, whichever kind it is."""

import json
import sys
from pathlib import Path
from typing import Any

from common.files import read_object, write_file, write_json
from common.schema import as_type
from model.export_files import TOKENIZER_NAME
from model.hf.special_tokens import SECTION
from model.hf.tokenizer import BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID, write_tokenizer

TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
THOUGHTS = ("bot_token_id", "eot_token_id")
FIX = "import its folder again"


def export_tokenizer(checkpoint: Path, out: Path, max_length: int, begins: bool) -> dict[str, int | None]:
    """Writes the tokenizer, and its own file unchanged, so that an import gives it back.

    Args:
        max_length: of a text in tokens, for tokenizer_config.json.
        begins: whether the tokenizer puts bos before every text, as data_pipeline does before a document and
            eval/ before a context.

    Returns:
        The ids of ENDS and THOUGHTS, by name; None for what the tokenizer does not have.

    Raises:
        ValueError: the file is of neither kind, or damaged. OSError: see common.files.replacing.
    """
    path = checkpoint / TOKENIZER_NAME
    if not path.is_file():
        print(f"note: {checkpoint} has no {TOKENIZER_NAME}; {out} gets no tokenizer", file=sys.stderr)
        return dict.fromkeys((*ENDS, *THOUGHTS))
    content = path.read_bytes()
    if content[:1] == b"{":
        ids = _write_json_tokenizer(path, out, max_length)
    else:
        write_tokenizer(path, out, max_length)
        special = {token["content"]: token["id"] for token in _tokenizer(out)["added_tokens"]}
        ids = dict(zip(ENDS, (BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID), strict=True))
        ids |= {name: special.get(f"<{name[:3]} >") for name in THOUGHTS}
    if begins:
        _put_bos_first(out, as_type(int, ids["bos_token_id"], f"{path}: bos_token_id"))
    write_file(out / TOKENIZER_NAME, content)
    return ids


def _write_json_tokenizer(path: Path, out: Path, max_length: int) -> dict[str, int | None]:
    """A tokenizer.json of an import: without the section that special_tokens.py added, which the library
    refuses.
    """
    values = read_object(path, FIX)
    section = as_type(dict[str, int], values.pop(SECTION, None), f"{path}: {SECTION}")
    names = {token["id"]: token["content"] for token in values["added_tokens"]}
    ids = ("bos_id", "eos_id", "pad_id", "bot_id", "eot_id")
    missing = [key for key in ids if section.get(key) not in names]
    if missing:
        raise ValueError(f"{path}: {SECTION}.{missing[0]} is not one of its special tokens; {FIX}")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{end}_token": names[section[f"{end}_id"]] for end in ("bos", "eos", "pad")},
        "padding_side": "left",  # a continuation follows the last token
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    write_file(out / TOKENIZER_JSON, json.dumps(values, ensure_ascii=False).encode())
    write_json(out / TOKENIZER_CONFIG, settings, indent=2)
    return {name: section[name.replace("_token", "")] for name in (*ENDS, *THOUGHTS)}


def _put_bos_first(out: Path, bos_id: int) -> None:
    """Adds bos to what the tokenizer does after splitting, unless it already adds special tokens there."""
    values = _tokenizer(out)
    before = values.get("post_processor")
    if '"SpecialToken"' in json.dumps(before):
        return
    bos = next(token["content"] for token in values["added_tokens"] if token["id"] == bos_id)
    first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
    both = {"type": "Sequence", "processors": [before, template]}
    values["post_processor"] = template if before is None else both
    write_file(out / TOKENIZER_JSON, json.dumps(values, ensure_ascii=False).encode())


def _tokenizer(out: Path) -> dict[str, Any]:
    return read_object(out / TOKENIZER_JSON, FIX)
