"""Results as tables for a terminal, and the columns that pages of results share with them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .metrics import PAIRS, Spread

if TYPE_CHECKING:
    from .drafters import DraftersBench
    from .results import Comparison
    from .speculation import SpeculationBench

Column = tuple[str, Callable[[Mapping[str, Any]], str]]
"""A header, and the cell for a row as it stands in the JSON."""

DEPTHS = (1, 2, 4, 8)
"""Depths whose acceptance is shown; the JSON has all."""

_NONE = "–"


def ratio(spread: Spread) -> str:
    """Return a speed ratio with its quartiles, such as `1.52× [1.48–1.60]`."""
    return f"{spread.median:.2f}× [{spread.lower:.2f}–{spread.upper:.2f}]"


def size(count: int) -> str:
    """Return a number of bytes in binary units."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def spread(found: Mapping[str, Any]) -> str:
    """Return a spread of ratios as it stands in the JSON."""
    return _NONE if found["median"] is None else ratio(Spread(**found))


def quality(row: Mapping[str, Any]) -> str:
    """Return a row's score with its spread over seeds, such as `0.71 ± 0.03 (3 seeds)`."""
    if row["quality"] is None:
        return _NONE
    deviation = f" ± {row['quality_sd']:.2f} ({row['seeds']} seeds)" if row["quality_sd"] is not None else ""
    return f"{row['quality']:.2f}{deviation}"


def columns(rows: Iterable[Mapping[str, Any]]) -> list[Column]:
    """The columns of any methods side by side; bits per byte only where measured."""
    found: list[Column] = [
        ("speed", lambda row: spread(row["speed"])),
        ("tokens/pass", lambda row: f"{row['tokens_per_pass']:.2f}"),
        ("KV kept", lambda row: size(row["kv_bytes"])),
        ("KV peak", lambda row: size(row["kv_peak_bytes"])),
        ("quality", quality),
        ("agreement", lambda row: _NONE if row["agreement"] is None else f"{row['agreement']:.0%}"),
        ("lossless", lambda row: row["lossless"] or _NONE),
        ("tokens/s", lambda row: f"{row['tokens_per_second']['median']:.0f}"),
    ]
    if any(row["bits_per_byte"] is not None for row in rows):
        found.insert(
            5, ("bits/byte", lambda row: _NONE if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.3f}")
        )
    return found


def speculation_columns() -> list[Column]:
    """The columns of drafters side by side."""
    return [
        ("speed", lambda row: spread(row["speed"])),
        ("tokens/pass", lambda row: f"{row['tokens_per_pass']:.2f}"),
        *((f"depth {depth}", _accepted(depth)) for depth in DEPTHS),
        ("drafter ms/step", _drafter_ms),
        ("drafter time", _drafter_share),
        ("lossless", lambda row: row["lossless"] or _NONE),
        ("tokens/s", lambda row: f"{row['tokens_per_second']['median']:.0f}"),
    ]


def _accepted(depth: int) -> Callable[[Mapping[str, Any]], str]:
    def cell(row: Mapping[str, Any]) -> str:
        drafted, accepted = row["drafted_to"], row["accepted_to"]
        return f"{accepted[depth - 1] / drafted[depth - 1]:.0%}" if depth <= len(drafted) else _NONE

    return cell


def _drafter_ms(row: Mapping[str, Any]) -> str:
    if row["drafter_seconds"] is None or not row["steps"]:
        return _NONE
    return f"{1e3 * row['drafter_seconds'] / row['steps']:.2f}"


def _drafter_share(row: Mapping[str, Any]) -> str:
    if row["drafter_seconds"] is None or not row["steps"]:
        return _NONE
    return f"{row['drafter_seconds'] / row['seconds']:.0%}"


SPECULATION_NOTE = (
    "depth d: of the verify steps that drafted to depth d, the share whose accepted path reached it. drafter ms/step: "
    "time of proposing and learning for each verify step and prompt; drafter time: its share of the whole (of assisted "
    "generation the draft model's own generate; prompt lookup in transformers does not tell)."
)


