import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset

from common.files import write_file
from data_pipeline import build as build_module
from data_pipeline.build import build, main
from data_pipeline.errors import DataError
from data_pipeline.loading.loader import Loader
from data_pipeline.loading.packing import IGNORE_INDEX, ConcatPacking
from data_pipeline.recipe import OWN_KEYS, Recipe, TokenizerRecipe
from data_pipeline.shards.format import EncodedDocument
from data_pipeline.shards.manifest import Manifest, Source, Split, open_manifest, write_manifest
from data_pipeline.shards.token_stream import TokenStream
from data_pipeline.shards.writer import write_shards
from data_pipeline.sources import registry
from data_pipeline.sources.documents import Document, LabelledDocument
from data_pipeline.sources.registry import read_documents
from data_pipeline.tokenization.tokenizer import Tokenizer, train_tokenizer
from data_pipeline.verify import verify

from .conftest import read_row

P_HOP = {"name": "hops", "kind": "p_hop", "weight": 1.0, "num_samples": 700, "length": 9, "hops": 2}
ADDITION = {"name": "sums", "kind": "addition", "weight": 3.0, "num_samples": 400, "operands": 3}
LOOPS = {"name": "loops", "kind": "causal_loop", "weight": 1.0, "num_samples": 60, "mask_prompt": True}
LENGTHS = {"hops": 11, "sums": 8}  # tokens of a document, <s> and </s> included


def recipe(*sources: dict, seed: int = 1) -> Recipe:
    return Recipe("labels", seed, 0.1, TokenizerRecipe(400, "bpe", 20_000), list(sources))


def random_documents(top: int, count: int) -> list[EncodedDocument]:
    rng = np.random.default_rng(7)
    documents = []
    for length in rng.integers(2, 9, count).tolist():
        labels = rng.integers(0, top, length)
        labels[rng.random(length) < 0.4] = IGNORE_INDEX
        documents.append(EncodedDocument(rng.integers(0, top, length).tolist(), 0, labels.tolist()))
    return documents


def write_folder(folder: Path, documents: list[EncodedDocument], dtype: str) -> Manifest:
    folder.mkdir()
    write_file(folder / "tokenizer.model", train_tokenizer(["some text"], 300))
    tokenizer = Tokenizer(folder / "tokenizer.model")
    shards = write_shards(folder, "x-train", documents, dtype, shard_bytes=12_000)
    split = Split(len(documents), sum(shard.tokens for shard in shards), 0, shards)
    size = (folder / "tokenizer.model").stat().st_size
    sources = {"x": Source(1.0, {"train": split}, labelled=True)}
    pieces = max(tokenizer.vocab_size, *(1 + max(document.tokens) for document in documents))
    write_manifest(Manifest(folder, "", "", {}, size, tokenizer.sha256, pieces, dtype, sources))
    return open_manifest(folder)


def read_labels(stream: TokenStream, start: int, stop: int) -> np.ndarray:
    """Labels of the tokens [start, stop), as loaders read them."""
    spans = stream.spans(np.array([0]), np.array([start]), np.array([stop]))
    stored = stream.copy(stream.reads(spans, stop - start, labels=True))
    return np.where(stored == stream.no_label, IGNORE_INDEX, stored.astype(np.int32))


@pytest.mark.parametrize(("dtype", "top"), [("<u2", 65_535), ("<u4", 200_000)])
def test_labels_come_back_across_members_and_shards(tmp_path, dtype, top):
    """Up to the largest id below the type's mark for none."""
    documents = random_documents(top, 1500)
    documents.append(EncodedDocument([top - 1, 0], 0, [top - 1, 0]))
    manifest = write_folder(tmp_path / "data", documents, dtype)
    assert open_manifest(tmp_path / "data") == manifest
    shards = manifest.sources["x"].splits["train"].shards
    assert len(shards) > 1
    assert shards[0].members > 1
    stream = TokenStream(manifest, "x", "train")
    tokens = [token for document in documents for token in document.tokens]
    labels = [label for document in documents for label in document.labels or ()]
    assert stream.read(0, stream.tokens).tolist() == tokens
    assert read_labels(stream, 0, stream.tokens).tolist() == labels
    rng = np.random.default_rng(0)
    for a, b in np.sort(rng.integers(0, stream.tokens + 1, (100, 2)), axis=1).tolist():
        b = min(b, a + 40)
        assert stream.read(a, b).tolist() == tokens[a:b]
        assert read_labels(stream, a, b).tolist() == labels[a:b]


