"""Hugging Face folders: tiny random networks that transformers saved here, against its own numbers."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from eval.scoring.core import Scorer
from eval.scoring.hf_folder import is_hf_folder, load_hf_engine
from model.hf.deepseek import export_folder, import_folder
from model.hf.special_tokens import ADDED

from ..model.hf_folders import kin_folder
from .conftest import TEXT
from .test_scripts import assert_error_line, results_of, samples_of

transformers = pytest.importorskip("transformers", reason="the development requirements are not installed")
KINDS = ("gpt2", "llama")


def save_tokenizer(folder: Path, adds_bos: bool) -> int:
    """A byte-level BPE tokenizer trained here; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>"} if adds_bos else {"eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="module", params=KINDS)
def hf_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 (learned positions, no bos) and Llama (rotary, grouped queries, bos), both with spare ids."""
    folder = tmp_path_factory.mktemp(request.param)
    size = save_tokenizer(folder, adds_bos=request.param == "llama") + 8
    common = {"vocab_size": size, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1}
    if request.param == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, **common)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, max_position_embeddings=256, **common,
        )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def network_of(folder: Path):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return loaded.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


REQUESTS = [
    ("Question: Where is Mary?\nAnswer:", " bathroom"),
    ("Question: Where is Mary?\nAnswer:", " hallway and John went to the kitchen"),
    ("Passage: Mary moved to the bathroom. Straße 東京\nQuestion: Where is Mary?\nAnswer:", " office"),
    ("A", "=3"),
]


def test_log_probabilities_are_transformers_own(hf_folder):
    network, tokenizer = network_of(hf_folder)
    scorer = Scorer.from_checkpoint(hf_folder, batch_size=3)
    assert scorer.max_length == 256
    for (context, continuation), (total, greedy) in zip(
        REQUESTS, scorer.loglikelihood(REQUESTS), strict=True
    ):
        start = len(tokenizer(context)["input_ids"])
        ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
        with torch.inference_mode():
            log_probs = network(ids).logits[0, start - 1 : -1].log_softmax(-1)
        targets = ids[0, start:]
        assert total == pytest.approx(log_probs.gather(-1, targets[:, None]).sum().item(), abs=1e-4)
        assert greedy == bool((log_probs.argmax(-1) == targets).all())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_generation_is_transformers_own(hf_folder, batch_size):
    network, tokenizer = network_of(hf_folder)
    prompts = [context for context, _ in REQUESTS]
    given = Scorer.from_checkpoint(hf_folder, batch_size).generate(prompts, 12)
    for prompt, text in zip(prompts, given, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert text == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert len(text) > 5
    # a stop string of the text itself ends it there
    stop = given[0][4:6]
    scorer = Scorer.from_checkpoint(hf_folder, batch_size)
    assert scorer.generate(prompts, 12, [stop])[0] == given[0][: given[0].index(stop)]


def test_samples_depend_on_seed_and_row_alone(hf_folder):
    prompts = [context for context, _ in REQUESTS] * 2
    alone, together = (
        Scorer.from_checkpoint(hf_folder, b).generate(prompts, 8, temperature=0.7, seed=3) for b in (1, 8)
    )
    assert alone == together
    assert alone[:4] != alone[4:]


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_an_import_scores_and_writes_as_its_folder(kind, tmp_path):
    """For a tokenizer that begins texts with bos, as an import does every text.

    It has an import's special tokens: new ones would take a share of every probability.
    """
    save_tokenizer(tmp_path / "hf", adds_bos=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    tokenizer.add_special_tokens({"additional_special_tokens": list(ADDED.values())})
    tokenizer.save_pretrained(tmp_path / "hf")
    size = len(tokenizer) + 3
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    common = {"vocab_size": size, "hidden_size": 32, "intermediate_size": 48, "sliding_window": None}
    kin_folder(kind, tmp_path / "hf", **sizes, **common, max_position_embeddings=256, eos_token_id=1)
    import_folder(tmp_path / "hf", tmp_path / "ours")
    direct, ours = (Scorer.from_checkpoint(tmp_path / name, batch_size=3) for name in ("hf", "ours"))
    for expected, found in zip(direct.loglikelihood(REQUESTS), ours.loglikelihood(REQUESTS), strict=True):
        assert found == (pytest.approx(expected[0], abs=1e-3), expected[1])
    prompts = [context for context, _ in REQUESTS]
    assert direct.generate(prompts, 12) == ours.generate(prompts, 12)


@pytest.mark.usefixtures("remote_code")
def test_an_exported_loop_runs_at_the_depth_asked_for(checkpoint, tmp_path):
    export_folder(checkpoint, tmp_path / "hf")
    theirs = Scorer.from_checkpoint(tmp_path / "hf", batch_size=3, trust_remote_code=True)
    ours = Scorer.from_checkpoint(checkpoint, batch_size=3)
    scores = []
    for depth in (1, 4, "adaptive", None):
        theirs.set_depth(depth)
        ours.set_depth(depth)
        scores.append([total for total, _ in theirs.loglikelihood(REQUESTS)])
        assert scores[-1] == pytest.approx([total for total, _ in ours.loglikelihood(REQUESTS)], abs=1e-3)
    assert scores[0] != pytest.approx(scores[1], abs=1e-2)


def test_bos_is_the_tokenizers_own_policy(hf_folder):
    _, tokenizer = network_of(hf_folder)
    ours = Scorer.from_checkpoint(hf_folder).tokenizer
    for text in (TEXT, "", " A", "<s>A"):
        expected = tokenizer("A" if text == "<s>A" else text)["input_ids"]
        if text == "<s>A" and tokenizer.bos_token is None:
            expected = tokenizer(text)["input_ids"]
        assert ours.encode(text, bos=True) == expected
    assert ours.decode(ours.encode(TEXT, bos=True)) == TEXT
    assert ours.bos_id == (1 if tokenizer.bos_token is None else 0)  # eos stands in, as in lm-eval


def test_tasks_over_a_hugging_face_folder(hf_folder, data_root, tmp_path, run_script):
    run_script(
        "run.py", "--checkpoint", hf_folder, "--data", data_root, "--limit", 1, "--output_path", tmp_path,
        "--tasks", "arc_easy,gsm8k,causal_loop,p_hop,perplexity", "--num_fewshot", 0, "--max_new_tokens", 4,
        "--log_samples", "--samples", 2,
    )  # fmt: skip
    results = results_of(tmp_path)
    assert results["config"]["model"] == "hf"
    with_bos = network_of(hf_folder)[1].bos_token is not None
    assert results["config"]["bos_policy"].startswith("one bos" if with_bos else "none")
    assert results["results"]["arc_easy"]["num_steps"] is None
    assert "exact_match,maj@2" in results["results"]["gsm8k"]
    assert len(samples_of(tmp_path, "causal_loop")) == 4
    assert 1 < results["results"]["perplexity"]["bits_per_byte,none"] < 100


def test_without_weights_the_rest_is_there(hf_folder):
    """What the first of several processes loads."""
    bare, whole = (load_hf_engine(hf_folder, torch.device(device)) for device in ("meta", "cpu"))
    assert bare.device.type == "meta"
    assert bare.model.config == whole.model.config
    assert bare.tokenizer.encode(TEXT, bos=True) == whole.tokenizer.encode(TEXT, bos=True)


@pytest.mark.slow
def test_two_processes_answer_as_one(hf_folder):
    one, two = (Scorer.from_checkpoint(hf_folder, 2, num_processes) for num_processes in (1, 2))
    try:
        expected = [log_prob for log_prob, _ in one.loglikelihood(REQUESTS)]
        assert [log_prob for log_prob, _ in two.loglikelihood(REQUESTS)] == pytest.approx(expected, abs=1e-5)
    finally:
        two.close()


def damaged(folder: Path, name: str) -> str:
    """Breaks a copy of a folder; what the error must name."""
    if name == "no weights":
        (folder / "model.safetensors").unlink()
        return "model.safetensors"
    if name == "cut weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        return "model.safetensors is damaged"
    if name == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
        return "has no tokenizer files"
    if name == "bad tokenizer":
        (folder / "tokenizer.json").write_text("{")
        return "transformers cannot load it"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model"}))
    return "no_such_model"


@pytest.mark.parametrize(
    "name", ["no weights", "cut weights", "no tokenizer", "bad tokenizer", "unknown kind"]
)
def test_broken_folder_is_one_line(hf_folder, tmp_path, run_script, capsys, name):
    shutil.copytree(hf_folder, tmp_path / "broken")
    message = damaged(tmp_path / "broken", name)
    with pytest.raises(SystemExit) as exit_:
        run_script("p_hop.py", "--checkpoint", tmp_path / "broken", "--limit", 1)
    assert_error_line(exit_.value, capsys, message)


def test_foreign_tokenizer_is_refused(hf_folder, tmp_path):
    shutil.copytree(hf_folder, tmp_path / "small")
    network = transformers.AutoModelForCausalLM.from_pretrained(hf_folder)
    network.resize_token_embeddings(300)
    network.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, the model vocab_size 300"):
        Scorer.from_checkpoint(tmp_path / "small")


def test_our_exports_are_none_and_need_no_transformers(checkpoint, hf_folder, monkeypatch):
    assert is_hf_folder(hf_folder)
    assert not is_hf_folder(checkpoint)
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails from here on
    Scorer.from_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"is a Hugging Face folder: pip install transformers"):
        Scorer.from_checkpoint(hf_folder)
