"""Self-speculative decoding: multi-token prediction drafts a token, and the model checks it in its next pass.

Shapes: B batch, T prompt tokens, n new tokens, S cached tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cache import LatentCache
from model.generate import PAD_TOKEN_ID, check_length
from model.transformer import ZeroModel


@dataclass
class Acceptance:
    """How many drafts were accepted, over all rows that had not ended."""

    drafted: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


class _Drafter:
    """The model, the module that drafts, and their caches.

    Both caches hold the same tokens. If a row rejects a token that another row accepts, the token stays as a
    position that `real` masks like padding, so rows may advance at different speeds.
    """

    def __init__(self, model: ZeroModel, real: Tensor, num_steps: int | None) -> None:
        self.model, self.real, self.num_steps = model, real, num_steps
        self.caches = LatentCache(limited=False), LatentCache(limited=False)

    def check(self, tokens: Tensor, logits_to_keep: int = 0) -> tuple[Tensor, Tensor]:
        """tokens (B, k) -> the model's choices after the last logits_to_keep, and all hidden states."""
        output = self.model(
            tokens,
            attention_mask=self._mask(),
            num_steps=self.num_steps,
            cache=self.caches[0],
            logits_to_keep=logits_to_keep,
        )
        assert output.logits is not None
        assert output.hidden is not None
        return output.logits.argmax(-1), output.hidden

    def draft(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """States of the last k tokens and the tokens (B, k) after them -> guesses (B, k) of what follows."""
        return self.model.draft(hidden, tokens, self._mask(), self.caches[1]).argmax(-1)

    def extend(self, num_tokens: int) -> None:
        self.real = F.pad(self.real, (0, num_tokens), value=True)

    def reject_last(self, accepted: Tensor) -> None:
        """Masks the last token in the rows (B,) that did not accept it."""
        self.real[:, -1] = accepted

    def forget_rejected(self) -> None:
        if not bool(self.real[:, -1].any()):
            self.real = self.real[:, :-1]
            for cache in self.caches:
                cache.crop(1)

    def _mask(self) -> Tensor | None:
        return None if bool(self.real.all()) else self.real


@torch.no_grad()
def generate_speculatively(
    model: ZeroModel,
    tokens: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    eos_token_id: int | None = None,
    num_steps: int | None = None,
) -> tuple[Tensor, Acceptance]:
    """The result of greedy generate in fewer passes (DeepSeek-V3, section 5.4.3); drafts one token.

    Args:
        tokens, max_new_tokens, attention_mask, eos_token_id, num_steps: as in generate.generate.

    Returns:
        (B, T + n) prompt and continuation, and how many drafts the model agreed with.

    Raises:
        ValueError: the model has no multi-token prediction, the text exceeds max_position_embeddings, or
            there are several rows and the model mixes neighbouring tokens.
    """
    if not model.config.num_nextn_predict_layers:
        raise ValueError(
            "speculative decoding drafts by multi-token prediction, but the model has "
            "num_nextn_predict_layers=0; train with at least 1 or use generate"
        )
    for name, width in (
        ("embedding_mixing", model.config.embedding_mixing),
        ("recurrence.position_mixing", model.config.recurrence.position_mixing),
    ):
        if width and len(tokens) > 1:
            raise ValueError(
                f"speculative decoding of {len(tokens)} rows leaves holes where drafts were rejected, which "
                f"{name}={width} mixes in; give one row"
            )
    check_length(model, tokens, max_new_tokens)
    if max_new_tokens == 0:
        return tokens, Acceptance()
    real = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    drafter, written = _Drafter(model, real, num_steps), _Written(tokens, max_new_tokens, eos_token_id)
    acceptance = Acceptance()
    known, hidden = drafter.check(tokens, logits_to_keep=1)
    written.append(known[:, 0], torch.ones_like(known[:, 0], dtype=torch.bool))
    guess = drafter.draft(hidden, torch.cat((tokens[:, 1:], known), 1))[:, -1:]
    while not written.finished():
        drafter.extend(2)
        choice, hidden = drafter.check(torch.cat((known, guess), 1))
        accepted = choice[:, 0] == guess[:, 0]
        acceptance.drafted += int((~written.ended).sum())
        acceptance.accepted += int((accepted & ~written.ended).sum())
        written.append(choice[:, 0], torch.ones_like(accepted))
        written.append(choice[:, 1], accepted)
        drafter.reject_last(accepted)
        last = accepted.long()[:, None]
        known = choice.gather(1, last)
        guess = drafter.draft(hidden, choice).gather(1, last)
        drafter.forget_rejected()
    return torch.cat((tokens, written.continuation()), 1), acceptance


class _Written:
    """The new tokens of rows that advance at different speeds."""

    def __init__(self, prompt: Tensor, max_new_tokens: int, eos_token_id: int | None) -> None:
        B, self.limit, self.eos_token_id = len(prompt), max_new_tokens, eos_token_id
        # One extra column takes what rows write after their end.
        self.tokens = prompt.new_full((B, max_new_tokens + 1), PAD_TOKEN_ID)
        self.length = prompt.new_zeros(B)
        self.ended = torch.zeros(B, dtype=torch.bool, device=prompt.device)

    def append(self, token: Tensor, rows: Tensor) -> None:
        """Writes token (B,) to the given rows (B,) that have not ended."""
        rows = rows & ~self.ended
        column = torch.where(rows, self.length, self.limit)
        self.tokens.scatter_(1, column[:, None], token[:, None])
        self.length += rows
        self.ended |= self.length >= self.limit
        if self.eos_token_id is not None:
            self.ended |= rows & (token == self.eos_token_id)

    def finished(self) -> bool:
        return bool(self.ended.all())

    def continuation(self) -> Tensor:
        """(B, n), n the longest row's length."""
        return self.tokens[:, : int(self.length.max())]
