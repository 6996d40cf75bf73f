"""What the parts of the bench share: runs that are counted, figures, and what could not be measured."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenry.errors import BadParameter, TokenryError
from tokenry.generation import GenerationResult, generate
from tokenry.workloads import Example

from ..environment import describe_model
from ..metrics import PAIRS
from .named import Named
from .results import SPEED, Figure, Ordered, Promise, judged

ACCURACY = "right answers"
SMALL_TASK = "the model is small beside the papers' of 1.5 billion parameters and more"


def promised(name: str, statement: str, figure: str, ahead: str, behind: str, **options: Any) -> Promise:
    """A promise of the part that its name begins with."""
    part = name.partition("-")[0]
    return Promise(name=name, part=part, statement=statement, figure=figure, ahead=ahead, behind=behind, **options)


@dataclass
class Tally:
    """What the runs of one way cost, and its value for each seed."""

    values: list[float] = field(default_factory=list)
    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def count(self, passes: int, tokens: int, seconds: float) -> None:
        """Add a run: passes, new tokens (or bytes, where bytes are written) and time."""
        self.passes, self.tokens, self.seconds = self.passes + passes, self.tokens + tokens, self.seconds + seconds

    def timed(self, run: Callable[[], Any]) -> None:
        """Run something, and add the time that it takes."""
        begin = time.perf_counter()
        run()
        self.seconds += time.perf_counter() - begin


@dataclass
class Bench:
    """One measurement: what it is given, as `bench_decoding` says, and what it has found.

    `checks` has those that are no ordering of two figures; `beside` the models that ran beside the one that is
    measured, by what they are.
    """

    model: Any
    tokenizer: Any
    limit: int
    seeds: int
    named: Named
    batch_size: int
    say: Callable[[str], None]
    resources: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    checks: list[Ordered] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)

    def add(self, part: str, way: str, figure: str, tally: Tally, note: str = "") -> None:
        """Note a figure, if it was measured."""
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

    def race(self, part: str, base: "Run", ways: Mapping[str, tuple["Run", str]]) -> None:
        """Add the speed of each way, a run of it and a note, over that of `base`, in interleaved pairs of runs; every
        other pair runs in the opposite order, so that what drifts favours nobody.

        Raises:
            BadParameter: A run writes nothing, so that it has no speed.
        """
        ratios = {way: Tally() for way in ways}
        runs = {"": base, **{way: run for way, (run, _) in ways.items()}}
        for pair in range(PAIRS):
            found = {}
            for way in list(runs) if pair % 2 == 0 else reversed(list(runs)):
                found[way] = Tally()
                runs[way](found[way])
                if not found[way].tokens:
                    raise BadParameter(f"{way or 'plain'} wrote nothing, so that it has no speed; raise limit")
            rate = found[""].tokens / found[""].seconds
            for way, tally in ratios.items():
                own = found[way]
                tally.values.append(own.tokens / own.seconds / rate)
                tally.count(own.passes, own.tokens, own.seconds)
        for way, tally in ratios.items():
            self.add(part, way, SPEED, tally, ways[way][1])

    def check(self, *args: Any, **found: Any) -> None:
        """Note a check as `judged` makes it."""
        self.checks.append(judged(*args, **found))

    def note(self, what: str, model: Any) -> None:
        """Note a model that ran beside."""
        about = describe_model(model)
        self.beside[what] = {**about, "name": _homeless(about["name"])}

    def run(self, tally: Tally, prompts: Sequence[Any], way: str | Any, **options: Any) -> Iterator[GenerationResult]:
        """Results of batches of prompts, counted; `batch_size` of them, where it is given."""
        seed = options.pop("seed", 0)
        size = options.pop("batch_size", None) or self.batch_size
        for start in range(0, len(prompts), size):
            begin = time.perf_counter()
            result = generate(
                self.model, self.tokenizer, list(prompts[start : start + size]), method=way,
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
            self.skipped[way] = _homeless(" ".join(str(error).split()))


Run = Callable[[Tally], None]
"""Runs a few prompts and counts what that took."""


def longest(tokenizer: Any, tasks: Sequence[Example]) -> int:
    """Tokens that the longest answer takes, and a few to go wrong with."""
    return max(len(tokenizer(task.answer)["input_ids"]) for task in tasks) + 8


def few(prompts: Sequence[Any], count: int) -> list[Any]:
    """Some of the prompts, evenly spaced."""
    count = min(count, len(prompts))
    return [prompts[number * len(prompts) // count] for number in range(count)]


def _homeless(text: str) -> str:
    # Results are shared; whose machine they come from is nobody's business.
    return text.replace(str(Path.home()), "~")
