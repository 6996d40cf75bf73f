"""What all parts share: where trained weights lie, comparisons beside plain decoding, checks, what was skipped."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from tokenry.errors import ResourceError, TokenryError
from tokenry.models import loaded_name, trained_folder, weights_hash
from tokenry.workloads import Example, held_out_files

from ..checks import Check, lossless_check
from ..comparison import compare
from ..metrics import Spread
from ..results import Comparison, Row
from .results import Table


@dataclass
class Bench:
    """A run of the bench: what it measures on, and what it has found; arguments as of `bench_drafters`.

    Args:
        place: The folder that holds the trainers' outputs; None: the user's cache folder.
        tasks: Examples by task.
    """

    model: Any
    tokenizer: Any
    place: Path | None
    tasks: dict[str, list[Example]]
    limit: int
    max_new_tokens: int
    repeats: int
    temperature: float
    draft: str
    text: str | Path | None
    steps: int
    seeds: int
    controls: bool
    seed: int
    progress: bool
    runs: list[Comparison] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    trained_as: dict[str, dict[str, Any]] = field(default_factory=dict)

    def attempt(self, what: str, measure: Callable[[Bench], None], must: bool = False) -> None:
        """Measure, or note why it cannot be; what must be measured raises."""
        try:
            measure(self)
        except (TokenryError, OSError) as error:
            if must:
                raise
            said = " ".join(str(error).split())
            # Results are shared; whose machine they come from is nobody's business.
            if self.place is not None:
                said = said.replace(str(self.place), "FOLDER").replace(str(self.place.resolve()), "FOLDER")
            said = said.replace(str(Path.home()), "~")
            self.skipped.append({"method": what, "reason": said, "batch_size": 1})

    def folder(self, name: str) -> Path:
        """Where a trainer writes."""
        return trained_folder(name, loaded_name(self.model)) if self.place is None else self.place / name

    def trained(self, name: str) -> Path:
        """Where what a trainer wrote lies.

        Raises:
            ResourceError: It has written nothing there, or is not done.
        """
        place = self.folder(name)
        if not any(place.glob("*.safetensors")):
            out = f" --out {place}" if self.place is not None else ""
            raise ResourceError(
                f"there are no weights in {str(place)!r}: make them by tokenry train {name}{out}, or name the folder "
                "that holds them"
            )
        return place

    def note(self, part: str, module: Any, folder: Path) -> None:
        """Remember which weights a part is about, and how they were trained."""
        known = folder / "training.json"
        about = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
        kept = {name: about[name] for name in ("trainer", "steps", "seed") if about.get(name) is not None}
        self.trained_as[part] = {"weights_hash": weights_hash(module), **kept}

    def compared(
        self, methods: Sequence[str], resources: dict[str, Any], tasks: Mapping[str, list[Example]] | None = None
    ) -> Comparison:
        """Run methods beside plain, by default on the bench's tasks, and check what promises its output."""
        run = compare(
            self.model, self.tokenizer, tasks or self.tasks, ["plain", *methods], max_new_tokens=self.max_new_tokens,
            repeats=self.repeats, seed=self.seed, sample=bool(self.temperature),
            temperature=self.temperature or 1.0, resources=resources, progress=self.progress,
        )  # fmt: skip
        self.runs.append(run)
        self.checks += lossless_check(run)
        if run.partial:
            raise KeyboardInterrupt
        return run

    def check(self, name: str, statement: str, unit: str, measured: Mapping[str, float], **found: Any) -> None:
        """Note a check; `found` are further fields of it, `passed` among them."""
        known: dict[str, Any] = {"ratio": None, "by_task": {}, "clear": True, **found}
        if known["passed"]:
            known["reason"] = ""
        self.checks.append(
            Check(name=name, statement=statement, batch_size=1, unit=unit, measured=dict(measured), **known)
        )

    def ratio(
        self,
        name: str,
        statement: str,
        unit: str,
        pairs: Mapping[str, float],
        ratios: Sequence[float],
        *,
        least: float = 1.0,
        strict: bool = False,
        **found: Any,
    ) -> None:
        """Check the first of two figures over the second.

        Args:
            pairs: The two figures by what they are of.
            ratios: The ratio on each prompt or seed, for the spread.
            least: What the ratio should reach, or pass if `strict`.
        """
        one, other = pairs.values()
        spread = Spread.of(ratios)
        passed = one > least * other if strict else one >= least * other
        clear = spread.lower >= least if passed else spread.upper <= least
        self.check(name, statement, unit, pairs, ratio=spread, passed=passed, clear=clear, **found)

    @contextlib.contextmanager
    def saying(self, what: str) -> Iterator[None]:
        """Say on a terminal what is measured."""
        console = Console(stderr=True)
        with console.status(what) if self.progress and console.is_terminal else contextlib.nullcontext():
            yield


def rows_of(run: Comparison, method: str) -> list[Row]:
    """A method's rows, one for each task."""
    return [row for row in run.rows if row.method == method]


def accepted(run: Comparison, method: str, depth: int) -> float | None:
    """Share of a run's verify steps that accepted the draft at a depth, from 0, over all tasks."""
    drafted = accepted = 0
    for row in rows_of(run, method):
        drafted += at(row.drafted_to, depth) or 0
        accepted += at(row.accepted_to, depth) or 0
    return accepted / drafted if drafted else None


def at(values: Sequence[Any], index: int) -> Any:
    """The value at an index, None behind the end."""
    return values[index] if index < len(values) else None


def held_out_texts() -> list[str]:
    """The files that no bundled model was trained on."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in held_out_files()]
    found = [text for text in texts if text.strip()]
    if not found:
        raise ResourceError("no held-out package is installed: pip install rich typer click hypothesis pytest")
    return found
