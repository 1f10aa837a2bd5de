"""What latent thoughts add to config, weights and counts, and what is refused."""

import pytest
import torch

from model import ModelConfig, ZeroModel, load_pretrained
from model.counts import num_parameters
from model.hf.deepseek import hf_config
from model.latent_cot.thoughts import think

from .conftest import SMALL
from .thoughts import FEEDBACKS, C, make, questions


def test_weights_survive_a_round_trip_and_are_counted(tmp_path):
    for feedback, settings in FEEDBACKS.items():
        model = make("latent_moe", feedback).float()
        assert num_parameters(model.config) == sum(p.numel() for p in model.parameters())
        thoughts = sum(p.numel() for p in model.latent_thoughts.parameters())
        bare = ModelConfig.from_dict({**SMALL})
        assert num_parameters(bare) == num_parameters(model.config) - thoughts
        assert num_parameters(bare, active=True) == num_parameters(model.config, active=True)
        model.save_pretrained(tmp_path / feedback)
        loaded = load_pretrained(tmp_path / feedback)
        assert (
            loaded.config.latent_cot
            == ModelConfig.from_dict({"latent_cot": {"num_latents": C, **settings}}).latent_cot
        )
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert not hasattr(ZeroModel(ModelConfig.from_dict(SMALL)), "latent_thoughts")
    norm = make("latent_moe").latent_thoughts.projection[3]
    assert bool((norm.weight == 1).all())
    assert not bool(norm.bias.any())


LATENTS = {"num_latents": 3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"latent_cot": {"feedback": "parallel"}}, "feedback='parallel' is unknown; choose one of jacobi"),
        ({"latent_cot": {"projection": "linear"}}, "projection='linear' is unknown"),
        ({"latent_cot": {"num_latents": -1}}, "num_latents=-1 must be at least 0"),
        ({"latent_cot": {"num_iterations": -1}}, "num_iterations=-1 must be at least 0"),
        ({"latent_cot": {"feedback": "lotus", "num_iterations": 0}}, "must be at least 1 for feedback=lotus"),
        ({"latent_cot": {"feedback": "sequential", "num_iterations": 3}}, "iterates over nothing"),
        ({"latent_cot": {"feedback": "lotus", "projection": "mlp"}}, "feedback=lotus projects nothing"),
        ({"latent_cot": LATENTS, "num_pause_tokens": 1}, "set both to 0"),
        (
            {"latent_cot": LATENTS, "num_memory_tokens": 1, "segment_length": 4, "use_moe": False},
            "num_memory_tokens=1, which are separate baselines",
        ),
        (
            {"latent_cot": LATENTS, "recurrence": {"placement": "block", "num_steps": 2, "cache": "ema"}},
            "does not go with recurrence.cache=ema",
        ),
        (
            {"latent_cot": {"latents": 3}},
            "model.latent_cot.latents is not a known key",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(values, message):
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig.from_dict({**SMALL, **values})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("feedback", "options", "message"),
    [
        ("jacobi", {"num_latents": 0}, "num_latents=0 must be at least 1"),
        ("jacobi", {"num_latents": 90}, "97 tokens exceed max_position_embeddings=64"),
        ("jacobi", {"replace": "mixed"}, "replace='mixed' is unknown"),
        ("jacobi", {"tolerance": -0.1}, "tolerance=-0.1 must not be negative"),
        ("sequential", {"tolerance": 0.1}, "feedback=sequential has none"),
        ("none", {"num_iterations": 2}, "feedback=none iterates over nothing"),
    ],
)
def test_thinking_refuses_what_it_cannot_do(feedback, options, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        think(make("latent_moe", feedback), questions(), **options)


def test_gradients_need_all_iterations():
    with pytest.raises(ValueError, match="must be 0 with gradients, where all ranks iterate equally often"):
        think(make("latent_moe"), questions(), tolerance=0.1)


def test_models_without_thoughts_or_with_too_few_virtual_layers_are_refused(build, tokens):
    with pytest.raises(ValueError, match="this model has no latent thoughts"):
        think(build(), tokens)
    recurrence = {"placement": "block", "num_steps": 2, "virtual_layers": 2}
    model = build(recurrence=recurrence, latent_cot=LATENTS)
    with pytest.raises(ValueError, match="num_steps=3 exceeds model.recurrence.virtual_layers=2"):
        think(model, tokens, num_steps=3)


def test_either_tokens_or_embeddings_go_in(build, tokens):
    model = build()
    embedded = model.model.embed_tokens(tokens)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens).logits)
    for given in ({}, {"tokens": tokens, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="either tokens or inputs_embeds"):
            model(**given)
    with pytest.raises(ValueError, match="multi-token prediction reads tokens"):
        build("multi_token")(inputs_embeds=embedded, targets=tokens)
    with pytest.raises(ValueError, match="a recurrent memory only reads tokens"):
        build("memory")(inputs_embeds=embedded)


def test_hugging_face_has_no_place_for_thoughts():
    with pytest.raises(ValueError, match=r"cannot express latent_cot.num_latents=4"):
        hf_config(make("latent_moe").config)
