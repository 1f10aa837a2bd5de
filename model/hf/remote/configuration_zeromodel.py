"""ZeroModel's configuration as Hugging Face loads it."""

from typing import Any

from transformers import PretrainedConfig

from model.config.model import ModelConfig
from model.hf.remote.section import MODEL_TYPE, SHARED, network_config


class ZeroModelConfig(PretrainedConfig):
    """Holds the network's own config as a section, `zeromodel`, and what Hugging Face's code looks for.

    Args:
        zeromodel: ModelConfig.to_dict(); default: a model of the default sizes.
        bot_token_id, eot_token_id: of the tokens around latent thoughts, where the tokenizer has them.
        use_cache: whether forward keeps a cache outside training.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        zeromodel: dict[str, Any] | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        bot_token_id: int | None = None,
        eot_token_id: int | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        own = ModelConfig.from_dict(zeromodel or {})
        self.zeromodel = own.to_dict()
        for name in SHARED:
            setattr(self, name, kwargs.pop(name, getattr(own, name)))
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.bot_token_id, self.eot_token_id = bot_token_id, eot_token_id
        self.use_cache = use_cache
        named: dict[str, Any] = {  # transformers 4 would set its own defaults
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        super().__init__(**named, **kwargs)

    def network_config(self) -> ModelConfig:
        """The network's own config.

        Raises:
            ValueError: the section contradicts the other values.
        """
        return network_config(self)
