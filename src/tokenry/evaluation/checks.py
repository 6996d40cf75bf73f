"""Named checks of a comparison: what should hold between methods, with what was measured and its spread.

What mathematics promises is tested; orderings between methods depend on model and text, so they are measured.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .metrics import Spread
from .results import Comparison, Row


@dataclass(frozen=True, kw_only=True)
class Check:
    """A statement about methods, and whether it held.

    Args:
        name: What the check is called.
        statement: What should hold, in words.
        batch_size: Prompts that ran together.
        unit: What `measured` counts.
        measured: The figure of each method, over all tasks.
        ratio: First figure over second, median and quartiles over the prompts (or pairs, or seeds) of all tasks; None
            where the check is no ratio.
        by_task: The same figures' ratio, or count, on each task.
        passed: Whether it held over all tasks.
        clear: Whether both quartiles lie on the side of the verdict.
        reason: Where it did not hold, what possibly caused it; nobody has looked whether it did.
    """

    name: str
    statement: str
    batch_size: int
    unit: str
    measured: dict[str, float]
    ratio: Spread | None
    by_task: dict[str, float]
    passed: bool
    clear: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """One method against another by tokens per forward pass.

    Args:
        name: What the check is called.
        statement: What should hold, in words.
        method: Text form of the method that should be ahead.
        other: Text form of the method that it is compared with.
        strict: Whether equality is too little.
    """

    name: str
    statement: str
    method: str
    other: str
    strict: bool = False


def lossless_check(comparison: Comparison) -> list[Check]:
    """Whether the outputs of all methods that promise it equal plain's; none where nothing promises it."""
    rows = [row for row in comparison.rows if row.lossless is not None]
    if not rows:
        return []
    broken = _by(rows, lambda row: row.label)
    measured = {label: float(sum(row.broken for row in group)) for label, group in broken.items()}
    tasks = _by(rows, lambda row: row.workload)
    return [
        Check(
            name="lossless",
            statement="outputs equal plain's but for near ties of half precision",
            batch_size=_batch_size(comparison),
            unit="outputs that differ otherwise",
            measured=measured,
            ratio=None,
            by_task={name: float(sum(row.broken for row in group)) for name, group in tasks.items()},
            passed=not any(measured.values()),
            clear=True,
        )
    ]


def not_slower_checks(comparison: Comparison, labels: Iterable[str]) -> list[Check]:
    """For each method whether it is not slower than plain on any task: its upper quartile reaches 1 on each."""
    found = []
    for label in labels:
        rows = [row for row in comparison.rows if row.label == label]
        if not rows:
            continue
        ratio = Spread.of(pair for row in rows for pair in row.pairs)
        passed = all(row.speed.upper >= 1 for row in rows)
        found.append(
            Check(
                name=f"not-slower:{label}",
                statement=f"{label} is not slower than plain on any task",
                batch_size=_batch_size(comparison),
                unit="speed",
                measured={label: ratio.median},
                ratio=ratio,
                by_task={row.workload: row.speed.median for row in rows},
                passed=passed,
                clear=all(row.speed.lower >= 1 for row in rows) if passed else True,
            )
        )
    return found


def ordering_checks(comparison: Comparison, orderings: Iterable[Ordering]) -> list[Check]:
    """The orderings whose two methods were both measured.

    Over all tasks the ratio is that of tokens over passes of all prompts; its spread is over prompts (batches of them).
    """
    found = []
    for ordering in orderings:
        mine, its = (
            {row.workload: row for row in comparison.rows if row.method == text}
            for text in (ordering.method, ordering.other)
        )
        tasks = [name for name in mine if name in its]
        if not tasks:
            continue
        ours, theirs = _per_pass(mine[name] for name in tasks), _per_pass(its[name] for name in tasks)
        ratio = Spread.of(
            one / other
            for name in tasks
            for one, other in zip(mine[name].tokens_per_pass_by_batch, its[name].tokens_per_pass_by_batch, strict=True)
        )
        passed = ours > theirs if ordering.strict else ours >= theirs
        found.append(
            Check(
                name=ordering.name,
                statement=ordering.statement,
                batch_size=_batch_size(comparison),
                unit="tokens per pass",
                measured={ordering.method: ours, ordering.other: theirs},
                ratio=ratio,
                by_task={name: mine[name].tokens_per_pass / its[name].tokens_per_pass for name in tasks},
                passed=passed,
                clear=ratio.lower >= 1 if passed else ratio.upper <= 1,
            )
        )
    return found


def _per_pass(rows: Iterable[Row]) -> float:
    found = list(rows)
    return sum(row.tokens for row in found) / sum(row.passes for row in found)


def _batch_size(comparison: Comparison) -> int:
    return comparison.about["settings"]["batch_size"]


def _by(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found
