"""The exported tokenizer gives the same ids as data_pipeline's, and loses nothing."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_pipeline.tokenization.tokenizer import Tokenizer, train_tokenizer
from model.hf.tokenizer import META_SPACE, write_tokenizer

TEXT = [
    "The cat sat on the mat; 12 + 34 = 460.\n\tWhy? <b>bold</b> & {x: [1, 2]}\n",
    "naïve café — 東京 😀 e\u0301 \u00a0 end  of   line </s> <s> <pad> <unk>\n",
] * 20


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def both(request, tmp_path_factory) -> tuple[Tokenizer, AutoTokenizer]:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    path = folder / "tokenizer.model"
    path.write_bytes(train_tokenizer(TEXT, 420, request.param))
    write_tokenizer(path, folder, 1024)
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    return Tokenizer(path), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def assert_same(both: tuple[Tokenizer, AutoTokenizer], text: str) -> None:
    ours, theirs = both
    ids = theirs(text)["input_ids"]
    assert ids == ours.encode(text)
    assert theirs.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "   ",
        " a",
        "a ",
        "a  b",
        "\n\n\t x\r\n",
        "</s>",
        "<s> </s> <pad> <unk>",
        "</s >",
        "<s ><pad ><unk >",
        "<0x41><0x34>",
        "日本語 テスト",
        "👩\u200d👩\u200d👧 \ufeff\x00\x01\u2028",
        "12345678901234567890",
        "ab" * 2000,
    ],
)
def test_hard_texts(both, text):
    assert_same(both, text)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_characters=META_SPACE, exclude_categories=["Cs"]), max_size=40))
def test_any_text(both, text):
    assert_same(both, text)


def test_control_tokens_have_their_ids(both):
    _, theirs = both
    assert [theirs.pad_token_id, theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id] == [
        0,
        1,
        2,
        3,
    ]
    assert theirs.decode([2, 3], skip_special_tokens=True) == ""
    assert len(theirs) == both[0].vocab_size


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_thought_pieces_are_control_tokens_too(kind, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(TEXT, 420, kind, thought_pieces=True))
    write_tokenizer(tmp_path / "tokenizer.model", tmp_path, 1024)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    ours = Tokenizer(tmp_path / "tokenizer.model")
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(theirs) == ours.vocab_size
    for text in ("<bot>12 + 34<eot> </s>", "<bot ><eot >", " <bot> ", *TEXT[:2]):
        assert_same((ours, theirs), text)
        assert not {ours.bot_id, ours.eot_id} & set(theirs(text)["input_ids"])
    framed = [ours.bos_id, *ours.encode("7"), ours.bot_id, *ours.encode("8"), ours.eot_id]
    assert theirs.decode(framed, skip_special_tokens=True) == ours.decode(framed) == "78"


def test_real_text(data_root, both):
    text = (data_root / "text" / "tinyshakespeare.txt").read_text()[:200_000]
    for start in range(0, len(text), 5000):
        assert_same(both, text[start : start + 5000])


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\xff\xff\xff\x7f"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match="is not a"):
        write_tokenizer(tmp_path / "tokenizer.model", tmp_path, 8)


LOSSY: list[tuple[dict[str, Any], str]] = [
    ({"byte_fallback": False}, "has no byte_fallback"),
    ({"normalization_rule_name": "nmt_nfkc"}, "has another normalization rule than identity"),
    ({"add_dummy_prefix": True}, "has add_dummy_prefix"),
    ({"remove_extra_whitespaces": True}, "has remove_extra_whitespaces"),
    ({"treat_whitespace_as_suffix": True}, "has treat_whitespace_as_suffix"),
    ({"user_defined_symbols": ["cat"]}, "has pieces of users"),
    ({"pad_id": -1}, "has other pieces than <pad>, <unk>, <s>, </s> first"),
]


@pytest.mark.parametrize(("options", "message"), LOSSY)
def test_a_tokenizer_that_loses_text_is_not_exported(options, message, tmp_path):
    model = io.BytesIO()
    whole = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "pad_id": 0,
        "unk_id": 1,
        "bos_id": 2,
        "eos_id": 3,
    }
    texts = iter(["the cat sat on the mat"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, vocab_size=300, hard_vocab_limit=False, minloglevel=2,
        **whole | options,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match=f"{message}.*, so that texts do not come back whole"):
        write_tokenizer(tmp_path / "tokenizer.model", tmp_path, 1024)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def test_a_tokenizer_of_another_library_is_not_taken_for_a_damaged_one(tmp_path):
    (tmp_path / "tokenizer.model").write_text('{"model": {}}')
    with pytest.raises(ValueError, match=r"is a tokenizer.json, .* move it out of the folder to export"):
        write_tokenizer(tmp_path / "tokenizer.model", tmp_path, 1024)
