"""The decoders against the orderings that their papers promise: what `tokenry bench decoding` prints.

Every figure is measured once a seed; an ordering is a check over the seeds, with its spread, and beside each figure
stand the forward passes and the time that it took. What mathematics promises is tested instead.
"""

import dataclasses
import json
import keyword
import math
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from tokenry.decoding import ByteEnsemble, ByteView, InContextNavigation, Superposed, navigate
from tokenry.decoding.skipdecode.training import losses_by_index
from tokenry.errors import BadParameter, TokenryError
from tokenry.generation import GenerationResult, generate
from tokenry.methods import method as read_method
from tokenry.models import anatomy, load, loaded_name, trained_folder
from tokenry.workloads import examples, functions

from .environment import describe_model, machine, versions
from .metrics import Spread
from .results import SCHEMA_VERSION, finite, printed

SEEDS = 5
"""Fewest seeds that a statement on an ordering rests on."""

_VOTES = 5  # answers of a vote, and whole answers that the best is chosen from
_SHARES = (0.1, 0.3)  # of the tokens that the large model writes
_PREFIX, _DRAFT = 15, 10  # tokens of superposed decoding's prompts and drafts in the paper
_ROUNDS, _EACH = 5, 4  # of in-context navigation
_LINE = 40  # bytes of a line of code that is cut

LISTS: dict[str, frozenset[str]] = {
    "Python's keywords.": frozenset(keyword.kwlist),
    "Names of Python's standard modules.": frozenset(sys.stdlib_module_names),
    "Names of Python's built-in exceptions.": frozenset(
        name for name, value in vars(__import__("builtins")).items()
        if isinstance(value, type) and issubclass(value, BaseException)
    ),
    "Names of Python's built-in functions.": frozenset(n for n in dir(__import__("builtins")) if n[0].islower()),
    "Names of the methods of str.": frozenset(name for name in dir(str) if name[0] != "_"),
}  # fmt: skip
"""Lists that a code model can write, with their right answers; in-context navigation asks for each."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of one way to decode, over the seeds.

    Args:
        part: Part of the bench.
        way: Method and setting, in words or as text form.
        figure: What was measured.
        values: One for each seed.
        forwards_per_token: Forward passes of the model over new tokens, a pass counted once a row; for each new byte
            where bytes were written. None where nothing was written.
        seconds: Time of all runs behind the values.
        note: What else a reader should know, such as the share that a router really gave.
    """

    part: str
    way: str
    figure: str
    values: tuple[float, ...]
    forwards_per_token: float | None
    seconds: float
    note: str = ""

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Promise:
    """An ordering that a paper or card states: the figure of one way at least, or above, that of another.

    Args:
        name: What the check is called.
        part: Part of the bench.
        statement: What should hold, in words.
        figure: The figure that is compared.
        ahead: Way of which it should be larger (smaller, if `smaller`).
        behind: The other.
        strict: Whether equality is too little.
        smaller: Whether less is better.
        otherwise: What can make it fail, such as on a small model; nobody has looked whether it did.
    """

    name: str
    part: str
    statement: str
    figure: str
    ahead: str
    behind: str
    strict: bool = False
    smaller: bool = False
    otherwise: str = ""


@dataclass(frozen=True, kw_only=True)
class Ordered:
    """A promise, and whether it held.

    Args:
        name, statement, figure: Of the promise.
        measured: Mean over the seeds by way.
        difference: Of the one that should be ahead over the other, in favour of the promise; over the seeds.
        passed: Whether it held in the mean.
        clear: Whether both quartiles lie on the side of the verdict.
        reason: Where it does not hold: that both are equal, or what possibly causes it.
    """

    name: str
    statement: str
    figure: str
    measured: dict[str, float]
    difference: Spread
    passed: bool
    clear: bool
    reason: str


ACCURACY, SCORE = "right answers", "exact match"
_SAMPLED, _VOTED, _WHOLE = "plain (sampled)", f"plain, vote of {_VOTES}", f"plain, surest of {_VOTES}"
_CNTP, _CNTP_VOTED, _SIX = "cntp", f"cntp, vote of {_VOTES}", "cntp:min_trials=6;max_trials=6"
_SMALL_TASK = "the model is small beside the papers' of 1.5 billion parameters and more"
_LOSS, _PERPLEXITY, _RIGHT = "nats a token", "perplexity", f"distinct right answers of {_ROUNDS * _EACH}"
_BITS, _OVERLAP = "bits per byte", "overlap of the drafts"
_FULL, _TUNED, _EARLY, _RAW, _RAW_EARLY = "all layers", "skip, tuned", "early exit, tuned", "skip", "early exit"
_NAVIGATED, _RANKED = "in-context-navigation", "in-context-navigation:navigate=false"
_BYTES, _TOKENS, _HEALED = "exact-byte-probabilities", "plain", "transformers, token_healing"
_BY_TOKEN = "exact-byte-probabilities:unit=token"


