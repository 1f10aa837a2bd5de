"""Tiny Hugging Face folders of GPT-2, Llama and its kin, with random weights and a tokenizer trained here."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

WORDS = "a an the how many apples does she have left each day 12 345 .,?+-*/=<> <<3+4=7>> Answer: eats"
GPT2_END = "<|endoftext|>"
LLAMA_ENDS = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>"}}
KIN_ENDS = ("<s>", "</s>")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 64,
}


@functools.cache
def tokenizer_json(*special: str) -> str:
    """A byte-level BPE like GPT-2's; the special tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f" {word}" for word in WORDS.split()] * 3 + [WORDS], trainer)
    return tokenizer.to_str()


QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@functools.cache
def kin_tokenizer_json(form: str) -> str:
    """In the form of qwen2 (NFC), llama3, llama2 (Prepend) or mistral (Metaspace); KIN_ENDS come first."""
    if form in ("llama2", "mistral"):
        return _with_byte_fallback(form)
    tokenizer = Tokenizer(models.BPE(ignore_merges=form == "llama3"))
    split = QWEN_SPLIT if form == "qwen2" else QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    if form == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), whole])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(KIN_ENDS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f" {word}" for word in WORDS.split()] * 3 + [WORDS], trainer)
    return tokenizer.to_str()


def _with_byte_fallback(form: str) -> str:
    """Sentencepiece's BPE as transformers converts it: unknown characters become bytes."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    special = [*KIN_ENDS, "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special + bytes_, show_progress=False)
    trained.train_from_iterator([WORDS] * 3, trainer)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if form == "llama2":
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    back = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    learned, values = json.loads(trained.to_str()), json.loads(tokenizer.to_str())
    values["added_tokens"] = [token for token in learned["added_tokens"] if token["content"] in special]
    values["model"] |= {key: learned["model"][key] for key in ("vocab", "merges")}
    return json.dumps(values)


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough to expose mistakes, including biases and norms."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = "ln_" in name or "norm" in name
            parameter.copy_(1 + 0.3 * noise if norm and name.endswith("weight") else 0.2 * noise)
    return model.eval()


def gpt2_folder(folder: Path, **changes: Any) -> PreTrainedModel:
    """GPT-2's bos is its eos, and only config.json names them."""
    text = tokenizer_json(GPT2_END)
    vocabulary = len(json.loads(text)["model"]["vocab"])
    sizes = {"vocab_size": vocabulary, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    config = GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **changes})
    model = randomized(GPT2LMHeadModel(config))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(text)
    return model


def kin_folder(kind: str, folder: Path, **values: Any) -> PreTrainedModel:
    """A model_type with these values of its config, without a tokenizer."""
    config = AutoConfig.for_model(kind, **values)
    model = randomized(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(folder)
    return model


def llama_folder(folder: Path, kind: str = "llama", **changes: Any) -> PreTrainedModel:
    """The model's vocabulary is larger than the tokenizer's, as is common for speed."""
    text = tokenizer_json("<|begin_of_text|>", "<|end_of_text|>")
    vocabulary = len(json.loads(text)["model"]["vocab"]) + 10
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
    }
    model = kin_folder(kind, folder, **{**sizes, "bos_token_id": 0, "eos_token_id": [1], **changes})
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(LLAMA_ENDS))
    return model
