"""R-KV's switches on the command lines of generated answers."""

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.scoring.kv_flags import KVFlags, limit_mark
from model import load_pretrained
from model.latent_cot.rkv import CacheLimit

from .test_scripts import assert_error_line, results_of, samples_of

FLAGS = ("--kv_buffer", 2, "--kv_lambda", 0.5, "--kv_window", 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gsm8k")
    lines = [json.dumps({"question": f"{i} + {i}?", "answer": f"So.\n#### {2 * i}"}) for i in range(12)]
    for name in ("train", "test"):
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    return root / "test.jsonl"


@pytest.mark.parametrize("task", ["gsm8k", "gsm8k_cot"])
def test_a_budget_cuts_the_cache_and_results_tell_the_cost(checkpoint, data, tmp_path, run_script, task):
    new = 30
    run_script(
        f"{task}.py", "--checkpoint", checkpoint, "--data", data, "--limit", 6, "--num_fewshot", 0,
        "--max_new_tokens", new, "--output_path", tmp_path, "--log_samples", "--kv_budget", "all,9", *FLAGS,
    )  # fmt: skip
    mark = "@kv_budget=9,kv_buffer=2,kv_lambda=0.5,kv_window=4"
    report = results_of(tmp_path)
    assert list(report["results"]) == [task, task + mark]
    settings = [
        tuple(report["configs"][name][f"kv_{key}"] for key in ("budget", "buffer", "lambda", "window"))
        for name in report["results"]
    ]
    assert settings == [(None,) * 4, (9, 2, 0.5, 4)]
    model, tokenizer = load_pretrained(checkpoint), Tokenizer(checkpoint / "tokenizer.model")
    for name, limit in ((task, None), (task + mark, 9 + 2)):
        lines, found = samples_of(tmp_path, name), report["results"][name]
        for cost in ("generated_tokens", "peak_cache_bytes"):
            assert found[f"{cost},none"] == pytest.approx(sum(line[cost] for line in lines) / 6)
            assert f"{cost}_stderr,none" in found
        tokens = [
            len(tokenizer.encode(line["prompt"], bos=True)) + min(line["generated_tokens"] - 1, limit or new)
            for line in lines
        ]
        assert len({line["peak_cache_bytes"] / count for line, count in zip(lines, tokens, strict=True)}) == 1
    line = samples_of(tmp_path, task + mark)[0]
    prompt = torch.tensor([tokenizer.encode(line["prompt"], bos=True)])
    options = {"kv_budget": 9, "kv_buffer": 2, "kv_lambda": 0.5, "kv_window": 4}
    alone = model.generate(prompt, line["generated_tokens"], **options)[0, prompt.shape[1] :]
    assert tokenizer.decode(alone.tolist()).startswith(line["resps"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv_lambda", "0.5"], "--kv_lambda 0.5 belongs to --kv_budget"),
        (["--kv_budget", "all", "--kv_window", "4"], "--kv_window 4 belongs to --kv_budget"),
        (["--kv_budget", "9,8"], "kv_budget=8 and kv_buffer=128: the budget must be at least 9"),
        (["--kv_budget", "9", "--kv_lambda", "-0.5"], "kv_lambda=-0.5 must lie in 0 <= kv_lambda <= 1"),
        (["--kv_budget", "9", "--kv_lambda", "nan"], "is nan, a finite number is needed"),
        (["--kv_budget", "9,9"], "is 9,9, different numbers from 1 or all are needed"),
        (["--kv_budget", "none"], "--kv_budget: is none, different numbers from 1 or all are needed"),
        (["--kv_budget", "9", "--kv_window", "0"], "is 0, at least 1 is needed"),
    ],
)
def test_mistakes_are_one_line(checkpoint, data, run_script, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run_script("gsm8k.py", "--checkpoint", checkpoint, "--data", data, "--limit", 2, *arguments)
    assert_error_line(stop.value, capsys, message)


def test_a_budget_for_each_result():
    flags = KVFlags([None, 64, 32], kv_lambda=1.0)
    assert flags.limits() == [None, CacheLimit(64, lambda_=1.0), CacheLimit(32, lambda_=1.0)]
    assert list(map(limit_mark, flags.limits())) == [
        "",
        "@kv_budget=64,kv_lambda=1.0",
        "@kv_budget=32,kv_lambda=1.0",
    ]
    assert KVFlags().limits() == [None]
