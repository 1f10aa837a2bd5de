"""The sentencepiece tokenizer in the format of Hugging Face's tokenizers library.

Both give the same ids for every text except two rare kinds: Hugging Face reads U+2581, sentencepiece's mark
for a space, as a space, while data_pipeline keeps it as bytes; and Hugging Face reads the spelled name of a
byte, `<0x41>`, as that byte if the tokenizer does not know one of its characters.
"""

import itertools
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.files import write_file, write_json

PAD_TOKEN_ID, UNK_TOKEN_ID, BOS_TOKEN_ID, EOS_TOKEN_ID = 0, 1, 2, 3
META_SPACE = "\u2581"
NUM_CONTROL_TOKENS = 4  # of every tokenizer; thought pieces <bot> and <eot> may follow
NEVER = -1e4  # a score, in nats
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # SentencePiece.Type


def write_tokenizer(model: Path, out: Path, max_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json for a sentencepiece tokenizer.model.

    Raises:
        ValueError: the file is not a sentencepiece model of data_pipeline, or one that loses text.
        OSError: see common.files.replacing.
    """
    pieces, model_type = _read_sentencepiece(model)
    leading = itertools.takewhile(lambda piece: piece[2] in (_CONTROL, _UNKNOWN), pieces)
    # With a space in the name no text can spell a control token, because spaces become META_SPACE first.
    control = [f"{piece[:-1]} >" for piece, _, _ in leading]
    vocabulary = [*control, *(piece for piece, _, _ in pieces[len(control) :])]
    # sentencepiece never matches control or byte pieces in a text; a text that spells the name of a byte must
    # be cheaper to split any other way.
    scores = [NEVER if kind in (_CONTROL, _UNKNOWN, _BYTE) else score for _, score, kind in pieces]
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, token in enumerate(control)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": META_SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": META_SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": _unigram(vocabulary, scores)
        if model_type == _UNIGRAM
        else _bpe(vocabulary, scores, len(control)),
    }
    pad, unk, bos, eos = control[:NUM_CONTROL_TOKENS]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "unk_token": unk,
        "bos_token": bos,
        "eos_token": eos,
        "split_special_tokens": True,  # text that looks like a control token stays text
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    write_file(out / "tokenizer.json", json.dumps(values, ensure_ascii=False).encode())
    write_json(out / "tokenizer_config.json", settings, indent=2)


def _unigram(vocabulary: list[str], scores: list[float]) -> dict[str, Any]:
    vocab = [list(pair) for pair in zip(vocabulary, scores, strict=True)]
    return {"type": "Unigram", "unk_id": UNK_TOKEN_ID, "vocab": vocab, "byte_fallback": True}


def _bpe(vocabulary: list[str], scores: list[float], num_control: int) -> dict[str, Any]:
    """Merges in the order of their results' scores, as sentencepiece applies them."""
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    merges = [
        (-scores[i], piece[:cut], piece[cut:])
        for i, piece in enumerate(vocabulary[num_control:], num_control)
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    merges.sort(key=lambda merge: merge[0])
    return {
        "type": "BPE",
        "unk_token": vocabulary[UNK_TOKEN_ID],
        "vocab": ids,
        "merges": [[left, right] for _, left, right in merges],
        "fuse_unk": True,
        "byte_fallback": True,
    }


def _read_sentencepiece(path: Path) -> tuple[list[tuple[str, float, int]], int]:
    """(piece, score, type) of every piece, and the model type, of a sentencepiece ModelProto."""
    content = path.read_bytes()
    if content[:1] == b"{":
        raise ValueError(
            f"{path} is a tokenizer.json, and only sentencepiece tokenizers of data_pipeline are exported; "
            "move it out of the folder to export without a tokenizer"
        )
    pieces = list[tuple[str, float, int]]()
    trainer, normalizer = dict[int, Any](), dict[int, Any]()
    try:
        for number, value in _fields(content):
            if number == 1:  # ModelProto.pieces: 1 piece, 2 score, 3 type
                parts = dict(_fields(value))
                score = struct.unpack("<f", parts[2])[0]
                pieces.append((parts[1].decode(), score, parts.get(3, _NORMAL)))
            elif number == 2:  # ModelProto.trainer_spec
                trainer |= dict(_fields(value))
            elif number == 3:  # ModelProto.normalizer_spec
                normalizer |= dict(_fields(value))
    except (IndexError, KeyError, TypeError, UnicodeDecodeError, struct.error, AttributeError):
        raise ValueError(f"{path} is not a sentencepiece model; export the checkpoint again") from None
    model_type = trainer.get(3, _UNIGRAM)
    if len(pieces) <= NUM_CONTROL_TOKENS or model_type not in (_UNIGRAM, _BPE):
        raise ValueError(f"{path} is not a unigram or BPE model with pieces; train it with data_pipeline")
    if odd := _what_loses_text(pieces, trainer, normalizer):
        raise ValueError(f"{path} {odd}, so that texts do not come back whole; train it with data_pipeline")
    return pieces, model_type


def _what_loses_text(
    pieces: list[tuple[str, float, int]], trainer: dict[int, Any], normalizer: dict[int, Any]
) -> str | None:
    """What of a sentencepiece model changes texts, or gives other ids here than there; None: nothing.

    Fields and their defaults follow sentencepiece_model.proto.
    """
    names = {piece for piece, _, _ in pieces}
    kinds = [kind for _, _, kind in pieces]
    leading = [_CONTROL, _UNKNOWN, _CONTROL, _CONTROL]
    bytes_ = {piece for piece, _, kind in pieces if kind == _BYTE}
    problems = (
        (not trainer.get(35, 0), "has no byte_fallback"),
        (bytes_ != {f"<0x{byte:02X}>" for byte in range(256)}, "lacks pieces of bytes"),
        (bool(trainer.get(24, 0)), "has treat_whitespace_as_suffix"),
        (normalizer.get(1, b"") not in (b"", b"identity"), "has another normalization rule than identity"),
        (bool(normalizer.get(2, b"")), "has normalization rules of its own"),
        (bool(normalizer.get(3, 1)), "has add_dummy_prefix"),
        (bool(normalizer.get(4, 1)), "has remove_extra_whitespaces"),
        (not normalizer.get(5, 1), "has escape_whitespaces=false"),
        (kinds[:NUM_CONTROL_TOKENS] != leading, "has other pieces than <pad>, <unk>, <s>, </s> first"),
        (not set(kinds) <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}, "has pieces of users or unused ones"),
        (len(names) < len(pieces), "has the same piece twice"),
        (not all(math.isfinite(score) for _, score, _ in pieces), "has a score that is not finite"),
    )
    return next((what for wrong, what in problems if wrong), None)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a protobuf message: int, 4 or 8 bytes, or bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(message, at)
        else:
            length = {1: 8, 5: 4}[wire]
        if at + length > len(message):
            raise IndexError("the message ends inside a field")
        yield number, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
