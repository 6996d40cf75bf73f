"""What any-subset speculative decoding saves and what it fills in, beside sequential filling with the same model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from tokenry.generation.infill import InfillResult, fill
from tokenry.generation.result import Stats
from tokenry.models import context_length
from tokenry.speculation.any_subset.sampler import AnySubset
from tokenry.workloads import Example, examples, infill


@dataclass(frozen=True)
class Figures:
    """One method on one workload.

    Attributes:
        method: Its text form.
        texts: Texts filled.
        tokens: Tokens filled in.
        calls_per_token: Model calls a token, each counted once for each text.
        tokens_per_round: Tokens filled in by a verified round, None where nothing was verified.
        exact_match: Share of the texts whose hole was filled with what stood there.
        different: Texts filled otherwise than by the first method.
        seconds: Time of all texts.
        seconds_per_token: Median over texts.
        calls_per_token_by_text: Model calls a token of each text.
    """

    method: str
    texts: int
    tokens: int
    calls_per_token: float
    tokens_per_round: float | None
    exact_match: float
    different: int
    seconds: float
    seconds_per_token: float
    calls_per_token_by_text: tuple[float, ...]


def report(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    count: int = 50,
    lines: int = 1,
    k: int = 5,
    temperature: float = 0.0,
    seed: int = 0,
    methods: Sequence[AnySubset] | None = None,
) -> list[dict[str, Any]]:
    """Fill the `infill` workload sequentially, with own drafts and with bigram drafts; texts are filled one by one.

    The number of tokens is that of the text that stood in the hole: it must be known to fill at all.

    Args:
        model: An any-subset model.
        tokenizer: Its tokenizer.
        count: Texts.
        lines: Lines masked in each.
        k: Places drafted a round.
        temperature: 0 is greedy, where all three fill in the same.
        seed: Of the workload, and of sampling.
        methods: Others than these three.

    Returns:
        The fields of `Figures` for each method.
    """
    base = {"temperature": temperature}
    chosen = methods or [
        AnySubset(k=1, **base),  # type: ignore[arg-type]
        AnySubset(k=k, **base),  # type: ignore[arg-type]
        AnySubset(k=k, drafter="bigram", **base),
    ]
    chosen_examples = _fitting(model, tokenizer, examples("infill", 4 * count, seed=seed, lines=lines))[:count]
    tasks = [(example, infill.with_masks(example, tokenizer)) for example in chosen_examples]
    found: dict[AnySubset, list[tuple[InfillResult, float]]] = {method: [] for method in chosen}
    fill(model, tokenizer, tasks[0][1], method=chosen[0], seed=seed)  # warms up
    # Methods take turns, so that a change of the machine's speed meets all of them.
    for number, (example, text) in enumerate(tasks):
        for method, results in found.items():
            result = fill(model, tokenizer, text, method=method, seed=seed + number)
            results.append((result, example.check(result.holes()[0][0])))
    first = _filled(found[chosen[0]])
    return [asdict(_figures(method, results, first)) for method, results in found.items()]


def _fitting(model: PreTrainedModel, tokenizer: Any, found: list[Example]) -> list[Example]:
    """The examples that fit the model's context."""
    context = context_length(model)
    if context is None or context < 0:  # XLNet says -1 for no limit
        return found
    return [task for task in found if len(tokenizer(infill.with_masks(task, tokenizer))["input_ids"]) <= context]


def _filled(results: list[tuple[InfillResult, float]]) -> list[list[int]]:
    """The ids of each text."""
    return [result.sequences[0].tolist() for result, _ in results if result.sequences is not None]


def _figures(method: AnySubset, results: list[tuple[InfillResult, float]], first: list[list[int]]) -> Figures:
    stats = [result.stats for result, _ in results if result.stats is not None]
    total = Stats.total(stats)
    return Figures(
        str(method),
        len(results),
        total.committed,
        total.passes / total.committed,
        total.verified / total.steps if total.steps else None,
        statistics.fmean(score for _, score in results),
        sum(mine != its for mine, its in zip(_filled(results), first, strict=True)),
        total.seconds,
        statistics.median(part.seconds / part.committed for part in stats),
        tuple(part.passes / part.committed for part in stats),
    )
