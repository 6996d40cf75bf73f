"""Superposed Decoding: ten tokens behind fifteen of held-out functions; perplexity of drafts, and what they share."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from tokenry.decoding import Superposed
from tokenry.generation import GenerationResult
from tokenry.workloads import functions

from .engine import Bench, Tally, few, promised
from .results import SPEED

_PREFIX, _DRAFT = 15, 10  # tokens of prompts and drafts in the paper
_TIMED = 8  # prompts that speeds are measured on
_PERPLEXITY, _OVERLAP, _FORWARDS = "perplexity", "overlap of the drafts", "forwards a prompt"
_BEST, _APART = "best of the drafts", "best of as many separate drafts"

PROMISES = (
    promised("superposed-best-of-drafts", "the best of three drafts is no less likely than one nucleus draft",
             _PERPLEXITY, _BEST, "nucleus", smaller=True,
             otherwise="the mixture of embeddings leaves what a small model can read"),
    promised("superposed-cheaper", "all drafts together take fewer forwards than as many separate ones", _FORWARDS,
             _BEST, _APART, smaller=True, strict=True,
             otherwise="separate drafts ended at once, and superposed ones went on"),
    promised("superposed-first-above-last", "the first draft is likelier than the last", _PERPLEXITY, "draft 1",
             "draft 3", smaller=True, strict=True, otherwise="drafts are ranked by their scores, not by the model"),
    promised("superposed-overlap", "longer drafts have more in common", _OVERLAP, f"{2 * _DRAFT} tokens",
             f"{_DRAFT} tokens", otherwise="a small model's drafts fall together within ten tokens"),
)  # fmt: skip


def largest(bench: Bench) -> int:
    """The largest limit that the functions are enough for."""
    return len(_starts(bench)) // bench.seeds


def _starts(bench: Bench) -> list[list[int]]:
    starts = [bench.tokenizer(source)["input_ids"][:_PREFIX] for source in functions("test")]
    return [ids for ids in starts if len(ids) == _PREFIX]


def measure(bench: Bench) -> None:
    """Perplexity of a nucleus draft, of several, of a greedy one and of superposed ones; the overlap of the latter, and
    what they take beside as many separate ones."""
    starts = _starts(bench)
    order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(0)).tolist()
    parts = [[starts[i] for i in order[s * bench.limit : (s + 1) * bench.limit]] for s in range(bench.seeds)]

    def plain(way: str, **options: Any) -> None:
        tally = Tally()
        for seed, prompts in enumerate(parts):
            found = [n for result in bench.run(tally, prompts, "plain", seed=seed, max_new_tokens=_DRAFT, **options)
                     for n in nats(bench.model, result)]  # fmt: skip
            tally.values.append(math.exp(statistics.fmean(found)))
        bench.add("superposed", way, _PERPLEXITY, tally)

    def separate() -> None:
        best, cost = Tally(), Tally()
        for seed, prompts in enumerate(parts):
            before = best.passes
            drafted = Tally()
            found = [n for result in bench.run(drafted, several(prompts), "plain", seed=seed, max_new_tokens=_DRAFT,
                                               **nucleus)
                     for n in nats(bench.model, result)]  # fmt: skip
            # All drafts are paid for, and are the tokens of one.
            best.count(drafted.passes, drafted.tokens // Superposed().k, drafted.seconds)
            rows = [found[start : start + Superposed().k] for start in range(0, len(found), Superposed().k)]
            best.values.append(math.exp(statistics.fmean(min(row) for row in rows)))
            cost.values.append((best.passes - before) / len(prompts))
        noted(_APART, best, cost)

    def several(prompts: Sequence[Any]) -> list[Any]:
        return [prompt for prompt in prompts for _ in range(Superposed().k)]

    def noted(way: str, best: Tally, cost: Tally) -> None:
        bench.add("superposed", way, _PERPLEXITY, best, f"forwards and seconds of all {Superposed().k}")
        cost.count(best.passes, best.tokens, best.seconds)
        bench.add("superposed", way, _FORWARDS, cost)

    def drafts() -> None:
        method = Superposed()
        ranks, best, cost = [Tally() for _ in range(method.k)], Tally(), Tally()
        for prompts in parts:
            before = best.passes
            found = [n for result in bench.run(best, prompts, method, do_sample=False, max_new_tokens=_DRAFT)
                     for n in nats(bench.model, result)]  # fmt: skip
            rows = [found[start : start + method.k] for start in range(0, len(found), method.k)]
            best.values.append(math.exp(statistics.fmean(min(row) for row in rows)))
            cost.values.append((best.passes - before) / len(prompts))
            for rank, tally in enumerate(ranks):
                tally.values.append(math.exp(statistics.fmean(row[rank] for row in rows)))
        for rank, tally in enumerate(ranks, 1):
            bench.add("superposed", f"draft {rank}", _PERPLEXITY, tally)
        noted(_BEST, best, cost)

    def compared() -> None:
        some = few(parts[0], _TIMED)
        # As many tokens on both sides, so that speeds are those of whole sets of drafts.
        options = {"max_new_tokens": _DRAFT, "min_new_tokens": _DRAFT}

        def write(prompts: Sequence[Any], way: Any, tally: Tally, **chosen: Any) -> None:
            size = bench.batch_size * (Superposed().k if way == "plain" else 1)
            tokens = 0
            for result in bench.run(tally, prompts, way, batch_size=size, **options, **chosen):
                tokens += sum(map(len, result.new_tokens))
            tally.tokens = tokens

        bench.race(
            "superposed",
            lambda tally: write(several(some), "plain", tally, **nucleus),
            {"superposed-decoding": (
                lambda tally: write(some, Superposed(), tally, do_sample=False),
                f"plain writes the {Superposed().k} drafts of all prompts in one batch",
            )},
        )  # fmt: skip

    def overlap(length: int) -> None:
        method, tally = Superposed(), Tally()
        for prompts in parts:
            shared = [share for result in bench.run(tally, prompts, method, do_sample=False, max_new_tokens=length)
                      for share in overlaps(result.new_tokens, method.k)]  # fmt: skip
            tally.values.append(statistics.fmean(shared))
        bench.add("superposed", f"{length} tokens", _OVERLAP, tally)

    nucleus = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0}
    bench.attempt("nucleus", lambda: plain("nucleus", **nucleus))
    bench.attempt("greedy", lambda: plain("greedy", do_sample=False))
    bench.attempt(_APART, separate)
    bench.attempt("superposed-decoding", drafts)
    if "superposed-decoding" not in bench.skipped:
        bench.attempt(f"superposed-decoding: {SPEED}", compared)
    for length in (_DRAFT, 2 * _DRAFT):
        bench.attempt(f"superposed-decoding, {length} tokens", lambda length=length: overlap(length))  # type: ignore[misc]


@torch.no_grad()
def nats(model: Any, result: GenerationResult) -> list[float]:
    """Mean nats a new token of each row, as the model itself reads the row; all prompts are equally long."""
    assert result.sources is not None and result.prompt_length is not None
    ids: Any = result.sequences
    # What is behind a row's end is not counted.
    logs = model(ids[:, :-1]).logits[:, result.prompt_length - 1 :].float().log_softmax(-1)
    found = logs.gather(-1, ids[:, result.prompt_length :, None])[..., 0]
    real = (result.sources[:, result.prompt_length :] >= 0).to(found.device)
    return (-(found * real).sum(1) / real.sum(1).clamp(min=1)).tolist()


def overlaps(rows: Sequence[Sequence[int]], k: int) -> list[float]:
    """For each prompt the share of a draft's tokens that another draft has at the same place, mean over pairs."""
    found = []
    for start in range(0, len(rows), k):
        group = rows[start : start + k]
        pairs = [(a, b) for i, a in enumerate(group) for b in group[i + 1 :]]
        shares = [sum(x == y for x, y in zip(a, b, strict=False)) / max(len(a), len(b), 1) for a, b in pairs]
        found.append(statistics.fmean(shares) if shares else 1.0)
    return found
