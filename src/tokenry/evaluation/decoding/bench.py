"""The parts of the bench together."""

from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from types import ModuleType
from typing import Any

from rich.console import Console

from tokenry.errors import BadParameter

from ..environment import describe_model, machine, versions
from . import byte_view, cntp, navigation, r2r, skipdecode, superposed
from .engine import Bench
from .named import resolve
from .results import SEEDS, DecodingBench, ordered

PARTS: dict[str, ModuleType] = {
    "cntp": cntp,
    "r2r": r2r,
    "skipdecode": skipdecode,
    "superposed": superposed,
    "navigation": navigation,
    "bytes": byte_view,
}
"""Each a module with `PROMISES` and `measure`."""

PROMISES = tuple(promise for part in PARTS.values() for promise in part.PROMISES)
"""What is promised; a comparison of which one side was not measured is left out."""


_POOLS = {"skipdecode": skipdecode, "superposed": superposed, "bytes": byte_view}
"""Parts whose texts are counted; each module has `largest`, the largest limit that they are enough for."""


def chosen_parts(parts: Sequence[str] | None) -> list[str]:
    """The names of the parts to be measured, each once; all where none is named."""
    chosen = list(dict.fromkeys(parts or PARTS))
    if unknown := [part for part in chosen if part not in PARTS]:
        raise BadParameter(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return chosen


def bench_decoding(
    model: Any,
    tokenizer: Any,
    *,
    parts: Sequence[str] | None = None,
    limit: int = 20,
    seeds: int = SEEDS,
    small: str | None = None,
    tuned: str | None = None,
    tuned_early: str | None = None,
    partner: str | None = None,
    batch_size: int = 32,
    resources: dict[str, Any] | None = None,
    progress: bool = True,
) -> DecodingBench:
    """Measure the decoders on the bundled tasks and check the orderings that their papers promise.

    Interrupted by Ctrl-C, it returns what is measured so far, marked as partial. What was named is loaded first; only
    what was left to its default may be missing, and is then skipped with the reason.

    Args:
        model: A causal model; the tasks are those that the bundled ones were trained on.
        tokenizer: Its tokenizer.
        parts: Of `PARTS`; by default all.
        limit: Prompts, rows or contexts of each seed; a quarter as many lines, each of which is some twenty prompts.
        seeds: Values of each figure; below 5 no ordering should be claimed.
        small: R2R's small model, by default `tokenry/code-draft`.
        tuned: Folder of a model that was fine-tuned for SkipDecode; by default where `tokenry train skipdecode` writes.
            The schedule is the one that its `training.json` names.
        tuned_early: Folder of one that was fine-tuned for early exit, with as many layers at every token.
        partner: A model with another tokenizer, for the ensemble of bytes.
        batch_size: Prompts that run together.
        resources: Second models and the like that are loaded already, by name.
        progress: Say on a terminal what is measured.

    Raises:
        BadParameter: A part is not known, a number is too small, there are too few texts for `limit` and `seeds`, or a
            folder holds no model that was fine-tuned as it has to be.
        ResourceError: A model that was named does not load, or does not fit.
    """
    chosen = chosen_parts(parts)
    for name, value, least in (("limit", limit, 1), ("seeds", seeds, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise BadParameter(f"{name}={value} is not allowed; it must be at least {least}")
    named = resolve(model, tokenizer, small=small, tuned=tuned, tuned_early=tuned_early, partner=partner)
    console = Console(stderr=True)
    partial = False
    with console.status("") if progress and console.is_terminal else nullcontext() as status:

        def say(what: str) -> None:
            if status is not None:
                status.update(what)

        bench = Bench(model, tokenizer, limit, seeds, named, batch_size, say, dict(resources or {}))
        for part in chosen:
            if part in _POOLS and limit > (most := _POOLS[part].largest(bench)):
                raise BadParameter(
                    f"limit={limit} with seeds={seeds} is not allowed; {part} has texts for a limit of {most} with so "
                    "many seeds: lower one of them, or leave the part out"
                )
        try:
            for part in chosen:
                bench.attempt(part, lambda part=part: PARTS[part].measure(bench))  # type: ignore[misc]
        except KeyboardInterrupt:
            partial = True
    return DecodingBench(
        figures=tuple(bench.figures),
        checks=(*ordered(bench.figures, PROMISES), *bench.checks),
        skipped=bench.skipped,
        about={
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": describe_model(model),
            "machine": machine(model.device),
            "versions": versions(),
            "beside": bench.beside,
            "settings": {"parts": chosen, "limit": limit, "seeds": seeds, "batch_size": batch_size},
        },
        partial=partial,
    )  # fmt: skip
