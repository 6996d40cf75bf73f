"""The byte view on lines of held-out functions: completed and filled in from every byte, and bits of an ensemble."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tokenry.decoding import ByteEnsemble, ByteView
from tokenry.errors import BadParameter
from tokenry.models import load
from tokenry.workloads import functions

from .engine import Bench, Tally, promised
from .results import SPEED

_LINE = 40  # bytes of a line of code that is cut
_BLANKS = " " * 8
# No line that is cut holds such a run; a text of blanks alone would take a forward for each of hundreds.
_STOPS = ["\n", _BLANKS]
_SCORE, _BITS = "exact match", "bits per byte"
_PLAIN, _HEALED = "plain", "transformers, token_healing"
_BYTES, _BY_TOKEN = "exact-byte-probabilities", "exact-byte-probabilities:unit=token"

PROMISES = (
    *(
        promise
        for task, holes in (("completion", "code cut"), ("infill", "holes cut"))
        for promise in (
            promised(f"bytes-above-tokens-{task}", f"{holes} at any byte: the byte view is right more often than plain "
                     "tokens", _SCORE, f"{_BYTES}, {task}", f"{_PLAIN}, {task}", strict=True),
            promised(f"bytes-by-token-above-tokens-{task}", f"{holes} at any byte: the byte view, choosing tokens, is "
                     "right more often than plain tokens", _SCORE, f"{_BY_TOKEN}, {task}", f"{_PLAIN}, {task}",
                     strict=True),
        )
    ),
    promised("bytes-above-healing", "the byte view completes at least as well as transformers' token healing", _SCORE,
             f"{_BYTES}, completion", f"{_HEALED}, completion",
             otherwise="the likeliest byte can begin many unlikely tokens, and the likeliest token begin with another"),
    promised("bytes-by-token-above-healing", "the byte view, choosing tokens, is at least as good as token healing",
             _SCORE, f"{_BY_TOKEN}, completion", f"{_HEALED}, completion"),
    promised("bytes-ensemble", "an ensemble needs at most the mean of its members' bits", _BITS, "ensemble",
             "mean of the members", smaller=True),
    promised("bytes-ensemble-above-better", "an ensemble needs no more bits than its better member", _BITS, "ensemble",
             "better member", smaller=True, otherwise="a much weaker member costs more than it adds"),
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A line of a function between what comes before and after it."""

    before: str
    text: str
    after: str

    @property
    def cuts(self) -> list[tuple[str, str]]:
        """Text up to each byte behind the indentation, and the rest of the line; code here is ASCII."""
        start = len(self.text) - len(self.text.lstrip())
        return [(self.before + self.text[:cut], self.text[cut:]) for cut in range(start + 1, len(self.text))]


def lines(count: int) -> list[Line]:
    """One line of each of some held-out functions: at most 40 bytes, and two lines before it."""
    found = []
    pool = functions("test")
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0)).tolist()
    for index in order:
        rows = pool[index].split("\n")
        fitting = [
            i for i in range(2, len(rows) - 1) if 8 <= len(rows[i].strip()) <= _LINE and _BLANKS not in rows[i].strip()
        ]
        if fitting:
            row = fitting[index % len(fitting)]
            found.append(Line("\n".join(rows[:row]) + "\n", rows[row], "\n".join(rows[row + 1 :])))
        if len(found) == count:
            break
    return found


def measure(bench: Bench) -> None:
    """Completion and infilling at every cut, about twenty a line, and an ensemble's bits."""
    found = lines(bench.seeds * bench.limit)
    starts = range(0, len(found), bench.limit)
    parts = [found[start : start + bench.limit] for start in starts]
    _side_by_side(
        bench,
        "completion",
        parts,
        {
            _PLAIN: lambda part, tally: _generated(bench, _PLAIN, _starts(part), tally),
            _BYTES: lambda part, tally: _generated(bench, _BYTES, _starts(part), tally),
            _BY_TOKEN: lambda part, tally: _generated(bench, _BY_TOKEN, _starts(part), tally),
            _HEALED: lambda part, tally: _healed(bench, _starts(part), tally),
        },
    )
    view = ByteView(bench.model, bench.tokenizer, paths="fast")
    _side_by_side(
        bench,
        "infill",
        parts,
        {
            _PLAIN: lambda part, tally: _generated(bench, _PLAIN, _holes(view, part, _cut_into_tokens(view)), tally),
            _BYTES: lambda part, tally: _generated(bench, _BYTES, _holes(view, part, view.infill_ids), tally),
            _BY_TOKEN: lambda part, tally: _generated(bench, _BY_TOKEN, _holes(view, part, view.infill_ids), tally),
        },
    )
    if bench.partner is None:
        bench.skipped["ensemble"] = (
            "name a model with another tokenizer (partner); recipes/code.py trains one in ten minutes"
        )
    else:
        bench.attempt("ensemble", lambda: _ensemble(bench, parts))


Completer = Callable[[Sequence[Line], Tally], list[str]]
"""Texts behind all cuts of some lines, in their order; what they cost is counted by the byte."""


