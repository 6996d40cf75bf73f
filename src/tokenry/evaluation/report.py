"""A comparison as one HTML page without external parts."""

from typing import Any

import jinja2

from .svg import Bar, Point, bars, scatter
from .tables import size, spread

_SOURCES = {
    "plain": "plain",
    "draft": "accepted draft",
    "bonus": "closes a verify step",
    "trial": "kept trial",
    "router": "router",
    "": "not told",
}


def render(data: dict[str, Any]) -> str:
    """Return the page for the plain data of `Comparison.to_dict`, as read from its JSON or not."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tokenry.evaluation", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"bytes": size, "spread": spread}
    page = environment.get_template("report.html.j2")
    # A partial result has fewer pairs than were asked for.
    pairs = min((row["speed"]["count"] for row in data["rows"]), default=0)
    return page.render(
        data=data, pairs=pairs, sections=[_section(data, facts) for facts in data["workloads"]], sources=_SOURCES
    )


def _section(data: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    rows = [row for row in data["rows"] if row["workload"] == facts["name"]]
    samples = [sample for sample in data["samples"] if sample["workload"] == facts["name"]]
    measured = [row for row in rows if row["speed"]["median"] is not None]
    # Exact match where there are answers; else how far outputs agree with plain's.
    key, title = ("quality", "quality (mean score)") if facts["scored"] else ("agreement", "agreement with plain")
    points = [
        Point(row["speed"]["median"], row[key], row["label"], _kind(row)) for row in measured if row[key] is not None
    ]
    speeds = [
        Bar(row["speed"]["median"], row["speed"]["lower"], row["speed"]["upper"], row["label"],
            f"{row['speed']['median']:.2f}×", _kind(row))
        for row in measured
    ]  # fmt: skip
    kept = [
        Bar(row["kv_bytes"], row["kv_bytes"], row["kv_bytes"], row["label"], size(row["kv_bytes"]), _kind(row))
        for row in measured
    ]
    x_title = "speed (1 = transformers' plain generate)"
    return {
        **facts,
        "rows": rows,
        "samples": [{**sample, "views": _views(sample)} for sample in samples],
        "opened": next((i for i, s in enumerate(samples) if any(source == "draft" for _, source in s["tokens"])), 0),
        "used": sorted({source for sample in samples for _, source in sample["tokens"]}, key=list(_SOURCES).index),
        "scatter": scatter(points, x_title, title, mark_x=1.0) if points else "",
        "bars": bars(speeds, x_title, mark=1.0) if speeds else "",
        "memory": bars(kept, "bytes of cache kept at the end") if any(bar.value for bar in kept) else "",
    }


def _views(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens with the share of the cache that still holds them, at each moment of the trace."""
    if not sample["kept"]:
        return []
    texts = [*sample["prompt_tokens"], *(text for text, _ in sample["tokens"])]
    names = {"prefill": "after prefill", "end": "at the end"}
    return [
        {"name": names[moment], "tokens": list(zip(texts, shares, strict=False))}
        for moment, shares in sample["kept"].items()
    ]


def _kind(row: dict[str, Any]) -> str:
    """The CSS class of a row: its family, a combination by its decoder's."""
    return "f-" + row["family"].partition("+")[0]
