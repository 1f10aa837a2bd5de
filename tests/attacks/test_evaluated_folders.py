"""Hugging Face folders that must not be scored: not whole, not used whole, damaged, absurd or hostile."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eval.scoring.core import Scorer
from eval.scoring.hf_folder import HFEngine, load_hf_engine
from model.hf.deepseek import import_folder

from ..eval.test_hf_folder import save_tokenizer
from .mutations import byte_mutations, config_mutations
from .test_model_folders import WEIGHTS, Bomb, change_config, change_weights, refusal, shards

transformers = pytest.importorskip("transformers", reason="the development requirements are not installed")
ROOT = Path(__file__).parents[2]
KINDS = ("gpt2", "llama", "deepseek_v3")
few_or_all = pytest.mark.parametrize("count", [10, pytest.param(300, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 and Llama have tied heads, DeepSeek-V3 has experts."""
    root = tmp_path_factory.mktemp("evaluated")
    for kind in KINDS:
        size = save_tokenizer(root / kind, adds_bos=True) + 8
        common = {"vocab_size": size, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1}
        if kind == "gpt2":
            config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, **common)
        else:
            common |= {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
            common |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
        if kind == "llama":
            config = transformers.LlamaConfig(tie_word_embeddings=True, **common)
        if kind == "deepseek_v3":
            config = transformers.DeepseekV3Config(
                moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
                n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=16,
                qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, **common,
            )  # fmt: skip
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / kind)
    return root


@pytest.fixture
def copy(folders: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(folders / kind, tmp_path / kind))


def load(folder: Path, **options: Any) -> HFEngine:
    return load_hf_engine(folder, torch.device("cpu"), **options)


def score(folder: Path) -> None:
    engine = load(folder)
    scorer = Scorer(engine.model, engine.tokenizer)
    scorer.loglikelihood([("A b c", " d")])
    scorer.generate(["A b c"], 2)


def first_matrix(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors) if name.endswith("o_proj.weight") or "c_proj.weight" in name)


def missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[first_matrix(tensors)]


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["renamed.weight"] = tensors.pop(first_matrix(tensors))


def extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["one_too_many.weight"] = torch.zeros(2, 2)


def another_shape(tensors: dict[str, torch.Tensor]) -> None:
    name = first_matrix(tensors)
    tensors[name] = tensors[name][:-1].contiguous()


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first_matrix(tensors)][-1, -1] = float("nan")


def eight_bits(tensors: dict[str, torch.Tensor]) -> None:
    name = first_matrix(tensors)
    tensors[name] = tensors[name].to(torch.int8)


def booleans(tensors: dict[str, torch.Tensor]) -> None:
    name = first_matrix(tensors)
    tensors[name] = tensors[name] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, "lacks {}:"),
        (renamed, "lacks {}:"),
        (extra, "has tensors that do not belong to the model, one_too_many.weight:"),
        (another_shape, "has tensors of another shape than config.json says, {} ("),
        (not_finite, "{} holds NaN or infinity"),
        (eight_bits, "{} is in I8"),
        (booleans, "{} is in BOOL"),
    ],
)
def test_a_folder_whose_weights_are_not_the_models_is_not_scored(copy, kind, change, message):
    folder = copy(kind)
    name = first_matrix(load_file(folder / WEIGHTS))
    change_weights(folder, change)
    found = refusal(change.__name__, lambda: load(folder))
    assert message.format(name) in (found or "accepted")


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("gpt2", "transformer.h.0.attn.bias", torch.ones(1, 1, 8, 8).bool()),
        ("gpt2", "transformer.h.0.attn.masked_bias", torch.tensor(-1e4)),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
        ("llama", "lm_head.weight", None),  # the embedding's
    ],
)
def test_leftovers_of_older_versions_and_copies_of_tied_weights_are_harmless(copy, kind, name, value):
    folder = copy(kind)
    change_weights(
        folder,
        lambda tensors: tensors.update(
            {name: tensors["model.embed_tokens.weight"].clone() if value is None else value}
        ),
    )
    score(folder)


def test_a_head_that_differs_although_it_is_tied(copy):
    folder = copy("llama")
    change_weights(
        folder, lambda tensors: tensors.update({"lm_head.weight": 2 * tensors["model.embed_tokens.weight"]})
    )
    with pytest.raises(
        ValueError, match=r"has an lm_head.weight that differs from model.embed_tokens.weight"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt2", {"n_layer": 10**9}, "has n_layer=1000000000, but its weights only"),
        ("llama", {"num_hidden_layers": 10**9}, "has num_hidden_layers=1000000000, but its weights only"),
        ("deepseek_v3", {"n_routed_experts": 10**9}, "has n_routed_experts=1000000000, but its weights only"),
        ("llama", {"hidden_size": 2 * 10**6}, "parameters, but its weights have only"),
        ("gpt2", {"n_embd": 2 * 10**6}, "parameters, but its weights have only"),
        ("gpt2", {"n_positions": 10**9}, "parameters, but its weights have only"),
        ("llama", {"vocab_size": 2**40}, "parameters, but its weights have only"),
        ("llama", {"max_position_embeddings": -1}, "its positions is -1, not an integer"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "has a quantization_config"),
        ("llama", {"attn_implementation": "someone/kernel"}, "which can load foreign code"),
        ("llama", {"_attn_implementation": {"": "someone/kernel"}}, "which can load foreign code"),
        ("llama", {"transformers_weights": "other.safetensors"}, "names its own file of weights"),
        ("deepseek_v3", {"num_experts_per_tok": 8}, "transformers cannot load it"),
        ("llama", {"dtype": "int8"}, "transformers cannot load it"),
    ],
)
def test_absurd_or_hostile_values_are_refused_before_weights_are_read(
    copy, kind, changes, message, monkeypatch
):
    folder = copy(kind)
    change_config(folder, **changes)
    if "weights" in message:  # by arithmetic

        def read(*_: object, **__: object) -> None:
            raise AssertionError("weights were read")

        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read)
    assert message in (refusal(str(changes), lambda: load(folder)) or "accepted")


