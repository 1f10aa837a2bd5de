"""What distill/matrix.py trains and tests on."""

from collections.abc import Sequence
from dataclasses import dataclass, field

REPEATED = ("cot", "no_cot", "kava", "lotus", "no_distillation")  # with every seed, the others with the first
ONCE = ("pause", "coconut", "pccot", "codi", "random_eviction", "uniform_eviction")


@dataclass(frozen=True)
class Size:
    """How much is trained and tested."""

    num_documents: int | None  # to generate for training; None: those of the files
    teacher_steps: int
    student_steps: int
    num_questions: int  # of the test
    methods: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """A problem set of eval/thoughts.py, with a recipe for its training data and a config for its runs."""

    about: str
    recipe: str
    config: str
    full: Size
    quick: Size
    test_options: str | None = None  # of generated questions
    methods: dict[str, list[str]] = field(default_factory=dict)  # method -> overrides of `model`
    budgets: str = "16,32,48,64"  # of the cache, in tokens of an answer

    def build_flags(self, size: Size) -> list[str]:
        """What data_pipeline/build.py is told beyond the recipe and the folder."""
        count = size.num_documents
        return [] if count is None else [f"sources.0.num_samples={count}"]

    def test_flags(self, name: str, size: Size) -> Sequence[str]:
        """What eval/thoughts.py is told of the questions."""
        count = str(size.num_questions)
        if self.test_options is None:
            return ("--task", name, "--limit", count)
        return ("--task", name, "--task_options", self.test_options, "--num_samples", count)


_CAUSAL_LOOP = Task(
    about="Causal-loop programs of 3 statements and serial depth 1-3",
    recipe="data_pipeline/recipes/distill_causal_loop.yaml",
    config="distill/configs/small.yaml",
    full=Size(130_000, 1800, 1200, 600, (*REPEATED, *ONCE), (0, 1, 2)),
    quick=Size(100_000, 1200, 300, 300, REPEATED, (0,)),
    test_options="variables=3,statements=3,names=5,max_depth=3",
    # What the published numbers of latents become where a trace has 3 steps of at most 11 tokens.
    methods={
        "pause": ["latent_cot.num_latents=24"],
        "lotus": ["latent_cot.num_latents=33", "distillation.latent_block=11"],
    },
    budgets="12,16,24,32",
)
_GSM8K = Task(
    about="GSM8K, trained from scratch on its 7.4 thousand problems with their equations",
    recipe="data_pipeline/recipes/distill_gsm8k.yaml",
    config="distill/configs/small_gsm8k.yaml",
    full=Size(None, 600, 200, 1319, REPEATED, (0,)),
    quick=Size(None, 60, 30, 100, ("cot", "kava"), (0,)),
)
TASKS = {"causal_loop_v2": _CAUSAL_LOOP, "gsm8k": _GSM8K}
