"""What `tokenry bench drafters` gives back: comparisons, tables of what they do not say, checks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from ..checks import Check
from ..results import SCHEMA_VERSION, Comparison, finite, printed
from ..tables import speculation_tables


@dataclass(frozen=True, kw_only=True)
class Table:
    """Figures of a part that a comparison has no columns for.

    Args:
        part: The part.
        method: Name of the method.
        title: What was measured, on what.
        rows: One dictionary of figures for each line, by header; the first names the line.
        note: What a reader must know.
    """

    part: str
    method: str
    title: str
    rows: tuple[dict[str, Any], ...]
    note: str = ""


def headers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The headers of a table's rows, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row))


def cell(value: Any) -> str:
    """A figure of a table as text."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@dataclass(frozen=True, kw_only=True)
class DraftersBench:
    """What the bench of the trained drafters measured; prints itself as tables and writes itself as JSON.

    Args:
        runs: A comparison for each part that drafts.
        tables: What else was measured.
        checks: What should hold, and whether it did.
        skipped: Parts that could not run here, with the reason.
        about: Model, machine, versions, settings, and what was trained how.
        partial: Whether it was interrupted.
    """

    runs: tuple[Comparison, ...]
    tables: tuple[Table, ...]
    checks: tuple[Check, ...]
    skipped: tuple[dict[str, Any], ...] = ()
    about: dict[str, Any] = field(repr=False, default_factory=dict)
    partial: bool = False

    @property
    def broken(self) -> int:
        """Outputs of lossless methods that differ from plain's otherwise than from a near tie on."""
        return sum(row.broken for run in self.runs for row in run.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but sample outputs as plain data."""
        runs = [run.to_dict() for run in self.runs]
        for run in runs:
            del run["samples"]
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "drafters",
            "partial": self.partial,
            **self.about,
            "runs": runs,
            "tables": [asdict(table) for table in self.tables],
            "checks": [asdict(check) for check in self.checks],
            "skipped": list(self.skipped),
        }

    def to_json(self) -> str:
        """Return the bench as JSON."""
        return json.dumps(finite(self.to_dict()), indent=1, ensure_ascii=False)

    def __rich__(self) -> Group:
        parts: list[Any] = []
        for each in self.tables:
            table = RichTable(title=each.title, title_justify="left", title_style="bold", header_style="bold")
            for number, header in enumerate(headers(each.rows)):
                table.add_column(header, overflow="fold", justify="right" if number else "left")
            for row in each.rows:
                table.add_row(*(cell(row.get(header)) for header in headers(each.rows)))
            parts.append(table)
            if each.note:
                parts.append(Text(each.note, style="dim"))
        return Group(*parts, speculation_tables(self))

    def __str__(self) -> str:
        return printed(self)
