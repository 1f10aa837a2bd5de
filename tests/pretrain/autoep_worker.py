"""Run by test_equality under the deepspeed launcher: this project's engine, and DeepSpeed's own AutoEP.

The second shares no code with the first: transformers' DeepseekV3, whose MoE layers DeepSpeed replaces with
its own if the JSON says so, starts from the same weights and trains on the same batches.
"""

import copy
import json
import sys

import deepspeed
import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from model import ModelConfig, ZeroModel
from model.hf.deepseek import hf_config, to_hf
from model.losses import total_loss
from pretrain.config import RunConfig, check_layout
from pretrain.ds_config import load_ds_config
from pretrain.engine import Engine
from pretrain.process_group import all_reduce_sum, init_process_group, rank, world_size
from pretrain.trainer import update_router_biases

CLIP, LR, ROWS, STEPS, T = 0.3, 1e-3, 8, 6, 21
AUTO_EP = {
    "enabled": True,
    "autoep_size": 2,
    "moe_layer_pattern": r"model\.layers\.\d+\.mlp",
    "router_pattern": "gate",
    "expert_pattern": "experts",
    "expert_w1": "gate_up_proj",
    "expert_w2": "down_proj",
    "expert_w3": None,
    "top_k": 2,
    "score_func": "sigmoid",
    "score_apply": "post",
    "route_norm": True,
    "has_shared_experts": True,
    "shared_experts_pattern": "shared_experts",
    "use_grouped_mm": False,
}
MODEL = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=3,
    intermediate_size=64,
    moe_intermediate_size=24,
    n_routed_experts=4,
    num_experts_per_tok=2,
    balance_loss_weight=0.0,
    router_bias_update_rate=0.0,  # AutoEP has no such update
    routed_scaling_factor=1.0,
    initializer_range=0.1,
)


def batch(step: int) -> Tensor:
    return torch.randint(0, 97, (ROWS, T), generator=torch.Generator().manual_seed(step))


def biases() -> list[Tensor]:
    """A balancing bias per MoE layer, large enough to change which experts are chosen."""
    count = sum(MODEL.is_moe_layer(layer) for layer in range(MODEL.num_hidden_layers))
    return list(0.1 * torch.randn(count, MODEL.n_routed_experts, generator=torch.Generator().manual_seed(7)))


def set_biases(model: ZeroModel) -> None:
    for layer, bias in zip(model.moe_layers(), biases(), strict=True):
        layer.gate.e_score_correction_bias.copy_(bias)


def mine(tokens: Tensor) -> Tensor:
    return tokens[rank() * ROWS // world_size() : (rank() + 1) * ROWS // world_size()]


def ours(run: RunConfig, ds_config: dict) -> list[tuple[float, float]]:
    engine = Engine(run, MODEL, copy.deepcopy(ds_config))
    set_biases(engine.model)
    engine.train()
    history = []
    for step in range(STEPS):
        tokens = mine(batch(step))
        output = engine.forward(tokens=tokens[:, :-1], targets=tokens[:, 1:])
        loss = total_loss(MODEL, output.loss_sums, {"targets": ROWS * (T - 1), "rows": ROWS})
        engine.backward(loss)
        engine.step(LR)
        update_router_biases(engine)
        history.append((all_reduce_sum(loss.detach().double()).item(), engine.grad_norm().item()))
    engine.deepspeed.destroy()
    return history


def auto_ep(run: RunConfig, ds_config: dict) -> list[tuple[float, float]]:
    plain = ZeroModel(MODEL, seed=run.seed)
    set_biases(plain)
    weights = {name: value.detach().clone() for name, value in to_hf(MODEL, plain.state_dict()).items()}
    # transformers treats padding_idx's token as ordinary but without a gradient: set none.
    hf = DeepseekV3Config(**hf_config(MODEL) | {"pad_token_id": None})
    model = DeepseekV3ForCausalLM.from_pretrained(None, config=hf, state_dict=weights)
    adam = run.optimizer
    ds_config = ds_config | {
        "expert_parallel": AUTO_EP,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": LR,
                "betas": (adam.beta1, adam.beta2),
                "eps": adam.eps,
                "weight_decay": 0.0,
                "torch_adam": True,
            },
        },
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)
    engine.train()
    history = []
    for step in range(STEPS):
        tokens = mine(batch(step))
        loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        mean = all_reduce_sum(loss.detach().double()).item() / world_size()
        history.append((mean, float(engine.get_global_grad_norm())))
    return history


def main() -> None:
    init_process_group()
    run = RunConfig(ep_size=2, global_batch_size=ROWS, micro_batch_size=ROWS // world_size())
    run.optimizer.clip, run.optimizer.weight_decay = CLIP, 0.0
    ds_config = load_ds_config(sys.argv[-1], run, *check_layout(run, MODEL, world_size()))
    histories = {"ours": ours(run, ds_config), "AutoEP": auto_ep(run, ds_config)}
    if rank() == 0:
        print("REPORT " + json.dumps(histories), flush=True)


if __name__ == "__main__":
    main()
