"""What the bench of the decoders gives back: figures with their costs, and whether orderings held."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..metrics import PAIRS, Spread
from ..results import SCHEMA_VERSION, finite, printed

SEEDS = 5
"""Fewest seeds that a statement on an ordering rests on."""

SPEED = "speed over plain"
"""The one figure of speed, in tokens or bytes a second; its values are pairs of runs, whatever the seeds are."""

_LAST_DIGITS = 1e-6
"""Differences below it are rounding: float32 sums in another order differ by as much."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of one way to decode, over the seeds.

    Args:
        part: Part of the bench.
        way: Method and setting, in words or as text form.
        figure: What was measured.
        values: One for each seed.
        forwards_per_token: Forward passes of the model over new tokens, a pass counted once a row; for each new byte
            where bytes were written. None where nothing was written.
        seconds: Time of all runs behind the values.
        note: What else a reader should know, such as the share that a router really gave.
    """

    part: str
    way: str
    figure: str
    values: tuple[float, ...]
    forwards_per_token: float | None
    seconds: float
    note: str = ""

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Promise:
    """An ordering that a paper or card states: the figure of one way at least, or above, that of another.

    Args:
        name: What the check is called.
        part: Part of the bench.
        statement: What should hold, in words.
        figure: The figure that is compared.
        ahead: Way of which it should be larger (smaller, if `smaller`).
        behind: The other.
        strict: Whether equality is too little.
        smaller: Whether less is better.
        otherwise: What can make it fail, such as on a small model; nobody has looked whether it did.
        must: Whether it has to hold on every model: a bench in which it does not has failed.
    """

    name: str
    part: str
    statement: str
    figure: str
    ahead: str
    behind: str
    strict: bool = False
    smaller: bool = False
    otherwise: str = ""
    must: bool = False


@dataclass(frozen=True, kw_only=True)
class Ordered:
    """A promise, and whether it held.

    Args:
        name, statement, figure: Of the promise.
        measured: Mean over the seeds by way.
        difference: Of the one that should be ahead over the other, in favour of the promise; over the seeds.
        passed: Whether it held in the mean.
        clear: Whether both quartiles lie on the side of the verdict.
        reason: Where it does not hold: that both are equal, or in how many pairs it held, what is noted beside the
            figures, and what possibly causes it.
        must: Whether it has to hold on every model.
    """

    name: str
    statement: str
    figure: str
    measured: dict[str, float]
    difference: Spread
    passed: bool
    clear: bool
    reason: str
    must: bool = False


@dataclass(frozen=True, kw_only=True)
class DecodingBench:
    """What the bench of the decoders measured; prints itself as tables and writes itself as JSON.

    Args:
        figures: Every figure with its costs.
        checks: What is promised, and whether it held.
        skipped: What could not run here, with the reason.
        about: Model, machine, versions and settings.
        partial: Whether it was interrupted.
    """

    figures: tuple[Figure, ...]
    checks: tuple[Ordered, ...]
    skipped: dict[str, str]
    about: dict[str, Any] = field(repr=False, default_factory=dict)
    partial: bool = False

    @property
    def broken(self) -> tuple[Ordered, ...]:
        """The checks that must hold and do not."""
        return tuple(check for check in self.checks if check.must and not check.passed)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "decoding",
            "partial": self.partial,
            **self.about,
            "figures": [{**asdict(each), "mean": each.mean, "deviation": each.deviation} for each in self.figures],
            "checks": [asdict(check) for check in self.checks],
            "skipped": self.skipped,
        }

    def to_json(self) -> str:
        """Return the bench as JSON."""
        return json.dumps(finite(self.to_dict()), indent=1, ensure_ascii=False)

    def __rich__(self) -> Group:
        data = self.to_dict()
        parts: list[RenderableType] = []
        for part in dict.fromkeys(each.part for each in self.figures):
            rows = [figure_cells(each) for each in data["figures"] if each["part"] == part]
            parts.append(_table(part, FIGURE_HEADERS, rows))
        if self.checks:
            parts.append(_table("checks", CHECK_HEADERS, map(check_cells, data["checks"])))
        parts += [Text(f"skipped {way}: {reason}", style="yellow") for way, reason in self.skipped.items()]
        return Group(*parts, Text(" ".join(notes(data)), style="dim"))

    def __str__(self) -> str:
        return printed(self)


FIGURE_HEADERS = ("way", "figure", "mean ± sd", "forwards/token", "seconds", "note")
CHECK_HEADERS = ("check", "figure", "measured", "difference", "holds")


def figure_cells(each: Mapping[str, Any]) -> list[str]:
    """Return the cells of a figure as it stands in the JSON, in the order of `FIGURE_HEADERS`."""
    rate = each["forwards_per_token"]
    forwards = "–" if rate is None else f"{rate:.2f}"
    return [each["way"], each["figure"], with_deviation(each), forwards, f"{each['seconds']:.1f}", each["note"]]


def with_deviation(each: Mapping[str, Any]) -> str:
    """Return a figure as it stands in the JSON, such as `0.712 ± 0.031`."""
    return f"{each['mean']:.3f} ± {each['deviation']:.3f}"


def check_cells(check: Mapping[str, Any]) -> list[str]:
    """Return the cells of a check as it stands in the JSON, in the order of `CHECK_HEADERS`."""
    reason, found = check["reason"], check["difference"]
    holds = ("yes" if check["passed"] else "no") + ("" if check["clear"] else ", within the spread")
    holds += f": {reason}" if reason else ""
    # Files that were written before there was such a check have no such field.
    if check.get("must") and not check["passed"]:
        holds = f"FAILED, it must hold; {holds}"
    return [
        check["statement"],
        check["figure"],
        ", ".join(f"{way} {value:.3f}" for way, value in check["measured"].items()),
        f"{found['median']:+.3f} [{found['lower']:+.3f}, {found['upper']:+.3f}]",
        holds,
    ]


def seeds_of(data: Mapping[str, Any]) -> int:
    """Fewest values that a figure of a bench has, as it stands in the JSON; speeds, whose values are pairs, aside."""
    return min((len(each["values"]) for each in data["figures"] if each["figure"] != SPEED), default=0)


def notes(data: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know to read the tables of a bench as it stands in the JSON."""
    count = seeds_of(data)
    found = ["Interrupted: these are the figures that were complete."] if data["partial"] else []
    found.append(
        f"difference: in favour of the statement, median [quartiles] over the seeds ({count} or more); of what a "
        "trainer measured, a single value."
    )
    if count < SEEDS:
        found.append(f"Fewer than {SEEDS} seeds: no ordering should be claimed from this.")
    found.append(
        "seconds: all runs of a way; most ways ran one after the other, so that no speed should be claimed from them."
    )
    pairs = [len(each["values"]) for each in data["figures"] if each["figure"] == SPEED]
    if pairs:
        few = f"; fewer than {PAIRS}: no speed should be claimed from this" if min(pairs) < PAIRS else ""
        found.append(f"{SPEED}: {min(pairs)} interleaved pairs of runs on a few prompts{few}.")
    return found