@few_or_all
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_values_in_config_json(copy, kind, count):
    folder = copy(kind)
    path = folder / "config.json"
    for what, values in config_mutations(json.loads(path.read_text()), count, seed=5):
        path.write_text(json.dumps(values))
        refusal(what, lambda: score(folder))


@few_or_all
@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "tokenizer.json"])
def test_wrong_values_and_bytes_in_other_files(copy, name, count):
    folder = copy("llama")
    whole = (folder / name).read_bytes()
    for what, values in config_mutations(json.loads(whole), count, seed=6):
        (folder / name).write_text(json.dumps(values))
        refusal(what, lambda: score(folder))
    for what, content in byte_mutations(whole, count, seed=7):
        (folder / name).write_bytes(content)
        refusal(what, lambda: score(folder))


def test_shards_and_pickles(copy, tmp_path):
    folder = copy("llama")
    where = shards(folder)
    score(folder)
    (folder / where[min(where)]).rename(tmp_path / "elsewhere.safetensors")
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(index.read_text().replace(where[min(where)], "../elsewhere.safetensors"))
    assert "is not a safetensors file in it" in (refusal("outside", lambda: load(folder)) or "accepted")
    index.unlink()
    torch.save(Bomb(tmp_path / "ran"), folder / "pytorch_model.bin")
    assert "pickled files can run code" in (refusal("pickled", lambda: load(folder)) or "accepted")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    (folder / WEIGHTS).write_bytes((tmp_path / "elsewhere.safetensors").read_bytes())
    assert "holds an adapter" in (refusal("adapter", lambda: load(folder)) or "accepted")
    assert not (tmp_path / "ran").exists()


CODE = """
import os
os.makedirs({marker!r}, exist_ok=True)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_code(folder: Path, marker: Path, part: str) -> None:
    """Gives a Llama folder Python code for its network or its tokenizer."""
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    if part == "network":
        auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
        change_config(folder, model_type="own", auto_map=auto)
    else:
        path = folder / "tokenizer_config.json"
        values = json.loads(path.read_text())
        values |= {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
        }
        path.write_text(json.dumps(values))


@pytest.mark.usefixtures("remote_code")
@pytest.mark.parametrize("part", ["network", "tokenizer"])
def test_the_folders_python_runs_only_when_it_is_trusted(copy, part, tmp_path, monkeypatch):
    folder, marker = copy("llama"), tmp_path / "ran"
    expected = Scorer.from_checkpoint(folder).loglikelihood([("A b c", " d")])
    with_code(folder, marker, part)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    found = refusal(part, lambda: load(folder))
    assert found is None or "give --trust_remote_code" in found
    refusal("import", lambda: import_folder(folder, tmp_path / "out"))
    assert not marker.exists()
    trusted = Scorer.from_checkpoint(folder, trust_remote_code=True)
    assert marker.exists()
    assert trusted.loglikelihood([("A b c", " d")]) == expected


def test_the_answer_y_on_the_command_line_runs_nothing(copy, tmp_path):
    folder, marker = copy("llama"), tmp_path / "ran"
    with_code(folder, marker, "network")
    command = [sys.executable, "eval/p_hop.py", "--checkpoint", str(folder), "--limit", "1"]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, input="y\n" * 9, text=True, capture_output=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "if you have read that code and trust it, give --trust_remote_code"
    )
    assert not marker.exists()


def test_a_tokenizer_that_loses_letters_is_refused_and_one_that_loses_spaces_is_named(copy, capsys):
    folder = copy("llama")
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "normalizer": {"type": "Lowercase"}}))
    with pytest.raises(
        ValueError, match="back for .*: it loses text, use the one that the model was trained"
    ):
        load(folder)
    path.write_text(json.dumps({**values, "normalizer": {"type": "NFC"}}))
    load(folder)
    warning = capsys.readouterr().err.splitlines()[-1]
    assert warning.startswith("warning: the tokenizer of")
    assert warning.endswith("the model does not see prompts exactly as they are written")


def test_a_panic_inside_the_tokenizer_library_is_one_line(copy):
    folder = copy("llama")
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["continuing_subword_prefix"] = "longer than a token"
    path.write_text(json.dumps(values))
    found = refusal("panic", lambda: load(folder))
    assert "PanicException: range end index" in (found or "accepted")


def test_a_folder_that_changes_while_it_is_read_is_refused(copy, monkeypatch):
    folder = copy("llama")
    read = transformers.AutoTokenizer.from_pretrained

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        change_weights(folder, not_finite)
        return read(*arguments, **keywords)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", interrupted)
    with pytest.raises(ValueError, match=r"model.safetensors was written while it was read"):
        load(folder)
