"""Run by test_plan under the deepspeed launcher: real training steps under DeepSpeed's communication logger.

Every rank writes a line per case into FOLDER/RANK.jsonl: what the logger recorded in one step, the experts'
loads and the bytes of ZeRO's partitions.

    plan_worker.py FOLDER CASES_AS_JSON
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.comm.comm import comms_logger

from model import ModelConfig
from model.config.execution import ExecutionConfig
from model.losses import total_loss
from pretrain.config import RunConfig
from pretrain.engine import Engine
from pretrain.process_group import init_process_group, rank, world_size
from pretrain.trainer import update_router_biases

STEPS = 3  # ZeRO-3 traces the modules in the first ones


def bytes_of(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def held(engine: Engine, stage: int) -> dict[str, int]:
    """Bytes of the partitions that this rank keeps."""
    zero = engine.deepspeed.optimizer
    moments = [s[name] for s in zero.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    if stage == 3:
        return {
            "parameters": bytes_of([p.ds_tensor for p in engine.model.parameters()]),
            "gradients": bytes_of([zero.grad_partitions_flat_buffer]),
            "optimizer": bytes_of([*zero.fp32_partitioned_groups_flat, *moments]),
        }
    return {
        "parameters": bytes_of(zero.bit16_groups_flat),
        "optimizer": bytes_of([*zero.single_partition_of_fp32_groups, *moments]),
    }


def settings(case: dict[str, Any], rows: int) -> dict[str, Any]:
    return {
        "train_batch_size": rows,
        "train_micro_batch_size_per_gpu": case["micro_batch_size"],
        "gradient_accumulation_steps": case["accumulation"],
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": case["stage"],
            "overlap_comm": True,
            "contiguous_gradients": True,
            "stage3_param_persistence_threshold": 0,
            **{f"stage3_{key}": value for key, value in case.get("zero", {}).items()},
        },
        "bf16": {"enabled": case["element_bytes"] == 2},
        **({"communication_data_type": "fp32"} if case["reduction_bytes"] == 4 else {}),
        "comms_logger": {"enabled": True, "prof_all": True, "verbose": False, "debug": False},
    }


def step(engine: Engine, case: dict[str, Any], number: int, rows: int) -> None:
    generator, length = torch.Generator().manual_seed(number * 100 + rank()), case["sequence_length"]
    for _ in range(case["accumulation"]):
        shape = (case["micro_batch_size"], length)
        tokens = torch.randint(0, engine.model.config.vocab_size, shape, generator=generator)
        output = engine.forward(tokens=tokens, targets=tokens.roll(-1, 1))
        counts = {"targets": rows * length, "rows": rows}
        engine.backward(total_loss(engine.model.config, output.loss_sums, counts))
        engine.step(1e-3)


def run(name: str, case: dict[str, Any]) -> dict[str, Any]:
    rows = case["micro_batch_size"] * case["accumulation"] * world_size()
    config = RunConfig(
        ep_size=case["ep"],
        global_batch_size=rows,
        micro_batch_size=case["micro_batch_size"],
        execution=ExecutionConfig(checkpointing=case["checkpointing"]),
    )
    engine = Engine(config, ModelConfig.from_dict(case["model"]), settings(case, rows))
    engine.train()
    for number in range(STEPS):
        comms_logger.reset_data()
        step(engine, case, number, rows)
        recorded = {
            operation: sum(size * record[0] for size, record in by_size.items())
            for operation, by_size in comms_logger.get_raw_data().items()
        }
        comms_logger.enabled = False
        loads = update_router_biases(engine)
        assert loads is not None
        comms_logger.enabled = True
    report = {"case": name, "rank": rank(), "logged": recorded, "loads": loads.tolist()}
    report["held"] = held(engine, case["stage"])
    engine.deepspeed.destroy()
    return report


def main() -> None:
    init_process_group()
    reports = [json.dumps(run(name, case)) for name, case in json.loads(sys.argv[-1]).items()]
    Path(sys.argv[-2], f"{rank()}.jsonl").write_text("\n".join(reports))


if __name__ == "__main__":
    main()
