"""The parts in turn: what `tokenry bench drafters` runs."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tokenry.errors import BadParameter

from ..environment import describe_model, machine, versions
from ..metrics import PAIRS
from ..running import collect
from . import adaspec, any_subset, ftp, hamburger, mtp
from .engine import Bench
from .results import DraftersBench

PARTS = {
    "mtp": mtp.measure, "ftp": ftp.measure, "hamburger": hamburger.measure, "any-subset": any_subset.measure,
    "adaspec": adaspec.measure,
}  # fmt: skip
"""What is measured; each part needs what its trainer wrote, but for adaspec, which trains."""


def bench_drafters(
    model: Any,
    tokenizer: Any,
    *,
    parts: Sequence[str] | None = None,
    trained: str | Path | None = None,
    workloads: Sequence[str] = ("code",),
    limit: int = 14,
    max_new_tokens: int = 96,
    repeats: int = PAIRS,
    temperature: float = 0.0,
    draft: str = "tokenry/code-draft",
    text: str | Path | None = None,
    steps: int = 300,
    seeds: int = 3,
    controls: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> DraftersBench:
    """Measure what the trainers of drafters made: tokens a pass, quality, and what their cards say shows that it works.

    A part whose weights are missing is skipped with the reason. Interrupted by Ctrl-C, it returns what is measured so
    far, marked as partial; distillation goes on from there when called again.

    Args:
        model: The model that they were trained for.
        tokenizer: Its tokenizer.
        parts: Of `PARTS`; by default all.
        trained: A folder that holds the trainers' outputs as `mtp`, `ftp`, `hamburger` and `any-order`, and takes the
            runs of adaspec; by default the user's cache folder, where `tokenry train` writes. With `ftp-tuned`, what
            `tokenry train ftp --encoder tuned` wrote, the geometry of its states is compared with the model's.
        workloads: Tasks of the drafters.
        limit: Prompts of each task; texts with holes are three times as many.
        max_new_tokens: New tokens a prompt.
        repeats: Interleaved pairs.
        temperature: Of the drafters' comparisons; 0 is greedy.
        draft: The draft model that is distilled.
        text: What it is distilled on, as `tokenry train --text`; by default the standard library.
        steps: Steps of every distillation.
        seeds: Distillations of each kind.
        controls: Whether further ways to distil run: longer, at equal steps, and with controls of the selection.
        seed: Seed of tasks and of sampling.
        progress: Show progress on a terminal.

    Raises:
        BadParameter: A part is not known, or a number is too small.
        BadPrompt, PromptTooLong: The tasks or texts cannot be used.
        ResourceError: adaspec is asked for, and its draft cannot be distilled.
    """
    chosen = list(dict.fromkeys(parts or PARTS))
    if unknown := [part for part in chosen if part not in PARTS]:
        raise BadParameter(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    numbers = {"limit": limit, "max_new_tokens": max_new_tokens, "repeats": repeats, "steps": steps, "seeds": seeds}
    for name, value in numbers.items():
        if value < 1:
            raise BadParameter(f"{name}={value} is not allowed; it must be at least 1")
    if temperature < 0:
        raise BadParameter(f"temperature={temperature} is not allowed; it must be at least 0, which is greedy")
    place = None if trained is None else Path(trained).expanduser()
    if place is not None and not place.is_dir():
        raise BadParameter(f"no folder {str(trained)!r}; name the one that holds mtp, ftp, hamburger and any-order")
    tasks = collect(None, list(workloads), limit=limit, seed=seed)
    bench = Bench(
        model, tokenizer, place, tasks, limit, max_new_tokens, repeats, temperature, draft, text, steps, seeds,
        controls, seed, progress,
    )  # fmt: skip
    partial = False
    try:
        for part in chosen:
            # It needs no weights, so what hinders it is what was given.
            bench.attempt(part, PARTS[part], must=part == "adaspec" and bool(parts))
    except KeyboardInterrupt:
        partial = True
    return DraftersBench(
        runs=tuple(bench.runs),
        tables=tuple(bench.tables),
        checks=tuple(bench.checks),
        skipped=tuple(bench.skipped),
        about={
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": describe_model(model),
            "machine": machine(model.device),
            "versions": versions(),
            "settings": {
                "parts": chosen, "workloads": list(workloads), **numbers, "temperature": temperature, "draft": draft,
                "controls": controls, "seed": seed,
            },
            "trained": bench.trained_as,
        },
        partial=partial,
    )  # fmt: skip
