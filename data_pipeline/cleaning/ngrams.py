"""Text as normalised words and as hashes of word n-grams: what dedup.py and decontaminate.py compare."""

import re
import unicodedata

import numpy as np
import xxhash

# Default-ignorable characters: a soft hyphen or a zero-width space inside a word does not change the word.
_INVISIBLE = re.compile("[\u00ad\u034f\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")
# Scripts written without spaces (Thai to Khmer, kana, Han): each character is a word.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]"
)
_WORD = re.compile(r"[^\W_]+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it loses bits


def normalised_words(text: str) -> list[str]:
    """Words of `text` after NFKC and case folding; punctuation, symbols and white space only separate."""
    if not text.isascii():
        text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
        text = _UNSPACED.sub(r" \g<0> ", text)
    return _WORD.findall(text.casefold())


def word_hashes(words: list[str]) -> np.ndarray:
    """xxh3_64 of the UTF-8 of each word; no word may contain white space. (len(words),) uint64."""
    # One encode call for all words, not one per word. Lone surrogates are hashed as they are.
    encoded = " ".join(words).encode("utf-8", "surrogatepass").split()
    return np.fromiter(map(xxhash.xxh3_64_intdigest, encoded), np.uint64, len(words))


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hash of every run of `n` words, a polynomial in their hashes modulo 2^64.

    `hashes` (W,) uint64 -> (max(0, W - n + 1),) uint64.
    """
    count = max(0, len(hashes) - n + 1)
    grams = np.zeros(count, np.uint64)
    for start in range(n):
        grams *= MULTIPLIER
        grams += hashes[start : start + count]
    return grams
