"""Exact and near duplicates. Workers compute a hash and a signature per document; one process decides.

Near duplicates are found by MinHash with banded LSH (Broder 1997; Leskovec et al., Mining of Massive
Datasets, chapter 3): the Jaccard similarity of two documents' word 5-gram sets is estimated by the share of
equal positions in their signatures. The decisions depend only on the documents and their order, never on how
the work was split.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import xxhash
from rensa import RMinHash

from data_pipeline.cleaning.ngrams import MULTIPLIER, ngram_hashes, normalised_words, word_hashes

PERMUTATIONS = 128  # the estimate's standard error is at most 0.5 / sqrt(128) = 0.044, at 0.8 it is 0.035
SHINGLE_WORDS = 5
THRESHOLD = 0.8  # as Lee et al. 2022, arXiv 2107.06499
SEED = 1
_RECALL = 0.99  # of the banding, for a pair exactly at the threshold


class Duplicates(NamedTuple):
    """What stays of n documents in input order."""

    keep: np.ndarray  # (n,) bool
    duplicate_of: np.ndarray  # (n,) int64: the kept document that this one repeats, -1 if it stays


def exact_hash(text: str) -> np.ndarray:
    """xxh3_128 of the text's UTF-8: (2,) uint64, 16 bytes. Lone surrogates are hashed as they are."""
    digest = xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))
    return np.frombuffer(digest, np.dtype("<u8"))


def keep_exact(hashes: np.ndarray) -> Duplicates:
    """Keeps the first of the documents with equal `hashes` (n, 2). Peak memory: 60 bytes per document."""
    count = len(hashes)
    duplicate_of = np.full(count, -1, np.int64)
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal hashes stay in input order
    ordered = hashes[order]
    same = np.zeros(count, bool)  # whether it equals the one before it in this order
    same[1:] = (ordered[1:] == ordered[:-1]).all(axis=1)
    first = np.maximum.accumulate(np.where(same, 0, np.arange(count)))
    duplicate_of[order[same]] = order[first[same]]
    return Duplicates(duplicate_of < 0, duplicate_of)


def signature(text: str) -> np.ndarray:
    """MinHash of the set of word 5-grams of `text`: (PERMUTATIONS,) uint32.

    Case, punctuation and white space do not count (ngrams.py). A text of 1 to 4 words is one shingle, so that
    it only meets texts of the same words; a text without any word is one shingle of its characters, so that
    it only meets its copies. In scripts without spaces each character is a word.
    """
    words = normalised_words(text)
    if words:
        shingles = ngram_hashes(word_hashes(words), min(SHINGLE_WORDS, len(words)))
    else:
        shingles = exact_hash(text)[:1]
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, [0, len(shingles)], PERMUTATIONS, SEED)
    return np.array(matrix.to_rows()[0], np.uint32)


def bands(threshold: float, permutations: int = PERMUTATIONS) -> tuple[int, int]:
    """(number of bands, rows per band) of the LSH: the most rows whose recall at the threshold is 0.99.

    Two documents of similarity s share a band with probability 1 - (1 - s^rows)^bands. More rows give fewer
    pairs to verify. For 0.8 and 128: 21 bands of 6, recall 0.998.
    """
    for rows in range(permutations, 1, -1):
        count = permutations // rows
        if 1 - (1 - threshold**rows) ** count >= _RECALL:
            return count, rows
    return permutations, 1


def keep_near(signatures: np.ndarray, threshold: float = THRESHOLD) -> Duplicates:
    """Removes documents that resemble an earlier kept one; `signatures` (n, P) uint32.

    In input order, a document is removed if it shares a band with a kept document and their estimated Jaccard
    similarity is at least `threshold`; `duplicate_of` is the first such document. So every removed document
    has a near duplicate among those that stay, which union-find over chains of similar documents does not
    ensure.

    10^6 documents, of which 300,000 nearly repeat another, take 20 CPU-seconds and 0.4 GB on top of the
    signatures' 0.5 GB. The time grows with the pairs that share a band: at worst with the square of
    the number of documents of one template that differ enough to stay (20,000 at similarity 0.5: 22 seconds).
    """
    count = len(signatures)
    duplicate_of = np.full(count, -1, np.int64)
    documents, groups = _shared_bands(signatures, *bands(threshold, signatures.shape[1]))
    minimum = threshold * signatures.shape[1] - 1e-9  # equal positions
    # The kept documents of each group, ascending: kept[first[group] : last[group]].
    sizes = np.bincount(groups)
    first = np.cumsum(sizes) - sizes
    last, kept = first.copy(), np.empty(len(groups), np.int64)
    edges = np.append(np.flatnonzero(np.diff(documents, prepend=-1)), len(documents))
    for start, stop in pairwise(edges.tolist()):
        document, mine = documents[start], groups[start:stop]
        begin, end = first[mine], last[mine]
        met = np.flatnonzero(end > begin)
        if len(met):
            spans = zip(begin[met].tolist(), end[met].tolist(), strict=True)
            candidates = np.unique(np.concatenate([kept[a:b] for a, b in spans]))
            equal = np.count_nonzero(signatures[candidates] == signatures[document], axis=1)
            similar = candidates[equal >= minimum]
            if len(similar):
                duplicate_of[document] = similar[0]
                continue
        kept[end] = document
        last[mine] += 1
    return Duplicates(duplicate_of < 0, duplicate_of)


def _shared_bands(signatures: np.ndarray, number: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(documents (m,) ascending, groups (m,)): the documents that share a band's content, and which one.

    Groups are numbered from 0; a document is in a group at most once.
    """
    documents: list[np.ndarray] = []
    groups: list[np.ndarray] = []
    total = 0
    for band in range(number):
        keys = _band_keys(signatures[:, band * rows : (band + 1) * rows])
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        new = np.ones(len(keys), bool)
        new[1:] = ordered[1:] != ordered[:-1]
        shared = ~(new & np.append(new[1:], True))
        documents.append(order[shared])
        groups.append(total + np.cumsum(new & shared)[shared] - 1)
        total += int(np.count_nonzero(new & shared))
    members, labels = np.concatenate(documents), np.concatenate(groups)
    order = np.argsort(members, kind="stable")
    return members[order], labels[order]


def _band_keys(columns: np.ndarray) -> np.ndarray:
    """One hash for each row of `columns` (n, rows) uint32: (n,) uint64. A collision costs one comparison."""
    keys = np.zeros(len(columns), np.uint64)
    for column in columns.T:
        keys *= MULTIPLIER
        keys += column
    return keys