def _table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


class Measured(Protocol):
    """What can be ordered: a figure of any bench, as `Figure` has it."""

    @property
    def part(self) -> str: ...
    @property
    def way(self) -> str: ...
    @property
    def figure(self) -> str: ...
    @property
    def values(self) -> tuple[float, ...]: ...
    @property
    def mean(self) -> float: ...


def ordered(figures: Sequence[Measured], promises: Sequence[Promise]) -> list[Ordered]:
    """Check the promises of which both sides were measured."""
    found = []
    for promise in promises:
        mine = [each for each in figures if (each.part, each.figure) == (promise.part, promise.figure)]
        sides = [next((each for each in mine if each.way == way), None) for way in (promise.ahead, promise.behind)]
        if sides[0] is None or sides[1] is None:
            continue
        sign = -1.0 if promise.smaller else 1.0
        gaps = [sign * (a - b) for a, b in zip(sides[0].values, sides[1].values, strict=True)]
        noted = [f"{each.way}: {note}" for each in sides if each is not None and (note := getattr(each, "note", ""))]
        found.append(
            judged(
                promise.name,
                promise.statement,
                promise.figure,
                {promise.ahead: sides[0].mean, promise.behind: sides[1].mean},
                gaps,
                gap=sign * (sides[0].mean - sides[1].mean),
                strict=promise.strict,
                must=promise.must,
                noted=noted,
                otherwise=promise.otherwise,
            )
        )
    return found


def judged(
    name: str,
    statement: str,
    figure: str,
    measured: dict[str, float],
    gaps: Sequence[float],
    *,
    gap: float | None = None,
    strict: bool = False,
    must: bool = False,
    noted: Sequence[str] = (),
    otherwise: str = "",
) -> Ordered:
    """A check of differences in favour of its statement.

    Args:
        name, statement, figure, measured, must: Of the check.
        gaps: The differences, one for each seed or pair.
        gap: Their mean, where it is known otherwise.
        strict: Whether equality is too little.
        noted: What else was measured that a reader of a check that does not hold should know.
        otherwise: What possibly makes it fail.
    """
    spread = Spread.of(gaps)
    gap = statistics.fmean(gaps) if gap is None else gap
    # The last digits of sums in another order decide nothing.
    passed = gap > _LAST_DIGITS if strict else gap >= -_LAST_DIGITS
    held = sum(each > _LAST_DIGITS if strict else each >= -_LAST_DIGITS for each in gaps)
    why = ["both are equal" if abs(gap) <= _LAST_DIGITS else f"it held in {held} of {len(gaps)}", *noted]
    if otherwise and abs(gap) > _LAST_DIGITS:
        why.append(f"possibly because {otherwise}")
    return Ordered(
        name=name,
        statement=statement,
        figure=figure,
        measured=measured,
        difference=spread,
        passed=passed,
        clear=spread.lower >= 0 if passed else spread.upper <= 0,
        reason="" if passed else "; ".join(why),
        must=must,
    )
