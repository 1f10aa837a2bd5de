"""Run by test_start_memory under the launcher: peak resident memory of a start and of the first steps.

    memory_worker.py FOLDER CASE_AS_JSON

Every rank writes FOLDER/RANK.json: peaks in bytes, without what the process holds after a tiny model's step.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from model import ModelConfig
from model.config.execution import ExecutionConfig
from model.losses import total_loss
from pretrain.config import RunConfig
from pretrain.engine import Engine
from pretrain.process_group import init_process_group, rank, world_size

CLEAR = Path("/proc/self/clear_refs")
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def resident(field: str) -> int:
    """VmRSS, or its peak VmHWM since forget_peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    CLEAR.write_text("5")


def step(engine: Engine, case: dict[str, Any], number: int) -> None:
    generator, rows = torch.Generator().manual_seed(number * 100 + rank()), case["rows"]
    shape = rows, case["sequence_length"]
    tokens = torch.randint(0, engine.model.config.vocab_size, shape, generator=generator)
    output = engine.forward(tokens=tokens, targets=tokens.roll(-1, 1))
    assert output.loss_sums is not None
    counts = {"targets": world_size() * tokens.numel(), "rows": world_size() * rows}
    engine.backward(total_loss(engine.model.config, output.loss_sums, counts))
    del output
    engine.step(1e-4)


def built(case: dict[str, Any], **sizes: int) -> Engine:
    """The case's engine, perhaps of other sizes."""
    config = RunConfig(
        ep_size=case["ep"],
        global_batch_size=case["rows"] * world_size(),
        micro_batch_size=case["rows"],
        execution=ExecutionConfig(),
    )
    ds_config = {
        "train_batch_size": case["rows"] * world_size(),
        "train_micro_batch_size_per_gpu": case["rows"],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        **case["ds_config"],
    }
    engine = Engine(config, ModelConfig.from_dict({**case["model"], **sizes}), ds_config)
    engine.train()
    return engine


def main() -> None:
    folder, case = Path(sys.argv[-2]), json.loads(sys.argv[-1])
    if case["freed"]:  # glibc would keep freed blocks of up to 32 MiB, so that more is resident than in use
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**18)
    init_process_group()
    tiny = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    engine = built(case, **tiny)  # what it leaves behind is the interpreter's own
    step(engine, case, 0)
    engine.deepspeed.destroy()
    del engine
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    engine = built(case)
    report = {"start": resident("VmHWM") - before, "started": resident("VmRSS") - before}
    for number in range(case["steps"]):
        forget_peak()
        step(engine, case, number)
        report[f"step {number + 1}"] = resident("VmHWM") - before
    (folder / f"{rank()}.json").write_text(json.dumps({**report, "before": before}))
    engine.close()


if __name__ == "__main__":
    main()
