"""Weights written one tensor at a time: the library's bytes, transformers' shards, and little memory."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from model import ModelConfig, ZeroModel, load_pretrained
from model.convert.__main__ import main as convert
from model.export_files import save_weights, saving_weights
from model.hf.deepseek import export_folder, import_folder
from model.weight_files import INDEX_NAME, WEIGHTS_NAME, OpenWeights, open_weights, weights_path
from model.weight_writer import (
    WeightWriter,
    copy_weights,
    describe,
    save_tensors,
    shards,
    weights_digest,
    writing_weights,
)

from .hf_folders import llama_folder

TENSORS = {
    "z.weight": torch.arange(12.0).view(3, 4),
    "a.weight": torch.arange(6.0).view(2, 3).bfloat16(),
    "half": torch.ones(5).half(),
    "double": torch.full((1,), 0.1).double(),
    "scalar": torch.tensor(-0.0),
    "empty": torch.empty(0, 7),
    'é"\\\n\x01\x7f/': torch.arange(4.0)[::2],
    "turned": torch.arange(8.0).view(2, 4).T,
    "expanded": torch.arange(3.0).expand(5, 3),
    "one": torch.arange(8.0)[::8],
}


def test_the_bytes_are_the_librarys(tmp_path):
    copies = {name: value.clone(memory_format=torch.contiguous_format) for name, value in TENSORS.items()}
    save_file(copies, tmp_path / "theirs", {"format": "pt"})
    save_tensors(tmp_path / "ours", TENSORS)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    for end in range(24):  # whatever the header's padding
        save_file({"x" * end: torch.ones(2)}, tmp_path / "theirs", {"format": "pt"})
        save_tensors(tmp_path / "ours", {"x" * end: torch.ones(2)})
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_any_order_and_rows_give_the_same_bytes(tmp_path):
    save_tensors(tmp_path / "whole", TENSORS)
    writer = WeightWriter({tmp_path / "parts": {name: describe(value) for name, value in TENSORS.items()}})
    for name in reversed(TENSORS):
        if name in ("z.weight", "turned"):
            writer.write(name, TENSORS[name][1:], row=1)
            with pytest.raises(ValueError, match="was not written as planned: .* bytes are missing"):
                writer.finish()
            writer.write(name, TENSORS[name][:1], row=0)
        else:
            writer.write(name, TENSORS[name])
    writer.finish()
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_another_shape_type_or_name_is_refused(tmp_path):
    writer = WeightWriter({tmp_path / "x": {"a": describe(torch.zeros(2, 3))}})
    for value, row in ((torch.zeros(3, 2), None), (torch.zeros(2, 3).half(), None), (torch.zeros(1, 2), 0)):
        with pytest.raises(ValueError, match=r"a is \(.*\) in .*, but \(.* in F32 was to be written"):
            writer.write("a", value, row)
    with pytest.raises(ValueError, match="b does not belong to the weights"):
        writer.write("b", torch.zeros(1))
    with pytest.raises(ValueError, match=r"a weight is in torch.int8, but .* bfloat16 or wider"):
        writer.write("a", torch.zeros(2, 3, dtype=torch.int8))


@pytest.mark.parametrize("limit", [1, 240, 400, 10**6])
def test_shards_are_transformers(limit, tmp_path):
    tensors = {f"layer.{n}": torch.full((n, 5), float(n)) for n in (3, 1, 12, 2, 2, 9)}
    theirs = split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
    stored = {name: describe(value) for name, value in tensors.items()}
    with writing_weights(tmp_path, shards(stored, limit), stored) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == theirs.filename_to_tensors.keys()
    if theirs.is_sharded:
        index = json.loads((tmp_path / INDEX_NAME).read_text())
        assert index["weight_map"] == theirs.tensor_to_filename
        assert index["metadata"]["total_size"] == theirs.metadata["total_size"]
    for file, names in theirs.filename_to_tensors.items():
        found = load_file(tmp_path / file)
        assert all(torch.equal(found.pop(name), tensors[name]) for name in names)
        assert not found


def model(**changes: Any) -> ZeroModel:
    """240,000 numbers in many small tensors."""
    sizes = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 6, "max_position_embeddings": 32}
    plain = {"use_moe": False, "use_mla": False, "num_attention_heads": 4, "intermediate_size": 96}
    return ZeroModel(ModelConfig.from_dict({**sizes, **plain, **changes}), seed=3).eval()


def save_sharded(folder: Path, source: ZeroModel, limit: int) -> None:
    state = source.state_dict()
    stored = {name: describe(value) for name, value in state.items()}
    with saving_weights(folder, source.config, stored, limit) as writer:
        for name, value in state.items():
            writer.write(name, value)


def test_an_export_in_shards_is_the_same_model(tmp_path):
    source, tokens = model(), torch.arange(20)[None]
    source.save_pretrained(tmp_path / "whole")
    save_sharded(tmp_path / "shards", source, 10**5)
    index = weights_path(tmp_path / "shards")
    assert index.name == INDEX_NAME
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 5
    assert torch.equal(load_pretrained(tmp_path / "shards")(tokens).logits, source(tokens).logits)
    assert weights_digest(index, "") == weights_digest(tmp_path / "whole" / WEIGHTS_NAME, "")
    copy_weights(index, tmp_path / "copy", "")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "whole" / WEIGHTS_NAME).read_bytes()
    export_folder(tmp_path / "shards", tmp_path / "hf", 10**5)
    import_folder(tmp_path / "hf", tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS_NAME).read_bytes() == (tmp_path / "copy").read_bytes()


def test_one_form_replaces_the_other(tmp_path):
    """And nothing of it stays, nor of other numbers of shards."""
    source = model()
    for limit in (10**5, 2 * 10**5, 10**9, 10**5):
        save_sharded(tmp_path, source, limit)
        files = {path.name for path in tmp_path.iterdir()} - {"config.json", INDEX_NAME}
        assert files == set(shards({n: describe(v) for n, v in source.state_dict().items()}, limit))
        load_pretrained(tmp_path)


def test_an_export_that_fails_leaves_the_older_one(tmp_path):
    source = model()
    save_sharded(tmp_path, source, 10**5)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    stored = {name: describe(value) for name, value in source.state_dict().items()}
    with (
        pytest.raises(ValueError, match="was not written as planned"),
        saving_weights(tmp_path, source.config, stored, 2 * 10**5) as writer,
    ):
        writer.write("lm_head.weight", source.state_dict()["lm_head.weight"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class Alive(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those that torch made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.most = 0

    def seen(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.is_meta or storage._cdata in self.sizes:
            return
        key = storage._cdata
        self.sizes[key] = storage.nbytes()
        weakref.finalize(storage, self.sizes.pop, key, None)
        self.most = max(self.most, sum(self.sizes.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.seen(tensor)
        return out


def most_alive(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of tensors at once during a call, those read from files included."""
    alive, read = Alive(), OpenWeights.__getitem__

    def reading(self: OpenWeights, name: str) -> torch.Tensor:
        tensor = read(self, name)
        alive.seen(tensor)
        return tensor

    with monkeypatch.context() as patched, alive:
        patched.setattr(OpenWeights, "__getitem__", reading)
        call()
    return alive.most


