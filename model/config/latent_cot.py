"""LatentCoTConfig: thoughts instead of a chain of thought's tokens."""

from dataclasses import dataclass
from typing import Annotated

from common.schema import Limits

Latents = Annotated[int, Limits(least=0, most=100_000)]
Iterations = Annotated[int, Limits(least=0, most=10_000)]

# PCCoT's T (arXiv 2506.18582) and LOTUS's R (arXiv 2606.31779). The other two iterate over nothing.
DEFAULT_ITERATIONS = {"jacobi": 3, "lotus": 6}
FEEDBACKS = ("jacobi", "sequential", "none", "lotus")
PROJECTIONS = (None, "mlp", "none")


@dataclass(frozen=True)
class LatentCoTConfig:
    """Latent thoughts between <bot> and <eot>. See model/latent_cot/thoughts.py for the formulas."""

    num_latents: Latents = 0  # c, latents in a thought; 0: none, and no parameters for them
    # jacobi: all latents at once, each from the one before in the iteration before (PCCoT) | sequential: one
    # after another (Coconut, CODI) | none: learned embeddings (pause) | lotus: all at once, each its own
    feedback: str = "jacobi"
    # jacobi: T, after iteration 0 (default 3; 0 is `none`) | lotus: R (default 6). The others have none
    num_iterations: Iterations | None = None
    # jacobi, sequential: mlp, Linear-GELU-Linear-LayerNorm (default) | none, the hidden state itself
    projection: str | None = None

    @property
    def iterations(self) -> int:
        """num_iterations in use; 0 where the kind has none."""
        if self.num_iterations is not None:
            return self.num_iterations
        return DEFAULT_ITERATIONS.get(self.feedback, 0)

    @property
    def has_embedding(self) -> bool:
        """Whether there is a learned embedding of the latents."""
        return self.num_latents > 0 and self.feedback != "sequential"

    @property
    def projects(self) -> bool:
        """Whether there is a projection from hidden states to latents."""
        fed_back = self.num_latents > 0 and self.feedback in ("jacobi", "sequential")
        return fed_back and self.projection != "none"


def check_latent_cot(c: LatentCoTConfig) -> None:
    """Refuses what is impossible or would do nothing.

    Raises:
        ValueError: names the key, its value, the limit and the fix.
    """
    for name, value, allowed in (
        ("feedback", c.feedback, FEEDBACKS),
        ("projection", c.projection, PROJECTIONS),
    ):
        if value not in allowed:
            known = ", ".join(str(choice) for choice in allowed)
            raise ValueError(f"model.latent_cot.{name}={value!r} is unknown; choose one of {known}")
    check_iterations(c, c.num_iterations)
    if c.projection is not None and c.feedback not in ("jacobi", "sequential"):
        raise ValueError(
            f"model.latent_cot.projection={c.projection} is for feedback=jacobi and sequential, but "
            f"feedback={c.feedback} projects nothing; leave it out"
        )


def check_iterations(c: LatentCoTConfig, num_iterations: int | None) -> None:
    """Refuses a number of iterations that this kind of feedback cannot take; None: the default."""
    if num_iterations is None:
        return
    if c.feedback not in DEFAULT_ITERATIONS:
        raise ValueError(
            f"latent_cot.num_iterations={num_iterations} is for feedback=jacobi and lotus, but "
            f"feedback={c.feedback} iterates over nothing; leave it out"
        )
    fewest = int(c.feedback == "lotus")
    if num_iterations < fewest:
        raise ValueError(
            f"latent_cot.num_iterations={num_iterations} must be at least {fewest} for feedback={c.feedback}"
        )
