"""The tokenizer of a Hugging Face model: a tokenizer.json with a section that names its special tokens, which
`python -m model.hf import` writes. Needs the optional extra [hf].

Only tokenizers that lose nothing are accepted, such as the byte-level BPE of GPT-2 and Llama 3, and two kinds
that lose little: Qwen's composes characters (Unicode NFC), Mistral's (Metaspace) drops a space at which a
text begins. The latter, like Llama 2's, also reads U+2581 as a space. No text encodes to a special token; the
special token <step> is the space between two steps of a chain of thought.
"""

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from itertools import groupby
from pathlib import Path

from common.schema import from_plain
from data_pipeline.errors import DataError

SECTION = "zeromodel"  # key of the file, see model/hf/special_tokens.py


@dataclass(frozen=True)
class SpecialIds:
    """The section: the rows of the model's embedding, and those of the special tokens."""

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    bot_id: int
    eot_id: int
    step_separator_id: int


# Spaces, case, and forms of Unicode that some tokenizers change.
PROBE = " a  B\tc\n\n1234 <bot><|endoftext|></s> e\u0301 \ufb01 \u6771 \U0001f600 "


def check_lossless(
    path: Path,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    accepted: Callable[[str], set[str]] = lambda text: {text},
) -> None:
    """Raises DataError if PROBE does not come back, with and without its spaces at the ends.

    Args:
        accepted: what may come back of a text.
    """
    for text in (PROBE, PROBE.strip()):
        if (back := decode(encode(text))) not in accepted(text):
            raise DataError(
                f"{path} gives {back!r} back for {text!r}: use a tokenizer that loses nothing, such as one "
                "that data_pipeline trained, or the byte-level BPE of GPT-2 and Llama 3"
            )


def _nearly(text: str) -> set[str]:
    """The text, composed (NFC) or not, with or without a space at its start."""
    forms = {text, unicodedata.normalize("NFC", text)}
    return forms | {form.removeprefix(" ") for form in forms}


class JsonTokenizer:
    """What tokenizer.Tokenizer needs of such a file.

    Args:
        content: of the file.
        path: named in errors.

    Raises:
        DataError: the extra is not installed, or the file is damaged, has no section, or loses text.
    """

    def __init__(self, content: bytes, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise DataError(
                f"{path} is a Hugging Face tokenizer, which needs the optional extra: pip install -e '.[hf]'"
            ) from error
        try:
            values = json.loads(content)
            ids = values.pop(SECTION, None)
            core = Tokenizer.from_str(json.dumps(values))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{path} is not a tokenizer.json ({error}): import its folder again") from error
        if ids is None:
            raise DataError(
                f"{path} does not name its special tokens: convert its folder with python -m model.hf import"
            )
        try:
            special = from_plain(SpecialIds, ids, SECTION)
        except ValueError as error:
            raise DataError(f"{path}: {error}: import its folder again") from error
        self.vocab_size, *numbers = astuple(special)
        self.pad_id, self.bos_id, self.eos_id, self.bot_id, self.eot_id, self.step_separator_id = numbers
        known = core.get_vocab_size(with_added_tokens=True)
        if known > self.vocab_size or not 0 <= min(numbers) <= max(numbers) < self.vocab_size:
            raise DataError(
                f"{path}: its {known} tokens or its special ids {numbers} are not below vocab_size "
                f"{self.vocab_size}: import its folder again"
            )
        self._special = set(numbers)
        core.encode_special_tokens = True  # text that looks like a special token stays text
        self._core = core
        check_lossless(path, self.encode, self.decode, _nearly)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Raises DataError if it spells a special token."""
        ids: list[int] = self._core.encode(text, add_special_tokens=False).ids
        if not self._special.isdisjoint(ids):
            raise DataError(f"the text {text[:60]!r} gives a special token: use another tokenizer")
        return ids

    def text_bytes(self) -> None:
        """Not known for every such tokenizer, see tokenizer.Tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens other than <step> are skipped."""
        parts = groupby(ids, key=lambda token: token == self.step_separator_id)
        return "".join(
            " " * len(list(part)) if step else self._core.decode(list(part), skip_special_tokens=True)
            for step, part in parts
        )