def _routed(rule: str, share: float) -> str:
    return f"r2r:share={share}" if rule == "router" else f"r2r:rule={rule};share={share}"


def _promise(name: str, statement: str, figure: str, ahead: str, behind: str, **options: Any) -> Promise:
    return Promise(
        name=name,
        part=name.partition("-")[0],
        statement=statement,
        figure=figure,
        ahead=ahead,
        behind=behind,
        **options,
    )


PROMISES = (
    _promise("cntp-above-sampling", "CNTP answers better than sampling at its temperature", ACCURACY, _CNTP, _SAMPLED,
             strict=True, otherwise=_SMALL_TASK),
    _promise("cntp-vote", "a vote of CNTP's answers is at least as good as a vote of sampled ones", ACCURACY,
             _CNTP_VOTED, _VOTED, otherwise="a vote has little left to gain where most answers are right already"),
    _promise("cntp-above-whole", "choosing clause by clause beats choosing among whole answers by perplexity", ACCURACY,
             _CNTP, _WHOLE, strict=True, otherwise=_SMALL_TASK),
    _promise("cntp-proportional", "trials by entropy are at least as good as always six", ACCURACY, _CNTP, _SIX,
             otherwise="always six costs more trials and may buy something with them"),
    *(
        promise
        for share in _SHARES
        for promise in (
            _promise(f"r2r-above-entropy-{share}", f"the router beats entropy at a calibrated share of {share}",
                     ACCURACY, _routed("router", share), _routed("entropy", share), strict=True,
                     otherwise="the router learned from few labels, or the shares reached on this text differ"),
            _promise(f"r2r-entropy-above-random-{share}", f"entropy beats random routing at a share of {share}",
                     ACCURACY, _routed("entropy", share), _routed("random", share), strict=True,
                     otherwise="where the small model errs, its entropy need not be high"),
        )
    ),
    _promise("r2r-rises", "the router's answers get better with the large model's share", ACCURACY,
             _routed("router", _SHARES[1]), _routed("router", _SHARES[0]),
             otherwise="one token of the large model need not mend a path that the small one goes on with"),
    _promise("skipdecode-below-full", "all layers lose no more than SkipDecode", _LOSS, _FULL, _TUNED, smaller=True,
             otherwise="fine-tuning on this text also teaches the text"),
    _promise("skipdecode-above-early", "SkipDecode loses no more than early exit of the same budget", _LOSS, _TUNED,
             _EARLY, smaller=True, otherwise="few layers leave little between the bottom ones and the top ones"),
    _promise("skipdecode-above-raw", "early exit after training loses no more than without", _LOSS, _EARLY, _RAW_EARLY,
             smaller=True),
    _promise("skipdecode-tuned-above-raw", "SkipDecode after training loses less than without", _LOSS, _TUNED, _RAW,
             smaller=True, strict=True),
    _promise("superposed-best-of-drafts", "the best of three drafts is no less likely than one nucleus draft",
             _PERPLEXITY, "best of the drafts", "nucleus", smaller=True,
             otherwise="the mixture of embeddings leaves what a small model can read"),
    _promise("superposed-first-above-last", "the first draft is likelier than the last", _PERPLEXITY, "draft 1",
             "draft 3", smaller=True, strict=True, otherwise="drafts are ranked by their scores, not by the model"),
    _promise("superposed-overlap", "longer drafts have more in common", _OVERLAP, f"{2 * _DRAFT} tokens",
             f"{_DRAFT} tokens", otherwise="a small model's drafts fall together within ten tokens"),
    _promise("navigation-above-ranking", "a list of the answers found reaches more right ones than one ranking", _RIGHT,
             _NAVIGATED, _RANKED, otherwise="a small code model was not trained to go on with a list"),
    _promise("bytes-above-tokens", "code cut at any byte is completed better by the byte view than by plain tokens",
             SCORE, f"{_BYTES}, completion", f"{_TOKENS}, completion", strict=True),
    _promise("bytes-above-tokens-infill", "holes cut at any byte are filled better by the byte view", SCORE,
             f"{_BYTES}, infill", f"{_TOKENS}, infill", strict=True),
    _promise("bytes-above-healing", "the byte view completes at least as well as transformers' token healing", SCORE,
             f"{_BYTES}, completion", f"{_HEALED}, completion"),
    _promise("bytes-by-token-above-tokens", "the byte view, choosing tokens, completes better than plain tokens", SCORE,
             f"{_BY_TOKEN}, completion", f"{_TOKENS}, completion", strict=True),
    _promise("bytes-by-token-above-healing", "the byte view, choosing tokens, is at least as good as token healing",
             SCORE, f"{_BY_TOKEN}, completion", f"{_HEALED}, completion"),
    _promise("bytes-ensemble", "an ensemble needs at most the mean of its members' bits", _BITS, "ensemble",
             "mean of the members", smaller=True),
    _promise("bytes-ensemble-above-better", "an ensemble needs no more bits than its better member", _BITS, "ensemble",
             "better member", smaller=True, otherwise="a much weaker member costs more than it adds"),
)  # fmt: skip
"""What is promised; a comparison of which one side was not measured is left out."""


