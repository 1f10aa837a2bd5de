import json
import shutil
from collections import deque

import numpy as np
import pytest
import webdataset

from data_pipeline.errors import DataError
from data_pipeline.loading.loader import Loader
from data_pipeline.shards.format import EncodedDocument, token_dtype
from data_pipeline.shards.manifest import open_manifest
from data_pipeline.shards.token_stream import TokenStream
from data_pipeline.shards.writer import write_shards
from data_pipeline.verify import main, verify


def flat(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in document]


def test_stream_gives_the_documents_back(folder, documents):
    manifest = open_manifest(folder)
    for name, splits in documents.items():
        for split, texts in splits.items():
            stream = TokenStream(manifest, name, split)
            expected = flat(texts)
            assert stream.tokens == len(expected)
            assert stream.document_starts.tolist() == np.cumsum([0, *map(len, texts)]).tolist()
            assert stream.read(0, stream.tokens).tolist() == expected
            rng = np.random.default_rng(0)
            for a, b in np.sort(rng.integers(0, stream.tokens + 1, (50, 2)), axis=1).tolist():
                read = stream.read(a, b)
                assert read.tolist() == expected[a:b]
                assert read.dtype == np.int32
    assert len(manifest.sources["short"].splits["train"].shards) > 1
    assert manifest.sources["short"].splits["train"].shards[0].members > 1


def test_stock_webdataset_reads_the_shards(folder, documents):
    shards = open_manifest(folder).sources["short"].splits["train"].shards
    texts, keys = [], []
    for sample in webdataset.WebDataset([str(folder / s.file) for s in shards], shardshuffle=False):
        keys.append(sample["__key__"])
        payload = sample["tokens"]
        count = int(np.frombuffer(payload, "<u4", 1)[0])
        lengths = np.frombuffer(payload, "<u4", count, 4)
        assert not np.frombuffer(payload, "<u4", count, 4 + 4 * count).any()  # no masked prompts
        tokens = np.frombuffer(payload, "<u2", offset=4 + 8 * count)
        assert lengths.sum() == len(tokens)
        assert count <= 256
        texts += [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    assert texts == documents["short"]["train"]
    assert len(keys) == len(set(keys)) == sum(s.members for s in shards)


def test_wide_vocabulary_uses_four_bytes(tmp_path, make_folder):
    assert (token_dtype(65_536), token_dtype(65_537)) == ("<u2", "<u4")
    shards = write_shards(tmp_path, "wide-train", [EncodedDocument([2, 70_000, 3])], "<u4")
    assert shards[0].tokens == 3
    assert int.from_bytes((tmp_path / shards[0].file).read_bytes()[512 + 12 + 4 :][:4], "little") == 70_000
    with pytest.raises(OverflowError):
        write_shards(tmp_path, "narrow-train", [EncodedDocument([2, 70_000, 3])], "<u2")


def test_edge_shapes(tmp_path):
    assert write_shards(tmp_path, "none-train", [], "<u2") == ()
    for count, members in ((1, 1), (256, 1), (257, 2)):
        (shard,) = write_shards(tmp_path, f"n{count}-train", [EncodedDocument([2, 3])] * count, "<u2")
        assert (shard.documents, shard.members, shard.tokens) == (count, members, 2 * count)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("position", [0.0, 0.3, 0.7, 0.999])
def test_flipped_bit_is_found_on_read_and_by_verify(copy, capsys, position):
    manifest = open_manifest(copy)
    shard = manifest.sources["long"].splits["train"].shards[-1]
    members = np.load(copy / shard.index_file)
    offset = int(members["offset"][-1] + position * members["size"][-1])
    data = bytearray((copy / shard.file).read_bytes())
    data[offset] ^= 4
    (copy / shard.file).write_bytes(data)
    stream = TokenStream(open_manifest(copy), "long", "train")  # sizes and index are still right
    with pytest.raises(DataError, match=f"{shard.file} member 00000.: its checksum differs"):
        stream.read(stream.tokens - 1, stream.tokens)
    loader = Loader(copy, 64, 8, 0)
    with pytest.raises(DataError, match="checksum"):
        deque((loader.batch(step) for step in range(200)), maxlen=0)
    with pytest.raises(SystemExit) as stop:
        main([str(copy)])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.splitlines()[-1].startswith("error: ")
    assert shard.file in error


def test_flipped_bit_outside_the_payload_is_found_by_verify(copy):
    shard = open_manifest(copy).sources["short"].splits["train"].shards[0]
    data = bytearray((copy / shard.file).read_bytes())
    data[-1] ^= 1
    (copy / shard.file).write_bytes(data)
    with pytest.raises(DataError, match=shard.file):
        verify(copy)


def test_whole_folder_verifies(folder, capsys):
    main([str(folder)])
    assert "good" in capsys.readouterr().out


@pytest.mark.parametrize("pattern", ["long-train-00000.tar", "short-train-00001.idx", "tokenizer.model"])
@pytest.mark.parametrize("damage", ["remove", "truncate", "grow", "empty"])
def test_missing_or_resized_file_is_found_at_open(copy, pattern, damage):
    path = copy / pattern
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes({"truncate": data[:-512], "grow": data + b"\0", "empty": b""}[damage])
    with pytest.raises(DataError, match=pattern) as error:
        open_manifest(copy)
    assert "\n" not in str(error.value)


def test_swapped_shards_of_one_size_are_found_at_open(tmp_path, make_folder):
    texts = [[2, token, 3] for token in range(4, 204)]
    folder = make_folder(tmp_path / "data", {"short": {"train": texts, "validation": texts}}, 600)
    a, b = folder / "short-train-00000.tar", folder / "short-train-00001.tar"
    assert a.stat().st_size == b.stat().st_size
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)
    with pytest.raises(DataError, match="short-train-00000.tar is another file"):
        open_manifest(folder)


