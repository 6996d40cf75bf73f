"""What papers and cards promise of the policies, and whether it held; a comparison of which one side is missing is left
out. What mathematics promises is tested instead."""

import statistics
from collections.abc import Iterator, Sequence

from tokenry.errors import TokenryError

from ..decoding import Ordered, Promise, judged, ordered
from . import quality
from .bits import BITS
from .engine import BASELINES, PLAIN, drops, policies
from .results import Figure
from .timing import FASTER, OPERATIONS, SAVERS, STEP, TIME

FLAT = 1.2
"""Most that a step may take behind the longest context, over one behind the shortest, where it costs O(budget)."""

RATIO = 3.0
"""Fewest steps that an evicting policy makes in the time of one of the full cache, behind the longest context."""

LONG, SHORTEST = 32768, 4096
"""Lengths between which the two are stated."""

_SMALL = "a small model attends to few tokens sharply, and its scores are coarse"
_BEHIND = "the prompts here are short beside the papers', so that the newest tokens are much of the budget"
_RECENT = "bits per byte are decided by the newest tokens, of which it holds fewer"
_FIRST = "it judges by what was looked at before, and these tasks ask for what nobody has looked at yet"

_ABOVE = (
    # ahead, behind, whether equality is too little, what can cause it otherwise
    ("h2o", "random", True, _FIRST),
    ("h2o", "sinks", True, _FIRST),
    ("keyformer", "sinks", True, _FIRST),
    ("treekv", "sinks", True, _BEHIND),
    ("treekv", "kvpress: TOVA", True, "its card claims this of long streams at rolling positions"),
    ("fasa", "snapkv", True, "its planes are few in heads of this size"),
    ("fasa", "h2o", True, "its planes are few in heads of this size"),
    ("fasa", "sinks", True, "its planes are few in heads of this size"),
    ("sentencekv", "snapkv", False, "code has few sentences, so its groups are long"),
    ("sentencekv", "random", True, "code has few sentences, so its groups are long"),
    ("icecache", "random", True, "its first and newest pages are much of a small budget"),
    ("spatten", "random", True, f"{_FIRST}, and what one layer drops all behind it lack"),
    ("fastkv", "random", True, _SMALL),
    ("fastkv", "fastkv:layer=0", True, _SMALL),
    ("lazyllm", "lazyllm:revive=false", False, "answers of a few tokens seldom want what the prompt's end did not"),
    ("lazyllm:layers=(3)", "lazyllm:layers=(1)", False, _SMALL),
    ("oracle", "sentencekv", False, _SMALL),
    ("oracle", "fasa", False, _SMALL),
    ("oracle", "icecache", False, _SMALL),
)
"""Orderings at equal slots, by the mean score over tasks and shares."""

_TIGHT = (("dapq", "snapkv", True, _SMALL), ("snapkv", "h2o", True, _SMALL), ("dapq", "sinks", True, _SMALL))
"""Orderings at the smallest share alone: at generous ones all meet."""

_PAIRS_OF_BITS = (
    ("h2o", "random", True, "bits per byte are decided by the newest tokens, which both hold"),
    ("h2o", "sinks", True, "bits per byte are decided by the newest tokens, of which sinks hold more"),
    ("keyformer", "sinks", True, "bits per byte are decided by the newest tokens, of which sinks hold more"),
    ("treekv", "sinks", False, "within the trained length nothing far is missed yet"),
    ("treekv", "h2o", False, "within the trained length nothing far is missed yet"),
    ("treekv:positions=rolling", "sinks:positions=rolling", False, _RECENT),
    ("treekv:positions=rolling", "h2o:positions=rolling", False, _RECENT),
    ("treekv:guided=false;positions=rolling", "h2o:positions=rolling", False, _RECENT),
    ("treekv:positions=rolling", "treekv:guided=false;positions=rolling", False, _RECENT),
    ("fasa", "h2o", True, "its planes are few in heads of this size"),
    ("oracle", "fasa", False, _SMALL),
)
"""Orderings by bits per byte, less is better."""