def notes(data: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know to read the tables of a comparison as it stands in the JSON."""
    rows = data["rows"]
    pairs = min((row["speed"]["count"] for row in rows), default=0)
    found = []
    if data["partial"]:
        found.append("Interrupted: these are the pairs that were complete.")
    found.append(
        f"speed: tokens per second over transformers' plain generate in the same pair of the same run, prefill "
        f"included; median [quartiles] of {pairs} interleaved pairs."
    )
    if pairs < PAIRS:
        found.append(f"Fewer than {PAIRS} pairs: no speed should be claimed from this.")
    found.append(
        "tokens/pass: tokens gained with each forward pass of the model (plain: 1); a trial row (CNTP's) counts as a "
        "pass of its own. agreement: share of an output "
        "before its first difference from plain's. lossless: equal to plain's output, near-ties in half precision "
        "counted."
    )
    if any(row["seeds"] for row in rows):
        sampled = next(row["setting"] for row in rows if row["seeds"])
        found.append(f"(sampled) rows: {sampled}, against the reference and plain under the same setting.")
    if "machine" in data:
        found.append(f"{measured_on(data)}. tokens/s holds for this machine only.")
    return found


def measured_on(data: Mapping[str, Any]) -> str:
    """Return the model, machine and versions of a comparison as it stands in the JSON."""
    model, machine, versions = data["model"], data["machine"], data["versions"]
    return (
        f"{model['name']}, {model['parameters'] / 1e6:.1f}M parameters, {model['dtype']}; "
        f"{machine['accelerator'] or machine['cpu']}, {machine['threads']} of {machine['cores']} cores; "
        f"torch {versions['torch']}, transformers {versions['transformers']}"
    )


def comparison_tables(comparison: "Comparison") -> Group:
    """Return one table for each workload, and the notes."""
    data = _data(comparison)
    return Group(*_tables(data, columns(data["rows"])), *_dimmed(notes(data)))


def speculation_tables(bench: "SpeculationBench | DraftersBench") -> Group:
    """Return the tables of each batch size, the checks, what was skipped, and the notes."""
    parts: list[RenderableType] = []
    said: dict[str, None] = {}
    for run in bench.runs:
        data = _data(run)
        # Headers of two lines leave the names of the methods room.
        shown = [(header.replace(" ", "\n"), cell) for header, cell in speculation_columns()]
        parts += _tables(data, shown, f" · batch size {data['settings']['batch_size']}")
        said |= dict.fromkeys(notes(data))
    if bench.checks:
        table = _empty_table("checks", CHECK_HEADERS)
        for check in bench.checks:
            table.add_row(*check_cells(asdict(check)))
        parts.append(table)
    parts += [Text(f"skipped {each['method']}: {each['reason']}", style="yellow") for each in bench.skipped]
    return Group(*parts, *_dimmed([*said, SPECULATION_NOTE] if bench.runs else []))


def _data(comparison: "Comparison") -> dict[str, Any]:
    """What tables read of a comparison, as it stands in the JSON."""
    rows = [asdict(row) for row in comparison.rows]
    return {"workloads": (), **comparison.about, "rows": rows, "partial": comparison.partial}


def _dimmed(lines: Iterable[str]) -> list[Text]:
    return [Text(line, style="dim") for line in lines]


def _tables(data: Mapping[str, Any], shown: Sequence[Column], suffix: str = "") -> list[RenderableType]:
    facts = {workload["name"]: workload_title(workload) for workload in data["workloads"]}
    parts: list[RenderableType] = []
    for name in dict.fromkeys(row["workload"] for row in data["rows"]):
        table = _empty_table(facts.get(name, name) + suffix, ["method", *(header for header, _ in shown)])
        for row in data["rows"]:
            if row["workload"] == name:
                cells = [row["label"], *(cell(row) for _, cell in shown)]
                table.add_row(*cells, style="dim" if row["family"] == "peers" else None)
        parts.append(table)
    return parts or [Text("nothing was measured")]


def workload_title(facts: Mapping[str, Any]) -> str:
    """Return a workload's name with how many prompts it has and how long they are."""
    return (
        f"{facts['name']} · {facts['prompts']} prompts of about {facts['prompt_tokens']:.0f} tokens · "
        f"up to {facts['max_new_tokens']} new"
    )


CHECK_HEADERS = ("check", "batch", "measured", "ratio", "holds")


def check_cells(check: Mapping[str, Any]) -> list[str]:
    """Return the cells of a check as it stands in the JSON, in the order of `CHECK_HEADERS`."""
    measured, found = check["measured"], check["ratio"]
    if found is not None:
        values = ", ".join(f"{name} {value:.2f}" for name, value in measured.items())
    else:
        counts = [f"{name} {value:.0f}" for name, value in measured.items() if value]
        values = ", ".join(counts) or f"0 of each of {len(measured)} methods"
    holds = ("yes" if check["passed"] else "no") + ("" if check["clear"] else ", within the spread")
    # A result that an earlier release wrote has no reasons.
    holds += f": {check['reason']}" if check.get("reason") else ""
    if check["unit"] == "speed" and found is not None and found["count"] < PAIRS * len(check["by_task"]):
        holds = f"not judged: fewer than {PAIRS} pairs"
    return [
        check["statement"],
        str(check["batch_size"]),
        f"{check['unit']}: {values}",
        _NONE if found is None else spread(found),
        holds,
    ]


def _empty_table(title: str, headers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", expand=False)
    table.add_column(headers[0], overflow="fold")
    for header in headers[1:]:
        table.add_column(header, justify="right")
    return table
