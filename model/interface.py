"""What code that reads and generates needs of a model, without the network itself.

Shapes: B batch, T new tokens, S cached and new tokens, D hidden, V vocabulary.
"""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from model.cache import LatentCache
from model.config.model import ModelConfig
from model.config.recurrence import HaltingConfig


class ModelOutput(NamedTuple):
    """Logits and hidden states when no targets are given; otherwise the loss of this batch and its terms.

    A named tuple, since ZeRO-3 looks for tensors in tuples and dicts only.
    """

    logits: Tensor | None = None  # (B, T, V), or of the last logits_to_keep positions
    hidden: Tensor | None = None  # (B, T, D), normed
    loss: Tensor | None = None  # normalised by this batch's own counts
    loss_sums: dict[str, Tensor] | None = None  # one scalar per term of losses.loss_terms, not normalised
    # Of the U loops; None without recurrence; see loop_trace.LoopTrace
    halt_probs: Tensor | None = None  # (U, B, T, N)
    num_iterations: Tensor | None = None  # (U, B, T)
    ponder_cost: Tensor | None = None  # (U, B, T)
    residuals: Tensor | None = None  # (U, N)


class LanguageModel(Protocol):
    """What generation and R-KV use of a model; ZeroModel provides it."""

    @property
    def config(self) -> ModelConfig: ...

    def attention_layer(self, layer: int) -> Any:
        """The attention of decoder layer number `layer`."""
        ...

    def __call__(
        self,
        tokens: Tensor,
        *,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        num_steps: int | None,
        cache: LatentCache,
        logits_to_keep: int,
        halting: HaltingConfig | None,
    ) -> ModelOutput:
        """See ZeroModel.forward."""
        ...
