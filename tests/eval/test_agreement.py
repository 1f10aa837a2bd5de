"""Our harnesses against lm-evaluation-harness 0.4.13, document by document.

Where lm-eval is installed (`pip install -e '.[lmeval]'`) it runs here, over the published files. Everywhere,
the prompts, choices and targets of all documents are compared with digests of its own, prompt_digests.json:
`python tests/eval/lm_eval_reference.py` made that file with lm-eval 0.4.13 and datasets 5.2.0. It holds, for
each document (50 of bAbI at a time), the first 8 hexadecimal digits of the sha256 of what lm-eval asked.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.run import TASKS
from eval.scoring.core import Scorer
from eval.scoring.task import Options
from model import load_pretrained
from model.hf.deepseek import export_folder

from .lm_eval_reference import CHARACTERS, DIGESTS, SETTINGS, asked, digests, evaluate, lm_eval_asks

ROOT = Path(__file__).parents[2]
live = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed: the digests are compared instead"
)
Answer = Callable[[str], str]
Rows = list[dict[str, Any]]


class Replay:
    """A scorer whose answers are given, and whose log-probabilities are all alike."""

    def __init__(self, answer: Answer = lambda prompt: "") -> None:
        self.answer = answer

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        return [(-1.0, False)] * len(requests)

    def generate(self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        return [self.answer(prompt) for prompt in prompts]

    def take_steps(self) -> list[float]:
        return []

    def take_seconds(self) -> float:
        return 0.0

    def take_truncated(self) -> int:
        return 0


def our_samples(scorer: Any, data: Path, task: str, **options: Any) -> Rows:
    """The sample lines of a task as the user gets them."""
    return TASKS[task].load(Options(data=data, **options))(scorer)[0].samples


def our_asks(data: Path, task: str, num_fewshot: int, **options: Any) -> Rows:
    samples = our_samples(Replay(), data, task, num_fewshot=num_fewshot, **options)
    return [
        {"prompt": sample["prompt"], "choices": sample.get("choices", []), "target": sample["target"]}
        for sample in samples
    ]


@pytest.mark.parametrize(("task", "num_fewshot"), SETTINGS)
def test_every_prompt_has_the_digest_of_lm_evals(data_root, task, num_fewshot):
    stored = json.loads(DIGESTS.read_text())[f"{task} {num_fewshot}"]
    expected = [stored[start : start + CHARACTERS] for start in range(0, len(stored), CHARACTERS)]
    documents = our_asks(data_root, task, num_fewshot)
    assert len(documents) == {"gsm8k": 1319, "gsm8k_cot": 1319, "arc_easy": 2376, "arc_challenge": 1172,
                              "logiqa": 651, "babi": 20000}[task]  # fmt: skip
    made = digests(task, documents)
    assert [i for i, pair in enumerate(zip(made, expected, strict=True)) if pair[0] != pair[1]] == []


def test_a_changed_character_changes_the_digest(data_root):
    documents = our_asks(data_root, "babi", 0, limit=10)
    before = digests("babi", documents)
    documents[170]["target"] += "s"
    changed = [a != b for a, b in zip(before, digests("babi", documents), strict=True)]
    assert changed == [False, False, False, True]


@pytest.mark.parametrize("task", ["gsm8k", "arc_challenge", pytest.param("babi", marks=pytest.mark.slow)])
def test_limit_changes_no_exemplar(data_root, task):
    """A shorter run asks what the whole one asks: one stream of exemplars over the file."""
    whole = our_asks(data_root, task, 2, limit=8)
    part = our_asks(data_root, task, 2, limit=4)
    group = 8 if task == "babi" else len(whole)
    assert part == [ask for i, ask in enumerate(whole) if i % group < 4]


@pytest.fixture
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval reads local files only, and leaves nothing in the user's cache."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@live
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("task", "num_fewshot"),
    [*SETTINGS, ("gsm8k_cot", 3), ("logiqa", 2), pytest.param("babi", 1, marks=pytest.mark.slow)],
)
def test_prompts_equal_lm_evals(data_root, task, num_fewshot):
    limit = 8 if num_fewshot == 25 else 40  # lm-eval takes 50 ms for a prompt of 25
    expected = lm_eval_asks(data_root, task, num_fewshot, limit)
    assert len(expected) == limit
    assert our_asks(data_root, task, num_fewshot, limit=limit)[:limit] == expected


def mutated(target: str, rng: random.Random) -> str:
    """An answer that is right by all, some or none of the filters."""
    number = target.split("####")[-1].strip()
    forms = (
        target, target.strip(), f"{target} ", "", "-", f" Thus\n#### {number}", f"#### {number}.",
        f"####{number}", f" The answer is {number}.", f" The answer is {number}",
        f" The answer is ${number}.\n",
        f" The answer is {number}. The answer is 5.", f"#### 5\n#### {number}", f"#### {number}\n#### 5",
        f" $ {number}.00", f" {number} -", f" **{number}**", f"#### {number}0", f" ${number},", "1,2,3",
        f" {number.upper()}", f" -{number}", f"#### -{number}", f"{number}\n", "...",
    )  # fmt: skip
    return rng.choice(forms)


@live
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("task", ["gsm8k", "gsm8k_cot", "babi"])
def test_filters_and_metrics_of_given_answers_equal_lm_evals(data_root, task):
    """Both grade the same answers: each filtered answer and each metric is the same."""
    from lm_eval.api.model import LM

    limit = {"gsm8k": 300, "gsm8k_cot": 300, "babi": 600}[task]
    rng = random.Random(0)
    asks = our_asks(data_root, task, 0, limit=limit)[:limit]
    answers = {ask["prompt"]: mutated(ask["target"], rng) for ask in asks}

    class Given(LM):
        def loglikelihood(self, requests: Any) -> Any:
            raise AssertionError("a task of generation")

        loglikelihood_rolling = loglikelihood

        def generate_until(self, requests: Any) -> list[str]:
            return [answers[request.args[0]] for request in requests]

    theirs = evaluate(Given(), data_root, [task], 0, limit)[task]
    ours = our_samples(
        Replay(lambda prompt: answers.get(prompt, "")), data_root, task, num_fewshot=0, limit=limit
    )
    seen = set()
    for sample in theirs:
        mine, name = ours[sample["doc_id"]], sample["filter"]
        assert mine["filtered_resps"][name] == sample["filtered_resps"][0]
        assert mine[f"exact_match,{name}"] == sample["exact_match"], mine["resps"]
        seen.add((name, sample["exact_match"]))
    names = ["none"] if task == "babi" else ["strict-match", "flexible-extract"]
    assert seen == {(name, value) for name in names for value in (0.0, 1.0)}


def assert_same(mine: dict[str, Any], sample: dict[str, Any]) -> None:
    """Our sample and lm-eval's: log-probabilities to 1e-4, all else exactly."""
    assert mine["prompt"] == asked(sample)["prompt"]
    if "acc" in sample:
        scores = [float(response[0][0]) for response in sample["resps"]]
        assert mine["resps"] == pytest.approx(scores, abs=1e-4)
        assert (mine["acc"], mine["acc_norm"]) == (sample["acc"], sample["acc_norm"])
    else:
        assert mine["resps"] == sample["resps"][0][0]
        assert mine[f"exact_match,{sample['filter']}"] == sample["exact_match"]


