"""What the parts of the bench share: methods at their budgets, figures, progress, and what could not be measured."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenry.errors import BadParameter, TokenryError
from tokenry.methods import Method, load_class, parameters, rows
from tokenry.methods import method as read_method

from ..kvpress import KVPress
from .results import Figure

PLAIN = "plain"
BASELINES = ("sinks", "random", "snapkv", "keydiff", "oracle")


@dataclass
class Bench:
    """One measurement: what it is given, and what it has found; `bench_kvcache` says what the fields are."""

    model: Any
    tokenizer: Any
    methods: list[Method]
    workloads: Sequence[str]
    shares: Sequence[float]
    tokens: int
    limit: int
    seeds: int
    batch_size: int
    bits_tokens: int
    bits_prompt: int
    lengths: Sequence[int]
    prefill: int
    budget: int
    repeats: int
    resources: dict[str, Any]
    python: Path | None
    presses: Sequence[str]
    expect: Callable[[int], None]
    """Told how many steps of progress are to come."""
    tick: Callable[[str], None]
    """Told what is measured next."""
    figures: list[Figure] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    peers: dict[str, str] = field(default_factory=dict)

    def add(
        self, part: str, group: str, way: str, budget: str, column: str, form: str, values: Sequence[float]
    ) -> None:
        """Note a figure."""
        figure = Figure(part=part, group=group, way=way, budget=budget, column=column, form=form, values=tuple(values))
        self.figures.append(figure)

    def attempt(self, way: str, measure: Callable[[], None], what: str = "") -> None:
        """Measure, or note why it cannot be; what could not be measured once is not tried again.

        Args:
            way: The method with its budget.
            measure: What measures.
            what: What it measures, for the progress.
        """
        self.tick(f"{way} {what}".strip())
        if way in self.skipped:
            return
        try:
            measure()
        except TokenryError as error:
            # Results are shared; whose machine they come from is nobody's business.
            self.skipped[way] = " ".join(str(error).split()).replace(str(Path.home()), "~")

    @contextlib.contextmanager
    def peer(self, model: Any) -> Iterator[KVPress | None]:
        """kvpress on a model, or None where it cannot run, with the reason noted."""
        if self.python is None or not self.presses:
            yield None
            return
        try:
            process = KVPress(model, self.python, self.tokenizer)
        except TokenryError as error:
            self.skipped["kvpress"] = " ".join(str(error).split()).replace(str(Path.home()), "~")
            yield None
            return
        with process:
            self.peers |= process.versions
            yield process

    def budgeted(self, budgets: Sequence[int | float]) -> Iterator[tuple[Method, Method, str]]:
        """Each method, the same at each budget, and what it keeps in words; of one that has no budget itself once."""
        for each in self.methods:
            if "budget" not in parameters(type(each)):
                yield each, each, ""
                continue
            for budget in budgets:
                try:
                    yield each, dataclasses.replace(each, budget=budget), said(budget)  # type: ignore[call-arg]
                except BadParameter as error:
                    self.skipped[f"{way(each)}, {said(budget)}"] = " ".join(str(error).split())


def said(budget: int | float) -> str:
    """A budget in words."""
    return f"{budget:,}" if isinstance(budget, int) else f"{100 * budget:.4g}%"


def way(method: Method) -> str:
    """The text form of a method without its budget, which tables set beside it."""
    budget = parameters(type(method)).get("budget")
    return str(method if budget is None else dataclasses.replace(method, budget=budget.default))  # type: ignore[call-arg]


def default_methods() -> tuple[list[Method], dict[str, str]]:
    """All cache policies that are available, baselines behind, and those that cannot be made with the reason."""
    found, skipped = [], {}
    named = [row.slug for row in rows() if row.family in ("kvcache", "external") and row.kind != "peer"]
    for slug in sorted(named, key=lambda slug: slug in BASELINES):
        try:
            if load_class(slug).role == "policy":
                each = read_method(slug)
                assert isinstance(each, Method)
                found.append(each)
        except TokenryError as error:
            skipped[slug] = " ".join(str(error).split())
    return found, skipped


def policies(given: Sequence[str | Method]) -> list[Method]:
    """The methods of a list.

    Raises:
        BadParameter: One of them is no cache policy.
    """
    found = []
    for each in given:
        method = read_method(each)
        if not isinstance(method, Method) or method.role != "policy":
            raise BadParameter(f"{each} is no cache policy; `tokenry methods --family kvcache` lists them")
        found.append(method)
    return found


def drops(method: Method) -> bool:
    """Whether the policy drops tokens, so that its budget is what it holds."""
    return bool(getattr(method, "drops", False))
