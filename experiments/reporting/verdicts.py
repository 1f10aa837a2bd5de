"""The claims in words and tables: verdict, effect, interval, budget, and what runs it again."""

import math
from collections.abc import Sequence

from common.pages import Block, Code, Section, Table
from experiments.reporting.claims import Claim, Unit, claim_verdict
from experiments.reporting.records import Record, Setting, settings_of
from experiments.reporting.statistics import ALPHA, Verdict, student_quantile
from experiments.reporting.tables import COSTS, NOTHING, cost_cells, interval_text, number


def effect_text(unit: Unit) -> str:
    """`+0.431 [0.321, 0.541]`; a level has no sign."""
    if unit.found is None or unit.interval is None:
        return NOTHING
    sign = "+" if unit.claim.b and unit.found.mean >= 0 else ""
    return f"{sign}{number(unit.found.mean)} {interval_text(unit.interval)}"


# With {tests}, {alpha}, {first} level and {reach}.
READING = """\
- {tests} comparisons are tested together at {alpha:g} (Holm). The effect of a comparison is a mean over
  seeds, of paired differences where two groups are compared, and its interval is of 1 less the level that
  Holm's procedure gave it.
- Such an interval is the wider one, at each end, of Student's over the seeds and of the percentile bootstrap
  over the seeds and, where the outcomes of the test samples are stored, over the samples.
- A bootstrap of 3 seeds cannot reach beyond the least and the greatest, so that it alone decides nothing;
  Student's takes the differences between seeds to be normal, which 3 to 5 of them cannot show. At the first
  of Holm's levels, {first:.2g}, its interval reaches to each side, in standard deviations over the seeds:
  {reach}. Smaller effects stay undecided.
- Where all seeds give one and the same value, the interval is as narrow as the samples allow: that is what
  these seeds and samples say, and no more.
- In the other tables a mean stands with its bootstrap interval of 95 % over the seeds, not corrected; of 3
  seeds it is the least and the greatest."""


def statistics_section(units: Sequence[Unit]) -> Section:
    """What the intervals are, and how little they can decide."""
    tested = [unit for unit in units if unit.found is not None]
    if not tested:
        return Section("How to read the intervals", ["Nothing was tested: no claim has enough cells."])
    first = ALPHA / len(tested)
    sizes = sorted({len(unit.seeds) for unit in tested})
    reach = ", ".join(
        f"{student_quantile(1 - first, n - 1) / math.sqrt(n):.1f} with {n} seeds" for n in sizes
    )
    said = READING.format(tests=len(tested), alpha=ALPHA, first=first, reach=reach)
    return Section("How to read the intervals", [said])


def claims_section(claims: Sequence[Claim], units: Sequence[Unit], records: Sequence[Record]) -> Section:
    settings = settings_of(records)
    rows = [(claim.title, f"**{claim_verdict(claim, units)}**", _summary(claim, units)) for claim in claims]
    parts = [_claim_section(claim, units, settings) for claim in claims]
    return Section("Claims", [Table(("claim", "verdict", "effect and interval, by task"), rows)], parts)


def _own(claim: Claim, units: Sequence[Unit]) -> list[Unit]:
    return [unit for unit in units if unit.claim.id == claim.id]


def _summary(claim: Claim, units: Sequence[Unit]) -> str:
    own = _own(claim, units)
    found = [f"{unit.setting.task} {effect_text(unit)} ({unit.verdict})" for unit in own]
    return "; ".join([*found, *(f"{task}: not run" for task in _not_run(claim, own))])


def _not_run(claim: Claim, own: Sequence[Unit]) -> list[str]:
    return [task for task in claim.tasks if task not in {unit.setting.task for unit in own}]


def _claim_section(
    claim: Claim, units: Sequence[Unit], settings: dict[Setting, dict[str, list[Record]]]
) -> Section:
    own = _own(claim, units)
    verdict: Verdict = claim_verdict(claim, units)
    blocks: list[Block] = [f"**{verdict.capitalize()}.** {claim.text}".rstrip(), _rule_text(claim)]
    if own:
        blocks += [_units_table(claim, own), _sides_table(claim, own, settings)]
    not_run = _not_run(claim, own)
    if not_run:
        blocks.append(f"Not run, or not both groups: {', '.join(not_run)}.")
    commands = tuple(dict.fromkeys(command for unit in own for command in unit.commands))
    if commands:
        blocks.append(Code("\n".join(commands), "bash"))
    return Section(f"{claim.title} (`{claim.id}`)", blocks)


def _rule_text(claim: Claim) -> str:
    """What CLAIMS.md asks, in a line."""
    rule, what = claim.rule, f"`{claim.metric}` of {claim.a}"
    if claim.b is None:
        return f"Asked: {what} within {rule.threshold[0]:g} and {rule.threshold[-1]:g}."
    within = f"within {claim.tolerance:.0%}" if claim.tolerance else "exactly"
    equal = f" Equal: {claim.equal}, {within}." if claim.equal else ""
    direction = {"higher": "higher than", "not_lower": "not lower than"}[rule.direction]
    return (
        f"Asked: {what} {direction} that of {claim.b}; threshold {rule.threshold[0]:g}, "
        f"minimum effect {rule.minimum_effect:g}.{equal}"
    )


def _units_table(claim: Claim, own: Sequence[Unit]) -> Table:
    sides = [str(side) for side in claim.sides]
    header = (
        *("task, size, budget", "verdict", *sides, "effect and interval", "level", "corrected p"),
        *("seeds", "bootstrap over", "remark"),
    )
    rows = []
    for unit in own:
        means = tuple(map(number, unit.sides)) or (NOTHING,) * len(sides)
        tested = unit.found is not None
        rows.append(
            (
                *(str(unit.setting), unit.verdict, *means, effect_text(unit)),
                f"{1 - unit.level:.2%}" if tested else NOTHING,
                f"{unit.adjusted:.4f}" if tested else NOTHING,
                str(len(unit.seeds)),
                _resampled(unit),
                unit.remark,
            )
        )
    return Table(header, rows)


def _resampled(unit: Unit) -> str:
    if unit.found is None:
        return NOTHING
    return "seeds and samples" if unit.found.over_samples else "seeds"


def _sides_table(
    claim: Claim, own: Sequence[Unit], settings: dict[Setting, dict[str, list[Record]]]
) -> Table:
    """What the compared groups cost."""
    groups = dict.fromkeys(side.group for side in claim.sides)
    rows = [
        (str(unit.setting), group, *cost_cells(settings[unit.setting][group]))
        for unit in own
        for group in groups
    ]
    return Table(("task, size, budget", "group", *COSTS), rows)
