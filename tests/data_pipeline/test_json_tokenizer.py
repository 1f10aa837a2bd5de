"""Tokenizers of Hugging Face models, as `python -m model.hf import` writes them."""

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as TheirTokenizer
from tokenizers import normalizers, pre_tokenizers

from common.files import write_json
from data_pipeline.build import build
from data_pipeline.errors import DataError
from data_pipeline.recipe import Recipe, TokenizerRecipe, load_recipe
from data_pipeline.sources.documents import TracedDocument
from data_pipeline.tokenization.encode import encode_traced
from data_pipeline.tokenization.tokenizer import Tokenizer
from model.hf.special_tokens import add_special_tokens, changes_of_texts

from ..conftest import ROOT
from ..model.hf_folders import GPT2_END, KIN_ENDS, kin_tokenizer_json, tokenizer_json


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "tokenizer.json").write_text(tokenizer_json(GPT2_END))
    found = add_special_tokens(folder, {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0})
    assert found is not None
    write_json(folder / "tokenizer.model", found[0], indent=2)
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.sampled_from("<bote> |s/\n\u2581")))
@example(f"<bot>{GPT2_END}<eot> <step><pad></s>")
@example(" \r\n\t\x00 e\u0301 \U0001f600 \ufeff")
def test_texts_come_back_and_give_no_special_token(tokenizer, text):
    found = tokenizer.encode(text)
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.bot_id, tokenizer.eot_id}
    assert not set(found) & {*special, tokenizer.eos_id, tokenizer.step_separator_id}
    assert tokenizer.decode(found) == text
    assert tokenizer.encode(text, bos=True, eos=True) == [tokenizer.bos_id, *found, tokenizer.eos_id]


def test_ids_are_the_librarys(tokenizer, path):
    theirs = TheirTokenizer.from_str(tokenizer_json(GPT2_END))
    for text in ("How many apples does she have?", " 12 <<3+4=7>>\n", "naïve 東京"):
        assert tokenizer.encode(text) == theirs.encode(text).ids
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 0, 400)
    assert Tokenizer(path).sha256 == tokenizer.sha256
    assert tokenizer.decode([399, *tokenizer.encode("a")]) == "a"  # a row that no token has
    with pytest.raises(DataError, match=r"token id 400 is not in 0\.\.399"):
        tokenizer.decode([400])


def test_a_build_uses_the_file(path, tokenizer, data_root, tmp_path, capsys):
    source = {"name": "gsm8k", "kind": "gsm8k_equations", "weight": 1.0, "max_documents": 30}
    recipe = Recipe("traced", 1, 0.2, TokenizerRecipe(file=str(path)), [source])
    manifest = build(recipe, data_root, tmp_path / "out")
    assert manifest is not None
    assert manifest.tokenizer_path.read_bytes() == path.read_bytes()
    assert (manifest.vocab_size, manifest.dtype) == (400, "<u2")
    assert build(recipe, data_root, tmp_path / "out") is not None  # nothing to do
    other = tmp_path / "tokenizer.model"
    other.write_text(path.read_text() + "\n")
    moved = Recipe("traced", 1, 0.2, TokenizerRecipe(file=str(other)), [source])
    first = build(moved, data_root, tmp_path / "moved")
    other.write_text(path.read_text())
    with pytest.raises(DataError, match="a build of another recipe or data"):
        build(moved, data_root, tmp_path / "moved")
    assert first is not None
    assert first.build_hash != manifest.build_hash
    document = TracedDocument("How many?", ("<<3+4=7>>", "<<7*2=14>>"), "14")
    encoded = encode_traced(document, tokenizer)
    assert encoded.tokens[: encoded.prompt_length] == [0, *tokenizer.encode("How many?"), tokenizer.bot_id]
    assert tokenizer.decode(encoded.tokens) == "How many?<<3+4=7>> <<7*2=14>>\nAnswer: 14"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokenizer.file=nowhere/tokenizer.model", "tokenizer.vocab_size=null"], "nowhere.* does not exist"),
        (
            ["tokenizer.file=nowhere/tokenizer.model"],
            "vocab_size 4096: set one of them and the other to null",
        ),
        (["tokenizer.vocab_size=null"], "file None and vocab_size None: set one of them"),
    ],
)
def test_recipes_that_cannot_be(overrides, message):
    with pytest.raises(DataError, match=message) as caught:
        load_recipe(ROOT / "data_pipeline/recipes/distill_gsm8k.yaml", overrides)
    assert "\n" not in str(caught.value)


FORMS = {  # what comes back of a text
    "llama3": lambda text: text,
    "qwen2": lambda text: unicodedata.normalize("NFC", text),
    "llama2": lambda text: text.replace("\u2581", " "),
    "mistral": lambda text: text.replace("\u2581", " ").removeprefix(" "),
}
CHANGES = {
    "llama3": [],
    "qwen2": ["composes characters (Unicode NFC)"],
    "llama2": ["reads U+2581 as a space"],
    "mistral": ["drops the space at which a text begins", "reads U+2581 as a space"],
}


@pytest.fixture(scope="module", params=FORMS)
def kin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer]:
    """The tokenizers of the models that are imported, in their forms."""
    form, folder = request.param, tmp_path_factory.mktemp(request.param)
    (folder / "tokenizer.json").write_text(kin_tokenizer_json(form))
    ends = dict(zip(("bos_token", "eos_token"), KIN_ENDS, strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(ends))
    found = add_special_tokens(folder, {"vocab_size": 400})
    assert found is not None
    assert changes_of_texts(found[0]) == CHANGES[form]
    write_json(folder / "tokenizer.model", found[0], indent=2)
    return form, Tokenizer(folder / "tokenizer.model")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.sampled_from("</s> |pade\u0301\n\u2581"))
)
@example("  How many apples does she  have?\r\n\n\t12345 ")
@example("e\u0301 \u212b \ufb01 \ufeff\x00 \U0001f600")
def test_each_form_gives_the_librarys_ids_and_loses_what_it_says(kin, text):
    form, ours = kin
    theirs = TheirTokenizer.from_str(kin_tokenizer_json(form))
    theirs.encode_special_tokens = True
    found = ours.encode(text)
    assert found == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(found) == FORMS[form](text)


def test_files_that_are_none(path, tmp_path):
    values = json.loads(path.read_text())
    loses, adds = (TheirTokenizer.from_str(tokenizer_json(GPT2_END)) for _ in range(2))
    loses.normalizer = normalizers.NFKC()
    adds.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    section = {"zeromodel": values["zeromodel"]}
    for content, message in (
        ("{", "is not a tokenizer.json"),
        ("{}", "is not a tokenizer.json"),
        (tokenizer_json(GPT2_END), "does not name its special tokens: convert its folder with"),
        (json.dumps(json.loads(loses.to_str()) | section), "that loses nothing"),
        (json.dumps(json.loads(adds.to_str()) | section), "that loses nothing"),
    ):
        (tmp_path / "tokenizer.model").write_text(content)
        with pytest.raises(DataError, match=message) as caught:
            Tokenizer(tmp_path / "tokenizer.model")
        assert "\n" not in str(caught.value)


def test_a_missing_extra_is_named(path):
    code = (
        "import sys; sys.modules['tokenizers'] = None; "
        "from data_pipeline.tokenization.tokenizer import Tokenizer; "
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}Tokenizer({str(path)!r})"], capture_output=True, text=True, cwd=ROOT
    )
    assert "needs the optional extra: pip install -e '.[hf]'" in done.stderr.splitlines()[-1]