@live
@pytest.mark.usefixtures("offline")
def test_the_same_model_scores_the_same_in_both(checkpoint, data_root):
    """Log-probabilities to 1e-4, chosen options, answers and metrics exactly; batches differ."""
    from eval.lm_eval_adapter import ZeroModelLM

    model = ZeroModelLM(checkpoint=str(checkpoint), batch_size=5)
    names = ["gsm8k", "gsm8k_cot", "arc_easy", "arc_challenge", "logiqa", "babi"]
    theirs = evaluate(model, data_root, names, None, limit=4, gen_kwargs="max_gen_toks=12")
    scorer = Scorer.from_checkpoint(checkpoint, batch_size=3)
    for name in names:
        ours = our_samples(scorer, data_root, name, limit=4, max_new_tokens=12)
        assert len({sample["doc_id"] for sample in theirs[name]}) == 4
        for sample in theirs[name]:
            mine = ours[sample["doc_id"]]
            assert_same(mine, sample)
            if "acc" not in sample:
                assert mine["filtered_resps"][sample["filter"]] == sample["filtered_resps"][0]


@live
@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("accelerate") is None, reason="accelerate, which lm-eval's hf needs, is missing"
)
@pytest.mark.usefixtures("offline", "remote_code")
@pytest.mark.parametrize("task", ["arc_easy", "arc_challenge", "gsm8k"])
def test_an_exported_looped_model_scores_the_same_under_lm_evals_own_hf(
    task, checkpoint, data_root, tmp_path
):
    """Log-probabilities to 1e-4, chosen options, texts and metrics exactly.

    The model writes no single bytes: a run of them that is not UTF-8 is shown differently by sentencepiece
    and by Hugging Face's tokenizers.
    """
    from lm_eval.models.huggingface import HFLM

    changed = load_pretrained(checkpoint)
    with torch.no_grad():
        changed.lm_head.weight[4:260] = 0.0
    changed.save_pretrained(tmp_path / "export")
    (tmp_path / "export/tokenizer.model").write_bytes((checkpoint / "tokenizer.model").read_bytes())
    checkpoint = tmp_path / "export"
    export_folder(checkpoint, tmp_path / "hf")
    options = {"device": "cpu", "batch_size": 4, "dtype": "float32"}
    model = HFLM(pretrained=str(tmp_path / "hf"), trust_remote_code=True, **options)
    theirs = evaluate(model, data_root, [task], None, limit=20, gen_kwargs="max_gen_toks=12")[task]
    scorer = Scorer.from_checkpoint(checkpoint, batch_size=3)
    ours = our_samples(scorer, data_root, task, limit=20, max_new_tokens=12)
    assert len({sample["doc_id"] for sample in theirs}) == 20
    for sample in theirs:
        assert_same(ours[sample["doc_id"]], sample)


