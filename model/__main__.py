"""`python -m model` prints the presets with their true parameter and FLOP counts."""

from model.config.model import PRESETS, ModelConfig
from model.counts import flops_per_token, num_parameters

flops_title = "forward FLOPs per token at 1,024 tokens"
print(f"{'preset':8}{'parameters':>16}{'active per token':>18}{flops_title:>40}")
for name in PRESETS:
    config = ModelConfig.from_dict({"preset": name})
    total, active = num_parameters(config), num_parameters(config, active=True)
    print(f"{name:8}{total:>16,}{active:>18,}{flops_per_token(config, 1024):>40,.0f}")
