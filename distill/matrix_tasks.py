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
    build: tuple[str, ...] = ()  # overrides of the recipe
    test_options: str | None = None  # of generated questions
    methods: dict[str, list[str]] = field(default_factory=dict)  # method -> overrides of `model`
    budgets: str = "16,32,48,64"  # of the cache, in tokens of an answer

    def build_flags(self, size: Size) -> list[str]:
        """What data_pipeline/build.py is told beyond the recipe and the folder."""
        count = size.num_documents
        return [*self.build, *([] if count is None else [f"sources.0.num_samples={count}"])]

    def test_flags(self, name: str, size: Size) -> Sequence[str]:
        """What eval/thoughts.py is told of the questions."""
        count = str(size.num_questions)
        if self.test_options is None:
            return ("--task", name, "--limit", count)
        return ("--task", name, "--task_options", self.test_options, "--num_samples", count)


# Of variables, in training and test. The tokenizer gets a piece for each: what the recipe's 26 leave free
# would go to merged ones.
_NAMES = 5
_CAUSAL_LOOP = Task(
    about="Causal-loop programs of 6 statements, trained on serial depth 1-4",
    recipe="data_pipeline/recipes/distill_causal_loop.yaml",
    config="distill/configs/small.yaml",
    full=Size(130_000, 2000, 400, 600, (*REPEATED, *ONCE), (0, 1, 2)),
    quick=Size(50_000, 1500, 200, 300, REPEATED, (0,)),
    build=(f"sources.0.names={_NAMES}", f"tokenizer.vocab_size={308 - 26 + _NAMES}"),
    test_options=f"variables=4,statements=6,names={_NAMES},max_depth=6",  # 5 and 6 are beyond the training
    # What the published numbers of latents become where a trace has 6 steps of at most 11 tokens.
    methods={
        "pause": ["latent_cot.num_latents=24"],
        "coconut": ["latent_cot.num_latents=12"],
        "lotus": ["latent_cot.num_latents=66", "distillation.latent_block=11"],
    },
)
_GSM8K = Task(
    about="GSM8K, trained from scratch on its 7.4 thousand problems with their equations",
    recipe="data_pipeline/recipes/distill_gsm8k.yaml",
    config="distill/configs/small_gsm8k.yaml",
    full=Size(None, 600, 200, 1319, REPEATED, (0,)),
    quick=Size(None, 60, 30, 100, ("cot", "kava"), (0,)),
)
TASKS = {"causal_loop_v2": _CAUSAL_LOOP, "gsm8k": _GSM8K}
