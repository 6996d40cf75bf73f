"""R2R on worked arithmetic, greedy: answers right when a router, entropy or chance sends tokens to the model."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from tokenry.decoding.r2r import Router
from tokenry.methods import method as read_method
from tokenry.models import loaded_name, resource, trained_folder
from tokenry.workloads import examples

from .engine import ACCURACY, Bench, Tally, promised

SHARES = (0.1, 0.3)
"""Of the tokens that the large model writes, as a router was calibrated to; what is reached stands in the figures."""

_SHARE, _SIZE, _SAME = "share of the model", "million parameters a token", "answers that are the model's own"
_LARGE, _ALL, _NONE = "plain", "r2r:rule=random;share=1.0", "r2r:rule=random;threshold=2.0"


def _routed(rule: str, share: float) -> str:
    return f"r2r:share={share}" if rule == "router" else f"r2r:rule={rule};share={share}"


PROMISES = (
    *(
        promise
        for share in SHARES
        for promise in (
            promised(f"r2r-above-entropy-{share}", f"the router beats entropy, both calibrated to a share of {share}",
                     ACCURACY, _routed("router", share), _routed("entropy", share), strict=True,
                     otherwise="the router learned from few labels, or the shares reached on this text differ"),
            promised(f"r2r-entropy-above-random-{share}", f"entropy calibrated to a share of {share} beats chance",
                     ACCURACY, _routed("entropy", share), _routed("random", share), strict=True,
                     otherwise="where the small model errs, its entropy need not be high"),
        )
    ),
    promised("r2r-rises", "the router's answers get better with the large model's share", ACCURACY,
             _routed("router", SHARES[1]), _routed("router", SHARES[0]),
             otherwise="one token of the large model need not mend a path that the small one goes on with"),
    promised("r2r-all", "at a share of 1 the answers are the large model's, token for token", _SAME, _ALL, _LARGE,
             otherwise="in half precision near ties fall otherwise where tokens are read in other pieces"),
)  # fmt: skip


def measure(bench: Bench) -> None:
    """Right answers of the model, of the small one alone, and of each rule at each share; what the router was trained
    to tell."""
    ways = [_routed(rule, share) for share in SHARES for rule in ("router", "entropy", "random")]
    own: dict[int, list[list[int]]] = {}
    for way in (_LARGE, *ways, _ALL, _NONE):
        bench.attempt(way, lambda way=way: _answer(bench, way, own))  # type: ignore[misc]
    if ways[0] not in bench.skipped:
        bench.attempt("AUC of the router", lambda: _told_apart(bench))


def _answer(bench: Bench, way: str, own: dict[int, list[list[int]]]) -> None:
    """Answers of one way; `own` has those of the model itself by seed, once they are there."""
    method: Any = read_method(way)
    if way != _LARGE:
        method = dataclasses.replace(method, small=bench.named.small)
    tally, small = Tally(), 0.0
    found: dict[str, list[float]] = {_SHARE: [], _SIZE: [], _SAME: []}
    whole = sum(parameter.numel() for parameter in bench.model.parameters())
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 96}
    for seed in range(bench.seeds):
        tasks = examples("arithmetic", bench.limit, seed=seed)
        texts: list[str] = []
        tokens: list[list[int]] = []
        large = size = 0.0
        before = tally.tokens
        for result in bench.run(tally, [task.prompt for task in tasks], method, seed=seed * 1_000_003, **options):
            texts += result.texts(bench.tokenizer)
            tokens += result.new_tokens
            assert result.stats is not None
            extra, count = result.stats.extra, result.stats.committed
            large += extra.get("share", 1.0) * count
            size += extra.get("activated_parameters", whole) * count
            # Its forwards are counted once a batch, which takes as many as its longest row.
            small += extra.get("small_forwards", 0) / max(1, *map(len, result.new_tokens)) * count
        count = tally.tokens - before
        if way == _LARGE:
            own[seed] = tokens
        tally.values.append(statistics.fmean(task.check(text) for task, text in zip(tasks, texts, strict=True)))
        found[_SHARE].append(large / count)
        found[_SIZE].append(size / count / 1e6)
        if seed in own:
            found[_SAME].append(statistics.fmean(a == b for a, b in zip(tokens, own[seed], strict=True)))
    if way != _LARGE and "small" not in bench.beside:
        bench.note("small", resource(bench.resources.get("small", bench.named.small), bench.model))
    note = (
        f"share of the model {statistics.fmean(found[_SHARE]):.1%}, "
        f"{small / tally.tokens:.2f} forwards of the small model a token, "
        f"{statistics.fmean(found[_SIZE]):.2f}M parameters a token"
    )
    bench.add("r2r", way, ACCURACY, tally, note)
    for figure, values in found.items():
        if figure != _SAME or way in (_LARGE, _ALL):
            bench.add("r2r", way, figure, Tally(values, tally.passes, tally.tokens, tally.seconds))


def _told_apart(bench: Bench) -> None:
    """What its trainer measured of the router on positions that were held out, where it says so."""
    given = bench.resources.get("router")
    if isinstance(given, Router):
        note = given.note.get("training", {})
    else:
        folder = Path(given or trained_folder("router", loaded_name(bench.model)))
        path = folder / "training.json"
        note = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = note.get("auc")
    if not found:
        bench.skipped["AUC of the router"] = "the router's training.json has none"
        return
    router, entropy = float(found["router"]), float(found["entropy"])
    known = ", ".join(f"{name}: {note[name]}" for name in ("positions", "divergent") if name in note)
    for name, statement, ahead, behind in (
        ("r2r-auc-router", "the router tells divergent tokens better than entropy", ("router", router),
         ("entropy", entropy)),
        ("r2r-auc-entropy", "entropy tells divergent tokens better than chance", ("entropy", entropy), ("chance", 0.5)),
    ):  # fmt: skip
        bench.check(
            name, statement, "AUC on held-out positions", dict((ahead, behind)), [ahead[1] - behind[1]], strict=True,
            noted=[known] if known else [],
            otherwise="few of the positions are divergent, or the router learned from few",
        )  # fmt: skip
