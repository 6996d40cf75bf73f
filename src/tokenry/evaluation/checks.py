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


def not_slower_checks(comparison: Comparison, labels: Iterable[str], than: str | None = None) -> list[Check]:
    """For each method whether it is not slower than another on any task: the upper quartile of the ratio of both speeds
    in the same pairs reaches 1 on each.

    Args:
        comparison: What was measured.
        labels: The methods.
        than: Label of the other; None: transformers' plain generate, which all speeds are ratios to.
    """
    found, reference = [], "transformers' generate"
    others = {row.workload: row for row in comparison.rows if row.label == than}
    for label in labels:
        rows = [row for row in comparison.rows if row.label == label and (than is None or row.workload in others)]
        if not rows or label == than:
            continue
        ratios = {row.workload: row.pairs for row in rows}
        if than is not None:
            ratios = {
                task: tuple(mine / its for mine, its in zip(pairs, others[task].pairs, strict=True))
                for task, pairs in ratios.items()
            }
        spreads = {task: Spread.of(pairs) for task, pairs in ratios.items()}
        measured = {label: Spread.of(pair for row in rows for pair in row.pairs).median}
        if than is not None:
            measured[than] = Spread.of(pair for task in ratios for pair in others[task].pairs).median
        passed = all(spread.upper >= 1 for spread in spreads.values())
        found.append(
            Check(
                name=f"not-slower:{label}" + ("" if than is None else f":{than}"),
                statement=f"{label} is not slower than {than or reference} on any task",
                batch_size=_batch_size(comparison),
                unit="speed",
                measured=measured,
                ratio=Spread.of(pair for pairs in ratios.values() for pair in pairs),
                by_task={task: spread.median for task, spread in spreads.items()},
                passed=passed,
                clear=all(spread.lower >= 1 for spread in spreads.values()) if passed else True,
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
