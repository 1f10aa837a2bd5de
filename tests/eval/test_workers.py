"""Several processes give the answers of one, and a failure is one line."""

import os
import re
import shutil
import signal

import pytest
import torch

from eval.scoring.journal import Journal
from eval.scoring.scorer import Scorer

REQUESTS = [(f"Where is Mary {i}?\nAnswer:", choice) for i in range(9) for choice in (" bathroom", " hall")]
PROMPTS = [f"Where is John {i}?" * (i % 3 + 1) for i in range(9)]  # five batches, as of contexts


def evaluate(scorer: Scorer) -> tuple:
    scorer.set_depth(3)
    scores = scorer.loglikelihood(REQUESTS)
    texts = scorer.generate(PROMPTS, 12, ["Q"]) + scorer.generate(PROMPTS, 12, temperature=1.0, seed=2)
    return scores, texts, scorer.take_steps()


def test_two_processes_answer_to_the_bit_as_one_and_a_dead_one_is_named(checkpoint, tmp_path):
    expected = evaluate(Scorer.from_checkpoint(checkpoint, batch_size=2))
    scorer = Scorer.from_checkpoint(checkpoint, batch_size=2, num_processes=2)
    try:
        scorer.journal = Journal.open(tmp_path, {})
        assert evaluate(scorer) == expected
        assert scorer.take_seconds() > 0
        assert scorer.journal.path.read_bytes().count(b"\n") == 1 + 5 + 5 + 5
        scorer.journal.close(finished=True)
        scorer.journal = None
        assert next(scorer.model.parameters()).is_meta
        assert scorer.device == torch.device("cuda" if torch.cuda.is_available() else "cpu")
        assert scorer.workers is not None
        process = scorer.workers.processes[1]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with pytest.raises(ChildProcessError, match=r"process 2 of 2 ended by SIGKILL: if memory"):
            scorer.loglikelihood(REQUESTS)
    finally:
        scorer.close()
    assert not any(process.is_alive() for process in scorer.workers.processes)


def test_what_is_wrong_with_a_checkpoint_is_one_line(checkpoint, tmp_path):
    broken = tmp_path / "export"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"^{re.escape(str(weights))} is damaged"):
        Scorer.from_checkpoint(broken, num_processes=2)
    with pytest.raises(ValueError, match="num_processes is 0, at least 1 is needed"):
        Scorer.from_checkpoint(checkpoint, num_processes=0)
