"""What `compare` gives back: rows, samples, and their tables, JSON and HTML."""

import contextlib
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group

from tokenry.errors import BadParameter, TokenryError
from tokenry.generation.full import effective

from .metrics import Spread

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method on one workload.

    Args:
        workload: Name of the workload.
        method: Text form of the method.
        label: The text form, marked where the method samples.
        family: The method's family, of a combination both.
        setting: How tokens were chosen, in words.
        speed: Tokens per second, as a ratio to transformers' plain `generate` under the same setting in
            the same pair; median and quartiles over the pairs.
        tokens_per_second: The same, absolute; it belongs to the machine.
        pairs: The ratios behind `speed`.
        tokens: New tokens in all timed runs.
        forwards: Forward passes of the model in all timed runs, prefill included.
        passes: The same, a pass counted once for each unfinished row.
        draft_forwards: Forward passes of a peer's second model.
        seconds: Time of all timed runs.
        drafter_seconds: The part of it spent on drafting; None where the library does not tell.
        steps: Verify steps in all timed runs, counted once for each unfinished row.
        drafted: Drafted tokens that were verified.
        accepted: Those of them that were accepted.
        drafted_to: At `d - 1` the verify steps whose drafts reached depth `d`.
        accepted_to: Those of them whose accepted path reached it too.
        forwards_per_token: Forward passes of the model over new tokens, a pass counted once for each
            unfinished row.
        tokens_per_pass: The inverse: tokens a row gained with each pass; 1 is plain. A trial row (CNTP's) counts
            as a pass of its own.
        tokens_per_pass_by_batch: The same for each batch of prompts, in their order.
        tokens_per_step: Tokens committed per verify step, the model's own token included; None without steps.
        kv_bytes: Largest key-value cache that the model was left with at the end of a run.
        kv_peak_bytes: Largest that it had within a run.
        quality: Mean score of the workload's check, between 0 and 1, over the prompts with an answer; None
            without answers to check.
        quality_sd: Its standard deviation over seeds; None where greedy or with one seed.
        seeds: Seeds that every prompt was sampled with; 0 where greedy.
        agreement: Share of each output that comes before its first difference from the reference's, mean
            over prompts; None where sampled.
        lossless: Whether outputs equal the reference's up to near ties, in words; None for the reference and
            where the method does not promise it.
        near_ties: Outputs that differ from a near tie on.
        broken: Outputs that differ otherwise.
        bits_per_byte: Bits a byte of the given text under the method; None where not measured.
    """

    workload: str
    method: str
    label: str
    family: str
    setting: str
    speed: Spread
    tokens_per_second: Spread
    pairs: tuple[float, ...]
    tokens: int
    forwards: int
    passes: int
    draft_forwards: int
    seconds: float
    drafter_seconds: float | None
    steps: int
    drafted: int
    accepted: int
    drafted_to: tuple[int, ...]
    accepted_to: tuple[int, ...]
    forwards_per_token: float
    tokens_per_pass: float
    tokens_per_pass_by_batch: tuple[float, ...]
    tokens_per_step: float | None
    kv_bytes: int
    kv_peak_bytes: int
    quality: float | None
    quality_sd: float | None
    seeds: int
    agreement: float | None
    lossless: str | None
    near_ties: int
    broken: int
    bits_per_byte: float | None

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Share of the steps that drafted to depth 1, 2, ... whose accepted path reached it."""
        return tuple(mine / its for mine, its in zip(self.accepted_to, self.drafted_to, strict=True))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One output as the report shows it.

    Args:
        workload: Name of the workload.
        label: The row's label.
        prompt: The prompt.
        tokens: Text and source of each new token; the source is "" where the library does not tell.
        kept: Share, between 0 and 1, of layers and heads that still hold each token of prompt and output,
            after prefill and at the end; None unless a trace was asked for.
        prompt_tokens: Texts of the prompt's tokens, given with `kept`.
    """

    workload: str
    label: str
    prompt: str
    tokens: tuple[tuple[str, str], ...]
    kept: dict[str, list[float]] | None = None
    prompt_tokens: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` measured; prints itself as tables, writes itself as JSON and HTML.

    Args:
        rows: One for each method and workload.
        samples: One output for each row.
        about: Model, machine, versions, settings and workloads, as they stand in the JSON.
        partial: Whether it was interrupted.
    """

    rows: tuple[Row, ...]
    samples: tuple[Sample, ...] = field(repr=False, default=())
    about: dict[str, Any] = field(repr=False, default_factory=dict)
    partial: bool = False

    def row(self, method: str, workload: str | None = None) -> Row:
        """Return the row of a method by its text form or label, on the first workload unless named.

        A drafter beside a policy is found by the form it was asked for in too, without the `compact_every` that it
        ran with. Raises `BadParameter` if there is none.
        """
        names = {method}
        with contextlib.suppress(TokenryError):
            names.add(str(effective(method)))
        for row in self.rows:
            if names & {row.label, row.method} and workload in (None, row.workload):
                return row
        raise BadParameter(f"no row for {method!r}" + (f" on {workload}" if workload else ""))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data; `schema_version` changes when a key changes its meaning."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "comparison",
            "partial": self.partial,
            **self.about,
            "rows": [asdict(row) for row in self.rows],
            "samples": [asdict(sample) for sample in self.samples],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the comparison as JSON, and write it to `path` if one is given."""
        text = json.dumps(finite(self.to_dict()), indent=1, ensure_ascii=False)
        if path is not None:
            _write(path, text + "\n")
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """Return the report, one HTML page without external parts, and write it to `path` if one is given."""
        from .report import render

        page = render(finite(self.to_dict()))
        if path is not None:
            _write(path, page)
        return page

    def __rich__(self) -> Group:
        from .tables import comparison_tables

        return comparison_tables(self)

    def __str__(self) -> str:
        return printed(self)


def printed(shown: Any) -> str:
    """Return as text what rich shows; a terminal has its own width, a file or a log gets room for every column."""
    console = Console(file=io.StringIO(), width=150, color_system=None)
    console.print(shown)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def finite(value: Any) -> Any:
    """Return plain data with tuples as lists and numbers that JSON lacks as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value


def _write(path: str | Path, text: str) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
