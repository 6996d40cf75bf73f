"""HAMburger: by confidence what groups gain and cost, and the drafter that another model verifies."""

import itertools
from typing import Any

from tokenry.speculation.hamburger import HamburgerModel
from tokenry.speculation.hamburger.training import report

from ..running import collect
from .engine import Bench
from .results import Table

CONFIDENCES = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Highest first; 1 is the fine-tuned base alone."""


def measure(bench: Bench) -> None:
    """By confidence what groups gain and cost, on tasks with answers; the drafter that another model verifies."""
    place = bench.trained("hamburger")
    whole = HamburgerModel.load(place, bench.model)
    bench.note("hamburger", whole, place)
    given = {"weights": whole}
    scored = dict(bench.tasks)
    if "arithmetic" not in scored:
        scored |= collect(None, ["arithmetic"], limit=bench.limit, seed=bench.seed)
    run = bench.compared(["hamburger", "hamburger:lossless=true"], given, scored)
    if bench.temperature:
        return
    for task, group in scored.items():
        with bench.saying(f"groups · {task}"):
            found = report(
                bench.model, bench.tokenizer, group, confidences=CONFIDENCES, max_new_tokens=bench.max_new_tokens,
                resources=given,
            )  # fmt: skip
        _groups(bench, task, found, run.row("plain", task).quality)


def _groups(bench: Bench, task: str, found: list[dict[str, Any]], plain: float | None) -> None:
    rows: list[dict[str, Any]] = [
        {
            "confidence": "plain, before", "tokens a step": 1.0, "cache entries a token": 1.0,
            "tokens in larger groups": 0.0, "score": plain,
        }
    ]  # fmt: skip
    for each in found:
        tokens = sum(size * count for size, count in enumerate(each["groups"], 1))
        rows.append(
            {
                "confidence": f"{each['confidence']:g}",
                "tokens a step": each["tokens_per_macro_step"],
                "cache entries a token": each["kv_entries_per_token"],
                "tokens in larger groups": 1 - each["groups"][0] / max(1, tokens),
                "score": each["score"],
                "agreement": each["agreement"],
                **{f"groups of {size}": count for size, count in enumerate(each["groups"], 1)},
            }
        )
    bench.tables.append(
        Table(
            part="hamburger",
            method="hamburger",
            title=f"hamburger, by confidence · {task}",
            rows=tuple(rows),
            note="Greedy; what it writes is not what the model would have written. Confidence 1 is the fine-tuned "
            "base alone: part of a difference from plain is what fine-tuning on this text does to it. tokens in "
            "larger groups: share of those in groups of 2 and more. agreement: share of the tokens before the first "
            "that differs from confidence 1.",
        )
    )
    steps = [each["tokens_per_macro_step"] for each in found]
    larger = sum(sum(each["groups"][1:]) for each in found if each["confidence"] == 1)
    bench.check(
        f"hamburger-one-token:{task}",
        f"at confidence 1 every group is one token ({task})",
        "larger groups",
        {"hamburger:confidence=1.0": larger},
        passed=larger == 0,
        reason="the stop head is not asked as it should be",
    )
    shorter = sum(after < before for before, after in itertools.pairwise(steps))
    bench.check(
        f"hamburger-rises:{task}",
        f"a lower confidence writes at least as many tokens a step ({task})",
        "confidences that write fewer than the one above",
        {"hamburger": shorter},
        passed=shorter == 0,
        reason="possibly because outputs go apart, and what follows is grouped otherwise",
    )
