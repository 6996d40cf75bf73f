"""R2R on worked arithmetic, greedy: answers right when a router, entropy or chance sends tokens to the model."""

import dataclasses
import statistics
from typing import Any

from tokenry.methods import method as read_method
from tokenry.models import resource
from tokenry.workloads import examples

from .engine import ACCURACY, Bench, Tally, promised

SHARES = (0.1, 0.3)
"""Of the tokens that the large model writes."""


def _routed(rule: str, share: float) -> str:
    return f"r2r:share={share}" if rule == "router" else f"r2r:rule={rule};share={share}"


PROMISES = (
    *(
        promise
        for share in SHARES
        for promise in (
            promised(f"r2r-above-entropy-{share}", f"the router beats entropy at a calibrated share of {share}",
                     ACCURACY, _routed("router", share), _routed("entropy", share), strict=True,
                     otherwise="the router learned from few labels, or the shares reached on this text differ"),
            promised(f"r2r-entropy-above-random-{share}", f"entropy beats random routing at a share of {share}",
                     ACCURACY, _routed("entropy", share), _routed("random", share), strict=True,
                     otherwise="where the small model errs, its entropy need not be high"),
        )
    ),
    promised("r2r-rises", "the router's answers get better with the large model's share", ACCURACY,
             _routed("router", SHARES[1]), _routed("router", SHARES[0]),
             otherwise="one token of the large model need not mend a path that the small one goes on with"),
)  # fmt: skip


def measure(bench: Bench) -> None:
    """Right answers of the model, of the small one alone, and of each rule at each share."""
    ways = [_routed(rule, share) for share in SHARES for rule in ("router", "entropy", "random")]
    for way in ("plain", *ways, "r2r:rule=random;threshold=2.0"):
        bench.attempt(way, lambda way=way: _answer(bench, way))  # type: ignore[misc]


def _answer(bench: Bench, way: str) -> None:
    method: Any = read_method(way)
    if way != "plain":
        method = dataclasses.replace(method, small=bench.small)
    tally, large = Tally(), 0.0
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 96}
    for seed in range(bench.seeds):
        tasks = examples("arithmetic", bench.limit, seed=seed)
        texts: list[str] = []
        for result in bench.run(tally, [task.prompt for task in tasks], method, seed=seed * 1_000_003, **options):
            texts += result.texts(bench.tokenizer)
            assert result.stats is not None
            large += result.stats.extra.get("share", 1.0) * result.stats.committed
        tally.values.append(statistics.fmean(task.check(text) for task, text in zip(tasks, texts, strict=True)))
    if way != "plain" and "small" not in bench.beside:
        bench.note("small", resource(bench.resources.get("small", bench.small), bench.model))
    bench.add("r2r", way, ACCURACY, tally, f"share of the model {large / max(1, tally.tokens):.0%}")
