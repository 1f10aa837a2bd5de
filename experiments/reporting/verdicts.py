"""The claims in words and tables: verdict, effect, interval, budget, and the commands of the runs."""

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


# Filled with {tests}, {alpha}, the {first} level and {reach}.
READING = """\
- {tests} comparisons are tested together at {alpha:g} (Holm). The effect of a comparison is a mean over
  seeds, of paired differences where two groups are compared; the confidence of its interval is 1 minus the
  level from Holm's procedure.
- At each end, such an interval is the wider of two: Student's over the seeds, and the percentile bootstrap
  over the seeds and, where the outcomes of the test samples are stored, over the samples.
- A bootstrap of 3 seeds cannot reach beyond their minimum and maximum, so it alone decides nothing; Student's
  assumes normal differences between seeds, which 3 to 5 of them cannot show. At the first of Holm's levels,
  {first:.2g}, its half-width in standard deviations over the seeds is {reach}. Smaller effects stay
  undecided.
- Where all seeds give the same value, the interval is as narrow as the samples allow: that is what these
  seeds and samples say, and no more.
- The other tables give means with 95 % bootstrap intervals over the seeds, not corrected; for 3 seeds these
  are the minimum and the maximum."""


def statistics_section(units: Sequence[Unit]) -> Section:
    """What the intervals are, and what they can decide."""
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
        blocks.append(f"Not run, or only one of the groups: {', '.join(not_run)}.")
    commands = tuple(dict.fromkeys(command for unit in own for command in unit.commands))
    if commands:
        blocks.append(Code("\n".join(commands), "bash"))
    return Section(f"{claim.title} (`{claim.id}`)", blocks)


def _rule_text(claim: Claim) -> str:
    """The rule of CLAIMS.md in one line."""
    rule, least, most = claim.rule, claim.rule.threshold[0], claim.rule.threshold[-1]
    if claim.b is None:
        return f"Test: `{claim.metric}` of {claim.a} is between {least:g} and {most:g}."
    within = f"within {claim.tolerance:.0%}" if claim.tolerance else "exactly"
    equal = f" Equal: {claim.equal}, {within}." if claim.equal else ""
    direction = {"higher": "higher", "not_lower": "not lower"}[rule.direction]
    return (
        f"Test: `{claim.metric}` is {direction} for {claim.a} than for {claim.b}; threshold {least:g}, "
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
