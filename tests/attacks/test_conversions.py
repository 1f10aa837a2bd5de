"""Attacks on model.convert and on exported folders of converted models.

Every attack ends in a model that computes what it says, or in one line and exit code 2.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from model import ModelConfig, ZeroModel, load_pretrained
from model.convert.__main__ import main
from model.export_files import CONFIG_NAME, CONVERSIONS_NAME, TRAINING_DATA_NAME, WEIGHTS_NAME, save_weights
from model.generate import generate
from model.hf.deepseek import export_folder, import_folder

from ..model.conftest import SMALL, VARIANTS, YARN
from ..model.hf_folders import llama_folder
from .faults import Faults, in_child

ATTENTION = "model.layers.1.self_attn."
TEXT = "Tom has 3 apples and eats 4. The rest she gives away, each day. "
SHORT = ("--evaluation_tokens", "512", "--calibration_tokens", "512")
LOOP = ("loop", "--core", "1", "--num_steps", "2")
TOKENS = torch.arange(2, 16).view(2, 7)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("conversions")
    llama_folder(root / "hf", max_position_embeddings=64)
    import_folder(root / "hf", root / "import")
    (root / "text").write_text(TEXT * 80)
    return root / "import"


@pytest.fixture
def convert(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command; returns the model that it wrote, or the line that refuses it."""

    def run(*command: str, checkpoint: Path = base, out: Path = tmp_path / "out") -> ZeroModel | str:
        capsys.readouterr()
        try:
            main([*command, "--checkpoint", str(checkpoint), "--out", str(out)])
        except SystemExit as ended:
            code = ended.code
        else:
            return load_pretrained(out)
        lines = capsys.readouterr().err.splitlines()
        assert code == 2
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        return lines[-1]

    return run


