"""The special tokens that training needs, in the tokenizer.json of a Hugging Face folder.

<pad>, <bot>, <eot> and <step> are added where missing. A separate section of the file records which id has
which task; data_pipeline/tokenization/json_tokenizer.py reads it.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from common.schema import as_type
from model.hf.files import FIX, read_json

# How the names of a tokenizer's files begin.
OTHER_FILES = ("tokenizer", "vocab", "merges", "spiece", "tekken", "special_tokens", "added_tokens")
SECTION = "zeromodel"  # key of the file
VOCAB_SIZE = "vocab_size"
ADDED = {"pad_id": "<pad>", "bot_id": "<bot>", "eot_id": "<eot>", "step_separator_id": "<step>"}


# What betrays, in a tokenizer's normalizer or pre_tokenizer, that it changes texts; such are accepted.
CHANGES = {
    '"NFC"': "composes characters (Unicode NFC)",
    '"Metaspace"': "drops the space at which a text begins",
    '"\\u2581"': "reads U+2581 as a space",
}


class SpecialTokens(NamedTuple):
    """What was added to a vocabulary."""

    ids: dict[str, int]  # the section: ids by task, and the vocabulary's size
    known: int  # tokens before
    added: list[int]  # ids that are new


def add_special_tokens(hf: Path, values: dict[str, Any]) -> tuple[dict[str, Any], SpecialTokens] | None:
    """The folder's tokenizer.json with the special tokens and the section; None: it has no tokenizer.

    Args:
        values: config.json.

    Raises:
        ValueError, FileNotFoundError: the tokenizer lies in other files, is of another kind, or does not fit
            the model.
    """
    path = hf / "tokenizer.json"
    if not path.is_file():
        others = sorted(
            file.name for file in hf.iterdir() if file.name.startswith(OTHER_FILES) and file.suffix != ".py"
        )
        if not others:
            return None
        raise FileNotFoundError(
            f"{path} is missing, and {others[0]} is not read; write it with transformers' "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), or delete the tokenizer's files to "
            "import without one"
        )
    tokenizer = read_json(path)
    model = as_type(dict[str, Any], tokenizer.get("model"), f"{path}: model")
    kind = model.get("type", "BPE" if "merges" in model else None)  # GPT-2's file of 2020 has no type
    if kind != "BPE":
        raise ValueError(f"{path} holds a tokenizer of type {kind!r}; only BPE is read")
    vocabulary = as_type(dict[str, int], model.get("vocab"), f"{path}: model.vocab")
    listed = as_type(list[dict[str, Any]], tokenizer.get("added_tokens") or [], f"{path}: added_tokens")
    special: dict[str, int] = {}
    for number, token in enumerate(listed):
        where = f"{path}: added_tokens[{number}]"
        content, token_id, is_special = (
            as_type(hint, token.get(key), f"{where}.{key}")
            for key, hint in (("content", str), ("id", int), ("special", bool))
        )
        vocabulary[content] = token_id
        if is_special:
            special[content] = token_id
    numbers = set(vocabulary.values())
    if not numbers or min(numbers) < 0 or len(numbers) < len(vocabulary):
        raise ValueError(f"{path} has no tokens, ids below 0, or two tokens of one id; {FIX}")
    known = size = max(numbers) + 1
    if known > values["vocab_size"]:
        raise ValueError(
            f"{path} has {known} tokens, but config.json has vocab_size={values['vocab_size']}; use files of "
            "one model"
        )
    ids = _document_ends(hf, values, special)
    for task, name in ADDED.items():
        if name in vocabulary and name not in special:
            raise ValueError(f"{path} has {name} as an ordinary token, which texts can contain; rename it")
        if name not in special:
            special[name] = size
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            listed.append({"id": size, "content": name, **flags, "special": True})
            size += 1
        ids[task] = special[name]
    ids[VOCAB_SIZE] = max(size, values["vocab_size"])
    changed = {"added_tokens": listed, "truncation": None, "padding": None, SECTION: ids}
    return {**tokenizer, **changed}, SpecialTokens(ids, known, list(range(known, size)))


def changes_of_texts(tokenizer: dict[str, Any]) -> list[str]:
    """What of a text does not come back from a tokenizer.json; other losses are refused where it is used."""
    steps = json.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")])
    return [what for mark, what in CHANGES.items() if mark in steps]


def _document_ends(hf: Path, values: dict[str, Any], special: dict[str, int]) -> dict[str, int]:
    """Ids of the tokens before and after a document; without one for the start, the end's (GPT-2)."""
    path, found = hf / "tokenizer_config.json", dict[str, int | None]()
    named = read_json(path) if path.is_file() else {}
    for end in ("bos", "eos"):
        key = f"{end}_token"
        token = as_type(str | dict[str, Any] | None, named.get(key), f"{path}: {key}")
        if token is None:
            number = as_type(int | list[int] | None, values.get(f"{key}_id"), f"config.json: {key}_id")
            found[end] = next(iter(number), None) if isinstance(number, list) else number
        else:
            content = token.get("content") if isinstance(token, dict) else token
            found[end] = special.get(as_type(str, content, f"{path}: {key}.content"))
    eos = found["eos"]
    bos = eos if found["bos"] is None else found["bos"]
    if bos is None or eos is None or not {bos, eos} <= set(special.values()):
        raise ValueError(
            f"{hf} has bos id {bos} and eos id {eos}, which are not special tokens of its tokenizer.json; "
            "name them as bos_token and eos_token in tokenizer_config.json"
        )
    return {"bos_id": bos, "eos_id": eos}
