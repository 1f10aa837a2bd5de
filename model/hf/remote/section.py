"""The part of an exported config.json that describes the network; read with and without transformers."""

from typing import Any

from model.config.model import ModelConfig

SECTION, MODEL_TYPE = "zeromodel", "zeromodel"
# Keys at the top of config.json that code of Hugging Face reads; the section has the same values.
SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "initializer_range",
    "tie_word_embeddings",
)


def network_config(config: Any) -> ModelConfig:
    """The network's own config, from the attributes of a ZeroModelConfig.

    transformers loads the configuration and the network of a local folder as two copies of this code, whose
    classes are not each other's: each needs the config in its own.

    Raises:
        ValueError: the section contradicts the other values.
    """
    return described_model({SECTION: config.zeromodel, **{name: getattr(config, name) for name in SHARED}})


def described_model(values: dict[str, Any]) -> ModelConfig:
    """The config of the network that a config.json describes.

    The vocabulary's size counts from the top, where `resize_token_embeddings` changes it.

    Raises:
        ValueError: one line for a section that is missing or impossible, or contradicts the keys at the top.
    """
    section = values.get(SECTION)
    if not isinstance(section, dict):
        raise ValueError(
            f"config.json has {SECTION}={section!r} instead of the section that describes the network; "
            "export the checkpoint again"
        )
    config = ModelConfig.from_dict({**section, "vocab_size": values.get("vocab_size")})
    for name in SHARED:
        if values.get(name) != getattr(config, name):
            raise ValueError(
                f"config.json has {name}={values.get(name)!r}, but its section {SECTION!r} says "
                f"{getattr(config, name)!r}; make them agree"
            )
    return config
