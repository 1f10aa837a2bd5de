"""The tables that eval/reasoning.py prints."""

from collections.abc import Sequence
from typing import Any

from eval.scoring.core import Score, mean_score
from eval.scoring.results import TaskResult, format_table


def report_text(results: Sequence[TaskResult]) -> str:
    """The tables of accuracies, loops and steps, then one line each of the first result's other facts."""
    facts = results[0].facts
    parts = [accuracy_table(results), cost_table(facts)]
    if facts["placement"] != "none":
        parts.append(loop_table(facts["by_steps"]))
        parts.append(step_table(facts["by_steps"].get(facts["trained_steps"])))
    return "\n\n".join([*parts, "\n".join(remarks(facts))])


def accuracy_table(results: Sequence[TaskResult]) -> str:
    """Rows: a group of samples and a metric; columns: test-time depths, then what guessing reaches."""
    keys = [key.split(",")[1] for key in results[0].values]
    rows = []
    for result in results:
        guesses = ", ".join(f"{name} {_score(score)}" for name, score in result.baselines.items())
        scores = [_score(mean_score(result.values[f"acc,{key}"])) for key in keys]
        rows.append((result.task, str(result.num_samples), "acc", *scores, guesses))
        losses = [f"{result.totals[f'cross_entropy,{key}']:.4f}" for key in keys]
        rows.append((result.task, str(result.num_samples), "cross_entropy", *losses, ""))
    return format_table(("task", "n", "metric", *keys, "to beat"), rows)


def cost_table(facts: dict[str, Any]) -> str:
    """One row per depth."""
    rows = [
        (str(n), f"{row['unrolled_parameters']:,}", f"{row['flops_per_token']:.3g}")
        for n, row in facts["by_steps"].items()
    ]
    return format_table(("steps", "unrolled parameters", "FLOPs per token"), rows)


def loop_table(by_steps: dict[int, dict[str, Any]]) -> str:
    """One row per depth."""
    rows = [
        (
            str(n),
            f"{row['steps_mean']:.2f}",
            f"{row['answer_steps_mean']:.2f}",
            f"{row['ponder_cost']:.2f}",
            f"{row['convergence_ratio']:.3g}",
            "n/a" if row["problem_depth_correlation"] is None else f"{row['problem_depth_correlation']:.3f}",
        )
        for n, row in by_steps.items()
    ]
    return format_table(
        ("steps", "mean run", "at answer", "ponder cost", "convergence", "Spearman(run, problem depth)"), rows
    )


def step_table(row: dict[str, Any] | None) -> str:
    """One row per step, at the trained depth; `row` None: it was not tested."""
    if row is None:
        return "The trained depth is not among --num_steps: no figures by step."
    columns = zip(row["steps_histogram"], row["halting_distribution"], row["residuals"], strict=True)
    rows = [
        (str(n), f"{stopped:.3f}", f"{probability:.3f}", f"{residual:.3g}")
        for n, (stopped, probability, residual) in enumerate(columns, start=1)
    ]
    return format_table(("step", "tokens stopped", "mean p_n", "relative change"), rows)


def remarks(facts: dict[str, Any]) -> list[str]:
    """What is measured once."""
    lines = [
        f"{facts['parameters']:,} parameters, placement {facts['placement']},"
        f" trained depth {facts['trained_steps']}"
    ]
    if facts["halting"] is not None:
        lines[0] += f", halting {facts['halting']}"
    gap = facts["overthinking_gap"]
    if gap is not None:
        lines.append(
            f"overthinking gap: {_score(Score(gap['value'], gap['stderr']))}, of {gap['best_steps']} steps"
            f" (the best) over {gap['last_steps']}"
        )
    ends = facts["path_independence"]
    if ends is not None:
        agreement, distance = (_score(Score(**ends[key])) for key in ("agreement", "distance"))
        lines.append(
            f"path independence: three starts agree at {agreement} of the labels,"
            f" relative distance {distance}"
        )
    for name, seconds in (facts["time"] or {}).items():
        what = {"batch": f"a batch of {seconds['batch_size']}", "decode": "a row, token by token"}[name]
        lines.append(
            f"time of {what}: {seconds['seconds_halting']:.4f} s with halting,"
            f" {seconds['seconds_fixed']:.4f} s at fixed depth: {seconds['time_saved']:.1%} saved"
            f" (medians of {seconds['rounds']})"
        )
    return lines


def _score(score: Score) -> str:
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")
