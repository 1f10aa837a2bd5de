"""DistillationConfig: which passes a student of latent chain of thought takes, and what each loss weighs.

distill/methods.py says what the methods of the literature set here; the losses are in
latent_cot/targets.py.
"""

from dataclasses import dataclass
from typing import Annotated

from common.schema import Count, CountOrZero, Limits, Weight, check_fields

DISTANCES = ("l1", "smooth_l1", "mse")
POLICIES = ("rkv", "random", "uniform")


@dataclass(frozen=True)
class DistillationConfig:
    """For documents `[bos] question <bot> trace <eot> answer [eos]`; the model is its own teacher.

    Raises:
        ValueError: a value is unknown or out of range, or switches contradict each other.
    """

    method: str = "kava"  # preset of distill/methods.py that fills in the keys not given
    published: str = "gpt2"  # gpt2 | llama-1b: the model whose published values the preset takes
    student_pass: bool = True  # answer after the latents; false: write the trace out, as cot does
    teacher_weight: Weight = 1.0  # cross-entropy of trace and answer in a pass over the whole document
    # CODI (arXiv 2502.21074): the states of all layers at the token before the answer's value
    hidden_weight: Weight = 0.0
    hidden_distance: str = "smooth_l1"  # l1 | smooth_l1 | mse
    hidden_std: bool = True  # divide by the standard deviation of the teacher's state
    # KaVa (arXiv 2510.02312): the latents' keys and values against the trace's kept ones
    kv_weight: Weight = 0.0
    kv_distance: str = "smooth_l1"  # l1 | smooth_l1 | mse
    kv_std: bool = True  # divide, layer by layer, by the standard deviation of the teacher's
    kv_policy: str = "rkv"  # which tokens of the trace are kept: rkv | random | uniform
    # share of importance against redundancy in R-KV's score
    kv_lambda: Annotated[float, Limits(least=0, most=1)] = 0.1
    use_projection: bool = (
        False  # the student's keys and values go through learned maps first, layer by layer
    )
    use_layernorm: bool = False  # a LayerNorm after each map
    prj_dim: Count | None = None  # numbers compared per latent; None: all heads' keys, and all heads' values
    # LOTUS (arXiv 2606.31779): each latent predicts a token of the trace
    latent_weight: Weight = 0.0
    latent_block: CountOrZero = 0  # latents per step of the trace; 0: the trace's tokens one after another
    # Coconut (arXiv 2412.06769): stage s replaces the first s steps of the trace by latents
    # optimizer steps per stage; 0: no curriculum, latents replace the whole trace
    stage_steps: CountOrZero = 0
    latents_per_step: Count = 2  # latents that replace a step in a curriculum
    # From the tokenizer; distill/main.py fills them in
    bot_id: CountOrZero = 4  # <bot>
    eot_id: CountOrZero = 5  # <eot>
    prefix_length: CountOrZero = 0  # tokens between <eot> and the answer's value
    step_id: CountOrZero = 0  # the token between two steps of the trace

    def __post_init__(self) -> None:
        check_fields(self, "model.distillation")
        for name, allowed in (
            ("hidden_distance", DISTANCES),
            ("kv_distance", DISTANCES),
            ("kv_policy", POLICIES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"model.distillation.{name}={getattr(self, name)!r} is unknown; choose one of "
                    f"{', '.join(allowed)}"
                )
        for name in WEIGHTS:
            if not self.student_pass and getattr(self, name) > 0:
                raise ValueError(
                    f"model.distillation.{name}={getattr(self, name)} needs a student, but "
                    "student_pass=false; set it to 0"
                )

        self._check_projection()

    def _check_projection(self) -> None:
        if self.use_projection and not self.kv_weight:
            raise ValueError(
                "model.distillation.use_projection=true maps keys and values that kv_weight=0 does not "
                "compare; set kv_weight, or leave use_projection out"
            )
        for name in ("use_layernorm", "prj_dim"):
            if getattr(self, name) and not self.use_projection:
                raise ValueError(
                    f"model.distillation.{name}={getattr(self, name)} belongs to use_projection=true; set "
                    "that, or leave it out"
                )

    @property
    def needs_teacher(self) -> bool:
        return self.teacher_weight > 0 or self.hidden_weight > 0 or self.kv_weight > 0

    def check(self, num_latents: int, others: dict[str, bool], kv_widths: tuple[int, int]) -> None:
        """Raises ValueError if the rest of the model config does not go with this section.

        Args:
            num_latents: latent_cot.num_latents.
            others: `key=value` of the model config -> whether it is in force.
            kv_widths: numbers of all heads' keys, and of all heads' values, of a token in a layer.
        """
        for key, on in others.items():
            if on:
                raise ValueError(f"model.{key} does not go with model.distillation; switch one of them off")
        for name in ("kv_weight", "latent_weight", "stage_steps"):
            if getattr(self, name) and not num_latents:
                raise ValueError(
                    f"model.distillation.{name}={getattr(self, name)} needs latents; set "
                    "model.latent_cot.num_latents"
                )
        if self.prj_dim is not None and self.prj_dim > min(kv_widths):
            raise ValueError(
                f"model.distillation.prj_dim={self.prj_dim} exceeds the {kv_widths[0]} numbers of a layer's "
                f"keys or the {kv_widths[1]} of its values; set it to {min(kv_widths)} or less"
            )
        if self.stage_steps and (self.hidden_weight or self.kv_weight or self.latent_weight):
            raise ValueError(
                f"model.distillation.stage_steps={self.stage_steps} is a curriculum without "
                "distillation; set hidden_weight, kv_weight and latent_weight to 0"
            )
        if self.stage_steps and num_latents % self.latents_per_step:
            raise ValueError(
                f"model.latent_cot.num_latents={num_latents} is not a multiple of "
                f"model.distillation.latents_per_step={self.latents_per_step}; make it one"
            )
        if self.latent_block and num_latents % self.latent_block:
            raise ValueError(
                f"model.latent_cot.num_latents={num_latents} is not a multiple of "
                f"model.distillation.latent_block={self.latent_block}; make it one"
            )


WEIGHTS = ("teacher_weight", "hidden_weight", "kv_weight", "latent_weight")
