"""Folders that bring their code: written, loaded, saved again, read back, and what is refused."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers.dynamic_module_utils
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data_pipeline.tokenization.tokenizer import Tokenizer, train_tokenizer
from model import ModelConfig, ZeroModel, load_pretrained
from model.hf.__main__ import main
from model.hf.bundle import INSTALLED, bundle
from model.hf.deepseek import export_folder, import_folder
from model.hf.remote.section import SHARED

from .conftest import SMALL, VARIANTS
from .hf_folders import llama_folder
from .own_classes import assert_close
from .test_hf_own import named

TEXT = "the cat sat on the mat 0123456789. "
VOCABULARY = 300
FILES = ("config.json", "model.safetensors", "tokenizer.model", "training_data.json")
DATA = {"sources": {"a|b": {"kind": "text", "weight": 1.0, "tokens": 77, "decontaminated": True}}}


def export(folder: Path, **changes: Any) -> ZeroModel:
    """An export/ folder with tokenizer, data and scores, as a run leaves it."""
    values = {**SMALL, **VARIANTS["loop"], "vocab_size": VOCABULARY, **changes}
    model = ZeroModel(ModelConfig.from_dict(values), seed=4).eval()
    model.save_pretrained(folder)
    pieces = train_tokenizer([TEXT * 20], VOCABULARY, "bpe", thought_pieces=True)
    (folder / "tokenizer.model").write_bytes(pieces)
    (folder / "training_data.json").write_text(json.dumps(DATA))
    entry = {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.0125, "num_steps": 3}
    (folder.parent / "eval").mkdir(exist_ok=True)
    report = {"results": {"arc_easy": entry}, "n-samples": {"arc_easy": {"effective": 40}}}
    (folder.parent / "eval/results_1.json").write_text(json.dumps(report))
    return model


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose tests must not change it, and the export/ folder that it was made from."""
    root = tmp_path_factory.mktemp("shared")
    export(root / "run/export")
    export_folder(root / "run/export", root / "hf")
    return root


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)


def loaded(folder: Path, **options: Any) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, output_loading_info=True, **options
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind], (kind, report[kind])
    assert type(model).__module__.startswith("transformers_modules.")
    return model


@pytest.mark.usefixtures("remote_code")
def test_a_folder_loads_generates_is_saved_and_imported_back(tmp_path, capsys):
    ours = export(tmp_path / "run/export")
    sys.argv = ["hf", "export", "--checkpoint", str(tmp_path / "run/export"), "--out", str(tmp_path / "hf")]
    main()
    assert (
        "with its own code, since the DeepseekV3 format cannot express recurrence" in capsys.readouterr().out
    )
    theirs, tokenizer = (
        loaded(tmp_path / "hf"),
        tokenizer_of(tmp_path / "hf"),
    )
    mine = Tokenizer(tmp_path / "run/export/tokenizer.model")
    inputs = tokenizer("the cat <s > sat", return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == mine.encode("the cat <s > sat", bos=True)
    tokens = inputs["input_ids"]
    with torch.no_grad():
        assert_close(theirs(**inputs).logits, ours(tokens).logits)
    text = theirs.generate(**inputs, max_new_tokens=9, do_sample=False, num_steps=2)
    assert torch.equal(text, ours.generate(tokens, 9, num_steps=2, eos_token_id=mine.eos_id))
    assert theirs.config.bot_token_id == mine.bot_id
    assert theirs.config.eot_token_id == mine.eot_id

    theirs.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    (tmp_path / "again/tokenizer.model").write_bytes((tmp_path / "hf/tokenizer.model").read_bytes())
    (tmp_path / "again/training_data.json").write_bytes((tmp_path / "hf/training_data.json").read_bytes())
    with torch.no_grad():
        assert_close(loaded(tmp_path / "again")(tokens).logits, theirs(tokens).logits)
    half = loaded(tmp_path / "hf", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.network.moe_layers()[0].gate.e_score_correction_bias.dtype == torch.float32
    assert half(tokens).logits.isfinite().all()
    for folder in ("hf", "again"):
        import_folder(tmp_path / folder, tmp_path / f"from_{folder}")
        for name in FILES:
            original = (tmp_path / "run/export" / name).read_bytes()
            assert (tmp_path / f"from_{folder}" / name).read_bytes() == original, (folder, name)


def test_large_weights_are_written_in_several_files(tmp_path):
    ours = export(tmp_path / "run/export")
    export_folder(tmp_path / "run/export", tmp_path / "hf", max_shard_size=20_000)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in ours.state_dict().values())
    import_folder(tmp_path / "hf", tmp_path / "back")
    for name in FILES:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "run/export" / name).read_bytes()
    with pytest.raises(ValueError, match=r"holds model-00001-of-\d+.safetensors of another model"):
        export_folder(tmp_path / "run/export", tmp_path / "hf")


