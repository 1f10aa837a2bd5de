"""Runs of planning/sizes.py as YAML, and the ones that the project ships.

    python -m pretrain.planning.size_files

writes pretrain/configs/sizes/ and the tables of docs/SCALING.md anew, as a change of the planner asks for.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.files import write_file
from model import ModelConfig
from model.counts import flops_per_token, num_parameters
from pretrain.planning.layout import Hardware
from pretrain.planning.search import LayoutPlan
from pretrain.planning.sizes import Sized, loop_of, sized, step_law

ROOT = Path(__file__).parents[2]
FOLDER, PAGE = "pretrain/configs/sizes", ROOT / "docs/SCALING.md"
SHIPPED = {"130M": 8, "1B": 8, "7B": 64, "16B": 64}  # sizes, and the GPUs that their files are laid out for
GPUS = (8, 64, 512)  # of the table
DS_CONFIGS = {1: "zero1_bf16", 2: "zero2_bf16", 3: "zero3_ep_bf16"}  # ds_configs/, by ZeRO stage
SAMPLES = {10e9: "10BT", 100e9: "100BT", 350e9: "350BT"}  # tokens of FineWeb-Edu's samples


def run_yaml(run: Sized, plan: LayoutPlan, folder: str = "") -> str:
    """The YAML of a run in its plain form, with the commands that build its data and start it."""
    layout, rows, model = plan.layout, run.rows(plan.layout.gpus), dict(run.model)
    name, data, steps = run.name, f"runs/fineweb_edu_{_vocabulary(run)}", run.steps(rows)
    return "\n".join(
        (
            *_header(run, run.config, plan),
            *_commands(run, plan, (f"{folder}{name}.yaml",), name),
            "# Keys and defaults: pretrain/config.py (the run) and model/config/model.py (the model).",
            f"output_dir: runs/{name}",
            f"max_steps: {steps}  # {run.tokens:,} tokens",
            f"global_batch_size: {rows}  # rows per step; the rule says {run.batch_tokens:,.0f} tokens",
            f"micro_batch_size: {layout.micro_batch_size}  # most rows a GPU computes at once",
            f"ep_size: {layout.ep}  # GPUs that share one set of experts",
            "save_every: 500",
            "eval_every: 500",
            "data:",
            f"  path: {data}",
            f"  sequence_length: {run.sequence_length}",
            "  packing: best_fit",
            "optimizer:",
            f"  lr: {run.learning_rate:.1e}",
            f"  min_lr: {run.learning_rate / 10:.1e}",
            f"  warmup_steps: {warmup_steps(steps)}",
            "execution:",
            f"  checkpointing: {layout.checkpointing}",
            "model:",
            *(f"  {key}: {str(value).lower()}" for key, value in model.items()),
            "",
        )
    )


def looped_yaml(run: Sized, plan: LayoutPlan, folder: str = "") -> str:
    """What the looped form changes, to be laid over the plain one."""
    layout, name = plan.layout, f"{run.name}_looped"
    configs = (f"{folder}{run.name}.yaml", f"{folder}{name}.yaml")
    loop = loop_of(run.config.num_hidden_layers)
    return "\n".join(
        (
            *_header(run, run.looped, plan),
            *_commands(run, plan, configs, name),
            f"output_dir: runs/{name}",
            f"micro_batch_size: {layout.micro_batch_size}",
            f"ep_size: {layout.ep}",
            "execution:",
            f"  checkpointing: {layout.checkpointing}",
            "model:",
            "  recurrence:",
            *(f"    {key}: {str(value).lower()}" for key, value in loop.items()),
            "",
        )
    )


def warmup_steps(steps: int) -> int:
    """DeepSeek's 2000 steps, or a fiftieth of a shorter run."""
    return min(2000, max(1, steps // 50))


def _vocabulary(run: Sized) -> str:
    return f"{run.config.vocab_size // 1024}k"


def _header(run: Sized, config: ModelConfig, plan: LayoutPlan) -> Iterator[str]:
    total, active = num_parameters(config), num_parameters(config, active=True)
    layout, rows = plan.layout, run.rows(plan.layout.gpus)
    forward = flops_per_token(config, run.sequence_length)
    if config.recurrence.placement == "none":
        yield f"# {run.size}, {_kind(config)}, latent attention: `pretrain/plan.py --size {run.size}`."
    else:
        first, last = config.recurrence.layer_ranges(config.num_hidden_layers)[0]
        yield f"# {run.size} looped, over {run.name}.yaml and with its batch and learning rate:"
        yield f"# layers {first} to {last} run twice."
    yield f"# {total:,} parameters, {active:,} active per token; {forward:.4g} forward FLOPs per token."
    hours = run.steps(rows) * plan.step_seconds / 3600
    memory = f"{plan.memory_bytes / 1e9:.0f} GB each"
    yield f"# On {layout.gpus} H100s, PREDICTED AND UNVERIFIED: {memory}, {hours:.1f} hours."
    if config.recurrence.placement == "none":
        others = num_parameters(config) - 2 * config.vocab_size * config.hidden_size
        rate, batch = step_law(others, run.tokens)
        yield f"# docs/SCALING.md has the rules. Another, Step Law, gives a learning rate of {rate:.1e} and"
        yield f"# {batch:,.0f} tokens per step."


def _kind(config: ModelConfig) -> str:
    if not config.use_moe:
        return "dense"
    shared = f"and {config.n_shared_experts} shared ones per token"
    return f"{config.n_routed_experts} experts, {config.num_experts_per_tok} {shared}"


def _commands(run: Sized, plan: LayoutPlan, configs: tuple[str, ...], name: str) -> Iterator[str]:
    gpus, stage, vocabulary = plan.layout.gpus, plan.layout.stage, run.config.vocab_size
    out = f"--out runs/fineweb_edu_{_vocabulary(run)}"
    nodes = f"--nodes {gpus // 8}" if gpus >= 8 else f"--ntasks-per-node {gpus} --gpus-per-node {gpus}"
    sample = f"hf://datasets/HuggingFaceFW/fineweb-edu/sample/{_sample(run)}/*.parquet"
    yield f"#   python data_pipeline/build.py --recipe data_pipeline/recipes/fineweb_edu.yaml {out} \\"
    yield f"#     tokenizer.vocab_size={vocabulary} 'sources.0.files=[\"{sample}\"]'"
    yield f"#   sbatch {nodes} slurm/pretrain.sbatch --ds_config ds_configs/{DS_CONFIGS[stage]}.json \\"
    for config in configs:
        yield f"#     --config {config} \\"
    yield f"#     output_dir=runs/{name}"


def _sample(run: Sized) -> str:
    """The smallest sample that holds the run's tokens; a longer run repeats the largest."""
    return next((name for tokens, name in SAMPLES.items() if run.tokens <= tokens), "350BT")


# ---- what is shipped


@functools.cache
def shipped(size: str) -> Sized:
    """The run of one of SHIPPED."""
    return sized(size)


@functools.cache
def _plan(size: str, looped: bool, gpus: int) -> LayoutPlan:
    run = shipped(size)
    return run.plan(run.looped if looped else run.config, gpus, Hardware())


def files(sizes: Iterable[str] = SHIPPED) -> Iterator[tuple[str, str]]:
    """(name, text) of the files in FOLDER."""
    for size in sizes:
        run, gpus = shipped(size), SHIPPED[size]
        yield f"{run.name}.yaml", run_yaml(run, _plan(size, False, gpus), f"{FOLDER}/")
        yield f"{run.name}_looped.yaml", looped_yaml(run, _plan(size, True, gpus), f"{FOLDER}/")


def shapes_table() -> str:
    """What the shipped sizes are, and what looping them keeps and costs."""
    lines = _table_head(
        "file", "layers x width", "experts", "parameters", "active", "forward FLOPs per token",
        "looped layers", "parameters looped", "FLOPs looped", "tokens at equal FLOPs",
    )  # fmt: skip
    for size in SHIPPED:
        run = shipped(size)
        plain, looped = run.config, run.looped
        flops = [flops_per_token(c, run.sequence_length) for c in (plain, looped)]
        first, last = looped.recurrence.layer_ranges(plain.num_hidden_layers)[0]
        more = num_parameters(looped) - num_parameters(plain)
        lines.append(
            _row(
                f"`{run.name}`",
                f"{plain.num_hidden_layers} x {plain.hidden_size}",
                f"64, top-6, 2 shared, {plain.moe_intermediate_size} wide" if plain.use_moe else "none",
                f"{num_parameters(plain):,}",
                f"{num_parameters(plain, active=True):,}",
                f"{flops[0]:.3g}",
                f"{first} to {last}",
                f"+{more:,}",
                f"x {flops[1] / flops[0]:.2f}",
                f"{flops[0] / flops[1]:.0%}",
            )
        )
    return "\n".join(lines)


def plans_table() -> str:
    """The planner's memory and time of the shipped sizes."""
    lines = _table_head(
        "size", "form", "H100s", "rows per step", "ds_configs/", "ep", "micro-batch", "checkpointing", "GB",
        "step, s", "tokens/s", "hours", "limited by",
    )  # fmt: skip
    for size in SHIPPED:
        run = shipped(size)
        for looped, gpus in itertools.product((False, True), GPUS):
            plan, rows = _plan(size, looped, gpus), run.rows(gpus)
            layout = plan.layout
            lines.append(
                _row(
                    size,
                    "looped" if looped else "plain",
                    gpus,
                    rows,
                    f"{DS_CONFIGS[layout.stage]}.json",
                    layout.ep,
                    f"{layout.micro_batch_size} x {layout.accumulation}",
                    layout.checkpointing,
                    f"{plan.memory_bytes / 1e9:.1f}",
                    f"{plan.step_seconds:.3f}",
                    f"{plan.tokens_per_second:,.0f}",
                    f"{run.steps(rows) * plan.step_seconds / 3600:,.2f}",
                    plan.limit,
                )
            )
    return "\n".join(lines)


def _table_head(*names: str) -> list[str]:
    return [_row(*names), "|" + "---|" * len(names)]


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


TABLES = {"shapes": shapes_table, "plans": plans_table}


def in_page(page: str, name: str, table: str) -> str:
    """The page with another table between `<!-- NAME -->` and `<!-- end -->`."""
    start, rest = page.split(f"<!-- {name} -->\n", 1)
    return f"{start}<!-- {name} -->\n{table}\n{rest[rest.index('<!-- end -->') :]}"


def main() -> None:
    for name, text in files():
        write_file(ROOT / FOLDER / name, text.encode())
    page = PAGE.read_text()
    for name, table in TABLES.items():
        page = in_page(page, name, table())
    write_file(PAGE, page.encode())
    print(f"written: {2 * len(SHIPPED)} files in {FOLDER}, the tables of {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
