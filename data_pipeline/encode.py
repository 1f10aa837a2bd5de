"""Documents -> tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.shards import IGNORE_INDEX, EncodedDocument
from data_pipeline.sources import Document, LabelledDocument
from data_pipeline.tokenizer import BOS_ID, EOS_ID, Tokenizer

AnyDocument = Document | LabelledDocument


def encoder(source: dict[str, Any], labelled: bool, tokenizer: Tokenizer) -> Callable[[Any], EncodedDocument]:
    """The function from a document of `source`, as the recipe describes it, to its tokens."""
    mask_prompt = source.get("mask_prompt", False)
    if not labelled:
        return partial(_encode, tokenizer=tokenizer, mask_prompt=mask_prompt)
    if mask_prompt:
        raise DataError(
            f"source {source['name']!r} has mask_prompt, but its labels say what to predict: remove it"
        )
    return partial(encode_labelled, ids=CharacterIds(source["name"], tokenizer))


def _encode(document: Document, tokenizer: Tokenizer, mask_prompt: bool) -> EncodedDocument:
    """A masked prompt is encoded by itself, so that the loss begins exactly where the completion does."""
    if not mask_prompt:
        return EncodedDocument(tokenizer.encode(document.text, bos=True, eos=True))
    prompt = tokenizer.encode(document.prompt, bos=True)
    return EncodedDocument(prompt + tokenizer.encode(document.completion, eos=True), len(prompt))


class CharacterIds(dict[str, int]):
    """Character -> its one token id, looked up in the tokenizer at first use."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._source, self._tokenizer = source, tokenizer

    def __missing__(self, character: str) -> int:
        assert len(character) == 1, character
        ids = self._tokenizer.encode(character)
        if len(ids) != 1:
            raise DataError(
                f"source {self._source!r} has the character {character!r} in text or labels, which is "
                f"{len(ids)} tokens, not 1: raise tokenizer.vocab_size or tokenizer.train_bytes"
            )
        self[character] = ids[0]
        return ids[0]


def encode_labelled(document: LabelledDocument, ids: CharacterIds) -> EncodedDocument:
    """One token a character, so that a label stays at its character; bos and eos have no label."""
    tokens = [BOS_ID, *(ids[character] for character in document.text), EOS_ID]
    labels = [IGNORE_INDEX] * len(tokens)
    for index, character in document.labels:
        assert 0 <= index < len(document.text), (index, document.text)
        labels[1 + index] = ids[character]
    return EncodedDocument(tokens, labels=labels)
