"""The bench of the cache policies on a page of results, as it stands in the JSON."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..decoding import SEEDS
from ..metrics import PAIRS
from ..tables import measured_on
from .engine import PLAIN
from .quality import AGNOSTIC, AVERAGE, AWARE
from .results import CHECK_HEADERS, check_cells, notes, pivots, written
from .timing import FASTER, OPERATIONS, STEP, TIME

Tabulate = Callable[[Sequence[str], Iterable[Sequence[str]]], str]
"""A Markdown table of headers and rows."""


def section(data: Mapping[str, Any], tabulate: Tabulate) -> list[str]:
    """What a bench was measured on, its tables, and the checks that there are seeds and rounds enough for."""
    settings, model = data["settings"], data["model"]
    lines = [f"- {measured_on(data)}; weights {model['weights_hash']}, attention {model['attention']}."]
    if data["peers"]:
        lines.append("- Peers: " + ", ".join(f"{name} {version}" for name, version in data["peers"].items()) + ".")
    lines.append(
        f"- {data['created'][:10]}; prompts of about {settings['tokens']} tokens, {settings['limit']} of each task and "
        f"seed, {settings['seeds']} seeds; texts of {settings['bits_tokens']} tokens; {settings['repeats']} "
        f"interleaved rounds at a budget of {settings['budget']} slots."
    )
    figures = _figures(data)
    parts = ["\n".join(lines), *notes({**data, "figures": figures})]
    for title, headers, rows in pivots(figures):
        parts += [f"#### {title}", tabulate(headers, [[f"`{row[0]}`", *row[1:]] for row in rows])]
    if checks := [check for check in data["checks"] if _enough(check)]:
        parts += ["#### Checks", tabulate(CHECK_HEADERS, map(check_cells, checks))]
    parts += [f"**Broken:** {each}." for each in data["broken"]]
    if data["skipped"]:
        parts.append("\n".join(f"- Skipped `{way}`: {reason}" for way, reason in data["skipped"].items()))
    return parts


def measured(data: Mapping[str, Any], name: str) -> dict[str, list[str]]:
    """For each method a line for every way that it was measured of, with its scores; `name` is the file's."""
    figures = _figures(data)
    place = f"{name}: {data['model']['name']} on {data['machine']['accelerator'] or 'a CPU'}"
    found: dict[str, list[str]] = {}
    for way in dict.fromkeys(each["way"] for each in figures):
        said = list(_said([each for each in figures if each["way"] in (way, PLAIN)], way))
        if said and way != PLAIN and not way.startswith("kvpress"):
            found.setdefault(way.partition(":")[0], []).append(f"`{way}` ({place}): {'; '.join(said)}.")
    return found


def _said(figures: Sequence[Mapping[str, Any]], way: str) -> Iterator[str]:
    own = [each for each in figures if each["way"] == way]

    def at(part: str, group: str | None, column: str | None) -> list[str]:
        return [
            f"{written(each)} at {each['budget'] or 'all'}"
            for each in own
            if each["part"] == part and group in (None, each["group"]) and column in (None, each["column"])
        ]

    for group in (AGNOSTIC, AWARE):
        if scores := at("quality", group, AVERAGE):
            plain = [each for each in figures if each["way"] == PLAIN and each["group"] == group]
            beside = [written(each) for each in plain if each["column"] == AVERAGE]
            seeds = min(len(each["values"]) for each in own if each["group"] == group)
            few = "" if seeds >= SEEDS else f", fewer than {SEEDS} seeds"
            yield f"mean score, {group}, {', '.join(scores)} (plain {beside[0] if beside else '–'}{few})"
    if bits := at("bits", None, None):
        beside = [written(each) for each in figures if each["way"] == PLAIN and each["part"] == "bits"]
        yield f"bits per byte {', '.join(bits)} (plain {beside[0] if beside else '–'})"
    faster = [each for each in own if each["group"] == FASTER]
    if faster:
        longest = max(faster, key=lambda each: int(each["column"].replace(",", "")))
        yield f"behind {longest['column']} tokens {written(longest)} as many decode steps as the full cache"
    for column in (OPERATIONS, TIME):
        for each in own:
            if each["part"] == "prefill" and each["column"] == column:
                yield f"{column} to read {each['group'].partition(', over')[0]} {written(each)} plain's"


def _figures(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The figures without times of fewer rounds than a claim takes."""
    return [each for each in data["figures"] if not _timed(each) or len(each["values"]) >= PAIRS]


def _timed(figure: Mapping[str, Any]) -> bool:
    return figure["group"] in (STEP, FASTER) or (figure["part"] == "prefill" and figure["column"] == TIME)


def _enough(check: Mapping[str, Any]) -> bool:
    """Whether a check rests on as many seeds or rounds as a claim takes; operations are counted, and need one."""
    figure, count = check["figure"], check["difference"]["count"]
    if figure.startswith(f"{OPERATIONS},"):
        return True
    rounds = figure in (STEP, FASTER) or figure.startswith(f"{TIME},")
    return bool(count >= (PAIRS if rounds else SEEDS))