def test_bf16_weights_stay_bf16(tmp_path):
    export(tmp_path / "run/export")
    path = tmp_path / "run/export/model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path, {"format": "pt"})
    export_folder(tmp_path / "run/export", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"
    import_folder(tmp_path / "hf", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("remote_code")
def test_an_imported_model_leaves_again_with_its_tokenizer(tmp_path):
    theirs = llama_folder(tmp_path / "llama")
    import_folder(tmp_path / "llama", tmp_path / "import")
    export_folder(tmp_path / "import", tmp_path / "hf")
    ours, tokenizer = (
        loaded(tmp_path / "hf"),
        tokenizer_of(tmp_path / "hf"),
    )
    text = "how many apples 12+345"
    ids = tokenizers.Tokenizer.from_file(str(tmp_path / "llama/tokenizer.json")).encode(text).ids
    found = tokenizer(text)["input_ids"]
    assert found == [tokenizer.bos_token_id, *ids] == [0, *ids]
    assert (tokenizer.eos_token_id, tokenizer.pad_token) == (1, "<pad>")
    assert tokenizer.decode(found, skip_special_tokens=True) == text
    with torch.no_grad():
        known = len(tokenizer) - 4  # the others were added, or had no token
        expected = theirs(torch.tensor([found])).logits[..., :known]
        assert_close(ours(torch.tensor([found])).logits[..., :known], expected)
    import_folder(tmp_path / "hf", tmp_path / "back")
    for name in FILES[:3]:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "import" / name).read_bytes()


def test_without_a_tokenizer_there_is_a_line(tmp_path, capsys):
    export(tmp_path / "run/export")
    (tmp_path / "run/export/tokenizer.model").unlink()
    export_folder(tmp_path / "run/export", tmp_path / "hf")
    assert "has no tokenizer.model; " in capsys.readouterr().err
    values = json.loads((tmp_path / "hf/config.json").read_text())
    assert values["eos_token_id"] is values["bot_token_id"] is None
    assert not (tmp_path / "hf/tokenizer.json").exists()


def test_the_card_says_what_is_known(tmp_path):
    ours = export(tmp_path / "run/export")
    export_folder(tmp_path / "run/export", tmp_path / "hf")
    card = ModelCard.load(tmp_path / "hf/README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["zeromodel", "custom_code", "recurrent-depth", "mixture-of-experts"],
    }
    total = sum(p.numel() for p in ours.parameters())
    for line in (
        f"| parameters | {total:,} |",
        "| runs of layers per token | 5 |",
        r"| a\|b | text | 1.0 | 77 | True |",
        r"| arc\_easy | 40 | 3 | acc \(none\) | 0.2500 | 0.0125 |",
    ):
        assert line in card.content, line
    export(tmp_path / "run/export", **VARIANTS["deepseek"], recurrence={})
    shutil.rmtree(tmp_path / "hf")
    assert "DeepseekV3 format" in export_folder(tmp_path / "run/export", tmp_path / "hf")
    assert "custom_code" not in ModelCard.load(tmp_path / "hf/README.md").data.tags


def test_the_card_says_where_the_weights_came_from(tmp_path):
    export(tmp_path / "run/export")
    start = {"folder": "/home/somebody/runs/llama", "sha256": "0123456789abcdef"}
    (tmp_path / "run/init.json").write_text(json.dumps(start))
    conversions = [{"command": "loop", "source": "/home/somebody/runs/start"}]
    (tmp_path / "run/export/conversion.json").write_text(json.dumps({"conversions": conversions}))
    export_folder(tmp_path / "run/export", tmp_path / "hf")
    card = (tmp_path / "hf/README.md").read_text()
    assert "Training began with the weights of llama (sha256 0123456789ab)." in card
    assert "Converted by `model.convert loop` from start." in card
    assert "somebody" not in card
    with pytest.raises(ValueError, match="--scores .*/nowhere is not a folder"):
        export_folder(tmp_path / "run/export", tmp_path / "other", scores=tmp_path / "nowhere")


def test_the_card_of_a_damaged_run_is_refused(tmp_path):
    export(tmp_path / "run/export")
    for name in ("export/training_data.json", "eval/results_1.json"):
        kept = (tmp_path / "run" / name).read_text()
        (tmp_path / "run" / name).write_text('{"sources": 1, "results": {"a": 2}}')
        with pytest.raises(ValueError, match=re.escape(Path(name).name)) as caught:
            export_folder(tmp_path / "run/export", tmp_path / "hf")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "hf/config.json").exists()
        (tmp_path / "run" / name).write_text(kept)


BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("a section of another kind", {"zeromodel": [1]}, "instead of the section"),
    ("no section", {"zeromodel": None}, "instead of the section"),
    ("a contradiction", {"hidden_size": 32}, "hidden_size=32, but its section"),
    ("an unknown key", {"zeromodel": {"hidden": 1}}, "model.hidden is not a known key"),
    ("too many layers", {"num_hidden_layers": 9000}, "num_hidden_layers=9000"),
    ("a vocabulary of another size", {"vocab_size": 301}, "expected"),
    ("no number", {"vocab_size": "many"}, "model.vocab_size='many' is not an integer"),
]


@pytest.mark.parametrize(("changes", "message"), [case[1:] for case in BROKEN], ids=[c[0] for c in BROKEN])
def test_a_contradictory_folder_is_one_line(changes, message, shared, tmp_path):
    shutil.copytree(shared / "hf", tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message) as caught:
        import_folder(tmp_path / "hf", tmp_path / "back")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "back/config.json").exists()


def test_code_in_a_folder_is_never_run_by_an_import(shared, tmp_path):
    shutil.copytree(shared / "hf", tmp_path / "hf")
    for path in (tmp_path / "hf").glob("*.py"):
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    import_folder(tmp_path / "hf", tmp_path / "back")
    assert load_pretrained(tmp_path / "back").config.recurrence.num_steps == 3
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", ["5", "0GB", "5TB", "-5GB", "1.5GB", ""])
def test_an_odd_shard_size_is_one_line(size, tmp_path, capsys):
    sys.argv = ["hf", "export", "--checkpoint", "X", "--out", str(tmp_path), f"--max_shard_size={size}"]
    with pytest.raises(SystemExit):
        main()
    assert f"--max_shard_size='{size}' is not a size" in capsys.readouterr().err


def test_the_code_is_whole_flat_and_the_same_each_time(shared):
    files = bundle()
    assert files == {path.name: path.read_text() for path in (shared / "hf").glob("*.py")}
    assert {"modeling_zeromodel.py", "configuration_zeromodel.py", "model_transformer.py"} <= files.keys()
    for name, text in files.items():
        compile(text, name, "exec")
        needed = re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.M)
        assert {f"{module}.py" for module in needed} <= files.keys(), name
        assert not re.search(r"^\s*(from|import)\s+(model|common)\b", text, flags=re.M), name


def test_transformers_finds_all_the_code_and_no_missing_package(shared):
    """On the Hub it checks every file, not only the first."""
    files = {path.name: path for path in (shared / "hf").glob("*.py")}
    for path in files.values():
        assert set(transformers.dynamic_module_utils.get_imports(path)) <= INSTALLED, path
    entry = files["modeling_zeromodel.py"]
    reached = transformers.dynamic_module_utils.get_relative_import_files(entry)
    assert {Path(name).name for name in reached} | {entry.name} == files.keys()


@pytest.mark.usefixtures("remote_code")
def test_the_config_alone_loads(shared):
    ours = load_pretrained(shared / "run/export")
    config = AutoConfig.from_pretrained(shared / "hf", trust_remote_code=True)
    assert all(getattr(config, name) == getattr(ours.config, name) for name in SHARED)
    assert config.zeromodel == ours.config.to_dict()
    assert set(config.zeromodel_code) == {"version", "sha256"}
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert torch.equal(fresh.network.lm_head.weight, ZeroModel(ours.config).lm_head.weight)


CLEAN = """
import sys
sys.path.append(sys.argv[1])
for name in ("model", "common", "omegaconf", "sentencepiece", "deepspeed", "numba"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported here")
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
tokens = torch.arange(5, 14)[None]
text = model.generate(tokens, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None)
loss = model(tokens, labels=tokens).loss
loss.backward()
torch.save({"logits": model(tokens).logits, "text": text}, sys.argv[3])
"""


def requirements(*names: str) -> set[str]:
    """The distributions that these need to be installed."""
    found, ahead = set[str](), list(names)
    while ahead:
        name = ahead.pop().lower()
        if name not in found:
            found.add(name)
            for line in distribution(name).requires or []:
                requirement = Requirement(line)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    ahead.append(requirement.name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loop", "kv-act-token-per_step", "gpt2", "memory"])
def test_an_environment_with_torch_transformers_and_safetensors_is_enough(name, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    for needed in requirements("torch", "transformers", "safetensors", "numpy"):
        for file in distribution(needed).files or []:
            top = file.parts[0]
            source = Path(str(distribution(needed).locate_file(top)))
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(source.resolve())
    ours = named(name)
    ours.save_pretrained(tmp_path / "export")
    export_folder(tmp_path / "export", tmp_path / "hf")
    result = tmp_path / "result.pt"
    command = [sys.executable, "-I", "-S", "-c", CLEAN, str(site), str(tmp_path / "hf"), str(result)]
    environment = {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-300:]
    found, tokens = torch.load(result), torch.arange(5, 14)[None]
    with torch.no_grad():
        assert_close(found["logits"], ours(tokens).logits)
    assert torch.equal(found["text"], ours.generate(tokens, 16))