def test_stock_webdataset_reads_the_labels(tmp_path):
    documents = random_documents(300, 600)
    manifest = write_folder(tmp_path / "data", documents, "<u2")
    files = [str(tmp_path / "data" / s.file) for s in manifest.sources["x"].splits["train"].shards]
    found = []
    for sample in webdataset.WebDataset(files, shardshuffle=False):
        count = int(np.frombuffer(sample["tokens"], "<u4", 1)[0])
        ends = np.cumsum(np.frombuffer(sample["tokens"], "<u4", count, 4))
        tokens, labels = np.frombuffer(sample["tokens"], "<u2", offset=4 + 8 * count).reshape(2, -1)
        labels = np.where(labels == 0xFFFF, -100, labels.astype(int))
        parts = zip(np.split(tokens, ends[:-1]), np.split(labels, ends[:-1]), strict=True)
        found += [EncodedDocument(text.tolist(), 0, label.tolist()) for text, label in parts]
    assert found == documents


def test_flipped_bit_in_a_label_is_found(tmp_path):
    manifest = write_folder(tmp_path / "data", random_documents(300, 300), "<u2")
    shard = manifest.sources["x"].splits["train"].shards[-1]
    members = np.load(tmp_path / "data" / shard.index_file)
    data = bytearray((tmp_path / "data" / shard.file).read_bytes())
    data[int(members["offset"][-1] + members["size"][-1]) - 1] ^= 1
    (tmp_path / "data" / shard.file).write_bytes(data)
    stream = TokenStream(open_manifest(tmp_path / "data"), "x", "train")
    with pytest.raises(DataError, match=f"{shard.file} member 00000.: its checksum differs"):
        read_labels(stream, stream.tokens - 1, stream.tokens)
    with pytest.raises(DataError, match=shard.file):
        verify(tmp_path / "data")


@pytest.mark.parametrize(
    "labels", [[5], [5, 6, 7, 8], [5, 6, 65_535], [5, 6, 70_000], [5, 6, -1]]
)  # too few, too many, the mark for none, too large, negative
def test_labels_that_cannot_be_stored(tmp_path, labels):
    with pytest.raises(AssertionError):
        write_shards(tmp_path, "x-train", [EncodedDocument([2, 9, 3], 0, labels)], "<u2")


@pytest.mark.parametrize("length", [1, 2, 7, 64, 257])
def test_packing_equals_brute_force_on_every_row(tmp_path, length):
    documents = random_documents(300, 400)
    stream = TokenStream(write_folder(tmp_path / "data", documents, "<u2"), "x", "train")
    packing = ConcatPacking(stream, length)
    places = [
        (token, label, number)
        for number, document in enumerate(documents)
        for token, label in zip(document.tokens, document.labels or (), strict=True)
    ]
    assert packing.rows == len(places) // length > 0
    assert packing.dropped_tokens == len(places) % length
    for r in range(packing.rows):
        part = places[r * length : (r + 1) * length]
        starts = [0] + [k for k in range(1, length) if part[k][2] != part[k - 1][2]]
        tokens, targets, found = read_row(packing, r)
        assert tokens.tolist() == [token for token, _, _ in part]
        assert targets.tolist() == [label for _, label, _ in part]
        assert found.tolist() == starts
        assert {tokens.dtype, targets.dtype, found.dtype} == {np.dtype(np.int32)}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("labels") / "out"
    build(recipe(P_HOP, ADDITION, LOOPS), Path(), out)
    return out