@dataclass(frozen=True, kw_only=True)
class DecodingBench:
    """What the bench of the decoders measured; prints itself as tables and writes itself as JSON.

    Args:
        figures: Every figure with its costs.
        checks: What is promised, and whether it held.
        skipped: What could not run here, with the reason.
        about: Model, machine, versions and settings.
        partial: Whether it was interrupted.
    """

    figures: tuple[Figure, ...]
    checks: tuple[Ordered, ...]
    skipped: dict[str, str]
    about: dict[str, Any] = field(repr=False, default_factory=dict)
    partial: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "decoding",
            "partial": self.partial,
            **self.about,
            "figures": [{**asdict(each), "mean": each.mean, "deviation": each.deviation} for each in self.figures],
            "checks": [asdict(check) for check in self.checks],
            "skipped": self.skipped,
        }

    def to_json(self) -> str:
        """Return the bench as JSON."""
        return json.dumps(finite(self.to_dict()), indent=1, ensure_ascii=False)

    def __rich__(self) -> Group:
        parts: list[RenderableType] = []
        for part in dict.fromkeys(each.part for each in self.figures):
            table = _table(part, ("way", "figure", "mean ± sd", "forwards/token", "seconds", ""))
            for each in self.figures:
                if each.part == part:
                    rate = "–" if each.forwards_per_token is None else f"{each.forwards_per_token:.2f}"
                    value = f"{each.mean:.3f} ± {each.deviation:.3f}"
                    table.add_row(each.way, each.figure, value, rate, f"{each.seconds:.1f}", each.note)
            parts.append(table)
        if self.checks:
            table = _table("checks", ("check", "figure", "measured", "difference", "holds"))
            for check in self.checks:
                holds = ("yes" if check.passed else f"no: {check.reason}" if check.reason else "no") + (
                    "" if check.clear else ", within the spread"
                )
                found = check.difference
                measured = ", ".join(f"{way} {value:.3f}" for way, value in check.measured.items())
                spread = f"{found.median:+.3f} [{found.lower:+.3f}, {found.upper:+.3f}]"
                table.add_row(check.statement, check.figure, measured, spread, holds)
            parts.append(table)
        parts += [Text(f"skipped {way}: {reason}", style="yellow") for way, reason in self.skipped.items()]
        count = min((len(each.values) for each in self.figures), default=0)
        few = "" if count >= SEEDS else f" Fewer than {SEEDS} seeds: no ordering should be claimed from this."
        text = f"difference: in favour of the statement, median [quartiles] over the seeds ({count} or more).{few}"
        return Group(*parts, Text(text, style="dim"))

    def __str__(self) -> str:
        return printed(self)


def _table(title: str, headers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def ordered(figures: Sequence[Figure], promises: Sequence[Promise] = PROMISES) -> list[Ordered]:
    """Check the promises of which both sides were measured."""
    found = []
    for promise in promises:
        mine = [each for each in figures if (each.part, each.figure) == (promise.part, promise.figure)]
        sides = [next((each for each in mine if each.way == way), None) for way in (promise.ahead, promise.behind)]
        if sides[0] is None or sides[1] is None:
            continue
        sign = -1.0 if promise.smaller else 1.0
        spread = Spread.of(sign * (a - b) for a, b in zip(sides[0].values, sides[1].values, strict=True))
        gap = sign * (sides[0].mean - sides[1].mean)
        # The last digits of sums in another order decide nothing.
        passed = gap > 1e-9 if promise.strict else gap >= -1e-9
        found.append(
            Ordered(
                name=promise.name,
                statement=promise.statement,
                figure=promise.figure,
                measured={promise.ahead: sides[0].mean, promise.behind: sides[1].mean},
                difference=spread,
                passed=passed,
                clear=spread.lower >= 0 if passed else spread.upper <= 0,
                reason="" if passed else _why(promise, gap),
            )
        )
    return found


def _why(promise: Promise, gap: float) -> str:
    """Why a promise did not hold: measured where both are equal, else what is known to be able to cause it."""
    if abs(gap) <= 1e-9:
        return "both are equal"
    return f"possibly because {promise.otherwise}" if promise.otherwise else ""


# --- running ------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """What the runs of one way cost, and its value for each seed."""

    values: list[float] = field(default_factory=list)
    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    notes: list[float] = field(default_factory=list)

    def count(self, passes: int, tokens: int, seconds: float) -> None:
        self.passes, self.tokens, self.seconds = self.passes + passes, self.tokens + tokens, self.seconds + seconds


@dataclass
class _Bench:
    model: Any
    tokenizer: Any
    limit: int
    seeds: int
    small: str
    tuned: str | None
    tuned_early: str | None
    partner: str | None
    batch_size: int
    say: Callable[[str], None]
    resources: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, part: str, way: str, figure: str, tally: _Tally, note: str = "") -> None:
        if tally.values:
            self.figures.append(
                Figure(
                    part=part,
                    way=way,
                    figure=figure,
                    values=tuple(tally.values),
                    forwards_per_token=tally.passes / tally.tokens if tally.tokens else None,
                    seconds=tally.seconds,
                    note=note,
                )
            )

    def run(self, tally: _Tally, prompts: Sequence[Any], way: str | Any, **options: Any) -> Iterator[GenerationResult]:
        """Results of batches of prompts, counted."""
        seed = options.pop("seed", 0)
        for start in range(0, len(prompts), self.batch_size):
            begin = time.perf_counter()
            result = generate(
                self.model, self.tokenizer, list(prompts[start : start + self.batch_size]), method=way,
                seed=None if seed is None else seed + start, resources=self.resources, **options,
            )  # fmt: skip
            assert result.stats is not None
            tally.count(result.stats.passes, result.stats.committed, time.perf_counter() - begin)
            yield result

    def attempt(self, way: str, measure: Callable[[], None]) -> None:
        """Measure, or note why it cannot be."""
        self.say(way)
        try:
            measure()
        except TokenryError as error:
            # Results are shared; whose machine they come from is nobody's business.
            self.skipped[way] = " ".join(str(error).split()).replace(str(Path.home()), "~")

    # --- CNTP ---

    def cntp(self) -> None:
        """Worked arithmetic, sampled: answers right by one draw, by vote, and by the surest whole answer."""
        tasks = examples("arithmetic", self.limit)
        prompts = [task.prompt for task in tasks]
        longest = max(len(self.tokenizer(task.answer)["input_ids"]) for task in tasks) + 8

        def draw(tally: _Tally, way: str, seed: int) -> tuple[list[str], list[float]]:
            texts: list[str] = []
            sure: list[float] = []
            options = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": longest}
            for result in self.run(tally, prompts, way, seed=seed * 1_000_003, output_scores=True, **options):
                texts += result.texts(self.tokenizer)
                sure += _mean_log_probs(result)
            return texts, sure

        def right(texts: Sequence[str]) -> float:
            return statistics.fmean(task.check(text) for task, text in zip(tasks, texts, strict=True))

        def measure(way: str, one: str, voted: str | None, surest: str | None) -> None:
            single, several, whole = _Tally(), _Tally(), _Tally()
            for seed in range(self.seeds):
                draws = []
                for number in range(_VOTES if voted else 1):
                    tally = _Tally()
                    draws.append(draw(tally, way, seed * _VOTES + number))
                    for each in (single,) * (number == 0) + (several, whole):
                        each.count(tally.passes, tally.tokens if each is single or number == 0 else 0, tally.seconds)
                single.values.append(right(draws[0][0]))
                if voted:
                    texts = [_vote([each[0][row] for each in draws]) for row in range(len(tasks))]
                    several.values.append(right(texts))
                    texts = [max(draws, key=lambda each: each[1][row])[0][row] for row in range(len(tasks))]
                    whole.values.append(right(texts))
            self.add("cntp", one, ACCURACY, single)
            if voted:
                self.add("cntp", voted, ACCURACY, several)
            if surest:
                self.add("cntp", surest, ACCURACY, whole)

        self.attempt(_SAMPLED, lambda: measure("plain", _SAMPLED, _VOTED, _WHOLE))
        self.attempt(_CNTP, lambda: measure("cntp", _CNTP, _CNTP_VOTED, None))
        self.attempt(_SIX, lambda: measure(_SIX, _SIX, None, None))

    # --- R2R ---

    def r2r(self) -> None:
        """Worked arithmetic, greedy: answers right when a router, entropy or chance sends tokens to the model."""
        ways = [_routed(rule, share) for share in _SHARES for rule in ("router", "entropy", "random")]
        for way in ("plain", *ways, "r2r:rule=random;threshold=2.0"):
            self.attempt(way, lambda way=way: self._routing(way))  # type: ignore[misc]

    def _routing(self, way: str) -> None:
        method: Any = read_method(way)
        if way != "plain":
            method = dataclasses.replace(method, small=self.small)
        tally, large = _Tally(), 0.0
        for seed in range(self.seeds):
            tasks = examples("arithmetic", self.limit, seed=seed)
            texts: list[str] = []
            for result in self.run(
                tally,
                [task.prompt for task in tasks],
                method,
                seed=seed * 1_000_003,
                do_sample=False,
                max_new_tokens=96,
            ):
                texts += result.texts(self.tokenizer)
                assert result.stats is not None
                large += result.stats.extra.get("share", 1.0) * result.stats.committed
            tally.values.append(statistics.fmean(task.check(text) for task, text in zip(tasks, texts, strict=True)))
        self.add("r2r", way, ACCURACY, tally, f"share of the model {large / max(1, tally.tokens):.0%}")

    # --- SkipDecode ---

    def skipdecode(self) -> None:
        """Loss on functions of held-out packages behind a prompt, as decoding under the schedule reads them."""
        prompt, horizon = 64, 64
        text = "\n\n".join(functions("test"))
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        rows = ids[: len(ids) // (prompt + horizon) * (prompt + horizon)].view(-1, prompt + horizon)
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
        default = str(trained_folder("skipdecode", loaded_name(self.model)))
        early = "early"

        def measure(way: str, folder: str | None, exit: str | None) -> None:
            if folder is None:
                # Of early exit there is no place by default: both runs would overwrite each other.
                raise BadParameter(
                    "name the folder of `tokenry train skipdecode --exit early --out FOLDER` (tuned_early)"
                )
            model: Any = load(folder, dtype=self.model.dtype, device=self.model.device)[0] if folder else self.model
            method: Any = read_method("skipdecode" if exit is None else f"skipdecode:exit={exit}")
            schedule = None if exit is None else method.schedule(len(anatomy(model).layers), horizon)
            tally = _Tally()
            begin = time.perf_counter()
            for seed in range(self.seeds):
                part = rows[seed * self.limit : (seed + 1) * self.limit]
                if len(part):
                    tally.values.append(float(losses_by_index(model, part, prompt, schedule).mean()))
            tally.seconds = time.perf_counter() - begin
            note = "" if schedule is None else f"{schedule.speedup():.2f} times fewer layers"
            self.add("skipdecode", way, _LOSS, tally, note)

        self.attempt(_FULL, lambda: measure(_FULL, "", None))
        self.attempt(_RAW, lambda: measure(_RAW, "", "skip"))
        self.attempt(_RAW_EARLY, lambda: measure(_RAW_EARLY, "", early))
        self.attempt(_TUNED, lambda: measure(_TUNED, self.tuned or default, "skip"))
        self.attempt(_EARLY, lambda: measure(_EARLY, self.tuned_early, early))

    # --- superposed decoding ---

    def superposed(self) -> None:
        """Ten tokens behind fifteen of held-out functions: perplexity of drafts, and what they share."""
        starts = [self.tokenizer(source)["input_ids"][:_PREFIX] for source in functions("test")]
        starts = [ids for ids in starts if len(ids) == _PREFIX]
        order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(0)).tolist()
        parts = [[starts[i] for i in order[s * self.limit : (s + 1) * self.limit]] for s in range(self.seeds)]

        def plain(way: str, **options: Any) -> None:
            tally = _Tally()
            for seed, prompts in enumerate(parts):
                nats = [n for result in self.run(tally, prompts, "plain", seed=seed, max_new_tokens=_DRAFT, **options)
                        for n in self._nats(result)]  # fmt: skip
                tally.values.append(math.exp(statistics.fmean(nats)))
            self.add("superposed", way, _PERPLEXITY, tally)

        def drafts() -> None:
            method = Superposed()
            ranks, best = [_Tally() for _ in range(method.k)], _Tally()
            for prompts in parts:
                nats = [n for result in self.run(best, prompts, method, do_sample=False, max_new_tokens=_DRAFT)
                        for n in self._nats(result)]  # fmt: skip
                rows = [nats[start : start + method.k] for start in range(0, len(nats), method.k)]
                best.values.append(math.exp(statistics.fmean(min(row) for row in rows)))
                for rank, tally in enumerate(ranks):
                    tally.values.append(math.exp(statistics.fmean(row[rank] for row in rows)))
            for rank, tally in enumerate(ranks, 1):
                self.add("superposed", f"draft {rank}", _PERPLEXITY, tally)
            self.add("superposed", "best of the drafts", _PERPLEXITY, best, "forwards and seconds of all three")

        def overlap(length: int) -> None:
            method, tally = Superposed(), _Tally()
            for prompts in parts:
                shared = [share for result in self.run(tally, prompts, method, do_sample=False, max_new_tokens=length)
                          for share in _overlaps(result.new_tokens, method.k)]  # fmt: skip
                tally.values.append(statistics.fmean(shared))
            self.add("superposed", f"{length} tokens", _OVERLAP, tally)

        nucleus = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0}
        self.attempt("nucleus", lambda: plain("nucleus", **nucleus))
        self.attempt("greedy", lambda: plain("greedy", do_sample=False))
        self.attempt("superposed-decoding", drafts)
        for length in (_DRAFT, 2 * _DRAFT):
            self.attempt(f"superposed-decoding, {length} tokens", lambda length=length: overlap(length))  # type: ignore[misc]

    @torch.no_grad()
    def _nats(self, result: GenerationResult) -> list[float]:
        """Mean nats a new token of each row, as the model itself reads the row."""
        assert result.sources is not None and result.prompt_length is not None
        ids: Any = result.sequences
        # Prompts are equally long, and what is behind a row's end is not counted.
        logs = self.model(ids[:, :-1]).logits[:, result.prompt_length - 1 :].float().log_softmax(-1)
        found = logs.gather(-1, ids[:, result.prompt_length :, None])[..., 0]
        real = (result.sources[:, result.prompt_length :] >= 0).to(found.device)
        return (-(found * real).sum(1) / real.sum(1).clamp(min=1)).tolist()

    # --- in-context navigation ---

    def navigation(self) -> None:
        """Lists that a code model knows; the lists stand in the place of seeds."""
        # In the bundled model's own language a list is source code.
        own: dict[str, Any] = {"header": "", "item": '    "{answer}",\n', "cue": '    "', "end": '"'}

        def measure(way: str, navigated: bool) -> None:
            method = InContextNavigation(rounds=_ROUNDS, per_round=_EACH, navigate=navigated, pool=200, **own)
            tally = _Tally()
            for about, known in LISTS.items():
                begin = time.perf_counter()
                prompt = f'"""{about}"""\n\nNAMES = [\n'
                answers = navigate(self.model, self.tokenizer, prompt, method=method, max_new_tokens=12)
                tally.seconds += time.perf_counter() - begin
                tally.values.append(float(len({answer.text.strip() for answer in answers} & known)))
            self.add("navigation", way, _RIGHT, tally, f"{len(LISTS)} lists in the place of seeds")

        self.attempt(_NAVIGATED, lambda: measure(_NAVIGATED, True))
        self.attempt(_RANKED, lambda: measure(_RANKED, False))

    # --- the byte view ---

    def bytes(self) -> None:
        """Lines of held-out functions cut at every byte: completed and filled in, and bits of an ensemble."""
        lines = _lines(self.seeds * self.limit)
        parts = [lines[seed * self.limit : (seed + 1) * self.limit] for seed in range(self.seeds)]
        for way in (_TOKENS, _BYTES, _BY_TOKEN):
            self.attempt(f"{way}, completion", lambda way=way: self._complete(way, parts))  # type: ignore[misc]
        self.attempt(f"{_HEALED}, completion", lambda: self._heal(parts))
        for way in (_TOKENS, _BYTES):
            self.attempt(f"{way}, infill", lambda way=way: self._infill(way, parts))  # type: ignore[misc]
        if self.partner is None:
            self.skipped["ensemble"] = "name a model with another tokenizer (partner)"
        else:
            self.attempt("ensemble", lambda: self._ensemble(parts))

    def _complete(self, way: str, parts: Sequence[Sequence["_Line"]]) -> None:
        tally = _Tally()
        for lines in parts:
            cuts = [cut for line in lines for cut in line.cuts]
            options = {"do_sample": False, "max_new_tokens": _LINE, "stop_strings": ["\n"]}
            texts = [text for result in self.run(tally, [before for before, _ in cuts], way, **options)
                     for text in result.texts(self.tokenizer)]  # fmt: skip
            tally.values.append(_matched(texts, [rest for _, rest in cuts]))
        self.add("bytes", f"{way}, completion", SCORE, tally)

    def _heal(self, parts: Sequence[Sequence["_Line"]]) -> None:
        tally = _Tally()
        for lines in parts:
            cuts = [cut for line in lines for cut in line.cuts]
            texts = []
            for before, _ in cuts:
                ids = self.tokenizer(before, return_tensors="pt").to(self.model.device)
                begin = time.perf_counter()
                try:
                    out = self.model.generate(
                        ids["input_ids"], attention_mask=ids["attention_mask"], do_sample=False, token_healing=True,
                        tokenizer=self.tokenizer, stop_strings=["\n"], max_new_tokens=_LINE,
                    )  # fmt: skip
                except (ValueError, TypeError, AttributeError, IndexError, ImportError) as error:
                    raise BadParameter(f"transformers refuses: {' '.join(str(error).split())}") from error
                tally.seconds += time.perf_counter() - begin
                whole = self.tokenizer.decode(out[0], skip_special_tokens=True)
                # Healing writes the prompt's end again; what it changed there is an error.
                texts.append(whole[len(before) :] if whole.startswith(before) else "\0")
            tally.values.append(_matched(texts, [rest for _, rest in cuts]))
        self.add("bytes", f"{_HEALED}, completion", SCORE, tally)

    def _infill(self, way: str, parts: Sequence[Sequence["_Line"]]) -> None:
        view = ByteView(self.model, self.tokenizer, paths="fast")
        tally = _Tally()
        first, second, third = view._marks()
        begin_ids = view._context()
        for lines in parts:
            texts, rests = [], []
            for line in lines:
                after = "\n" + line.after
                for before, rest in line.cuts:
                    begin = time.perf_counter()
                    rests.append(rest)
                    if way == _BYTES:
                        state = view.infill(before, after)
                        held = state.forwards
                        made = state.generate(max_bytes=_LINE, temperature=0, stop=["\n"])
                        texts.append(made.text)
                        tally.count(sum(made.forwards) - held, len(made.data), time.perf_counter() - begin)
                        continue
                    ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after)]
                    prompt = [*begin_ids, first, *ids[0], second, *ids[1], third]
                    result = generate(self.model, self.tokenizer, prompt, do_sample=False, max_new_tokens=_LINE,
                                      stop_strings=["\n"])  # fmt: skip
                    assert result.stats is not None
                    texts.append(result.text(self.tokenizer))
                    tally.count(result.stats.passes, len(texts[-1].encode()), time.perf_counter() - begin)
            tally.values.append(_matched(texts, rests))
        self.add("bytes", f"{way}, infill", SCORE, tally, "forwards for each byte")

    def _ensemble(self, parts: Sequence[Sequence["_Line"]]) -> None:
        assert self.partner is not None
        # Without the weights of the partner in the same precision the comparison would be another one.
        other = load(self.partner, dtype=self.model.dtype, device=self.model.device)
        members = {"member 1": (self.model, self.tokenizer), "member 2": other}
        tallies = {name: _Tally() for name in (*members, "ensemble", "mean of the members", "better member")}
        for lines in parts:
            texts = [line.before + line.text + "\n" + line.after for line in lines]
            size = sum(len(text.encode()) for text in texts)
            found = {}
            for name, views in {**{name: [member] for name, member in members.items()},
                                "ensemble": list(members.values())}.items():  # fmt: skip
                begin = time.perf_counter()
                nats = -sum(ByteEnsemble(views, paths="fast").log_prob(text) for text in texts)
                tallies[name].seconds += time.perf_counter() - begin
                found[name] = nats / size / math.log(2)
            found["mean of the members"] = (found["member 1"] + found["member 2"]) / 2
            found["better member"] = min(found["member 1"], found["member 2"])
            for name, value in found.items():
                tallies[name].values.append(value)
        for name, tally in tallies.items():
            self.add("bytes", name, _BITS, tally)


PARTS = ("cntp", "r2r", "skipdecode", "superposed", "navigation", "bytes")


def bench_decoding(
    model: Any,
    tokenizer: Any,
    *,
    parts: Sequence[str] | None = None,
    limit: int = 20,
    seeds: int = SEEDS,
    small: str = "tokenry/code-draft",
    tuned: str | None = None,
    tuned_early: str | None = None,
    partner: str | None = None,
    batch_size: int = 16,
    resources: dict[str, Any] | None = None,
    progress: bool = True,
) -> DecodingBench:
    """Measure the decoders on the bundled tasks and check the orderings that their papers promise.

    Interrupted by Ctrl-C, it returns what is measured so far, marked as partial.

    Args:
        model: A causal model; the tasks are those that the bundled ones were trained on.
        tokenizer: Its tokenizer.
        parts: Of `PARTS`; by default all.
        limit: Prompts, rows or lines of each seed.
        seeds: Values of each figure; below 5 no ordering should be claimed.
        small: R2R's small model.
        tuned: Folder of a model that was fine-tuned for SkipDecode; by default where `tokenry train skipdecode` writes.
        tuned_early: Folder of one that was fine-tuned for early exit.
        partner: A model with another tokenizer, for the ensemble of bytes.
        batch_size: Prompts that run together.
        resources: Second models and the like that are loaded already, by name.
        progress: Say on a terminal what is measured.

    Raises:
        BadParameter: A part is not known, or a number is too small.
    """
    chosen = list(dict.fromkeys(parts or PARTS))
    if unknown := [part for part in chosen if part not in PARTS]:
        raise BadParameter(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    for name, value, least in (("limit", limit, 1), ("seeds", seeds, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise BadParameter(f"{name}={value} is not allowed; it must be at least {least}")
    console = Console(stderr=True)
    partial = False
    with console.status("") if progress and console.is_terminal else _Silent() as status:

        def say(what: str) -> None:
            if status is not None:
                status.update(what)

        bench = _Bench(
            model, tokenizer, limit, seeds, small, tuned, tuned_early, partner, batch_size, say, dict(resources or {})
        )
        try:
            for part in chosen:
                bench.attempt(part, getattr(bench, part))
        except KeyboardInterrupt:
            partial = True
    return DecodingBench(
        figures=tuple(bench.figures),
        checks=tuple(ordered(bench.figures)),
        skipped=bench.skipped,
        about={
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": describe_model(model),
            "machine": machine(model.device),
            "versions": versions(),
            "settings": {"parts": chosen, "limit": limit, "seeds": seeds, "batch_size": batch_size, "small": small,
                         "partner": partner},
        },
        partial=partial,
    )  # fmt: skip


# --- texts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """A line of a function between what comes before and after it."""

    before: str
    text: str
    after: str

    @property
    def cuts(self) -> list[tuple[str, str]]:
        """Text up to each byte behind the indentation, and the rest of the line; code here is ASCII."""
        start = len(self.text) - len(self.text.lstrip())
        return [(self.before + self.text[:cut], self.text[cut:]) for cut in range(start + 1, len(self.text))]


def _lines(count: int) -> list[_Line]:
    """One line of each of some held-out functions: at most 40 bytes, and two lines before it."""
    found = []
    pool = functions("test")
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0)).tolist()
    for index in order:
        rows = pool[index].split("\n")
        fitting = [i for i in range(2, len(rows) - 1) if 8 <= len(rows[i].strip()) <= _LINE]
        if fitting:
            row = fitting[index % len(fitting)]
            found.append(_Line("\n".join(rows[:row]) + "\n", rows[row], "\n".join(rows[row + 1 :])))
        if len(found) == count:
            break
    return found


def _matched(texts: Sequence[str], rests: Sequence[str]) -> float:
    """Share of texts whose first line is the rest of a line; blanks at its end aside."""
    pairs = zip(texts, rests, strict=True)
    return statistics.fmean(float(text.partition("\n")[0].rstrip() == rest.rstrip()) for text, rest in pairs)


def _mean_log_probs(result: GenerationResult) -> list[float]:
    """Mean log-probability of each row's new tokens under the distribution that they were sampled from."""
    assert result.sources is not None and result.prompt_length is not None and result.scores is not None
    ids: Any = result.sequences
    new = ids[:, result.prompt_length :]
    logs = torch.stack([
        step.log_softmax(-1).gather(1, new[:, column, None])[:, 0] for column, step in enumerate(result.scores)
    ], 1)  # fmt: skip
    real = (result.sources[:, result.prompt_length :] >= 0).to(logs.device)
    total: Tensor = logs.masked_fill(~real, 0).sum(1) / real.sum(1).clamp(min=1)
    return total.tolist()


_ANSWER = re.compile(r"answer (-?\d+)\.")


def _vote(texts: Sequence[str]) -> str:
    """The answer that most texts have, the earliest of several; the first text where none has one."""
    read = [found.group(0) if (found := _ANSWER.search(text)) else "" for text in texts]
    counts = Counter(answer for answer in read if answer)
    return counts.most_common(1)[0][0] if counts else texts[0]


def _overlaps(rows: Sequence[Sequence[int]], k: int) -> list[float]:
    """For each prompt the share of a draft's tokens that another draft has at the same place, mean over pairs."""
    found = []
    for start in range(0, len(rows), k):
        group = rows[start : start + k]
        pairs = [(a, b) for i, a in enumerate(group) for b in group[i + 1 :]]
        shares = [sum(x == y for x, y in zip(a, b, strict=False)) / max(len(a), len(b), 1) for a, b in pairs]
        found.append(statistics.fmean(shares) if shares else 1.0)
    return found


class _Silent:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *args: Any) -> None:
        return None
