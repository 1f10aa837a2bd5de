import io
import random

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.tasks.causal_loop import generate, training_document
from data_pipeline.tokenization.tokenizer import Tokenizer, train_tokenizer

TEXT = [
    "The quick brown fox, 12345 times, jumps over the lazy dog.\n\nA new paragraph -- naïve café, 東京!\n"
    * 3,
    "def f(x):\n    return x * 2  # two spaces\n\tand a tab\r\n" * 5,
    "Question: Where is Mary?\nAnswer: bathroom" * 3,
]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(TEXT, 400, request.param))
    return Tokenizer(path)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("")
@example("\u2581")
@example("\u2581\u2581 a \u2581b\u2581")
@example("\0\x01\x7f")
@example(" leading, double  spaces, trailing ")
@example("<s></s><pad><unk><0x41>")
@example("\ufeffBOM \u200b \u2028 \ufffd e\u0301 \u1100\u1161 ﬁ Ⅳ")
@example("\r\n\t\v\f\n\n\n")
@example("👩‍👩‍👧‍👦🏳️‍🌈" * 3)
@example("x" * 5000)
def test_round_trip_is_lossless(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert (ids[0], ids[-1]) == (2, 3)
    assert ids[1:-1] == tokenizer.encode(text)
    assert all(4 <= token < tokenizer.vocab_size for token in ids[1:-1])
    assert tokenizer.decode(ids) == text


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def thinking(request, tmp_path_factory) -> Tokenizer:
    """With thought pieces; its text spells them, and so often that each would be a piece of its own."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    spelled = ["a <bot> b <eot> c<bot>d<eot>\n" * 40]
    path.write_bytes(train_tokenizer(TEXT + spelled, 420, request.param, thought_pieces=True))
    return Tokenizer(path)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(["<bot>", "<eot>", "<0x20>", " ", "\u2581", "a", "\0", "東"])).map("".join)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
@example("<bot><eot> <bot> </s>")
def test_no_text_gives_a_thought_piece(thinking, text):
    """Nor the byte between two steps; control pieces are left out of decoded text."""
    ids = thinking.encode(text)
    assert not {*range(6), thinking.step_separator_id} & set(ids)
    assert thinking.decode(ids) == text
    assert thinking.decode([2, 4, *ids, 5, 3]) == text


def test_thought_pieces_are_control_pieces(thinking, tokenizer):
    stock = sentencepiece.SentencePieceProcessor(
        model_proto=thinking._core._processor.serialized_model_proto()
    )
    assert [stock.id_to_piece(i) for i in range(6)] == ["<pad>", "<unk>", "<s>", "</s>", "<bot>", "<eot>"]
    assert [stock.is_control(i) for i in range(7)] == [True, False, True, True, True, True, False]
    assert (thinking.bot_id, thinking.eot_id) == (4, 5)
    assert stock.id_to_piece(thinking.step_separator_id) == "<0x20>"
    assert thinking.decode([thinking.step_separator_id]) == " "
    for text in TEXT:
        assert thinking.encode(text) == stock.encode(text)
    assert (tokenizer.bot_id, tokenizer.eot_id, tokenizer.step_separator_id) == (None, None, None)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(" " * 6 + "abcThe\n\t12.,-é東\u00a0\u3000"), max_size=80))
@example("the  the   the " * 30 + "x" * 100 + "   ")
def test_any_spacing_is_encoded_as_by_stock_sentencepiece(tokenizer, text):
    """Also where BPE takes the text apart into runs that it keeps."""
    assert tokenizer.encode(text) == tokenizer._core._processor.encode(text)


def test_encode_equals_stock_sentencepiece(tokenizer, tmp_path):
    """Where the text has no U+2581 nothing of ours is between it and sentencepiece."""
    stock = sentencepiece.SentencePieceProcessor(
        model_proto=tokenizer._core._processor.serialized_model_proto()
    )
    for text in TEXT:
        assert tokenizer.encode(text) == stock.encode(text)
    assert tokenizer.encode_batch(TEXT, bos=True) == [[2, *stock.encode(text)] for text in TEXT]
    ids = (stock.pad_id(), stock.unk_id(), stock.bos_id(), stock.eos_id())
    assert ids == (tokenizer.pad_id, 1, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2, 3)


def test_digits_are_single_and_newlines_have_a_piece(tokenizer):
    pieces = [tokenizer._core._processor.id_to_piece(i) for i in range(260, tokenizer.vocab_size)]
    assert "\n" in "".join(pieces)
    assert all(len(piece) == 1 for piece in pieces if any(c.isdigit() for c in piece))


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_training_is_reproducible(model_type):
    assert train_tokenizer(iter(TEXT), 400, model_type) == train_tokenizer(TEXT, 400, model_type)


def test_long_documents_are_used_whole():
    """sentencepiece alone drops a 'sentence' over 4192 bytes without a word."""
    rng = random.Random(0)
    words = [f"{'ab' * 20}{rng.choice('cdefgh')}zq" for _ in range(2000)]
    long = train_tokenizer([" ".join(words)], 300, "bpe")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=long)
    assert any("abab" in pieces.id_to_piece(i) for i in range(pieces.vocab_size()))


def test_small_corpus_gives_fewer_pieces(tmp_path):
    (tmp_path / "m").write_bytes(train_tokenizer(["ab"], 1000, "unigram"))
    assert 260 < Tokenizer(tmp_path / "m").vocab_size < 270


def test_causal_loop_alphabet_stays_single_characters(tmp_path):
    """A near character-level vocabulary keeps every variable and digit a token of its own."""
    texts = ["".join(training_document(s, 0.75)) for s in generate(400, [1, 2, 3, 4], 0)]
    (tmp_path / "m").write_bytes(train_tokenizer(texts, 316, "bpe"))
    tokenizer = Tokenizer(tmp_path / "m")
    for text in texts[:100]:
        for token in tokenizer.encode(text):
            piece = tokenizer.decode([token])
            word = piece.isalpha() and piece in "Answer Trace loop"
            assert len(piece) == 1 or word or not any(c.isalnum() for c in piece), piece


@pytest.mark.parametrize("text", ["\ud800", "abc\udfffdef"])
def test_lone_surrogate_is_refused(tokenizer, text):
    with pytest.raises(DataError, match=f"character {text.index(text.strip('abcdef'))}"):
        tokenizer.encode(text)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_unknown_id_is_refused(tokenizer, token):
    with pytest.raises(DataError, match=str(token)):
        tokenizer.decode([5, token])


@pytest.mark.parametrize(
    ("texts", "size", "kind", "message"),
    [
        ([], 400, "unigram", "no text"),
        ([""], 400, "bpe", "no text"),
        (TEXT, 270, "bpe", "270.*raise tokenizer.vocab_size"),
        (TEXT, 400, "wordpiece", "wordpiece"),
    ],
)
def test_training_refuses_what_cannot_work(texts, size, kind, message):
    with pytest.raises(DataError, match=message) as error:
        train_tokenizer(texts, size, kind)
    assert "\n" not in str(error.value)


def test_loading_refuses_what_is_no_tokenizer(tokenizer, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Tokenizer(tmp_path / "absent.model")
    model = tokenizer._core._processor.serialized_model_proto()
    for data in (b"", b"not a model", model[: len(model) // 2]):
        (tmp_path / "bad.model").write_bytes(data)
        with pytest.raises(DataError, match="bad.model"):
            Tokenizer(tmp_path / "bad.model")


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("text", ["acgt" * 50, "".join(map(chr, range(20000, 20064))) * 99 + " "])
def test_spaces_come_back_where_training_saw_hardly_any(tmp_path, model_type, text):
    """sentencepiece leaves out rare characters (its coverage), and gives its own mark back for a space."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_tokenizer([text], 340, model_type))
    tokenizer = Tokenizer(path)
    for asked in (" ", "a  b", "\u2581 \u2581", text, "acg t "):
        ids = tokenizer.encode(asked)
        assert tokenizer.decode(ids) == asked
        assert tokenizer.text_bytes()[ids].sum() == len(asked.encode())
    path.write_bytes(train_tokenizer([text], 340, model_type, thought_pieces=True))
    with pytest.raises(DataError, match="has thought pieces, but none for a space"):
        Tokenizer(path)


LOSSLESS = {
    "vocab_size": 330, "model_type": "bpe", "hard_vocab_limit": False, "byte_fallback": True,
    "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True, "pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3,
    "minloglevel": 2,
}  # fmt: skip


def stock_model(**options: object) -> bytes:
    """What sentencepiece itself trains."""
    model = io.BytesIO()
    lines = iter(TEXT[0].split("\n"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, **{**LOSSLESS, **options}
    )
    return model.getvalue()


def with_pieces_swapped(model: bytes, one: str, other: str) -> bytes:
    """The pieces lie in the file with their lengths before them."""
    a, b = (bytes([len(piece)]) + piece.encode() for piece in (one, other))
    assert len(a) == len(b)
    assert model.count(b"\n" + a) == model.count(b"\n" + b) == 1
    return model.replace(b"\n" + a, b"\n?").replace(b"\n" + b, b"\n" + a).replace(b"\n?", b"\n" + b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"byte_fallback": False}, "no byte piece <0x00> at id 4: train it with data_pipeline"),
        ({"user_defined_symbols": ["<x>"]}, "no byte piece <0x00> at id 4"),
        ({"control_symbols": ["<y>"]}, "no byte piece <0x00> at id"),
        ({"add_dummy_prefix": True}, "changes text before encoding it"),
        ({"remove_extra_whitespaces": True}, "changes text before encoding it"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes text before encoding it"),
        ({"normalization_rule_name": "nfkc_cf"}, "changes text before encoding it"),
    ],
)
def test_sentencepiece_models_that_lose_text_are_refused(tmp_path, options, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(stock_model())
    assert Tokenizer(path).decode(Tokenizer(path).encode(TEXT[0])) == TEXT[0]
    path.write_bytes(stock_model(**options))
    with pytest.raises(DataError, match=message) as error:
        Tokenizer(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pair", [("<0x20>", "<0x21>"), ("<0x41>", "<0xC3>")])
def test_swapped_byte_pieces_are_refused(tmp_path, pair):
    """They would come back as they went in, but a chain's steps are told apart by the id of <0x20>."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(with_pieces_swapped(stock_model(), *pair))
    with pytest.raises(DataError, match=f"no byte piece {pair[0]} at id"):
        Tokenizer(path)


def test_bytes_of_a_text_are_those_of_its_tokens(tokenizer, thinking):
    for one in (tokenizer, thinking):
        sizes = one.text_bytes()
        for text in [*TEXT, "", " \u2581 x\0 \u6771 "]:
            ids = one.encode(text, bos=True, eos=True)
            assert sizes[ids].sum() == len(text.encode())
