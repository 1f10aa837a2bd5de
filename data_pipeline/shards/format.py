"""Shards: plain tars of tokenised documents, readable by stock webdataset, with an index for random access.

A data folder holds `manifest.json`, `tokenizer.model` and, for every source and split,
`SOURCE-SPLIT-NNNNN.tar` with its `.idx`. A tar member (`SOURCE-SPLIT-NNNNN-MMMMMM.tokens`) holds up to 256
documents: their number, their lengths and the lengths of their masked prompts (0: none) as little-endian
uint32, then their tokens as little-endian uint16 (uint32 above 65,536 pieces). In a labelled source one label
per token follows in the same type: the id to predict at that token, or the type's largest value for none (the
build takes the wider type where that value is a piece). The `.idx` is two numpy arrays, one after the other:
INDEX_DTYPE for the members, DOCUMENT_DTYPE for all documents.

manifest.py checks sizes, indices and the tokenizer when a folder is opened; token_stream.py checks a member's
checksum when it first reads it and again once its shard was written to; verify.py checks everything.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FORMAT = 2
EXTENSION = "tokens"
# offset and size of the payload in the tar, in bytes
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u8"), ("documents", "<u4"), ("crc32", "<u4")])
DOCUMENT_DTYPE = np.dtype([("length", "<u4"), ("prompt", "<u4")])  # in tokens; prompt: the masked part
IGNORE_INDEX = -100  # the label or target of a token where nothing is predicted


class EncodedDocument(NamedTuple):
    tokens: Sequence[int]
    prompt_length: int = 0  # leading tokens that are not to be predicted
    labels: Sequence[int] | None = None  # what to predict at each token, IGNORE_INDEX: nothing


def token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 65_536 else "<u4"
