"""Published methods and their controls, as values of model.latent_cot and model.distillation.

A preset fills in keys that a config leaves out. Values are those published for GSM8K-AUG and depend on the
model that training starts from (`published`: gpt2 or llama-1b); a value shared by both is given once. Two
controls need no training: shuffled and zeroed latents are set at test time (latent_cot.thoughts.think,
`replace`).
"""

from dataclasses import dataclass, field
from typing import Any

PUBLISHED = ("gpt2", "llama-1b")


@dataclass(frozen=True)
class Method:
    """Where a method's values come from, and the values."""

    source: str
    latent_cot: dict[str, Any] = field(default_factory=dict)
    distillation: dict[str, Any] = field(default_factory=dict)
    by_kind: dict[str, dict[str, Any]] = field(default_factory=dict)  # of distillation, by `published`


_PLAIN: dict[str, Any] = {"teacher_weight": 0.0}
_CODI_GAMMA = {"gpt2": {"hidden_weight": 1.0}, "llama-1b": {"hidden_weight": 20.0}}
_JACOBI: dict[str, Any] = {"num_latents": 24, "feedback": "jacobi", "num_iterations": 3}
_KAVA: dict[str, Any] = {"teacher_weight": 1.0, "hidden_weight": 10.0, "kv_weight": 1.0}
_KAVA_SOURCE = "KaVa, arXiv 2510.02312: M=24, T=3, CODI's loss 10, KV loss 1, lambda 0.1"

METHODS: dict[str, Method] = {
    "cot": Method("the trace is written out", {"num_latents": 0}, {**_PLAIN, "student_pass": False}),
    "no_cot": Method("Q <bot> <eot> A", {"num_latents": 0}, _PLAIN),
    "pause": Method(
        "pause tokens instead of Coconut's thoughts, arXiv 2412.06769, 4.3",
        {"num_latents": 6, "feedback": "none"},
        _PLAIN,
    ),
    "coconut": Method(
        "arXiv 2412.06769; args/gsm_coconut.yaml of its code: c_thought 2, max_latent_stage 3",
        {"num_latents": 6, "feedback": "sequential", "projection": "none"},
        {**_PLAIN, "latents_per_step": 2},
    ),
    "codi": Method(
        "arXiv 2502.21074; its training scripts: 6 latents, smooth L1 / std, factor 1 (GPT-2), 20 (Llama-1B)",
        {"num_latents": 6, "feedback": "sequential", "projection": "mlp"},
        {"teacher_weight": 1.0},
        _CODI_GAMMA,
    ),
    "pccot": Method(
        "arXiv 2506.18582: c=24, T=3, with CODI's three losses", _JACOBI, {"teacher_weight": 1.0}, _CODI_GAMMA
    ),
    "kava": Method(_KAVA_SOURCE, _JACOBI, _KAVA),
    "lotus": Method(
        "arXiv 2606.31779: R=6, K=6 blocks of 25 latents, cross-entropy of the latents 0.05",
        {"num_latents": 150, "feedback": "lotus", "num_iterations": 6},
        {**_PLAIN, "latent_weight": 0.05, "latent_block": 25},
    ),
    "no_distillation": Method(
        f"control of kava: its passes without its distance losses ({_KAVA_SOURCE})",
        _JACOBI,
        {**_KAVA, "hidden_weight": 0.0, "kv_weight": 0.0},
    ),
    "random_eviction": Method(f"control of {_KAVA_SOURCE}", _JACOBI, {**_KAVA, "kv_policy": "random"}),
    "uniform_eviction": Method(f"control of {_KAVA_SOURCE}", _JACOBI, {**_KAVA, "kv_policy": "uniform"}),
}


def with_method(model: dict[str, Any]) -> dict[str, Any]:
    """A model config, completed by the preset that `distillation.method` names.

    Raises:
        ValueError: no method is named, or an unknown one.
    """
    given = dict(model.get("distillation") or {})
    name, published = given.get("method"), given.setdefault("published", PUBLISHED[0])
    for key, value, allowed in (("method", name, tuple(METHODS)), ("published", published, PUBLISHED)):
        if value not in allowed:
            raise ValueError(
                f"model.distillation.{key}={value!r} is unknown; choose one of {', '.join(allowed)}"
            )
    method = METHODS[str(name)]
    latent_cot = {**method.latent_cot, **(model.get("latent_cot") or {})}
    distillation = {**method.distillation, **method.by_kind.get(published, {}), **given}
    return {**model, "latent_cot": latent_cot, "distillation": distillation}
