"""Sentencepiece without loss: decode(encode(text)) == text for every valid Unicode string.

Ids: 0 `<pad>`, 1 `<unk>` (never produced: unknown characters become bytes), 2 `<s>`, 3 `</s>`. A training
document is [bos] + encode(text) + [eos]. No user-defined symbols: text that looks like `</s>` stays text.

A tokenizer with thought pieces has two more control pieces, 4 `<bot>` and 5 `<eot>`, around a chain of
thought. The space between two steps of the chain is the byte piece `<0x20>`: encode() never gives that
piece, since sentencepiece writes a space in a text as its own mark, so the tokens always tell the steps
apart, whatever their text.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from data_pipeline.errors import DataError
from data_pipeline.tokenization.json_tokenizer import JsonTokenizer, check_lossless

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
BOT_ID, EOT_ID = 4, 5  # begin and end of thought; with thought pieces only
THOUGHT_PIECES = ["<bot>", "<eot>"]
STEP_SEPARATOR_ID = EOT_ID + 1 + ord(" ")  # the 256 bytes follow the control pieces
MODEL_TYPES = ("unigram", "bpe")
NUM_THREADS = 2  # fixed: the model file's bytes depend on it
SLICE_LENGTH = 1000  # characters; longer "sentences" would be dropped silently
META_SPACE = "\u2581"  # sentencepiece's own mark for a space: the one character it cannot carry itself
# No piece continues from another character into a space, so BPE merges every such run separately. Most runs
# recur: encoding each once and keeping the result is faster. In unigram the best path depends on neighbours.
_RUNS = re.compile(" *[^ ]+| +")
KEPT_CHARACTERS = 2**22  # of the runs kept; beyond it they are dropped


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    model_type: str = "unigram",
    num_threads: int = NUM_THREADS,
    thought_pieces: bool = False,
) -> bytes:
    """Train on `texts` and return the bytes of a `tokenizer.model`; equal input gives equal bytes.

    `vocab_size` is an upper limit: a small corpus gives fewer pieces. Raises DataError for an unknown model
    type, for no text at all and for a vocabulary too small for the 256 bytes, 4 control pieces (6 with
    `thought_pieces`) and the characters.
    """
    if model_type not in MODEL_TYPES:
        raise DataError(f"model_type {model_type!r} is not one of {', '.join(MODEL_TYPES)}: choose one")
    slices = _slices(texts)
    first = next(slices, None)
    if first is None:
        raise DataError("no text to train a tokenizer on: check the sources of the recipe")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chain(first, slices),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            num_threads=num_threads,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * SLICE_LENGTH,
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            control_symbols=THOUGHT_PIECES if thought_pieces else [],
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason):
            reason = f"its bytes, control pieces and characters need {needed[1]}, raise tokenizer.vocab_size"
        raise DataError(f"no tokenizer of vocab_size {vocab_size} from this text: {reason}") from error
    return model.getvalue()


class Tokenizer:
    """A `tokenizer.model`: one that `train_tokenizer` wrote, or one of a Hugging Face model (see
    json_tokenizer.py). Raises DataError if the file is missing or neither.

    `bot_id`, `eot_id` and `step_separator_id` are None where it was trained without thought pieces.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise DataError(f"tokenizer {path} does not exist: build the data first or fix the path")
        content = path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        core: _SentencePiece | JsonTokenizer
        core = JsonTokenizer(content, path) if content[:1] == b"{" else _SentencePiece(content, path)
        self._core = core
        self.vocab_size = core.vocab_size
        self.pad_id, self.bos_id, self.eos_id = core.pad_id, core.bos_id, core.eos_id
        self.bot_id: int | None = core.bot_id
        self.eot_id: int | None = core.eot_id
        self.step_separator_id: int | None = core.step_separator_id

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of `text`. Raises DataError for a lone surrogate."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"text has a lone surrogate at character {error.start}, not valid Unicode: remove it"
            ) from error
        return [self.bos_id] * bos + self._core.encode(text) + [self.eos_id] * eos

    def encode_batch(self, texts: Iterable[str], bos: bool = False, eos: bool = False) -> list[list[int]]:
        return [self.encode(text, bos, eos) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; pad, unk, bos, eos, bot and eot are skipped. Raises DataError for an id outside
        the vocabulary.
        """
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise DataError(
                    f"token id {token} is not in 0..{self.vocab_size - 1}: use the data's own tokenizer"
                )
        return self._core.decode([int(token) for token in ids])

    def text_bytes(self) -> np.ndarray | None:
        """(vocab_size,) int64: how many bytes of UTF-8 each token adds to a text; None if that depends on its
        neighbours.
        """
        return self._core.text_bytes()


class _SentencePiece:
    """The content of a file that `train_tokenizer` wrote; `path` is named in errors. Raises DataError."""

    def __init__(self, content: bytes, path: Path) -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except (RuntimeError, UnicodeError) as error:  # a message may quote bytes of the file
            raise DataError(
                f"{path} is not a sentencepiece model ({len(content)} bytes): build it again"
            ) from error
        ids = [self._processor.pad_id(), self._processor.bos_id(), self._processor.eos_id()]
        if ids != [PAD_ID, BOS_ID, EOS_ID]:
            raise DataError(f"{path} has pad, bos, eos ids {ids}, not [0, 2, 3]: train it with data_pipeline")
        self.vocab_size: int = self._processor.vocab_size()
        self.pad_id, self.bos_id, self.eos_id = PAD_ID, BOS_ID, EOS_ID
        # A text with "<bot>" in it may have taught a piece of that name, so the id and its type are asked.
        thought = self._processor.is_control(BOT_ID)
        self.bot_id = BOT_ID if thought else None
        self.eot_id = EOT_ID if thought else None
        self.step_separator_id = STEP_SEPARATOR_ID if thought else None
        self._last_control_id = EOT_ID if thought else EOS_ID
        self._check_bytes(path)
        self._kept: dict[str, list[int]] = {}
        self._kept_characters = 0
        # Trained on text with hardly any space, it has no piece for one: sentencepiece would give a space the
        # bytes of its own mark, which come back as that mark.
        self._lacks_space = self._processor.piece_to_id(META_SPACE) == self._processor.unk_id()
        self._space_id = self._last_control_id + 1 + ord(" ")
        if thought and self._lacks_space:
            raise DataError(
                f"{path} has thought pieces, but none for a space, so that steps could not be told apart: "
                "train it on text with spaces"
            )
        self._meta_space_ids = [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in META_SPACE.encode()
        ]
        try:
            pieces = list(range(self._last_control_id + 1, self.vocab_size))
            self._processor.id_to_piece(pieces)  # fails where one is not text
            scores = self._processor.get_score(pieces)
            self._is_bpe = all(
                score == int(score) for score in scores
            )  # ranks; unigram has log-probabilities
            self._check_normalizer(path)
            check_lossless(path, self.encode, self.decode)
        except (RuntimeError, UnicodeError, OverflowError) as error:
            raise DataError(f"{path} is a damaged sentencepiece model ({error}): build it again") from error

    def _check_bytes(self, path: Path) -> None:
        """A character without a piece becomes bytes, and the step separator is one of them."""
        first = self._last_control_id + 1
        for byte in range(256):
            number, piece = first + byte, f"<0x{byte:02X}>"
            if number >= self.vocab_size or self._processor.id_to_piece(number) != piece:
                break
            if not self._processor.is_byte(number):
                break
        else:
            return
        raise DataError(
            f"{path} has no byte piece {piece} at id {number}: train it with data_pipeline, which loses no "
            "text (byte_fallback, no symbols of one's own)"
        )

    def _check_normalizer(self, path: Path) -> None:
        """No character is changed on the way in, and none is added or dropped at the ends."""
        changed = self._processor.normalize(text := _every_character())
        if changed != text.replace(" ", META_SPACE):
            raise DataError(
                f"{path} changes text before encoding it (normalization, a dummy prefix, removed spaces): "
                "train it with data_pipeline, which sets all of these off"
            )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(text.split(META_SPACE)):
            if i:
                ids += self._meta_space_ids
            for j, run in enumerate(part.split(" ") if self._lacks_space else [part]):
                if j:
                    ids.append(self._space_id)
                ids += self._encode_runs(run) if self._is_bpe else self._processor.encode(run)
        return ids

    def _encode_runs(self, text: str) -> list[int]:
        if self._kept_characters > KEPT_CHARACTERS:
            self._kept, self._kept_characters = {}, 0
        runs = _RUNS.findall(text)
        new = [run for run in set(runs) if run not in self._kept]
        self._kept.update(zip(new, self._processor.encode(new, num_threads=1), strict=True))
        self._kept_characters += sum(map(len, new))
        return [token for run in runs for token in self._kept[run]]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([token for token in ids if token > self._last_control_id])
        return text

    def text_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, np.int64)
        for token in range(self._last_control_id + 1, self.vocab_size):
            piece: str = self._processor.id_to_piece(token)
            is_byte = self._processor.is_byte(token)
            sizes[token] = 1 if is_byte else len(piece.replace(META_SPACE, " ").encode())
        return sizes


def _every_character() -> str:
    """Every character that a text may have, with spaces at both ends and doubled."""
    points = np.concatenate([np.arange(1, 0xD800), np.arange(0xE000, 0x110000)]).astype("<u4")
    return f"  {points.tobytes().decode('utf-32-le')}  "


def _slices(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), SLICE_LENGTH):
            yield text[start : start + SLICE_LENGTH]


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest
