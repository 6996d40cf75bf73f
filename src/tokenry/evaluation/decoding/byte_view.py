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
from tokenry.workloads import functions

from .engine import Bench, Run, Tally, few, promised
from .results import SPEED

_LINE = 40  # bytes of a line of code that is cut
_SHARE = 4  # of the limit a quarter are lines: each is cut some twenty times
_TIMED = 4  # prompts that speeds are measured on
_ONE = "forwards for each byte; one prompt at a time, plain as well"
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
                     "tokens", _SCORE, f"{_BYTES}, {task}", f"{_PLAIN}, {task}", strict=True, must=True,
                     otherwise="the model completes too few of these lines, or the likeliest bytes lead astray"),
            promised(f"bytes-by-token-above-tokens-{task}", f"{holes} at any byte: the byte view, choosing tokens, is "
                     "right more often than plain tokens", _SCORE, f"{_BY_TOKEN}, {task}", f"{_PLAIN}, {task}",
                     strict=True, must=True, otherwise="the model completes too few of these lines to tell"),
        )
    ),
    promised("bytes-above-healing", "the byte view completes at least as well as transformers' token healing", _SCORE,
             f"{_BYTES}, completion", f"{_HEALED}, completion",
             otherwise="the likeliest byte can begin many unlikely tokens, and the likeliest token begin with another"),
    promised("bytes-by-token-above-healing", "the byte view, choosing tokens, is at least as good as token healing",
             _SCORE, f"{_BY_TOKEN}, completion", f"{_HEALED}, completion",
             otherwise="healing takes back one token, and few of these cuts change more than one"),
    promised("bytes-ensemble", "an ensemble needs at most the mean of its members' bits", _BITS, "ensemble",
             "mean of the members", smaller=True, must=True,
             otherwise="members were read otherwise alone than together, which is a fault"),
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


def lines(count: int | None = None) -> list[Line]:
    """One line of each of some held-out functions, of all without a count: at most 40 bytes, and two lines before
    it."""
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


def largest(bench: Bench) -> int:
    """The largest limit that the lines are enough for."""
    each = len(lines()) // bench.seeds
    return each * _SHARE + _SHARE - 1 if each else 0


def measure(bench: Bench) -> None:
    """Completion and infilling at every cut, about twenty a line, and an ensemble's bits."""
    each = max(1, bench.limit // _SHARE)
    found = lines(bench.seeds * each)
    parts = [found[start : start + each] for start in range(0, len(found), each)]

    def generated(way: str) -> Completer:
        return lambda prompts, tally, size: _generated(bench, way, prompts, tally, size)

    view = ByteView(bench.model, bench.tokenizer, paths="fast")
    ways = (_PLAIN, _BYTES, _BY_TOKEN)
    completing: dict[str, _Way] = {way: (_starts, generated(way)) for way in ways}
    completing[_HEALED] = _starts, lambda prompts, tally, _: _healed(bench, prompts, tally)
    _side_by_side(bench, "completion", parts, completing)

    def holes(way: str) -> _Prompts:
        prompt = _cut_into_tokens(view) if way == _PLAIN else view.infill_ids
        return lambda part: [prompt(before, "\n" + line.after) for line in part for before, _ in line.cuts]

    def marked() -> None:
        # Without marks there is no infilling, and no prompt of one.
        _ = view.marks
        _side_by_side(bench, "infill", parts, {way: (holes(way), generated(way)) for way in ways})

    bench.attempt("infill", marked)
    if bench.named.partner is None:
        bench.skipped["ensemble"] = (
            "name a model with another tokenizer (partner); recipes/code.py trains one in ten minutes"
        )
    else:
        bench.attempt("ensemble", lambda: _ensemble(bench, parts))


_Prompts = Callable[[Sequence[Line]], list[Any]]
"""The prompts of all cuts of some lines, in their order."""

Completer = Callable[[Sequence[Any], Tally, int], list[str]]
"""Texts behind prompts, so many at a time; what they cost is counted by the byte."""

_Way = tuple[_Prompts, Completer]


def _side_by_side(bench: Bench, task: str, parts: Sequence[Sequence[Line]], ways: dict[str, _Way]) -> None:
    """Every way on the lines of one seed, then on those of the next; speeds apart, one prompt at a time, which is all
    that token healing can."""
    tallies = {way: Tally() for way in ways}

    def complete(way: str, part: Sequence[Line], rests: Sequence[str]) -> None:
        prompts, completer = ways[way]
        tallies[way].values.append(matched(completer(prompts(part), tallies[way], bench.batch_size), rests))

    for part in parts:
        rests = [rest for line in part for _, rest in line.cuts]
        for way in ways:
            if f"{way}, {task}" not in bench.skipped:
                bench.attempt(f"{way}, {task}", partial(complete, way, part, rests))
    left = [way for way in ways if f"{way}, {task}" not in bench.skipped]
    for way in left:
        note = "forwards for each byte" + (", one prompt at a time" if way == _HEALED else "")
        bench.add("bytes", f"{way}, {task}", _SCORE, tallies[way], note)

    def run(way: str) -> Run:
        prompts, completer = ways[way]
        some = few([prompt for part in parts for prompt in prompts(part)], _TIMED)

        def timed(tally: Tally) -> None:
            completer(some, tally, 1)

        return timed

    if _PLAIN in left and len(left) > 1:
        racing = {f"{way}, {task}": (run(way), _ONE) for way in left if way != _PLAIN}
        bench.attempt(f"{task}: {SPEED}", lambda: bench.race("bytes", run(_PLAIN), racing))


def _starts(part: Sequence[Line]) -> list[Any]:
    return [before for line in part for before, _ in line.cuts]


def _cut_into_tokens(view: ByteView) -> Callable[[str, str], list[int]]:
    """The prompt of whoever knows of no bytes: both texts as the tokenizer cuts them, each behind its mark."""
    first, second, third = view.marks
    encode = view.vocabulary.encode

    def prompt(before: str, after: str) -> list[int]:
        return [*view.begin, first, *encode(before.encode()), second, *encode(after.encode()), third]

    return prompt


def _generated(bench: Bench, way: str, prompts: Sequence[Any], tally: Tally, size: int) -> list[str]:
    own = Tally()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": _LINE, "stop_strings": _STOPS}
    texts = [
        text
        for result in bench.run(own, prompts, way, batch_size=size, **options)
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
            whole = _healed_whole(bench, before)
            tally.count(0, max(0, len(whole.encode()) - len(before.encode())), time.perf_counter() - begin)
            # Healing writes the prompt's end again; what it changed there is an error.
            texts.append(whole[len(before) :] if whole.startswith(before) else "\0")
    finally:
        counter.remove()
    tally.count(len(passes), 0, 0.0)
    return texts


def _healed_whole(bench: Bench, before: str) -> str:
    """Prompt and completion."""
    ids = bench.tokenizer(before, return_tensors="pt").to(bench.model.device)
    try:
        out = bench.model.generate(
            ids["input_ids"], attention_mask=ids["attention_mask"], do_sample=False, token_healing=True,
            tokenizer=bench.tokenizer, stop_strings=_STOPS, max_new_tokens=_LINE,
        )  # fmt: skip
    except (ValueError, TypeError, AttributeError, IndexError, ImportError) as error:
        raise BadParameter(f"transformers refuses: {' '.join(str(error).split())}") from error
    whole: str = bench.tokenizer.decode(out[0], skip_special_tokens=True)
    return whole


def _ensemble(bench: Bench, parts: Sequence[Sequence[Line]]) -> None:
    other = bench.named.partner
    assert other is not None
    bench.note("partner", other.model)
    both = ByteEnsemble([(bench.model, bench.tokenizer), other], paths="fast")
    tallies = {name: Tally() for name in ("member 1", "member 2", "ensemble", "mean of the members", "better member")}
    for part in parts:
        texts = [(line.before + line.text + "\n" + line.after).encode() for line in part]
        begin = time.perf_counter()
        nats = torch.zeros(3, dtype=torch.float64)
        for text in texts:
            state = both.start()
            joint, members = state.read_members(text)
            tallies["ensemble"].count(sum(each.forwards for each in state.states), len(text), 0.0)
            nats -= torch.stack([logs.sum().double().cpu() for logs in (joint, *members)])
        found = (nats / sum(map(len, texts)) / math.log(2)).tolist()
        for name, value in zip(("ensemble", "member 1", "member 2"), found, strict=True):
            tallies[name].values.append(value)
        tallies["mean of the members"].values.append(statistics.fmean(found[1:]))
        tallies["better member"].values.append(min(found[1:]))
        tallies["ensemble"].seconds += time.perf_counter() - begin
    for name, tally in tallies.items():
        note = "forwards for each byte that is read, and time, of both members"
        bench.add("bytes", name, _BITS, tally, note if name == "ensemble" else "")
    some = few([before for part in parts for before in _starts(part)], _TIMED)

    def write(tally: Tally) -> None:
        for before in some:
            begin = time.perf_counter()
            result = both.generate(before, max_bytes=_LINE, temperature=0, stop=_STOPS)
            tally.count(sum(result.forwards), len(result.data), time.perf_counter() - begin)

    def plainly(tally: Tally) -> None:
        _generated(bench, _PLAIN, some, tally, 1)

    racing = {"ensemble": (write, f"forwards of both members, {_ONE}")}
    bench.attempt(f"ensemble: {SPEED}", lambda: bench.race("bytes", plainly, racing))


def matched(texts: Sequence[str], rests: Sequence[str]) -> float:
    """Share of texts whose first line is the rest of a line; blanks at its end aside."""
    pairs = zip(texts, rests, strict=True)
    return statistics.fmean(float(text.partition("\n")[0].rstrip() == rest.rstrip()) for text, rest in pairs)
