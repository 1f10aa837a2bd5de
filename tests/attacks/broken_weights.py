"""Run by test_training under the deepspeed launcher: a save while one rank's weights hold NaN.

    broken_weights.py ZERO_STAGE

Every rank prints the line by which it is refused.
"""

import sys
from pathlib import Path

import torch

from model import ModelConfig
from pretrain.checkpoint import CheckpointError
from pretrain.config import RunConfig, check_layout
from pretrain.ds_config import load_ds_config
from pretrain.engine import Engine
from pretrain.process_group import init_process_group, rank, world_size

DS_CONFIGS = {"1": "zero1.json", "2": "zero2.json", "3": "zero3_ep.json"}
FOLDER = Path(__file__).parents[2] / "ds_configs"


def main() -> None:
    init_process_group()
    model = ModelConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, intermediate_size=48, use_moe=False
    )
    config = RunConfig(global_batch_size=2, micro_batch_size=1)
    micro, accumulation = check_layout(config, model, world_size())
    ds_config = load_ds_config(str(FOLDER / DS_CONFIGS[sys.argv[-1]]), config, micro, accumulation)
    engine = Engine(config, model, ds_config)
    engine.snapshot()
    weights = dict(engine.full_weights())["model.norm.weight"].clone()
    weights[-1] = torch.nan  # in the last rank's shard, or in the only one that holds the vector
    engine._set_full_parameter(dict(engine.model.named_parameters())["model.norm.weight"], weights)
    try:
        engine.snapshot()
    except CheckpointError as error:
        sys.stdout.write(f"REFUSED {error}\n")
        sys.stdout.flush()
    assert rank() < 2


if __name__ == "__main__":
    main()