def test_memory_holds_one_tensor_and_not_the_model(tmp_path, monkeypatch):
    source = model(num_hidden_layers=12)
    state = source.state_dict()
    total, largest = (f(value.nbytes for value in state.values()) for f in (sum, max))
    assert total > 15 * largest
    source.save_pretrained(tmp_path / "export")
    loop = ["loop", "--core", "1-3", "--num_steps", "2"]
    moe = ["moe", "--n_routed_experts", "8", "--num_experts_per_tok", "2", "--n_shared_experts", "1"]
    given = ["--checkpoint", str(tmp_path / "export"), "--out"]
    llama_folder(tmp_path / "llama", num_hidden_layers=12, hidden_size=48)
    with_names = open_weights(tmp_path / "llama" / WEIGHTS_NAME, "").stored.values()
    calls = {
        "export": lambda: export_folder(tmp_path / "export", tmp_path / "hf"),
        "import": lambda: import_folder(tmp_path / "hf", tmp_path / "back"),
        "import of llama": lambda: import_folder(tmp_path / "llama", tmp_path / "ours"),
        "loop": lambda: convert([*loop, *given, str(tmp_path / "loop")]),
        "moe": lambda: convert([*moe, *given, str(tmp_path / "moe")]),
    }
    largest = max(largest, *(4 * tensor.size for tensor in with_names))
    router = 13 * 8 * 48 * 4  # the initial values of new parts
    for name, call in calls.items():
        most = most_alive(call, monkeypatch)
        assert 0 < most <= 3 * largest + router, name
    most = most_alive(lambda: load_pretrained(tmp_path / "export"), monkeypatch)
    assert total <= most <= total + 3 * largest


def test_a_state_in_memory_is_saved_as_before(tmp_path):
    source = model()
    save_weights(tmp_path, source.config, source.state_dict())
    save_file(source.state_dict(), tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == (tmp_path / "theirs").read_bytes()