def test_swapped_index_and_tokenizer_are_found_at_open(copy):
    index = copy / "short-train-00000.idx"
    data = bytearray(index.read_bytes())
    data[-1] ^= 1
    index.write_bytes(data)
    with pytest.raises(DataError, match="short-train-00000.idx has sha256"):
        open_manifest(copy)
    data[-1] ^= 1
    index.write_bytes(data)
    tokenizer = bytearray((copy / "tokenizer.model").read_bytes())
    tokenizer[100] ^= 1
    (copy / "tokenizer.model").write_bytes(tokenizer)
    with pytest.raises(DataError, match="tokenizer.model has sha256"):
        open_manifest(copy)


def test_open_names_what_is_missing(tmp_path, copy):
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_manifest(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="manifest.json"):
        open_manifest(tmp_path / "empty")
    good = json.loads((copy / "manifest.json").read_text())
    outside = json.loads(json.dumps(good).replace("short-train-00000.tar", "../short-train-00000.tar"))
    for bad in (
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff",
        json.dumps({**good, "format": 99}).encode(),
        json.dumps({**good, "sources": 3}).encode(),
        json.dumps({**good, "extra": 1}).encode(),
        json.dumps(outside).encode(),
    ):
        (copy / "manifest.json").write_bytes(bad)
        with pytest.raises(DataError, match="manifest.json") as error:
            open_manifest(copy)
        assert "\n" not in str(error.value)


def test_moved_folder_still_opens(copy, tmp_path):
    shutil.move(copy, tmp_path / "elsewhere")
    assert verify(tmp_path / "elsewhere").manifest.path == tmp_path / "elsewhere"


def test_documents_without_text_are_counted_and_compared(tmp_path, make_folder, capsys):
    """What two builds in one folder once wrote: whole shards of empty documents."""
    documents = {"x": {"train": [[2, 70, 71, 3], [2, 3], [2, 72, 3]], "validation": [[2, 80, 3]]}}
    folder = make_folder(tmp_path / "data", documents)
    main([str(folder)])
    assert "4 documents (1 of them empty), 12 tokens" in capsys.readouterr().out
    manifest = json.loads((folder / "manifest.json").read_text())
    split = manifest["sources"]["x"]["splits"]["train"]
    split["text_bytes"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="train documents of 'x' have 3 bytes of text, the manifest says 4"):
        verify(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": 1}, "documents and tokens are not the sums of its shards"),
        ({"text_bytes": -1}, "documents and tokens are not the sums of its shards"),
        ({"tokens": "8"}, "tokens='8' is not an integer"),
        ({"shards": []}, "not the sums"),
        ({"more": 1}, "more is not a known key"),
    ],
)
def test_a_manifest_that_contradicts_itself(copy, change, message):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["sources"]["short"]["splits"]["train"].update(change)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"manifest.json is damaged .*{message}.*: build it again"):
        open_manifest(copy)


@pytest.mark.parametrize("what", ["members", "documents", "tokens"])
def test_counts_of_a_shard_are_those_of_its_index(copy, what):
    manifest = json.loads((copy / "manifest.json").read_text())
    split = manifest["sources"]["short"]["splits"]["train"]
    split["shards"][0][what] += 1
    if what in split:
        split[what] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="short-train-00000.idx has .* members, documents, tokens, the manif"):
        open_manifest(copy)
