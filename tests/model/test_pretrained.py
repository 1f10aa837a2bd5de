"""Exported folders: round trip and damaged files."""

import json

import pytest
import torch

from model import load_pretrained


def test_round_trip(build, variant, tokens, tmp_path):
    model = build(variant)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_damage_is_named_in_one_line(build, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing; give the export"):
        load_pretrained(tmp_path / "absent")
    build().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    values, whole = json.loads(config.read_text()), weights.read_bytes()
    config.write_text(json.dumps({**values, "hidden_size": 96}))
    with pytest.raises(ValueError, match="describes a model of .* parameters, but its weights have only"):
        load_pretrained(tmp_path)
    config.write_text(json.dumps({**values, "hidden_size": 48}))
    with pytest.raises(ValueError, match="does not fit config.json: .* expected"):
        load_pretrained(tmp_path)
    config.write_text(json.dumps({**values, "hidden_sise": 48}))
    with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
        load_pretrained(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_pretrained(tmp_path)
    config.write_text(json.dumps(values))
    weights.write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged \("):
        load_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        load_pretrained(tmp_path)