def _side_by_side(bench: Bench, task: str, parts: Sequence[Sequence[Line]], ways: dict[str, Completer]) -> None:
    """Every way on the lines of one seed, then on those of the next: speeds are ratios within a seed."""
    tallies = {way: Tally() for way in ways}
    speeds = {way: Tally() for way in ways}

    def complete(way: str, part: Sequence[Line], rests: Sequence[str], own: Tally) -> None:
        tallies[way].values.append(matched(ways[way](part, own), rests))

    for part in parts:
        rests = [rest for line in part for _, rest in line.cuts]
        rate = 0.0
        for way in ways:
            name = f"{way}, {task}"
            if name in bench.skipped:
                continue
            own = Tally()
            bench.attempt(name, partial(complete, way, part, rests, own))
            if name in bench.skipped:
                continue
            tallies[way].count(own.passes, own.tokens, own.seconds)
            if way == _PLAIN:
                rate = own.tokens / own.seconds
            elif rate:
                speeds[way].values.append(own.tokens / own.seconds / rate)
                speeds[way].seconds += own.seconds
    for way, tally in tallies.items():
        if f"{way}, {task}" not in bench.skipped:
            bench.add("bytes", f"{way}, {task}", _SCORE, tally, "forwards for each byte" if tally.passes else "")
            bench.add("bytes", f"{way}, {task}", SPEED, speeds[way])


def _starts(part: Sequence[Line]) -> list[Any]:
    return [before for line in part for before, _ in line.cuts]


def _holes(view: ByteView, part: Sequence[Line], prompt: Callable[[str, str], list[int]]) -> list[Any]:
    return [prompt(before, "\n" + line.after) for line in part for before, _ in line.cuts]


def _cut_into_tokens(view: ByteView) -> Callable[[str, str], list[int]]:
    """The prompt of whoever knows of no bytes: both texts as the tokenizer cuts them, each behind its mark."""
    first, second, third = view.marks
    encode = view.vocabulary.encode

    def prompt(before: str, after: str) -> list[int]:
        return [*view.begin, first, *encode(before.encode()), second, *encode(after.encode()), third]

    return prompt


def _generated(bench: Bench, way: str, prompts: Sequence[Any], tally: Tally) -> list[str]:
    own = Tally()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": _LINE, "stop_strings": _STOPS}
    texts = [
        text
        for result in bench.run(own, prompts, way, **options)
        for text in result.texts(bench.tokenizer)
    ]  # fmt: skip
    tally.count(own.passes, sum(len(text.encode()) for text in texts), own.seconds)
    return texts


def _healed(bench: Bench, prompts: Sequence[str], tally: Tally) -> list[str]:
    """transformers' own, which takes one prompt at a time."""
    texts: list[str] = []
    passes: list[None] = []
    counter = bench.model.register_forward_pre_hook(lambda *_: passes.append(None))
    try:
        for before in prompts:
            begin = time.perf_counter()
            texts.append(_behind(bench, before))
            tally.count(0, len(texts[-1].encode()), time.perf_counter() - begin)
    finally:
        counter.remove()
    tally.count(len(passes), 0, 0.0)
    return texts


def _behind(bench: Bench, before: str) -> str:
    ids = bench.tokenizer(before, return_tensors="pt").to(bench.model.device)
    try:
        out = bench.model.generate(
            ids["input_ids"], attention_mask=ids["attention_mask"], do_sample=False, token_healing=True,
            tokenizer=bench.tokenizer, stop_strings=_STOPS, max_new_tokens=_LINE,
        )  # fmt: skip
    except (ValueError, TypeError, AttributeError, IndexError, ImportError) as error:
        raise BadParameter(f"transformers refuses: {' '.join(str(error).split())}") from error
    whole = bench.tokenizer.decode(out[0], skip_special_tokens=True)
    # Healing writes the prompt's end again; what it changed there is an error.
    return whole[len(before) :] if whole.startswith(before) else "\0"


def _ensemble(bench: Bench, parts: Sequence[Sequence[Line]]) -> None:
    assert bench.partner is not None
    # Without the weights of the partner in the same precision the comparison would be another one.
    other = load(bench.partner, dtype=bench.model.dtype, device=bench.model.device)
    bench.note("partner", other[0])
    both = ByteEnsemble([(bench.model, bench.tokenizer), other], paths="fast")
    tallies = {name: Tally() for name in ("member 1", "member 2", "ensemble", "mean of the members", "better member")}
    for part in parts:
        texts = [(line.before + line.text + "\n" + line.after).encode() for line in part]
        begin = time.perf_counter()
        nats = torch.zeros(3, dtype=torch.float64)
        for text in texts:
            joint, members = both.start().read_members(text)
            nats -= torch.stack([logs.sum().double().cpu() for logs in (joint, *members)])
        found = (nats / sum(map(len, texts)) / math.log(2)).tolist()
        for name, value in zip(("ensemble", "member 1", "member 2"), found, strict=True):
            tallies[name].values.append(value)
        tallies["mean of the members"].values.append(statistics.fmean(found[1:]))
        tallies["better member"].values.append(min(found[1:]))
        tallies["ensemble"].seconds += time.perf_counter() - begin
    for name, tally in tallies.items():
        bench.add("bytes", name, _BITS, tally, "time of both members" if name == "ensemble" else "")


def matched(texts: Sequence[str], rests: Sequence[str]) -> float:
    """Share of texts whose first line is the rest of a line; blanks at its end aside."""
    pairs = zip(texts, rests, strict=True)
    return statistics.fmean(float(text.partition("\n")[0].rstrip() == rest.rstrip()) for text, rest in pairs)
