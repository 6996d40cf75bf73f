"""Results as tables for a terminal."""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .metrics import Spread

if TYPE_CHECKING:
    from .results import Comparison, Row


def ratio(spread: Spread) -> str:
    """Return a speed ratio with its quartiles, such as `1.52× [1.48–1.60]`."""
    return f"{spread.median:.2f}× [{spread.lower:.2f}–{spread.upper:.2f}]"


def size(count: int) -> str:
    """Return a number of bytes in binary units."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def quality(row: "Row") -> str:
    """Return a row's score with its spread over seeds, such as `0.71 ± 0.03 (3 seeds)`."""
    if row.quality is None:
        return "–"
    spread = f" ± {row.quality_sd:.2f} ({row.seeds} seeds)" if row.quality_sd is not None else ""
    return f"{row.quality:.2f}{spread}"


def notes(comparison: "Comparison") -> list[str]:
    """Return what a reader must know to read the tables."""
    about = comparison.about
    rows = comparison.rows
    pairs = min((row.speed.count for row in rows), default=0)
    found = []
    if comparison.partial:
        found.append("Interrupted: these are the pairs that were complete.")
    found.append(
        f"speed: tokens per second over transformers' plain generate in the same pair of the same run, prefill "
        f"included; median [quartiles] of {pairs} interleaved pairs."
    )
    if pairs < 7:
        found.append("Fewer than 7 pairs: no speed should be claimed from this.")
    found.append(
        "tokens/pass: tokens gained with each forward pass of the model (plain: 1); a trial row (CNTP's) counts as a "
        "pass of its own. agreement: share of an output "
        "before its first difference from plain's. lossless: equal to plain's output, near-ties in half precision "
        "counted."
    )
    if any(row.seeds for row in rows):
        sampled = next(row.setting for row in rows if row.seeds)
        found.append(f"(sampled) rows: {sampled}, against the reference and plain under the same setting.")
    if machine := about.get("machine"):
        model = about["model"]
        place = machine["accelerator"] or machine["cpu"]
        found.append(
            f"{model['name']}, {model['parameters'] / 1e6:.1f}M parameters, {model['dtype']}; {place}, "
            f"{machine['threads']} of {machine['cores']} cores; torch {about['versions']['torch']}, "
            f"transformers {about['versions']['transformers']}. tokens/s holds for this machine only."
        )
    return found


def comparison_tables(comparison: "Comparison") -> Group:
    """Return one table for each workload, and the notes."""
    parts: list[RenderableType] = []
    for name in dict.fromkeys(row.workload for row in comparison.rows):
        parts.append(_table(comparison, name, [row for row in comparison.rows if row.workload == name]))
    if not comparison.rows:
        parts.append(Text("nothing was measured"))
    return Group(*parts, *(Text(note, style="dim") for note in notes(comparison)))


def _table(comparison: "Comparison", name: str, rows: list["Row"]) -> Table:
    facts = next((w for w in comparison.about.get("workloads", ()) if w["name"] == name), None)
    title = name
    if facts:
        title += f" · {facts['prompts']} prompts of about {facts['prompt_tokens']:.0f} tokens"
        title += f" · up to {facts['max_new_tokens']} new"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", expand=False)
    table.add_column("method", overflow="fold")
    headers = ["speed", "tokens/pass", "KV kept", "KV peak", "quality", "agreement", "lossless", "tokens/s"]
    with_bits = any(row.bits_per_byte is not None for row in rows)
    if with_bits:
        headers.insert(5, "bits/byte")
    for header in headers:
        table.add_column(header, justify="right")
    for row in rows:
        cells = [
            row.label,
            ratio(row.speed),
            f"{row.tokens_per_pass:.2f}",
            size(row.kv_bytes),
            size(row.kv_peak_bytes),
            quality(row),
            "–" if row.agreement is None else f"{row.agreement:.0%}",
            row.lossless or "–",
            f"{row.tokens_per_second.median:.0f}",
        ]
        if with_bits:
            cells.insert(6, "–" if row.bits_per_byte is None else f"{row.bits_per_byte:.3f}")
        table.add_row(*cells, style="dim" if row.family == "peers" else None)
    return table
