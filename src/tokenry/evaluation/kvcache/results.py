"""What the bench of the cache policies gives back: figures by method and budget, and what should hold between them."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..decoding import SEEDS, Ordered
from ..metrics import PAIRS, Spread
from ..results import SCHEMA_VERSION, finite, printed

FORMS = ("score", "bits", "milliseconds", "ratio", "bytes", "share", "operations")
"""How the values of a figure are written."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of one method at one budget.

    Args:
        part: Part of the bench.
        group: What stands in one table, such as ``"question-aware"``.
        way: The method, its text form without the budget; of kvpress ``kvpress:`` and the press.
        budget: What it keeps, as a share (``"25%"``) or a count; empty where it is of no budget, or of all.
        column: What was measured: a task, a length.
        form: One of `FORMS`.
        values: One for each seed, or for each interleaved pair.
    """

    part: str
    group: str
    way: str
    budget: str
    column: str
    form: str
    values: tuple[float, ...]

    @property
    def figure(self) -> str:
        """What is compared where methods are ordered."""
        return ", ".join(filter(None, (self.column, self.group, self.budget)))

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> Spread:
        """Median and quartiles of the values."""
        return Spread.of(self.values)


def written(figure: Mapping[str, Any]) -> str:
    """The values of a figure as a table shows them: mean ± standard deviation over seeds, median [quartiles] of times.

    Args:
        figure: As it stands in the JSON.
    """
    values = figure["values"]
    form, mean = figure["form"], statistics.fmean(values)
    if form in ("milliseconds", "ratio"):
        spread = Spread.of(values)
        unit, digits = ("×", 2) if form == "ratio" else ("", 1 if spread.median < 1000 else 0)
        shown = f"{spread.median:,.{digits}f}{unit}"
        return shown if len(values) == 1 else f"{shown} [{spread.lower:,.{digits}f}–{spread.upper:,.{digits}f}]"
    if form == "bytes":
        return f"{max(values) / 2**20:.2f} MiB"
    if form == "share":
        return f"{mean:.0%}"
    if form == "operations":
        return f"{mean / 1e9:,.1f} G"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    digits = 3 if form == "bits" else 2
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


_TITLES = {
    "quality": "score, {}",
    "bits": "bits per byte, read token by token, {}",
    "time": "{}",
    "prefill": "{}",
}


def pivots(figures: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Tables of figures as they stand in the JSON: title, headers, and rows, one for each method and budget."""
    for part, group in dict.fromkeys((each["part"], each["group"]) for each in figures):
        mine = [each for each in figures if (each["part"], each["group"]) == (part, group)]
        columns = list(dict.fromkeys(each["column"] for each in mine))
        rows: dict[tuple[str, str], dict[str, str]] = {}
        for each in mine:
            rows.setdefault((each["way"], each["budget"]), {})[each["column"]] = written(each)
        cells = [
            [way, budget or "–", *(found.get(column, "–") for column in columns)]
            for (way, budget), found in rows.items()
        ]
        yield f"{part}: {_TITLES[part].format(group)}", ["method", "kept", *columns], cells


def notes(data: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables must know, a paragraph for each part that was measured.

    Args:
        data: The bench as it stands in the JSON.
    """
    parts = {each["part"] for each in data["figures"]}
    found = []
    if "quality" in parts:
        found.append(
            "quality: mean ± standard deviation over the seeds. kept: share of the prompt's slots that a layer and "
            "head hold when the answer begins, the question among them; nothing is dropped behind the context, as in "
            "kvpress. Policies that retrieve (fasa, icecache, sentencekv, oracle) hold "
            "everything and attend to that share. question-agnostic: the context is compressed before the question is "
            "seen; question-aware: behind it."
        )
    if "bits" in parts:
        found.append("bits: mean ± standard deviation over the texts; kept: slots of each layer and head.")
    if "time" in parts:
        found.append(
            "time: median [quartiles] over interleaved rounds, on random weights of the model's shape; kept: slots. "
            "Reading was timed once each: nothing should be claimed from it. Bytes are counted from the tensors held."
        )
    if "prefill" in parts:
        found.append(
            "prefill: time as median [quartiles] over interleaved pairs; operations of all products as they ran, those "
            "of statistics and of a second model included; random weights."
        )
    seeds = data["settings"]["seeds"]
    if seeds < SEEDS and {"quality", "bits"} & parts:
        found.append(f"Fewer than {SEEDS} seeds: no ordering should be claimed from this.")
    rounds = data["settings"]["repeats"]
    if rounds < PAIRS and {"time", "prefill"} & parts:
        found.append(f"Fewer than {PAIRS} rounds: no speed should be claimed from this.")
    return found


CHECK_HEADERS = ("check", "figure", "measured", "difference", "holds")


def check_cells(check: Mapping[str, Any]) -> list[str]:
    """A check as it stands in the JSON, as a row of a table."""
    holds = "yes" if check["passed"] else f"no: {check['reason']}" if check["reason"] else "no"
    found = check["difference"]
    numbers = ", ".join(f"{way} {value:,.4g}" for way, value in check["measured"].items())
    spread = f"{found['median']:+.3g} [{found['lower']:+.3g}, {found['upper']:+.3g}]"
    return [
        check["statement"],
        check["figure"],
        numbers,
        spread,
        holds + ("" if check["clear"] else ", within the spread"),
    ]


@dataclass(frozen=True, kw_only=True)
class KVCacheBench:
    """What the bench of the cache policies measured; prints itself as tables and writes itself as JSON.

    Args:
        figures: Every figure.
        checks: What should hold between them, and whether it did.
        broken: What holds by construction and did not: bytes over a budget, prompts that kvpress reads otherwise.
        skipped: What could not run here, with the reason.
        about: Model, machine, versions and settings.
        partial: Whether it was interrupted.
    """

    figures: tuple[Figure, ...]
    checks: tuple[Ordered, ...]
    broken: tuple[str, ...]
    skipped: dict[str, str]
    about: dict[str, Any] = field(repr=False, default_factory=dict)
    partial: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "kvcache",
            "partial": self.partial,
            **self.about,
            "figures": [asdict(each) for each in self.figures],
            "checks": [asdict(check) for check in self.checks],
            "broken": list(self.broken),
            "skipped": self.skipped,
        }

    def to_json(self) -> str:
        """Return the bench as JSON."""
        return json.dumps(finite(self.to_dict()), indent=1, ensure_ascii=False)

    def __rich__(self) -> Group:
        parts: list[RenderableType] = []
        data = self.to_dict()
        for title, headers, rows in pivots(data["figures"]):
            parts.append(_table(title, headers, rows))
        if self.checks:
            parts.append(_table("checks", CHECK_HEADERS, [check_cells(check) for check in data["checks"]]))
        parts += [Text(f"broken: {each}", style="red") for each in self.broken]
        parts += [Text(f"skipped {way}: {reason}", style="yellow") for way, reason in self.skipped.items()]
        return Group(*parts, *(Text(each, style="dim") for each in notes(data)))

    def __str__(self) -> str:
        return printed(self)


def _table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for number, header in enumerate(headers):
        table.add_column(header, overflow="fold", justify="left" if number == 0 or title == "checks" else "right")
    for row in rows:
        table.add_row(*row)
    return table
