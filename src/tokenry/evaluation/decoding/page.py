"""The bench of the decoders on a page of results, as it stands in the JSON."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..metrics import PAIRS
from ..tables import measured_on
from .results import (
    CHECK_HEADERS,
    FIGURE_HEADERS,
    SEEDS,
    SPEED,
    check_cells,
    figure_cells,
    notes,
    seeds_of,
    with_deviation,
)

METHODS = {
    "cntp": "cntp",
    "r2r": "r2r",
    "skipdecode": "skipdecode",
    "superposed": "superposed-decoding",
    "navigation": "in-context-navigation",
    "bytes": "exact-byte-probabilities",
}
"""The methods that the parts of the bench measure."""

Tabulate = Callable[[Sequence[str], Iterable[Sequence[str]]], str]
"""A Markdown table of headers and rows."""


def section(data: Mapping[str, Any], tabulate: Tabulate) -> list[str]:
    """What a bench was measured on, its tables, and its checks, where there are seeds enough."""
    settings, model = data["settings"], data["model"]
    lines = [f"- {measured_on(data)}; weights {model['weights_hash']}, attention {model['attention']}."]
    lines += [
        f"- {what}: {other['name']}, {other['parameters'] / 1e6:.1f}M parameters, weights {other['weights_hash']}."
        for what, other in data["beside"].items()
    ]
    lines.append(
        f"- {data['created'][:10]}, {settings['seeds']} seeds, limit {settings['limit']}, "
        f"batch size {settings['batch_size']}."
    )
    parts = ["\n".join(lines), " ".join(notes(data))]
    figures = _figures(data)
    for part in dict.fromkeys(each["part"] for each in figures):
        rows = [figure_cells(each) for each in figures if each["part"] == part]
        parts += [f"#### {part}", tabulate(FIGURE_HEADERS, rows)]
    if data["checks"] and seeds_of(data) >= SEEDS:
        parts += ["#### Checks", tabulate(CHECK_HEADERS, map(check_cells, data["checks"]))]
    if data["skipped"]:
        parts.append("\n".join(f"- Skipped `{way}`: {reason}" for way, reason in data["skipped"].items()))
    return parts


def measured(data: Mapping[str, Any], name: str) -> dict[str, list[str]]:
    """For each method a line a figure, with all ways that it was measured of; `name` is the file's."""
    found: dict[str, list[str]] = {}
    figures = _figures(data)
    place = f"{name}: {data['model']['name']} on {data['machine']['accelerator'] or 'a CPU'}"
    for part, figure in dict.fromkeys((each["part"], each["figure"]) for each in figures):
        own = [each for each in figures if (each["part"], each["figure"]) == (part, figure)]
        ways = ", ".join(f"`{each['way']}` {with_deviation(each)}" for each in own)
        seeds = min(len(each["values"]) for each in own)
        few = "" if seeds >= SEEDS else f"; fewer than {SEEDS}: no ordering should be claimed"
        found.setdefault(METHODS[part], []).append(f"{figure} ({place}, {seeds} seeds{few}): {ways}.")
    return found


def _figures(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The figures without speeds of fewer pairs than a claim takes."""
    return [each for each in data["figures"] if each["figure"] != SPEED or len(each["values"]) >= PAIRS]
