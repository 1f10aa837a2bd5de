"""Exported and imported folders that are damaged, hostile, cut short or read while they are written.

Every attack ends in a model that is wholly one or the other, or in a ValueError or OSError of one line.
"""

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.locks import FolderLock
from model import ModelConfig, ZeroModel, load_pretrained
from model.hf.deepseek import export_folder, import_folder
from model.weight_writer import save_tensors

from ..model.hf_folders import LLAMA3_ROPE, gpt2_folder, llama_folder
from ..model.test_hf import exported, random_config, random_model
from .mutations import byte_mutations, config_mutations

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
WEIGHTS, CONFIG = "model.safetensors", "config.json"
KINDS = ("gpt2", "llama", "qwen3", "deepseek_v3", "deepseek_section", "export")
few_or_all = pytest.mark.parametrize("count", [20, pytest.param(300, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each of KINDS; deepseek_section has our section in config.json, as an export does."""
    root = tmp_path_factory.mktemp("folders")
    gpt2_folder(root / "gpt2")
    llama_folder(root / "llama", rope_parameters={**LLAMA3_ROPE, "rope_theta": 10000.0})
    llama_folder(root / "qwen3", "qwen3", use_sliding_window=True, head_dim=6)
    section = exported(random_model(random_config(3)), root)
    shutil.copytree(section, root / "deepseek_v3")
    change_config(root / "deepseek_v3", zeromodel=None)
    section.rename(root / "deepseek_section")
    (root / "ours").rename(root / "export")
    return root


@pytest.fixture
def copy(folders: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(folders / kind, tmp_path / kind))


def change_config(folder: Path, **changes: Any) -> None:
    """None deletes a key."""
    values = json.loads((folder / CONFIG).read_text()) | changes
    kept = {key: value for key, value in values.items() if value is not None or key not in changes}
    (folder / CONFIG).write_text(json.dumps(kept))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def read(folder: Path) -> None:
    """As its kind is read: an import whose result must load too, or an export."""
    if folder.name == "export":
        load_pretrained(folder)
        return
    out = folder.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    import_folder(folder, out)
    load_pretrained(out)


def refusal(what: str, call: Callable[[], object]) -> str | None:
    """The error line of a call; None if it succeeds. Anything but ValueError and OSError fails the test."""
    try:
        call()
    except (ValueError, OSError) as error:
        line = str(error)
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    else:
        return None
    assert "\n" not in line, what
    return line


def refusals(folder: Path, path: Path, mutated: Iterator[tuple[str, Any]]) -> int:
    """How many mutations of a file are refused; the file is as before afterwards."""
    whole, count = path.read_bytes(), 0
    for what, content in mutated:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        count += refusal(f"{path.name}: {what}", lambda: read(folder)) is not None
    path.write_bytes(whole)
    assert refusal("whole", lambda: read(folder)) is None
    return count


@few_or_all
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_values_in_config_json(copy, kind, count):
    folder = copy(kind)
    values = json.loads((folder / CONFIG).read_text())
    assert refusals(folder, folder / CONFIG, config_mutations(values, count, seed=1)) >= count // 4


@few_or_all
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_wrong_values_in_the_tokenizers_files(copy, name, count):
    folder = copy("llama")
    values = json.loads((folder / name).read_text())
    assert refusals(folder, folder / name, config_mutations(values, count, seed=2)) >= count // 4


@few_or_all
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", CONFIG),
        ("llama", WEIGHTS),
        ("llama", "tokenizer.json"),
        ("export", CONFIG),
        ("export", WEIGHTS),
    ],
)
def test_wrong_bytes(copy, kind, name, count):
    folder = copy(kind)
    path = folder / name
    refusals(folder, path, byte_mutations(path.read_bytes(), count, seed=3))


@few_or_all
@pytest.mark.parametrize("kind", ["llama", "export"])
def test_a_wrong_byte_in_the_header_of_the_weights_is_always_noticed(copy, kind, count):
    folder = copy(kind)
    content = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    headers = ((what, head + content[end:]) for what, head in byte_mutations(content[:end], count, seed=4))
    assert refusals(folder, folder / WEIGHTS, headers) == count


@few_or_all
def test_wrong_bytes_in_a_sentencepiece_tokenizer_on_export(copy, count):
    folder = copy("export")
    path = folder / "tokenizer.model"
    for what, content in byte_mutations(path.read_bytes(), count, seed=5):
        path.write_bytes(content)
        shutil.rmtree(folder.parent / "hf", ignore_errors=True)
        refusal(what, lambda: export_folder(folder, folder.parent / "hf"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        (torch.int8, 1, "int8|I8"),
        (torch.bool, 1, "bool|BOOL"),
        (torch.float8_e4m3fn, 1, "float8_e4m3fn|F8_E4M3"),
        (torch.float32, float("nan"), "NaN or infinity"),
        (torch.bfloat16, float("-inf"), "NaN or infinity"),
    ],
)
def test_weights_that_are_not_finite_floats_are_refused_by_name(copy, kind, dtype, value, message):
    folder = copy(kind)
    names = sorted(load_file(folder / WEIGHTS))
    last = names[-1]

    def change(tensors):
        tensors[last].view(-1)[-1] = value
        tensors[last] = tensors[last].to(dtype)

    change_weights(folder, change)
    with pytest.raises(ValueError, match=f"{last}.* (in ({message}),|holds {message})"):
        read(folder)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {"n_layer": 10**9}),
        ("gpt2", {"n_layer": 900}),
        ("gpt2", {"n_embd": 2 * 10**6, "n_head": 2}),
        ("gpt2", {"n_positions": 10**12}),
        ("llama", {"num_hidden_layers": 10**9}),
        ("llama", {"hidden_size": 2 * 10**6}),
        ("llama", {"vocab_size": 2**62}),
        ("deepseek_v3", {"num_hidden_layers": 10**9}),
        ("deepseek_v3", {"num_nextn_predict_layers": 10**9}),
        ("deepseek_v3", {"n_routed_experts": 10**9}),
        ("deepseek_v3", {"hidden_size": 2 * 10**6, "intermediate_size": 2 * 10**6}),
        ("export", {"num_hidden_layers": 10**9}),
        ("export", {"num_hidden_layers": 900}),
        ("export", {"num_nextn_predict_layers": 10**9}),
        ("export", {"n_routed_experts": 10**9}),
        ("export", {"hidden_size": 2 * 10**6}),
        ("export", {"vocab_size": 2**62}),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(copy, kind, changes, monkeypatch):
    folder = copy(kind)
    change_config(folder, **changes)

    def built(*_: object, **__: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(ZeroModel, "__init__", built)
    with pytest.raises(ValueError, match="but its weights have only|and at most"):
        read(folder)


def shards(folder: Path) -> dict[str, str]:
    """Splits the weights in two; the index's map."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    where = {name: f"model-{1 + (name > names[3])}-of-2.safetensors" for name in names}
    for file in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file, {"format": "pt"})
    (folder / WEIGHTS).unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return where


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("whole", None),
        ("linked", None),  # as in the cache of the Hub
        ("no shard", "model-2-of-2.safetensors is missing"),
        ("outside", "names '../model-1-of-2.safetensors', which is not a safetensors file in it"),
        ("absolute", "which is not a safetensors file in it"),
        ("pickled", "names 'pytorch_model.bin', which is not a safetensors file in it"),
        ("tensor elsewhere", "but model.safetensors.index.json says otherwise"),
        ("tensor twice", "which another file of the folder holds too"),
        ("both", "has both model.safetensors and model.safetensors.index.json"),
        ("no map", "weight_map=None is not a mapping"),
        ("numbers", "is not text"),
        ("unknown tensor", "lacks nothing.weight, but model.safetensors.index.json says otherwise"),
        ("cut", "is damaged ("),
        ("map of maps", "weight_map"),
        ("brackets", "is not valid JSON"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "export"])
def test_shards(copy, kind, name, message):
    folder = copy(kind)
    where = shards(folder)
    first = min(where)
    file, index = where[first], folder / f"{WEIGHTS}.index.json"
    if name == "linked":
        (folder / file).rename(folder.parent / "blob")
        (folder / file).symlink_to("../blob")
    elif name == "no shard":
        (folder / "model-2-of-2.safetensors").unlink()
    elif name in ("outside", "absolute", "pickled"):
        new = {"outside": f"../{file}", "absolute": str(folder / file), "pickled": "pytorch_model.bin"}[name]
        where = {key: new if value == file else value for key, value in where.items()}
    elif name == "tensor elsewhere":
        where[first] = where[max(where)]
    elif name == "tensor twice":
        other = folder / where[max(where)]
        save_file({**load_file(other), first: torch.zeros(1)}, other, {"format": "pt"})
        where = dict(where)
    elif name == "unknown tensor":
        where["nothing.weight"] = file
    elif name == "cut":
        (folder / file).write_bytes((folder / file).read_bytes()[:-4])
    elif name == "map of maps":
        where = {"a": where}
    elif name == "both":
        shutil.copy(folder / file, folder / WEIGHTS)
    index.write_text(json.dumps({} if name == "no map" else {"weight_map": where}))
    if name == "numbers":
        index.write_text(json.dumps({"weight_map": dict.fromkeys(where, 1)}))
    if name == "brackets":
        index.write_text("[" * 10**5)
    found = refusal(name, lambda: read(folder))
    assert found is None if message is None else message in (found or "accepted")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_pickled_weights_are_never_read(copy, tmp_path):
    folder = copy("llama")
    (folder / WEIGHTS).unlink()
    torch.save(Bomb(tmp_path / "ran"), folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"pytorch_model.bin is not read, since pickled files can run"
    ):
        read(folder)
    shutil.copy(folder / "pytorch_model.bin", folder / WEIGHTS)
    with pytest.raises(ValueError, match="is damaged"):
        read(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("depth", [900, 10**5])
@pytest.mark.parametrize("kind", ["llama", "export"])
def test_brackets_without_end(copy, kind, depth):
    folder = copy(kind)
    (folder / CONFIG).write_text('{"vocab_size": ' + "[" * depth + "]" * depth + "}")
    assert refusal("brackets", lambda: read(folder)) is not None
    (folder / CONFIG).write_text('{"vocab_size": ' + "9" * 10**4 + "}")
    assert refusal("digits", lambda: read(folder)) is not None


# ---- writers: killed, on a full disk, beside readers and other writers


def models(scales: tuple[float, ...] = (1.0, 2.5)) -> list[ZeroModel]:
    """Of equal shapes; config and weights both tell them apart."""
    values = {**random_config(4).to_dict(), "use_moe": True}
    return [
        random_model(ModelConfig.from_dict({**values, "routed_scaling_factor": scale}), seed=number)
        for number, scale in enumerate(scales)
    ]


def which(folder: Path, candidates: list[ZeroModel]) -> int:
    """The number of the model in a folder. A mixture fails the test; an unreadable folder raises."""
    found = load_pretrained(folder)
    (number,) = (n for n, model in enumerate(candidates) if model.config == found.config)
    state = candidates[number].state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in found.state_dict().items())
    return number


def killed_at(call: int, write: Callable[[], None]) -> bool:
    """Whether a process ended by kill -9 at the call-th change of a folder; False: it finished before."""
    child = os.fork()
    if child == 0:
        left = call

        def dying(change: Callable[..., Any]) -> Callable[..., Any]:
            def changed(*arguments: Any, **keywords: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return change(*arguments, **keywords)

            return changed

        for owner, name in (
            (os, "replace"),
            (os, "unlink"),
            (os, "fsync"),
            (Path, "unlink"),
            (Path, "touch"),
        ):
            setattr(owner, name, dying(getattr(owner, name)))
        try:
            write()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def test_a_kill_between_any_two_changes_never_mixes_two_exports(tmp_path):
    candidates, seen, call = models(), set[int | None](), 0
    while True:
        folder = tmp_path / str(call)
        candidates[0].save_pretrained(folder)
        killed = killed_at(call, lambda folder=folder: candidates[1].save_pretrained(folder))
        seen.add(
            None if refusal("killed", lambda f=folder: load_pretrained(f)) else which(folder, candidates)
        )
        if not killed:
            break
        call += 1
    assert call > 5
    assert seen == {0, 1, None}


def test_a_kill_between_any_two_changes_never_mixes_two_hugging_face_folders(tmp_path, copy):
    candidates, call = models(), 0
    for number, model in enumerate(candidates):
        exported(model, tmp_path / str(number))
    while True:
        out = tmp_path / f"hf{call}"
        shutil.copytree(tmp_path / "0" / "hf", out)
        killed = killed_at(call, lambda out=out: export_folder(tmp_path / "1" / "ours", out))
        back = tmp_path / f"back{call}"
        if refusal("killed", lambda out=out, back=back: import_folder(out, back)) is None:
            which(back, candidates)
        if not killed:
            break
        call += 1
    assert call > 10
    assert which(back, candidates) == 1


@pytest.mark.parametrize("room", [0, 100, 5000])
def test_a_full_disk_keeps_the_export_that_was_there(tmp_path, room):
    candidates = models()
    candidates[0].save_pretrained(tmp_path / "export")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        found = refusal("full disk", lambda: candidates[1].save_pretrained(tmp_path / "export"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "bytes free" in (found or "written")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [CONFIG, WEIGHTS]
    assert which(tmp_path / "export", candidates) == 0


def test_others_may_read_what_was_written(tmp_path):
    (tmp_path / "any").touch()
    save_tensors(tmp_path / WEIGHTS, {"a": torch.zeros(3)})
    assert (tmp_path / WEIGHTS).stat().st_mode == (tmp_path / "any").stat().st_mode


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    rows = torch.arange(6.0).view(2, 3)
    save_tensors(tmp_path / "rows", {"0": rows[0], "1": rows[1], "again": rows[1], "turned": rows.T})
    found = load_file(tmp_path / "rows")
    assert found["0"].tolist() == [0, 1, 2]
    assert found["1"].tolist() == found["again"].tolist() == [3, 4, 5]
    assert torch.equal(found["turned"], rows.T)


def test_an_export_that_is_replaced_while_it_is_read_is_refused(tmp_path, monkeypatch):
    candidates = models()
    candidates[0].save_pretrained(tmp_path)
    read_config = ModelConfig.from_dict

    def interrupted(values: dict[str, Any]) -> ModelConfig:
        monkeypatch.setattr(ModelConfig, "from_dict", read_config)
        candidates[1].save_pretrained(tmp_path)
        return read_config(values)

    monkeypatch.setattr(ModelConfig, "from_dict", interrupted)
    with pytest.raises(ValueError, match="was written while it was read; wait for its writer"):
        load_pretrained(tmp_path)
    assert which(tmp_path, candidates) == 1


def test_no_folder_of_another_kind_is_overwritten(copy):
    export, hf = copy("export"), copy("deepseek_section")
    for call, other in (
        (lambda: export_folder(export, export), "an export"),
        (lambda: import_folder(hf, hf), "a Hugging"),
    ):
        with pytest.raises(ValueError, match=f"is {other}.*, whose files would be overwritten"):
            call()
    (hf / "mtp.safetensors").touch()
    with pytest.raises(ValueError, match="holds mtp.safetensors of another model; delete it or choose"):
        export_folder(export, hf)
    (hf / "mtp.safetensors").unlink()
    with (
        FolderLock(hf, "another export", "wait"),
        pytest.raises(ValueError, match="is in use by another export"),
    ):
        export_folder(export, hf)
    read(export)
    read(hf)


def test_an_export_without_a_tokenizer_says_so(copy, tmp_path, capsys):
    export = copy("export")
    (export / "tokenizer.model").unlink()
    export_folder(export, tmp_path / "hf")
    assert "has no tokenizer.model" in capsys.readouterr().err
    assert json.loads((tmp_path / "hf" / CONFIG).read_text())["eos_token_id"] is None
    import_folder(tmp_path / "hf", tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (export / WEIGHTS).read_bytes()