@live
@torch.inference_mode()
def test_rolling_log_probability_is_that_of_each_window(checkpoint):
    from lm_eval.api.instance import Instance

    from eval.lm_eval_adapter import ZeroModelLM

    model = ZeroModelLM(checkpoint=str(checkpoint), batch_size=2)
    model.scorer.max_length = 16
    texts = ["Where is Mary?", "Mary moved to the bathroom. " * 4, ""]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    tokenizer = Tokenizer(checkpoint / "tokenizer.model")
    for text, total in zip(texts, model.loglikelihood_rolling(requests), strict=True):
        ids = tokenizer.encode(text, bos=True)
        expected = 0.0
        for position in range(1, len(ids)):
            first = (position - 1) // 16 * 16  # windows of 16 predictions...
            if first + 16 >= len(ids):
                first = max(0, len(ids) - 1 - 16)  # ...the last one reaches back for its context
            context = torch.tensor([ids[first:position]])
            expected += (
                model.scorer.model(context).logits[0, -1].double().log_softmax(-1)[ids[position]].item()
            )
        assert total == pytest.approx(expected, abs=1e-3)


@live
def test_what_the_adapter_cannot_do_is_said(checkpoint):
    from lm_eval.api.instance import Instance

    from eval.lm_eval_adapter import ZeroModelLM

    model = ZeroModelLM(checkpoint=str(checkpoint))
    sampled = Instance("generate_until", {}, ("a", {"do_sample": True, "temperature": 1.0}), 0)
    with pytest.raises(ValueError, match="do_sample: zeromodel is greedy"):
        model.generate_until([sampled])
    with pytest.raises(ValueError, match="batch_size is auto"):
        ZeroModelLM(checkpoint=str(checkpoint), batch_size="auto")
    with pytest.raises(ValueError, match="no checkpoint folder nowhere"):
        ZeroModelLM(checkpoint="nowhere")
    with pytest.raises(ValueError, match="device is meta"):
        ZeroModelLM(checkpoint=str(checkpoint), device="meta")


def test_without_lm_eval_the_adapter_names_the_extra(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ModuleNotFoundError(\"No module named 'lm_eval'\")")
    command = [sys.executable, str(ROOT / "eval" / "lm_eval_adapter.py"), "--model", "zeromodel"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: lm-eval cannot be imported (No module named 'lm_eval'): pip install -e '.[lmeval]'\n"
    )
