"""Parity with transformers' DeepseekV3, both ways."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM, DynamicCache
from transformers.modeling_layers import MtpModel

from data_pipeline.tokenization.tokenizer import train_tokenizer
from model import ModelConfig, ZeroModel, load_pretrained
from model.cache import LatentCache
from model.hf.__main__ import main
from model.hf.deepseek import export_folder, hf_config, import_folder

from .conftest import BLOCK

TOKENIZER = train_tokenizer(["the cat sat on the mat 0123456789. " * 20], 300)
VOCABULARY = 300
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
# One entry per configuration; what it leaves out is drawn at random.
MATRIX: list[dict[str, Any]] = [
    {"q_lora_rank": None},
    {"q_lora_rank": 12},
    {"rope_scaling": YARN},
    {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}, "q_lora_rank": 9},
    {"rope_scaling": {**YARN, "mscale_all_dim": 0.0, "beta_fast": 8.0, "beta_slow": 0.5}},
    {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 4},
    {"n_shared_experts": 0},
    {"n_shared_experts": 2, "norm_topk_prob": False},
    {"first_k_dense_replace": 0},
    {"first_k_dense_replace": 3},
    {"use_moe": False},
    {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    {"num_experts_per_tok": 1, "routed_scaling_factor": 0.3},
    {"rms_norm_eps": 1e-3, "rope_theta": 500.0},
    {"num_hidden_layers": 1, "num_attention_heads": 1},
]


def random_config(number: int) -> ModelConfig:
    draw = random.Random(number)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": draw.choice([16, 24, 33]),
        "num_hidden_layers": 3,
        "max_position_embeddings": 128,
        "initializer_range": draw.choice([0.1, 0.2]),
        "num_attention_heads": draw.choice([2, 3]),
        "q_lora_rank": draw.choice([None, 10]),
        "kv_lora_rank": draw.choice([8, 13]),
        "qk_nope_head_dim": draw.choice([5, 8]),
        "qk_rope_head_dim": draw.choice([4, 6]),
        "v_head_dim": draw.choice([4, 7, 16]),
        "intermediate_size": 30,
        "moe_intermediate_size": draw.choice([9, 16]),
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": draw.choice([1.0, 2.5]),
        "n_shared_experts": draw.choice([1, 2]),
    }
    return ModelConfig.from_dict({**sizes, **MATRIX[number]})


def random_model(config: ModelConfig, seed: int = 0, scale: float = 0.3) -> ZeroModel:
    """Norms and a balancing bias that differ from their initial values; every third bias is large."""
    model = ZeroModel(config, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
        for layer in model.moe_layers():
            bias = layer.gate.e_score_correction_bias
            bias.copy_(scale * torch.randn(bias.shape, generator=generator))
            bias[::3] *= 40
    return model


def exported(model: ZeroModel, folder: Path) -> Path:
    """The Hugging Face folder of a model, converted from an export/ folder."""
    model.save_pretrained(folder / "ours")
    (folder / "ours" / "tokenizer.model").write_bytes(TOKENIZER)
    export_folder(folder / "ours", folder / "hf")
    return folder / "hf"


def load_theirs(folder: Path) -> DeepseekV3ForCausalLM:
    values = json.loads((folder / "config.json").read_text())
    odd = (
        values["hidden_size"] % 4 or values["moe_intermediate_size"] % 4
    )  # its grouped products need 16 bytes
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        experts_implementation="eager" if odd else None,
        output_loading_info=True,
        local_files_only=True,
    )
    assert isinstance(model, DeepseekV3ForCausalLM)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (kind, info[kind])
    return model.eval()


def assert_equal_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    limit = 1e-5 * max(1.0, expected.abs().max().item())
    assert (found - expected).abs().max().item() <= limit


@pytest.mark.parametrize("number", range(len(MATRIX)))
@torch.no_grad()
def test_logits_equal_transformers_in_every_way_of_running(number, tmp_path):
    config = random_config(number)
    ours = random_model(config, seed=number)
    theirs = load_theirs(exported(ours, tmp_path))
    tokens = torch.randint(4, VOCABULARY, (3, 21), generator=torch.Generator().manual_seed(number))
    expected = theirs(tokens).logits
    assert expected.abs().max() > 0.1
    assert_equal_logits(ours(tokens).logits, expected)

    mask = torch.ones_like(tokens)
    mask[0, :6], mask[1, :20] = 0, 0  # padded left, as for generation
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = theirs(tokens, attention_mask=mask, position_ids=positions).logits
    found = ours(tokens, attention_mask=mask).logits
    assert_equal_logits(found[mask.bool()], padded[mask.bool()])
    mask = mask.flip(1)  # and right
    padded = theirs(tokens, attention_mask=mask).logits
    assert_equal_logits(ours(tokens, attention_mask=mask).logits[mask.bool()], padded[mask.bool()])

    cache, their_cache = LatentCache(), DynamicCache(config=theirs.config)
    for part in tokens.split([9, 1, 1, 10], 1):
        step = theirs(part, past_key_values=their_cache, use_cache=True).logits
        assert_equal_logits(ours(part, cache=cache).logits, step)


@pytest.mark.parametrize("number", [1, 3, 5])
def test_greedy_generation_is_identical_and_tokenizers_agree(number, tmp_path):
    ours = random_model(random_config(number), seed=number)
    folder = exported(ours, tmp_path)
    theirs, tokenizer = load_theirs(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    prompt = tokenizer(["the cat sat", "on the mat"], return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 64, "eos_token_id": None, "do_sample": False}
    expected = theirs.generate(**prompt, **options)
    found = ours.generate(prompt["input_ids"], 64, attention_mask=prompt["attention_mask"])
    assert torch.equal(found, expected)
    assert len(set(found[0, -64:].tolist())) > 3  # not the same token forever


@pytest.mark.parametrize(("number", "modules"), [(2, 0), (6, 2), (7, 0), (7, 2), (8, 2), (10, 1), (11, 0)])
def test_a_round_trip_gives_every_bit_back(number, modules, tmp_path):
    values = {**random_config(number).to_dict(), "num_nextn_predict_layers": modules}
    values |= {"router_bias_update_rate": 0.02, "mtp_loss_weight": 0.1}
    ours = random_model(ModelConfig.from_dict(values), seed=number)
    folder = exported(ours, tmp_path)
    load_theirs(folder)  # no key is unexpected, even with multi-token prediction
    import_folder(folder, tmp_path / "back")
    for name in ("config.json", "tokenizer.model"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    back, state = load_pretrained(tmp_path / "back").state_dict(), ours.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@torch.no_grad()
def test_multi_token_prediction_equals_transformers(tmp_path):
    config = ModelConfig.from_dict({**random_config(3).to_dict(), "num_nextn_predict_layers": 2})
    ours = random_model(config)
    theirs = load_theirs(exported(ours, tmp_path))
    modules = MtpModel(theirs, 2).eval()
    state = {}
    for name, tensor in ours.model.mtp.state_dict().items():
        name = re.sub(r"^(\d+)\.layer\.", r"layers.\1.mtp_block.", name)
        state[re.sub(r"^(\d+)\.(?=enorm|hnorm|eh_proj|norm)", r"layers.\1.", name)] = tensor
    for k in range(2):
        experts = f"layers.{k}.mtp_block.mlp.experts"
        w1, w2, w3 = (state.pop(f"{experts}.{w}") for w in ("w1", "w2", "w3"))
        state |= {f"{experts}.gate_up_proj": torch.cat((w1, w3), 1), f"{experts}.down_proj": w2}
        state[f"layers.{k}.post_norm.weight"] = state.pop(f"layers.{k}.norm.weight")
    report = modules.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    assert not [name for name in report.missing_keys if name.startswith("layers.")]
    tokens = torch.randint(4, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(13)[None]
    context = ours.attention_context(tokens)
    found = expected = ours(tokens).hidden
    for k in range(2):
        ahead = tokens.roll(-k - 1, 1)
        found, _ = ours.model.predict_further(k, found, ahead, context)
        expected = modules.forward_layer(k, expected, positions, None, input_ids=ahead)
        assert_equal_logits(ours.lm_head(found), theirs.lm_head(expected))


def test_folders_of_transformers_itself_are_read(tmp_path):
    """Written by save_pretrained, in one file and in shards, without ZeroModel's section in config.json."""
    ours = random_model(random_config(4))
    theirs = load_theirs(exported(ours, tmp_path))
    del theirs.config.zeromodel
    for name, size in (("whole", "1GB"), ("shards", "20KB")):
        theirs.save_pretrained(tmp_path / name, max_shard_size=size)
        import_folder(tmp_path / name, tmp_path / f"{name}_back")
        back = load_pretrained(tmp_path / f"{name}_back")
        assert all(torch.equal(back.state_dict()[n], t) for n, t in ours.state_dict().items())
        tokens = torch.randint(4, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
        assert torch.equal(back(tokens).logits, ours(tokens).logits)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


def test_the_config_says_what_vllm_reads():
    values = hf_config(random_config(3))
    expected = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "rope_theta": 10000.0,
        "num_nextn_predict_layers": 0,
        "num_key_value_heads": values["num_attention_heads"],
    }
    assert {name: values[name] for name in expected} == expected
    assert values["rope_scaling"]["rope_type"] == "yarn"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recurrence": BLOCK}, "cannot express recurrence.placement=block"),
        ({"use_mla": False}, "cannot express use_mla=false"),
        ({"num_pause_tokens": 2}, "cannot express num_pause_tokens=2"),
        ({"embedding_mixing": 4}, "cannot express embedding_mixing=4"),
        ({"use_moe": False, "hidden_act": "relu2"}, "cannot express hidden_act=relu2"),
        ({"use_moe": False, "num_nextn_predict_layers": 1}, "multi-token prediction with a dense layer"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        hf_config(ModelConfig.from_dict({**random_config(0).to_dict(), **change}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deepseek_v2"}, "model_type='deepseek_v2', which is not deepseek_v3; choose"),
        ({"attention_bias": True}, "attention_bias=True, but only False"),
        ({"rope_interleave": False}, "rope_interleave=False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config; convert the weights"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "scales positions by rope_type='linear'"),
        ({"rope_scaling": {"type": "yarn", "attention_factor": 1.0}}, "by keys attention_factor"),
        ({"hidden_size": 5}, "kv_a_proj_with_mqa.weight is|embed_tokens.weight is"),
        ({"num_hidden_layers": 2}, "tensors do not belong to the model, model.layers.2"),
        ({"num_hidden_layers": 4}, r"model.layers.3.* is missing"),
    ],
)
def test_folders_of_other_models_are_refused_in_one_line(change, message, tmp_path):
    folder = exported(random_model(random_config(0)), tmp_path)
    values = json.loads((folder / "config.json").read_text())
    del values["zeromodel"]
    (folder / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(ValueError, match=message) as caught:
        import_folder(folder, tmp_path / "back")
    assert "\n" not in str(caught.value)


def test_a_section_that_contradicts_the_config_is_refused(tmp_path):
    folder = exported(random_model(random_config(0)), tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "rms_norm_eps": 0.5}))
    with pytest.raises(ValueError, match="rms_norm_eps=0.5, but its section 'zeromodel' says 1e-06"):
        import_folder(folder, tmp_path / "back")


@pytest.mark.parametrize("damage", ["no config", "no JSON", "no weights", "cut weights", "fp8"])
def test_the_command_line_tells_what_is_wrong(damage, tmp_path, monkeypatch, capsys):
    folder = exported(random_model(random_config(0)), tmp_path)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if damage == "no config":
        config.unlink()
    elif damage == "no JSON":
        config.write_text("{")
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-9])
    else:
        tensors = load_file(weights)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
        save_file(tensors, weights)
    monkeypatch.setattr(sys, "argv", ["hf", "import", "--hf", str(folder), "--out", str(tmp_path / "back")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "back" / "model.safetensors").exists()


def test_the_two_commands_as_a_user_types_them(tmp_path):
    ours = random_model(random_config(5))
    exported(ours, tmp_path)
    for command in (
        ["export", "--checkpoint", tmp_path / "ours", "--out", tmp_path / "typed"],
        ["import", "--hf", tmp_path / "typed", "--out", tmp_path / "back"],
    ):
        subprocess.run([sys.executable, "-m", "model.hf", *map(str, command)], check=True)
    for name in ("config.json", "tokenizer.model", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