def checked(figures: Sequence[Figure]) -> list[Ordered]:
    """Every check that the figures allow."""
    return [*_quality(figures), *_bits(figures), *_time(figures), *_prefill(figures)]


def _quality(figures: Sequence[Figure]) -> Iterator[Ordered]:
    scored = [each for each in figures if each.part == "quality" and each.form == "score"]
    for group in (quality.AGNOSTIC, quality.AWARE):
        overall = f"{quality.AVERAGE}, {group}, over all shares"
        promises = [
            _promise(f"{one}-above-{other}, {group}", "quality", f"{one} {_verb(strict)} {other}, {group}", overall,
                     one, other, strict, otherwise)
            for one, other, strict, otherwise in _ABOVE
        ]  # fmt: skip
        mine = [each for each in scored if each.figure.startswith(overall)]
        others = [each for each in mine if each.way not in (PLAIN, quality.NONE)]
        if others:
            best = max(others, key=lambda each: each.mean)
            promises.append(
                _promise(f"plain-above-all, {group}", "quality",
                         f"the full cache answers no worse than what keeps less (at best {best.way}), {group}", overall,
                         PLAIN, best.way, False, "an answer that was wrong with all tokens may come right without some")
            )  # fmt: skip
        yield from ordered(mine, promises)
        shares = dict.fromkeys(each.budget for each in scored if each.group == group and each.budget)
        if shares:
            tight = min(shares, key=lambda share: float(share.rstrip("%")))
            figure = f"{quality.AVERAGE}, {group}, {tight}"
            promises = [
                _promise(f"{one}-above-{other}-at-{tight}, {group}", "quality",
                         f"{one} {_verb(strict)} {other} at {tight}, {group}", figure, one, other, strict, otherwise)
                for one, other, strict, otherwise in _TIGHT
            ]  # fmt: skip
            yield from ordered(scored, promises)
        yield from _beside_kvpress(figures, mine, group)


def _beside_kvpress(figures: Sequence[Figure], mine: Sequence[Figure], group: str) -> Iterator[Ordered]:
    """Our best policy against kvpress's best: of the papers' that hold no more than their share, with the baselines, of
    which two are presses too, and of all but the ceiling."""
    theirs = [each for each in mine if each.way.startswith("kvpress: ") and each.way != quality.NONE]
    ours = [each for each in mine if each.way.partition(":")[0] not in (PLAIN, "kvpress", "oracle")]
    holding = [each for each in ours if not _retrieves(each.way) and _within(figures, each.way, group)]
    papers = [each for each in holding if each.way.partition(":")[0] not in BASELINES]
    for name, side, what in (
        ("ours-above-kvpress", papers, "of the papers that hold no more than their share"),
        ("ours-above-kvpress-with-baselines", holding, "that hold no more than their share, baselines among them"),
        ("ours-above-kvpress-with-all", ours, "those that hold everything and attend to their share among them"),
    ):
        if side and theirs:
            best, other = (max(each, key=lambda figure: figure.mean) for each in (side, theirs))
            promise = _promise(
                f"{name}, {group}", "quality",
                f"the best of Tokenry's policies ({best.way}), {what}, is at least as good as kvpress's best "
                f"({other.way}), {group}", best.figure, best.way, other.way, False,
                "KeyDiff keeps the keys that differ most from their mean, which no paper here does; the baseline "
                "keydiff does",
            )  # fmt: skip
            yield from ordered(mine, [promise])


def _within(figures: Sequence[Figure], way: str, group: str) -> bool:
    """Whether a method held no more than its share when answers began; half a slot in a hundred is rounding."""
    kept = [each for each in figures if (each.part, each.group, each.way) == ("quality", f"{group}, share kept", way)]
    return all(each.budget and each.mean <= float(each.budget.rstrip("%")) / 100 + 0.005 for each in kept)


