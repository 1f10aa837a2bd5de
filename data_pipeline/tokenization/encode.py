"""Documents -> tokens.

A traced document is `[bos] Q <bot> C <eot> A [eos]`: question, chain of thought, answer. The question, each
step, ANSWER_PREFIX and " value" are encoded separately, so that the tokens of each part are the same whatever
surrounds it: a question as evaluation asks it, an answer behind latent thoughts instead of the chain.
The steps are joined by one space, as in the published data (GSM8K-AUG of Deng et al. 2023, which CODI, PCCoT
and KaVa train on, has one equation after another). That space is a token of its own (see tokenizer.py), which
separates the steps for the methods that leave some out.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.shards.format import IGNORE_INDEX, EncodedDocument
from data_pipeline.sources.documents import ANSWER_PREFIX, Document, LabelledDocument, TracedDocument
from data_pipeline.tokenization.tokenizer import Tokenizer


def encoder(source: dict[str, Any], labelled: bool, tokenizer: Tokenizer) -> Callable[[Any], EncodedDocument]:
    """The function from a document of `source`, as the recipe describes it, to its tokens."""
    mask_prompt = source.get("mask_prompt", False)
    if not labelled:
        return partial(_encode, source=source["name"], tokenizer=tokenizer, mask_prompt=mask_prompt)
    if mask_prompt:
        raise DataError(
            f"source {source['name']!r} has mask_prompt, but its labels say what to predict: remove it"
        )
    return partial(encode_labelled, ids=CharacterIds(source["name"], tokenizer))


def _encode(
    document: Document | TracedDocument, source: str, tokenizer: Tokenizer, mask_prompt: bool
) -> EncodedDocument:
    """A masked prompt is encoded separately, so that the loss begins exactly where the completion does."""
    if isinstance(document, TracedDocument):
        if mask_prompt:
            raise DataError(
                f"source {source!r} has mask_prompt, but its questions are masked in any case: remove it"
            )
        return encode_traced(document, tokenizer)
    if not mask_prompt:
        return EncodedDocument(tokenizer.encode(document.text, bos=True, eos=True))
    prompt = tokenizer.encode(document.prompt, bos=True)
    return EncodedDocument(prompt + tokenizer.encode(document.completion, eos=True), len(prompt))


class CharacterIds(dict[str, int]):
    """Character -> its one token id, looked up in the tokenizer at first use."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._source, self.tokenizer = source, tokenizer

    def __missing__(self, character: str) -> int:
        assert len(character) == 1, character
        ids = self.tokenizer.encode(character)
        if len(ids) != 1:
            raise DataError(
                f"source {self._source!r} has the character {character!r} in text or labels, which is "
                f"{len(ids)} tokens, not 1: raise tokenizer.vocab_size or tokenizer.train_bytes"
            )
        self[character] = ids[0]
        return ids[0]


def encode_labelled(document: LabelledDocument, ids: CharacterIds) -> EncodedDocument:
    """One token per character, so that a label stays at its character; bos and eos have no label."""
    characters = (ids[character] for character in document.text)
    tokens = [ids.tokenizer.bos_id, *characters, ids.tokenizer.eos_id]
    labels = [IGNORE_INDEX] * len(tokens)
    for index, character in document.labels:
        assert 0 <= index < len(document.text), (index, document.text)
        labels[1 + index] = ids[character]
    return EncodedDocument(tokens, labels=labels)


# ---- chains of thought


def encode_question(question: str, tokenizer: Tokenizer) -> list[int]:
    """`[bos] Q <bot>`. Raises DataError for a tokenizer without thought pieces."""
    if tokenizer.bot_id is None:
        raise DataError(
            "the tokenizer has no <bot> and <eot>, which a chain of thought needs: build the data with "
            "tokenizer.thought_pieces: true in the recipe"
        )
    return [*tokenizer.encode(question, bos=True), tokenizer.bot_id]


def encode_traced(document: TracedDocument, tokenizer: Tokenizer) -> EncodedDocument:
    """`[bos] Q <bot> C <eot> "\\nAnswer:" " value" [eos]`; nothing up to `<bot>` is to be predicted.

    Raises DataError for a tokenizer without thought pieces.
    """
    question = encode_question(document.question, tokenizer)
    assert tokenizer.step_separator_id is not None
    assert tokenizer.eot_id is not None
    chain: list[int] = []
    for i, step in enumerate(document.steps):
        chain += [tokenizer.step_separator_id] * (i > 0) + tokenizer.encode(step)
    answer = tokenizer.encode(ANSWER_PREFIX) + tokenizer.encode(f" {document.answer}", eos=True)
    return EncodedDocument([*question, *chain, tokenizer.eot_id, *answer], len(question))
