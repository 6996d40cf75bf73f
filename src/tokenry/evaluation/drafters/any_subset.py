"""Any-subset speculative decoding: calls and filled holes beside filling one by one."""

from typing import Any

from tokenry.models import load
from tokenry.speculation.any_subset import AnySubset, report

from .engine import Bench
from .results import Table

_WAYS = ("one by one", "own drafts", "bigram drafts")  # what the report fills with, in its order


def measure(bench: Bench) -> None:
    """Calls and filled holes beside sequential filling, greedy and sampled."""
    place = bench.trained("any-order")
    whole, own = load(place, device=bench.model.device)
    bench.note("any-subset", whole, place)
    count = 3 * bench.limit
    for temperature in (0.0, 1.0):
        with bench.saying(f"filling at temperature {temperature:g}"):
            found = report(whole, own, count=count, temperature=temperature, seed=bench.seed)
        _filled(bench, found, temperature)


def _filled(bench: Bench, found: list[dict[str, Any]], temperature: float) -> None:
    greedy = temperature == 0
    how = "greedy" if greedy else f"sampled at temperature {temperature:g}"
    rows = [
        {
            "way": name,
            "calls a token": each["calls_per_token"],
            "most in a text": max(each["calls_per_token_by_text"]),
            "tokens a round": each["tokens_per_round"],
            "exact match": each["exact_match"],
            "ms a token": 1000 * each["seconds_per_token"],
            "filled otherwise": each["different"] if greedy else None,
        }
        for name, each in zip(_WAYS, found, strict=True)
    ]
    texts, tokens = found[0]["texts"], found[0]["tokens"]
    method = AnySubset.slug
    bench.tables.append(
        Table(
            part="any-subset",
            method=method,
            title=f"{method} · {how} · {texts} texts with a line of {tokens / texts:.0f} tokens missing",
            rows=tuple(rows),
            note="The number of missing tokens is given. filled otherwise: texts that are not filled as one by one "
            "fills them; greedily that takes a near tie. "
            "own drafts: 5 places a round. One text at a time.",
        )
    )
    own = found[1]
    more = sum(calls > 1 for calls in own["calls_per_token_by_text"])
    bench.check(
        f"assd-calls:{how}",
        f"own drafts never take more calls than tokens ({how})",
        "texts that take more",
        {_WAYS[1]: more},
        passed=more == 0,
        reason="the first draft of a round was rejected: draft and oracle masks disagree",
    )
    bench.ratio(
        f"assd-fewer-calls:{how}",
        f"own drafts take fewer calls than one by one ({how}; ratio of tokens to calls)",
        "tokens a call",
        {_WAYS[1]: 1 / own["calls_per_token"], _WAYS[0]: 1 / found[0]["calls_per_token"]},
        [1 / calls for calls in own["calls_per_token_by_text"]],
        strict=True,
        reason="possibly because the model was trained too shortly to draft what it would write",
    )
    if greedy:
        differing = {name: each["different"] for name, each in zip(_WAYS[1:], found[1:], strict=True)}
        bench.check(
            "assd-same-filling",
            "greedily, drafts fill in what one by one fills in",
            "texts filled otherwise",
            differing,
            passed=not any(differing.values()),
            reason="rounding decides near ties otherwise where several places are read at once",
        )
