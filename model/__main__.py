"""`python -m model` prints the presets with their true parameter and FLOP counts."""

from model.config.model import PRESETS, ModelConfig

print(f"{'preset':8}{'parameters':>16}{'active a token':>18}{'forward FLOPs a token at 1,024 tokens':>40}")
for name in PRESETS:
    config = ModelConfig.from_dict({"preset": name})
    total, active = config.num_parameters(), config.num_parameters(active=True)
    print(f"{name:8}{total:>16,}{active:>18,}{config.flops_per_token(1024):>40,.0f}")