def text_of(tokenizer: Tokenizer, tokens: np.ndarray, labels: np.ndarray) -> LabelledDocument:
    """A document from its ids, one character at a time."""
    ids = tokens.tolist()
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert labels[0] == labels[-1] == IGNORE_INDEX
    characters = [tokenizer.decode([i]) for i in ids[1:-1]]
    assert {len(character) for character in characters} == {1}
    pairs = [(k, tokenizer.decode([i])) for k, i in enumerate(labels[1:-1].tolist()) if i != IGNORE_INDEX]
    return LabelledDocument("".join(characters), tuple(pairs))


@pytest.mark.parametrize("source", [P_HOP, ADDITION])
def test_build_keeps_every_document_and_label(built, source):
    manifest = verify(built).manifest
    assert {name: s.labelled for name, s in manifest.sources.items()} == {
        "hops": True, "sums": True, "loops": False,
    }  # fmt: skip
    options = {k: v for k, v in source.items() if k not in OWN_KEYS}
    published = list(read_documents(source["kind"], built, options))
    tokenizer = Tokenizer(manifest.tokenizer_path)
    found: dict[str, list] = {}
    for split, value in manifest.sources[source["name"]].splits.items():
        stream = TokenStream(manifest, source["name"], split)
        bounds = stream.document_starts.tolist()
        found[split] = [
            text_of(tokenizer, stream.read(a, b), read_labels(stream, a, b))
            for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        assert value.documents == len(found[split])
        assert value.text_bytes == sum(len(document.text) for document in found[split])
        assert {b - a for a, b in zip(bounds, bounds[1:], strict=False)} == {LENGTHS[source["name"]]}
    assert sorted(found["train"] + found["validation"]) == sorted(published)
    assert 0 < len(found["validation"]) < 0.25 * len(published)
    assert not {d.text for d in found["train"]} & {d.text for d in found["validation"]}
    assert found["train"] != [d for d in published if d in set(found["train"])]  # shuffled


def test_mixture_of_labelled_sources_and_text(built):
    whole = Loader(built, 88, 8, seed=3)  # 8 documents of one source, 11 of the other
    ranks = [Loader(built, 88, 8, seed=3, rank=rank, world_size=2) for rank in range(2)]
    streams = {name: TokenStream(open_manifest(built), name, "train") for name in whole.rows}
    seen = set()
    for step in (0, 5, 1000):
        batch, parts = whole.batch(step), [loader.batch(step) for loader in ranks]
        assert np.array_equal(batch.targets, np.concatenate([part.targets for part in parts]))
        for i, (name, row) in enumerate(batch.sample_ids):
            seen.add(name)
            assert batch.tokens[i].tolist() == streams[name].read(88 * row, 88 * row + 88).tolist()
            if name == "loops":
                predicted = batch.targets[i, :-1] != IGNORE_INDEX
                assert (batch.targets[i, :-1] == batch.tokens[i, 1:])[predicted].all()
                assert not streams[name].labelled
            else:
                labels = read_labels(streams[name], 88 * row, 88 * row + 88)
                assert batch.targets[i].tolist() == labels.tolist()
                starts = list(range(0, 88, LENGTHS[name]))
                assert [c for c in batch.cu_seqlens[i].tolist() if c < 88] == starts
    assert seen == {"hops", "sums", "loops"}


def test_labels_of_text_are_not_there_to_read(built):
    stream = TokenStream(open_manifest(built), "loops", "train")
    with pytest.raises(AssertionError):
        read_labels(stream, 0, 1)


def test_two_builds_are_byte_identical(tmp_path):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        build(recipe(P_HOP, ADDITION, seed=seed), Path(), tmp_path / out)
    a, b, c = ({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in "abc")
    assert a == b
    assert a["hops-train-00000.tar"] != c["hops-train-00000.tar"]


def use_documents(monkeypatch: pytest.MonkeyPatch, documents: list) -> None:
    def read(paths: list[Path], options: object) -> Iterator[object]:
        return iter(documents)

    monkeypatch.setitem(registry.KINDS, "p_hop", registry.KINDS["p_hop"]._replace(read=read))


def test_characters_only_labels_have_are_pieces(tmp_path, monkeypatch):
    """The tokenizer is trained on the labels too; a character beyond ASCII proves it."""
    use_documents(monkeypatch, [LabelledDocument(f"x y{'z' * i}", ((1, "東"), (2, " "))) for i in range(40)])
    manifest = build(recipe(P_HOP), Path(), tmp_path / "out")
    tokenizer = Tokenizer(manifest.tokenizer_path)
    stream = TokenStream(manifest, "hops", "train")
    end = int(stream.document_starts[1])
    document = text_of(tokenizer, stream.read(0, end), read_labels(stream, 0, end))
    assert document.text.startswith("x y")
    assert document.labels == ((1, "東"), (2, " "))


def test_character_without_a_piece(tmp_path, monkeypatch):
    """It was not among the train_bytes of the tokenizer's text, so it would be three byte tokens."""
    use_documents(monkeypatch, [LabelledDocument("xyz" * 30 + "東" * (i == 30), ()) for i in range(31)])
    small = Recipe("x", 0, 0.0, TokenizerRecipe(300, "bpe", 90), [P_HOP])
    with pytest.raises(DataError, match="'hops' has the character '東'.*3 tokens.*raise") as error:
        build(small, Path(), tmp_path / "out")
    assert "\n" not in str(error.value)


def test_mixed_source_and_masked_prompt_are_refused(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="'hops' has mask_prompt.*remove it"):
        build(recipe({**P_HOP, "mask_prompt": True}), Path(), tmp_path / "masked")
    use_documents(monkeypatch, [LabelledDocument("ab", ()), Document("a", "b")] * 20)
    with pytest.raises(DataError, match="'hops' mixes documents"):
        build(recipe(P_HOP), Path(), tmp_path / "mixed")


def test_the_mark_for_none_is_never_a_piece(tmp_path, monkeypatch):
    """A vocabulary that just fills the narrow type: labels need one value more."""
    for source, spare, dtype in ((LOOPS, 0, "<u2"), (P_HOP, 0, "<u4"), (P_HOP, 1, "<u2")):
        out = tmp_path / f"{source['name']}-{spare}"
        room = build(recipe(source), Path(), out / "any").vocab_size + spare
        with monkeypatch.context() as patch:
            patch.setattr(build_module, "token_dtype", lambda n, room=room: "<u2" if n <= room else "<u4")
            manifest = build(recipe(source), Path(), out / "full")
        assert manifest.dtype == dtype
        if manifest.sources[source["name"]].labelled:
            assert read_labels(TokenStream(manifest, "hops", "train"), 0, 1).tolist() == [IGNORE_INDEX]


@pytest.mark.parametrize("name", ["p_hop", "addition"])
def test_recipes_build(tmp_path, capsys, name):
    path = Path(registry.__file__).parents[1] / "recipes" / f"{name}.yaml"
    main(["--recipe", str(path), "--out", str(tmp_path / "out"), "sources.0.num_samples=2000"])
    vocabulary = int(re.findall(r"vocabulary: (\d+) pieces", capsys.readouterr().out)[0])
    manifest = verify(tmp_path / "out").manifest
    stream = TokenStream(manifest, name, "train")
    ids = set(stream.read(0, stream.tokens).tolist())
    assert len(ids) == vocabulary - 260 + 2  # every piece is used: the characters, <s> and </s>
    assert set(read_labels(stream, 0, stream.tokens).tolist()) - {IGNORE_INDEX} <= ids