def with_weights(base: Path, folder: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    shutil.copytree(base, folder)
    changed = {name: change(name, value) for name, value in load_file(base / WEIGHTS_NAME).items()}
    save_file(changed, folder / WEIGHTS_NAME, {"format": "pt"})
    return folder


@pytest.mark.parametrize("parts", [("k",), ("q",), ("v",), ("o",), ("k", "v"), ("q", "k", "v", "o")])
@pytest.mark.parametrize("text", [False, True])
def test_a_layer_of_zeros_keeps_its_logits(base, convert, tmp_path, parts, text):
    zeros = tuple(f"{ATTENTION}{part}_proj" for part in parts)
    checkpoint = with_weights(base, tmp_path / "zeros", lambda n, w: w * (not n.startswith(zeros)))
    texts = ("--text", str(base.parent / "text"), *SHORT) if text else ()
    found = convert("mla", "--kv_lora_rank=16", "--qk_rope_head_dim=16", *texts, checkpoint=checkpoint)
    torch.testing.assert_close(
        found(TOKENS).logits, load_pretrained(checkpoint)(TOKENS).logits, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(("name", "size"), [("lm_head.weight", 1e4), ("model.norm.weight", 3e38)])
@pytest.mark.parametrize(
    "command",
    [
        LOOP,
        ("mla", "--kv_lora_rank=8", "--qk_rope_head_dim=4", "--calibration_tokens=64"),
        ("moe", "--n_routed_experts=4", "--num_experts_per_tok=2"),
    ],
)
def test_a_perplexity_that_is_no_number_is_one_line(base, convert, tmp_path, name, size, command):
    checkpoint = with_weights(base, tmp_path / "large", lambda n, w: w.sign() * size if n == name else w)
    line = convert(
        *command,
        *("--text", str(base.parent / "text"), "--evaluation_tokens=64"),
        checkpoint=checkpoint,
    )
    assert "mean loss on the text is" in line
    assert not (tmp_path / "out" / CONFIG_NAME).exists()


def test_more_copies_than_memory_are_one_line(convert):
    command = ("moe", "--n_routed_experts=4", "--num_experts_per_tok=2", "--n_shared_experts=999999999")
    assert "GB of memory" in convert(*command)


@pytest.mark.parametrize("command", [LOOP[:3], ("unit", "--placement=post_attention")])
def test_more_loop_steps_than_the_default_limit(convert, command):
    recurrence = convert(*command, "--num_steps=33").config.recurrence
    assert recurrence.num_steps == recurrence.max_steps == 33


@pytest.mark.parametrize("name", [CONFIG_NAME, TRAINING_DATA_NAME, "folder.json"])
def test_a_table_of_ranks_replaces_tables_only(base, convert, tmp_path, name):
    folder = shutil.copytree(base, tmp_path / "copy")
    (folder / TRAINING_DATA_NAME).write_text("{}")
    (folder / "folder.json").mkdir()
    ranks = ("ranks", "--kv_lora_rank=8", "--qk_rope_head_dim=4", "--text", str(base.parent / "text"))
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert "would be overwritten" in convert(*ranks, checkpoint=folder, out=folder / name)
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_an_odd_latent_decodes_token_by_token(convert):
    model = convert("mla", "--kv_lora_rank=5", "--qk_rope_head_dim=4")
    tokens = TOKENS[:1]
    for _ in range(4):
        tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(generate(model, TOKENS[:1], max_new_tokens=4), tokens)


def test_a_folder_says_nothing_of_the_model_that_was_there_before(base, convert, tmp_path):
    out = tmp_path / "out"
    convert(*LOOP)
    (out / TRAINING_DATA_NAME).write_text("{}")
    import_folder(base.parent / "hf", out)
    assert not (out / TRAINING_DATA_NAME).exists()
    assert not (out / CONVERSIONS_NAME).exists()
    hf, bare = tmp_path / "hf", tmp_path / "bare"
    convert(*LOOP)
    export_folder(out, hf)
    config = ModelConfig.from_dict(SMALL)
    save_weights(bare, config, dict(ZeroModel(config).state_dict()))
    export_folder(bare, hf)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert not (hf / name).exists(), name


@pytest.mark.parametrize("scaling", [YARN, VARIANTS["llama"]["rope_scaling"]])
@pytest.mark.usefixtures("remote_code")
def test_transformers_turns_positions_as_we_do(tmp_path, scaling):
    config = ModelConfig.from_dict({**SMALL, **VARIANTS["llama"], "rope_scaling": scaling})
    ours, folder = ZeroModel(config).eval(), f"turns_{scaling.get('rope_type', 'yarn')}"
    save_weights(tmp_path / "ours", config, dict(ours.state_dict()))
    export_folder(tmp_path / "ours", tmp_path / folder)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / folder, trust_remote_code=True)
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(theirs(input_ids=tokens).logits, ours(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["kill", "full"])
def test_a_conversion_that_is_stopped_anywhere_leaves_the_old_model_or_none(base, tmp_path, kind):
    old, out = tmp_path / "old", tmp_path / "out"
    command = [*LOOP, "--checkpoint", str(base), "--out", str(out)]
    main([*LOOP[:-1], "3", "--checkpoint", str(base), "--out", str(old)])

    def attempt(at: int) -> tuple[int, str]:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(old, out)

        def work() -> str:
            faults = Faults(out, kind, at)
            faults.install()
            try:
                main(command)
            except SystemExit as ended:
                return f"exit {ended.code}"
            return str(faults.count)

        return in_child(work)

    code, count = attempt(0)
    assert code == 0
    for at in range(1, int(count) + 1, 4):
        assert attempt(at) in ((-9, ""), (0, "exit 2"), (0, count))
        if (out / CONFIG_NAME).is_file():
            steps = load_pretrained(out).config.recurrence.num_steps
            record = json.loads((out / CONVERSIONS_NAME).read_text())["conversions"][-1]
            assert steps in (2, 3)
            assert record["num_steps"] == steps