def _retrieves(way: str) -> bool:
    try:
        return not drops(policies([way])[0])
    except TokenryError:
        return False


def _bits(figures: Sequence[Figure]) -> Iterator[Ordered]:
    mine = [each for each in figures if each.part == "bits"]
    for budget in dict.fromkeys(each.budget for each in mine if each.budget):
        # Plain has no budget; beside each it stands as the full cache.
        group = next(each.group for each in mine if each.budget == budget)
        figure = f"{BITS}, {group}, {budget}"
        beside = [each for each in mine if each.budget == budget]
        promises = [
            _promise(f"{one}-below-{other}, {budget}", "bits", f"{one} needs {_fewer(strict)} bits than {other}",
                     figure, one, other, strict, otherwise, smaller=True)
            for one, other, strict, otherwise in _PAIRS_OF_BITS
        ]  # fmt: skip
        yield from ordered(beside, promises)


def _time(figures: Sequence[Figure]) -> Iterator[Ordered]:
    timed = {(each.group, each.way, each.column): each for each in figures if each.part == "time"}
    for label in sorted({label for _, label, column in timed if column == f"{LONG:,}"} - {PLAIN}):
        short, long = (timed.get((STEP, label, f"{length:,}")) for length in (SHORTEST, LONG))
        if short and long:
            statement = (
                f"a step of {label} takes at most {FLAT} times as long behind {LONG:,} tokens as behind {SHORTEST:,}"
            )
            measured = {each.column: each.spread.median for each in (short, long)}
            # Rounds at two lengths are no pairs: the spread is that of the long ones over the median of the short.
            ratios = [value / short.spread.median for value in long.values]
            yield _bounded(f"{label}-flat", statement, STEP, measured, ratios, most=FLAT)
        faster = timed.get((FASTER, label, f"{LONG:,}"))
        if faster:
            statement = f"{label} makes at least {RATIO:g} steps behind {LONG:,} tokens while the full cache makes one"
            yield _bounded(
                f"{label}-faster", statement, FASTER, {label: faster.spread.median}, faster.values, least=RATIO
            )


def _prefill(figures: Sequence[Figure]) -> Iterator[Ordered]:
    for each in figures:
        if each.part == "prefill" and each.way.partition(":")[0] in SAVERS and each.column in (OPERATIONS, TIME):
            reason = "what is saved in products is spent on choosing, copying and calls" if each.column == TIME else ""
            manner = "with fewer operations" if each.column == OPERATIONS else "in less time"
            statement = f"{each.way} reads a prompt {manner} than the model alone"
            yield _bounded(
                f"{each.way}-saves-{each.column}", statement, each.figure, {each.way: each.spread.median}, each.values,
                most=1.0, reason=reason,
            )  # fmt: skip


def _bounded(
    name: str,
    statement: str,
    figure: str,
    measured: dict[str, float],
    values: Sequence[float],
    *,
    most: float | None = None,
    least: float | None = None,
    reason: str = "",
) -> Ordered:
    """A bound on the median of some values; the difference is what is left to it."""
    left = [most - value for value in values] if most is not None else [value - (least or 0.0) for value in values]
    return judged(name, statement, figure, measured, left, gap=statistics.median(left), otherwise=reason)


def _promise(
    name: str, part: str, statement: str, figure: str, ahead: str, behind: str, strict: bool, otherwise: str,
    smaller: bool = False,
) -> Promise:  # fmt: skip
    return Promise(
        name=name, part=part, statement=statement, figure=figure, ahead=ahead, behind=behind, strict=strict,
        smaller=smaller, otherwise=otherwise,
    )  # fmt: skip


def _verb(strict: bool) -> str:
    return "answers better than" if strict else "answers no worse than"


def _fewer(strict: bool) -> str:
    return "fewer" if strict else "no more"
