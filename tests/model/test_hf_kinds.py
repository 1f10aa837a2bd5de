"""Imported folders of Llama, Mistral, Qwen2 and Qwen3: transformers' logits, or a line with the reason."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from data_pipeline.tokenization.tokenizer import Tokenizer
from model import ZeroModel, load_pretrained
from model.cache import LatentCache
from model.hf.deepseek import import_folder

from ..attacks.mutations import refusal
from .hf_folders import kin_folder, kin_tokenizer_json, llama_folder

KINDS = ("llama", "mistral", "qwen2", "qwen3")
LENGTH = 40  # tokens of a row; the context first trained on is shorter, so that scaled rotations act
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16}
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "default", "rope_theta": 123.0},
    YARN,
    {**YARN, "attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 0.2},
    {**YARN, "factor": 1.0},
    {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 16,
    },
)


def random_values(kind: str, seed: int) -> dict[str, Any]:
    """Odd sizes, all ratios of heads, tied or not, one kind of positions after another."""
    draw = random.Random(f"{kind}{seed}")
    groups, ratio = draw.choice((1, 2, 3)), draw.choice((1, 2, 3))
    heads, width = groups * ratio, draw.choice((4, 6, 10, 16))
    values = {
        "vocab_size": draw.choice((37, 64, 101)),
        "hidden_size": heads * draw.choice((5, 8)),
        "num_hidden_layers": draw.choice((1, 2, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": width,
        "intermediate_size": draw.choice((17, 32)),
        "max_position_embeddings": 64,
        "rms_norm_eps": draw.choice((1e-6, 1e-3)),
        "tie_word_embeddings": draw.choice((True, False)),
        "rope_parameters": {"rope_theta": 1000.0, **ROPES[seed % len(ROPES)]},
        "sliding_window": 64,  # never acts
    }
    return {name: value for name, value in values.items() if (kind, name) != ("llama", "sliding_window")}


def imported(kind: str, folder: Path, **values: Any) -> tuple[PreTrainedModel, ZeroModel]:
    theirs = kin_folder(kind, folder / "hf", **values)
    import_folder(folder / "hf", folder / "ours")
    return theirs, load_pretrained(folder / "ours")


def assert_same_logits(theirs: PreTrainedModel, ours: ZeroModel) -> None:
    """For whole rows, padded on the left, and read over a cache whole, token by token and in chunks."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(ours.config.vocab_size, (3, LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, :7], mask[1, : LENGTH - 1] = 0, 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    real = mask.bool()
    expected = theirs(tokens, attention_mask=mask, position_ids=places).logits[real]
    limit = 1e-5 * max(1.0, expected.abs().max().item())
    assert expected.std() > 0.05
    assert (ours(tokens, attention_mask=mask).logits[real] - expected).abs().max() <= limit
    cache, parts, end = LatentCache(), [], 0
    for part in tokens.split([20, *[1] * 8, 7, 5], 1):
        end += part.shape[1]
        parts.append(ours(part, attention_mask=mask[:, :end], cache=cache).logits)
    assert (torch.cat(parts, 1)[real] - expected).abs().max() <= limit


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_equal_transformers(kind, tmp_path):
    for seed in range(8):
        theirs, ours = imported(kind, tmp_path / str(seed), **random_values(kind, seed))
        assert_same_logits(theirs, ours)


