"""Our checkpoints inside lm-evaluation-harness itself, as its model `zeromodel`.

pip install -e '.[lmeval]'
python eval/lm_eval_adapter.py --model zeromodel --model_args checkpoint=runs/NAME/export --tasks arc_easy

What follows the script is lm-eval's own command line; it fetches the tasks' data from the Hugging Face hub.
The tests compare eval/*.py with what lm-eval computes through this file.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import user_errors
from eval.scoring.cli import USER_ERRORS
from eval.scoring.core import Scorer

try:
    from lm_eval import utils
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ModuleNotFoundError as missing:
    sys.exit(f"error: lm-eval cannot be imported ({missing}): pip install -e '.[lmeval]'")

MAX_GEN_TOKS = 256  # lm-eval's default for a task that gives no number


@register_model("zeromodel")
class ZeroModelLM(TemplateLM):
    """A checkpoint as lm-eval asks models: every prompt starts with `bos`, generation is greedy.

    Raises ValueError or OSError, with a one-line message, if the checkpoint is missing, cut or does not fit.
    """

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str = 16,
        max_gen_toks: int = MAX_GEN_TOKS,
        device: str | None = None,
    ) -> None:
        """`max_gen_toks` bounds the answers of tasks that do not say how long they may be."""
        super().__init__()
        if not str(batch_size).isdigit():
            raise ValueError(f"batch_size is {batch_size}: zeromodel takes a number")
        self.scorer = Scorer.from_checkpoint(Path(checkpoint), int(batch_size))
        if device not in (None, self.scorer.device.type):
            raise ValueError(
                f"device is {device}: zeromodel runs on {self.scorer.device.type} here, leave it out"
            )
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        return self.scorer.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.scorer.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.scorer.tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with `bos` unless `add_special_tokens` is False."""
        return self.scorer.tokenizer.encode(string, bos=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self.scorer.loglikelihood_tokens([(context, target) for _, context, target in requests])

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability (nats) of whole texts, in lm-eval's disjoint windows of the model's positions."""
        windows: list[tuple[list[int], list[int]]] = []
        ends = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            rolling = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.scorer.max_length, 1)
            windows += map(utils.make_disjoint_window, rolling)
            ends.append(len(windows))
        scores = [score for score, _ in self.scorer.loglikelihood_tokens(windows)]
        return [sum(scores[a:b]) for a, b in zip([0, *ends], ends, strict=False)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut at the task's stop strings. Raises ValueError if the task wants samples."""
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for i, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            if options["do_sample"]:
                raise ValueError(
                    "the task asks for do_sample: zeromodel is greedy, --gen_kwargs do_sample=False"
                )
            groups.setdefault((options["max_gen_toks"], tuple(options["until"])), []).append(i)
        answers: dict[int, str] = {}
        for (max_new_tokens, stop), members in groups.items():
            texts = self.scorer.generate([requests[i].args[0] for i in members], max_new_tokens, stop)
            answers.update(zip(members, texts, strict=True))
        return [answers[i] for i in range(len(requests))]


if __name__ == "__main__":
    with user_errors(*USER_ERRORS):
        cli_evaluate()
