"""Run by test_sizes as one rank: slices of the shipped sizes train, as pretrain/main.py trains them.

    sizes_worker.py CASES_AS_JSON

Of each case, NAME: [CONFIGS, DS_CONFIG, OVERRIDES], the run's folder has the metrics afterwards.
"""

import json
import sys

from pretrain.engine import Engine
from pretrain.process_group import init_process_group
from pretrain.setup import Run, prepare
from pretrain.stopping import StopRequests
from pretrain.trainer import Trainer


def train(configs: list[str], ds_config: str, overrides: list[str]) -> None:
    run = prepare(configs, ds_config, overrides)
    assert isinstance(run, Run)
    run.folder.mkdir(parents=True)
    engine = Engine(run.config, run.model_config, run.ds_config)
    trainer = Trainer(
        run.config,
        run.model_config,
        engine,
        run.loader,
        None,
        run.micro_batch_size,
        run.state,
        StopRequests(0),
    )
    trainer.open()
    trainer.train()
    trainer.close()
    engine.deepspeed.destroy()


def main() -> None:
    init_process_group()
    for case in json.loads(sys.argv[-1]).values():
        train(*case)


if __name__ == "__main__":
    main()
