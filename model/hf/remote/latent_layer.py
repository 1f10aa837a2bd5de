"""ZeroModel's cache inside a cache of transformers.

Shapes: B rows.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from model.cache import LatentCache


class LatentLayer(CacheLayerMixin):
    """The whole LatentCache, with a slot for every loop step and layer, as the one layer of a Cache.

    So `generate`, and every other code that holds the Cache, can ask for its length, reorder its rows for
    beams, crop and repeat it.

    Args:
        positions_per_token: entries that a token takes.
        differentiable: see LatentCache.
    """

    is_sliding = False

    def __init__(self, positions_per_token: int, differentiable: bool) -> None:
        super().__init__()
        self.positions_per_token, self.differentiable = positions_per_token, differentiable
        self.latent = LatentCache(differentiable=differentiable)

    def get_seq_length(self) -> int:
        return self.latent.length // self.positions_per_token

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name that transformers 4 has for get_max_length."""
        return -1

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.get_seq_length() + int(query_length), 0

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """A recurrent memory keeps no tokens that could be taken back."""
        return self.latent.memory is None

    def lazy_initialization(self, *arguments: Any) -> None:
        raise NotImplementedError("ZeroModel fills its cache itself")

    def update(self, *arguments: Any, **options: Any) -> Any:
        raise NotImplementedError("ZeroModel fills its cache itself")

    def offload(self) -> None:
        raise NotImplementedError("ZeroModel's cache stays on the device; leave out cache_implementation")

    def reset(self) -> None:
        self.latent = LatentCache(differentiable=self.differentiable)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last -tokens_to_remove tokens; 0: nothing."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to take back")
        if tokens_to_remove and not self.is_croppable:
            raise ValueError(
                f"crop({tokens_to_remove}): a recurrent memory cannot forget single tokens; leave out "
                "assisted decoding"
            )
        self.latent.crop(-tokens_to_remove * self.positions_per_token)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.latent.length:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """The given rows (n,), in this order."""
        if self.latent.length:
            self.latent = self.latent.rows(indices)

    @property
    def batch_size(self) -> int:
        return self.latent.batch_size


def latent_layer(cache: Cache, positions_per_token: int, differentiable: bool) -> LatentLayer:
    """The layer of a cache of transformers; one that is still empty gets it.

    Raises:
        ValueError: the cache is of another kind, or was filled by another model.
    """
    if len(cache.layers) == 1 and isinstance(cache.layers[0], LatentLayer):
        return cache.layers[0]
    foreign = [layer for layer in cache.layers if type(layer) is not DynamicLayer]
    if foreign or getattr(cache, "offloading", False) or cache.get_seq_length():
        kind = type(foreign[0]).__name__ if foreign else type(cache).__name__
        raise ValueError(
            f"past_key_values is a cache of {kind} with {cache.get_seq_length()} tokens, but ZeroModel fills "
            "an empty DynamicCache itself; leave out past_key_values and cache_implementation"
        )
    layer = LatentLayer(positions_per_token, differentiable)
    cache.layers[:] = [layer]
    return layer
