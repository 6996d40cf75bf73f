"""What the parts of the bench share: runs that are counted, figures, and what could not be measured."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenry.errors import TokenryError
from tokenry.generation import GenerationResult, generate

from ..environment import describe_model
from .results import Figure, Promise

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


@dataclass
class Bench:
    """One measurement: what it is given, as `bench_decoding` says, and what it has found.

    `beside` has the models that ran beside the one that is measured, by what they are.
    """

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

    def note(self, what: str, model: Any) -> None:
        """Note a model that ran beside."""
        about = describe_model(model)
        self.beside[what] = {**about, "name": _homeless(about["name"])}

    def run(self, tally: Tally, prompts: Sequence[Any], way: str | Any, **options: Any) -> Iterator[GenerationResult]:
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
            self.skipped[way] = _homeless(" ".join(str(error).split()))


def _homeless(text: str) -> str:
    # Results are shared; whose machine they come from is nobody's business.
    return text.replace(str(Path.home()), "~")