@torch.no_grad()
def test_config_json_of_earlier_transformers(tmp_path):
    """rope_theta and rope_scaling by themselves, as in Qwen2.5's instructions, and absent keys."""
    values = random_values("qwen2", 1)
    theirs = kin_folder("qwen2", tmp_path / "hf", **values)
    rope = {"type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16}
    edit(tmp_path / "hf", rope_parameters=..., rope_theta=1000.0, rope_scaling=rope, layer_types=...)
    import_folder(tmp_path / "hf", tmp_path / "ours")
    assert_same_logits(theirs, load_pretrained(tmp_path / "ours"))


def edit(folder: Path, **changes: Any) -> None:
    """Of config.json; an Ellipsis deletes a key."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kinds")
    for kind in KINDS:
        kin_folder(kind, root / kind, **random_values(kind, 0))
    return root


WINDOW = "sliding_window={}, below max_position_embeddings=64, but attention reaches back to the first token"
ON = {"use_sliding_window": True, "layer_types": ...}
LINEAR = {"rope_type": "linear", "factor": 2.0}
UNREAD = "rope_type={!r}, which this network does not compute; only llama3 and yarn are read"


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 64}, None),
        ("mistral", {"sliding_window": 63}, WINDOW.format(63)),
        ("mistral", {"sliding_window": ..., "max_position_embeddings": 4096}, None),
        (
            "mistral",
            {"sliding_window": ..., "max_position_embeddings": 4097},
            "lower max_position_embeddings to 4096 if no text is longer",
        ),
        ("mistral", {"sliding_window": None, "layer_types": ["sliding_attention"]}, "but no window is set"),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": False}, None),
        ("qwen2", {**ON, "sliding_window": 5, "max_window_layers": 3}, None),
        ("qwen2", {**ON, "sliding_window": 5, "max_window_layers": 0}, WINDOW.format(5)),
        ("qwen2", {**ON, "sliding_window": 64, "max_window_layers": 0}, None),
        ("qwen3", {**ON, "sliding_window": 5, "layer_types": ["sliding_attention"]}, WINDOW.format(5)),
        ("qwen3", {**ON, "sliding_window": 5, "layer_types": ["full_attention"]}, None),
        ("qwen3", {"layer_types": ["linear_attention"]}, "layer_types has 'linear_attention', but only"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True, but only False is supported for Qwen3"),
        ("llama", {"rope_parameters": LINEAR}, UNREAD.format("linear")),
        ("qwen2", {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, UNREAD.format("dynamic")),
        ("qwen3", {"rope_parameters": {"type": "longrope"}}, UNREAD.format("longrope")),
        ("llama", {"rope_parameters": {**YARN, "truncate": False}}, "yarn with truncate=false"),
        ("llama", {"rope_parameters": {**YARN, "long_factor": [1]}}, "by keys long_factor; only yarn with"),
        ("llama", {"rope_parameters": {**YARN, "factor": None}}, "but does not say factor; download"),
        (
            "llama",
            {"rope_parameters": {**YARN, "attention_factor": 1.0}},
            "factor=3 and attention_factor=1; both must be above 1",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, but heads are rotated whole"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "a section 'full_attention', but all layers"),
        (
            "llama",
            {"model_type": "smollm3"},
            "layers without rotation .no_rope_layers., but all layers rotate",
        ),
        ("llama", {"model_type": "olmo2"}, "norms behind attention and feed-forward .*post_feedforward_lay"),
        (
            "llama",
            {"model_type": "qwen2_moe"},
            "'qwen2_moe', which is not qwen2; choose a checkpoint of deepseek",
        ),
        (
            "llama",
            {"model_type": "bert"},
            "'bert', which is unknown; choose .* gpt2, llama, mistral, qwen2, qwen3",
        ),
        ("llama", {"model_type": 5}, "config.json: model_type=5 is not text"),
        (
            "qwen2",
            {"model_type": "llama"},
            "tensors do not belong to the model, .*self_attn.k_proj.bias among",
        ),
        ("llama", {"model_type": "qwen2"}, "self_attn.q_proj.bias is missing; the folder is not complete"),
        ("llama", {"intermediate_size": 18}, r"gate_proj.weight is \(\d+, \d+\), expected \(18, \d+\)"),
    ],
)
def test_what_is_not_computed_is_refused_with_the_reason(kind, changes, message, folders, tmp_path):
    edited = Path(shutil.copytree(folders / kind, tmp_path / "hf"))
    edit(edited, **changes)
    found = refusal(lambda: import_folder(edited, tmp_path / "out"))
    assert (found is None) if message is None else re.search(message, found or "imported")


def test_a_folder_without_a_tokenizer_keeps_its_rows(tmp_path, capsys):
    llama_folder(tmp_path / "with", "qwen2")
    import_folder(tmp_path / "with", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").is_file()
    capsys.readouterr()
    theirs, ours = imported("qwen2", tmp_path, **random_values("qwen2", 3))
    assert "hf has no tokenizer.json; " in capsys.readouterr().err
    assert ours.config.vocab_size == theirs.config.vocab_size
    assert torch.equal(ours.model.embed_tokens.weight, theirs.get_input_embeddings().weight)
    import_folder(tmp_path / "hf", tmp_path / "out")  # over another model
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    for name in ("tokenizer.model", "vocab.json", "tekken.json"):
        (tmp_path / "hf" / name).touch()
        with pytest.raises(
            FileNotFoundError, match=f"tokenizer.json is missing, and {name} is not read; write"
        ):
            import_folder(tmp_path / "hf", tmp_path / "ours")
        (tmp_path / "hf" / name).unlink()


def test_what_a_tokenizer_changes_of_texts_is_said(tmp_path, capsys):
    llama_folder(tmp_path / "hf", "qwen2", vocab_size=400)
    import_folder(tmp_path / "hf", tmp_path / "ours")
    assert "note" not in capsys.readouterr().err
    (tmp_path / "hf" / "tokenizer.json").write_text(kin_tokenizer_json("qwen2"))
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    import_folder(tmp_path / "hf", tmp_path / "ours")
    assert "the tokenizer of" in (said := capsys.readouterr().err)
    assert "hf composes characters (Unicode NFC)" in said
    tokenizer = Tokenizer(tmp_path / "ours" / "tokenizer.model")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 400)


def test_code_in_a_folder_is_never_run(tmp_path, capsys):
    """A known kind needs none of it, an unknown one is refused."""
    bomb = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    kin_folder("qwen3", tmp_path / "hf", **random_values("qwen3", 0))
    for name in ("__init__.py", "modeling_qwen3.py", "configuration_qwen3.py", "torch.py", "tokenizers.py"):
        (tmp_path / "hf" / name).write_text(bomb)
    edit(tmp_path / "hf", auto_map={"AutoConfig": "configuration_qwen3.Qwen3Config"})
    import_folder(tmp_path / "hf", tmp_path / "ours")
    assert "hf brings Python code, which is not run: qwen3 is built in" in capsys.readouterr().err
    load_pretrained(tmp_path / "ours")
    edit(tmp_path / "hf", model_type="own")
    with pytest.raises(ValueError, match="model_type='own', which is unknown"):
        import_folder(tmp_path / "hf", tmp_path / "ours")
    assert not (tmp_path / "ran").exists()


def test_shards_as_they_lie_on_the_hub(tmp_path):
    """Mistral's folders hold its own file of the same weights too, which no index names."""
    theirs = kin_folder("mistral", tmp_path / "hf", **random_values("mistral", 0))
    whole = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    save_file(tensors, tmp_path / "hf" / "consolidated.safetensors")
    parts = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in sorted(set(parts.values())):
        save_file(
            {name: tensors[name] for name, part in parts.items() if part == file}, tmp_path / "hf" / file
        )
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    import_folder(tmp_path / "hf", tmp_path / "ours")
    with torch.no_grad():
        assert_same_logits(theirs, load_pretrained(tmp_path / "ours"))
