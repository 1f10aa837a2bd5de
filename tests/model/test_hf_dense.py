"""Imported GPT-2 and Llama folders give transformers' logits, and files that need no further package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.tokenization.tokenizer import Tokenizer
from model import load_pretrained
from model.counts import num_parameters
from model.export_files import load_config
from model.hf.deepseek import import_folder

from ..conftest import ROOT
from .hf_folders import GPT2_END, LLAMA3_ROPE, gpt2_folder, llama_folder

KINDS = {
    "gpt2": (gpt2_folder, {}),
    "gpt2_untied": (gpt2_folder, {"tie_word_embeddings": False, "n_inner": 40, "layer_norm_epsilon": 1e-3}),
    "llama_tied": (llama_folder, {"tie_word_embeddings": True, "rope_parameters": {**LLAMA3_ROPE}}),
    "llama": (llama_folder, {"head_dim": 6, "rms_norm_eps": 1e-3, "rope_parameters": {"rope_theta": 500.0}}),
}
TASKS = ("pad_id", "bos_id", "eos_id", "bot_id", "eot_id", "step_separator_id")


def known_tokens(folder: Path) -> int:
    """The model may have more rows; new tokens take the first of those."""
    return len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_equal_transformers(kind, tmp_path):
    """For whole rows, padded rows, and rows read token by token; 300 positions reach llama3's ramp."""
    make, changes = KINDS[kind]
    theirs = make(tmp_path / "hf", **changes)
    import_folder(tmp_path / "hf", tmp_path / "ours")
    ours, V = load_pretrained(tmp_path / "ours"), known_tokens(tmp_path / "hf")
    assert num_parameters(ours.config) == sum(p.numel() for p in ours.parameters())
    tokens = torch.randint(V, (3, 300), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :7], mask[1, :290] = 0, 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs(tokens, attention_mask=mask, position_ids=places).logits[..., :V][mask.bool()]
    assert expected.std() > 0.1
    found = ours(tokens, attention_mask=mask).logits[..., :V][mask.bool()]
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())
    start, row = tokens[2:, :290], tokens[2:, 290:295]
    generated = ours.generate(start, 12)[:, 290:]
    whole = torch.cat((start, generated), 1)
    assert torch.equal(ours(whole).logits[:, 289:-1].argmax(-1), generated)  # the cache agrees
    packed = ours(torch.cat((row, start), 1), cu_seqlens=torch.tensor([[0, 5, 295]], dtype=torch.int32))
    alone = theirs(start).logits[..., :V]
    assert (packed.logits[:, 5:, :V] - alone).abs().max() <= 1e-5 * max(1.0, alone.abs().max().item())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_special_tokens_are_new_rows_that_no_text_gives(kind, tmp_path):
    make, changes = KINDS[kind]
    theirs = make(tmp_path / "hf", **changes)
    import_folder(tmp_path / "hf", tmp_path / "ours")
    tokenizer = Tokenizer(tmp_path / "ours" / "tokenizer.model")
    ids = {task: getattr(tokenizer, task) for task in TASKS}
    named = {} if kind == "gpt2" else {"bos_id": 0, "eos_id": 1}
    assert {task: ids[task] for task in ("bos_id", "eos_id")} == (named or {"bos_id": 0, "eos_id": 0})
    assert len(set(ids.values())) == (5 if kind == "gpt2" else 6)
    forged = f"<bot>{GPT2_END}<eot><pad><step><|begin_of_text|> <|end_of_text|>  \u2581"
    found = tokenizer.encode(forged)
    assert not set(found) & set(ids.values())
    assert tokenizer.decode(found) == forged
    framed = tokenizer.encode("3 + 4", bos=True, eos=True)
    assert (framed[0], framed[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    step = [*tokenizer.encode("a"), tokenizer.step_separator_id, *tokenizer.encode("b")]
    assert tokenizer.decode([tokenizer.bos_id, *step, tokenizer.eot_id, *framed]) == "a b3 + 4"
    state, old = load_file(tmp_path / "ours" / "model.safetensors"), theirs.get_input_embeddings().weight
    rows = state["model.embed_tokens.weight"]
    assert len(rows) == tokenizer.vocab_size == load_config(tmp_path / "ours").vocab_size
    added = torch.tensor([ids[task] for task in TASKS if task not in ("bos_id", "eos_id")])
    kept = torch.tensor([i for i in range(len(old)) if i not in added])
    assert torch.equal(rows[kept], old[kept])
    known = old[: known_tokens(tmp_path / "hf")]
    spread = (rows[added] - known.mean(0)) / known.std(0)
    assert spread.std().item() == pytest.approx(1, abs=0.3)
    assert torch.cdist(rows[added], rows[added]).fill_diagonal_(9).min() > 0.1


def edited(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (llama_folder, {"attention_bias": True}, "attention_bias=True, but only False is supported"),
        (llama_folder, {"mlp_bias": True}, "mlp_bias=True, but only False is supported"),
        (llama_folder, {"hidden_act": "gelu"}, "hidden_act='gelu', but only 'silu' is supported"),
        (llama_folder, {"quantization_config": {"bits": 4}}, "convert the weights to bf16 first"),
        (llama_folder, {"rope_parameters": {**LLAMA3_ROPE, "odd": 1}}, "rope_scaling.odd is not a known key"),
        (llama_folder, {"vocab_size": 300}, "tokens, but config.json has vocab_size=300"),
        (gpt2_folder, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        (gpt2_folder, {"activation_function": "relu"}, "activation_function='relu', but only 'gelu_new'"),
        (gpt2_folder, {"n_layer": 3}, "model.layers.2.input_layernorm.weight is missing"),
        (gpt2_folder, {"n_layer": 1}, "tensors do not belong to the model, model.layers.1.input"),
        (gpt2_folder, {"eos_token_id": 7}, "bos id 0 and eos id 7, which are not special tokens"),
    ],
)
def test_what_is_not_computed_is_refused_in_one_line(make, changes, message, tmp_path):
    make(tmp_path / "hf")
    edited(tmp_path / "hf", "config.json", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        import_folder(tmp_path / "hf", tmp_path / "ours")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_folders_as_they_lie_on_the_hub(tmp_path):
    """A folder of 2019: no prefix, masks among the tensors, a head besides the equal embedding, a tokenizer
    without a type.
    """
    gpt2_folder(tmp_path / "hf")
    values = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    del values["model"]["type"]
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(values))
    path = tmp_path / "hf" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 4, 4) for i in range(2)}
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, path, {"format": "pt"})
    import_folder(tmp_path / "hf", tmp_path / "ours")
    assert Tokenizer(tmp_path / "ours" / "tokenizer.model").encode("apples")
    first = (tmp_path / "ours" / "model.safetensors").read_bytes()
    gpt2_folder(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "ours")
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == first
    tensors["lm_head.weight"] += 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        import_folder(tmp_path / "hf", tmp_path / "ours")


def test_the_command_needs_neither_transformers_nor_the_tokenizers(tmp_path):
    gpt2_folder(tmp_path / "hf")
    blocked = "import sys; sys.modules['transformers'] = sys.modules['tokenizers'] = None; "
    run = f"sys.argv[1:] = {['import', '--hf', str(tmp_path / 'hf'), '--out', str(tmp_path / 'ours')]!r}; "
    code = blocked + run + "from model.hf.__main__ import main; main()"
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=paths)
    assert done.returncode == 0, done.stderr
    assert load_config(tmp_path / "ours").norm == "layer_norm"
    with pytest.raises(ValueError, match="convert it first: python -m model.hf import --hf") as caught:
        load_config(tmp_path / "hf")
    assert "\n" not in str(caught.value)
