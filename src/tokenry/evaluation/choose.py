"""Which way to generate for this model and text? What `tokenry choose` measures, and what it recommends.

The taxonomy in the catalogue says what each method changes and needs; what remains is measured in one comparison.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokenry.catalogue import BY_SLUG, CACHE, EXACTNESS, TRAINING, TRAITS, WAYS, Traits
from tokenry.errors import TokenryError, UnsupportedModel
from tokenry.methods import Combination, Method, load_class, parameters, rows
from tokenry.methods import method as read_method

from .comparison import REFERENCE, compare, samples
from .metrics import PAIRS, Spread
from .peers import Peer
from .results import SCHEMA_VERSION, Comparison, Row, finite, printed
from .running import Prompts, Runner, Setting, Variant, collect
from .speculation import automatic
from .tables import notes, ratio, size

Goal = Literal["speed", "memory", "quality"]
GOALS: Mapping[str, str] = {
    "speed": "most tokens per second",
    "memory": "fewest bytes of cached keys and values",
    "quality": "best answers",
}

PLAIN = "plain"
# What a choice is measured against: the first that ran.
_BASES = (PLAIN, f"{PLAIN} (sampled)", REFERENCE, f"{REFERENCE} (sampled)")
_FAMILIES = ("generation", "decoding", "speculation", "kvcache", "external", "peers")
_SECOND = ("draft", "small")  # parameters of methods that name a second model
_SURE = 2.0  # standard errors by which a better quality must show


@dataclass(frozen=True, kw_only=True)
class Chooser(Method):
    """Choose a way to generate: the taxonomy says which remain, a measurement which of them is best (arXiv 2508.08712).

    The survey's taxonomy and advice, with figures of one's own model in the place of rules; `tokenry choose` runs it.

    Args:
        goal: What the best method is best in.
        loss: Quality that may be lost, as a difference of mean scores between 0 and 1.
        budget: What cache policies keep: slots, or below 1 a share of the prompt.
    """

    role: ClassVar[str] = "chooser"

    goal: Goal = "speed"
    loss: float = 0.0
    budget: float = 0.5

    def validate(self) -> None:
        self.check("loss", "from 0 to 1", 0 <= self.loss <= 1)
        self.check("budget", "above 0: slots, or below 1 a share of the prompt", self.budget > 0)


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """What may change, and what the text is run with.

    Args:
        weights: Whether weights may be trained, beside the model's or its own.
        distribution: Whether the output may be another than plain decoding's.
        second_model: Whether a model may run beside.
        sampled: Whether tokens are sampled.
        batch_size: Prompts that run together.
    """

    weights: bool = False
    distribution: bool = False
    second_model: bool = False
    sampled: bool = False
    batch_size: int = 1

    def against(self, traits: Traits) -> str | None:
        """Why a method of these traits is out, in words; None if it is not."""
        if traits.way in ("control", "several-texts") or traits.exactness == "other":
            return f"no way to continue a text: {WAYS[traits.way]}"
        exact = traits.exactness == "distribution" or (traits.exactness == "greedy" and not self.sampled)
        if not exact and not self.distribution:
            return f"the output may not change: {EXACTNESS[traits.exactness]}"
        if traits.training not in ("none", "table") and not self.weights:
            return f"no weights may be trained: {TRAINING[traits.training]}"
        if traits.second_model and not self.second_model:
            return "no second model may run"
        if self.sampled and not traits.samples:
            return "it does not sample"
        if self.batch_size > 1 and not traits.batches:
            return f"it takes one prompt at a time, not {self.batch_size}"
        return None


def traits_of(text: str) -> Traits:
    """The traits of a method by its text form; of another package's method what its class tells of itself."""
    slug = text.partition(":")[0]
    if slug in BY_SLUG:
        return TRAITS[text if text in TRAITS else slug]
    cls = load_class(slug)
    drafts = bool(getattr(cls, "drafts", False)) and getattr(cls, "lossless", True) is True
    way = "draft-and-verify" if drafts else "memory" if cls.role == "policy" else "choice"
    return Traits(way=way, exactness="distribution" if drafts else "approximate", second_model="draft" in cls.resources)


def candidates(allowed: Allowed) -> tuple[list[str], dict[str, str]]:
    """Text forms of the available methods that remain, and of the others with the reason."""
    kept: list[str] = []
    out: dict[str, str] = {}
    for row in rows():
        if row.family not in _FAMILIES:
            continue
        forms = [form for form in TRAITS if form.partition(":")[0] == row.slug]
        if not forms and row.kind == "external":
            forms = [row.slug]
        for form in forms:
            try:
                reason = allowed.against(traits_of(form))
            except TokenryError as error:
                reason = _one_line(error)
            if reason is None:
                kept.append(form)
            else:
                out[form] = reason
    return kept, out


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A measured method beside the goal.

    Args:
        label: As the comparison's rows name it.
        method: Its text form.
        way: Where it stands in the taxonomy.
        exactness: What it promises.
        speed: Ratio to transformers' plain `generate` over the pairs of all tasks.
        kv_bytes: Largest cache that it was left with.
        kv_peak_bytes: Largest that it had within a run.
        quality: Mean score over the answers of all tasks; None without answers.
        answers: Prompts that have an answer.
        against: Why it cannot be recommended; None if it can.
    """

    label: str
    method: str
    way: str
    exactness: str
    speed: Spread
    kv_bytes: int
    kv_peak_bytes: int
    quality: float | None
    answers: int
    against: str | None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What `choose` recommends, and every figure behind it; prints itself as a table and writes itself as JSON.

    Args:
        recommended: The label of the method.
        method: Its text form.
        reason: Why, in one sentence.
        goal: What was asked for: `speed`, `memory` or `quality`.
        allowed: What could change.
        standings: All measured methods, the best first.
        left_out: Those that were not measured, with the reason.
        comparison: The measurement.
    """

    recommended: str
    method: str
    reason: str
    goal: Goal
    allowed: Allowed
    standings: tuple[Standing, ...]
    left_out: dict[str, str]
    comparison: Comparison = field(repr=False)

    @property
    def partial(self) -> bool:
        """Whether it was interrupted."""
        return self.comparison.partial

    def to_dict(self) -> dict[str, Any]:
        """Return everything but sample outputs as plain data."""
        measured = self.comparison.to_dict()
        del measured["samples"]
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "choice",
            "partial": self.partial,
            "recommended": self.method,
            "label": self.recommended,
            "reason": self.reason,
            "goal": self.goal,
            "allowed": asdict(self.allowed),
            "standings": [asdict(standing) for standing in self.standings],
            "left_out": self.left_out,
            "comparison": measured,
        }

    def to_json(self) -> str:
        """Return the choice as JSON."""
        return json.dumps(finite(self.to_dict()), indent=1, ensure_ascii=False)

    def __rich__(self) -> Group:
        table = Table(title=f"goal: {GOALS[self.goal]}", title_justify="left", title_style="bold")
        table.add_column("method", overflow="fold")
        for header in ("speed", "KV kept", "KV peak", "quality", "output", "can be chosen"):
            table.add_column(header, justify="right", overflow="fold")
        for each in self.standings:
            score = "–" if each.quality is None else f"{each.quality:.2f}"
            table.add_row(
                each.label, ratio(each.speed), size(each.kv_bytes), size(each.kv_peak_bytes), score,
                "plain's" if each.exactness == "distribution" else each.exactness, each.against or "yes",
                style="bold" if each.label == self.recommended else "dim" if each.against else None,
            )  # fmt: skip
        parts: list[RenderableType] = [table]
        parts += [Text(f"left out {form}: {reason}", style="yellow") for form, reason in self.left_out.items()]
        parts += [Text(line, style="dim") for line in notes(self.comparison.to_dict())]
        parts.append(Text(f"{self.recommended}: {self.reason}", style="bold"))
        return Group(*parts)

    def __str__(self) -> str:
        return printed(self)


def choose(
    model: Any,
    tokenizer: Any,
    prompts: Prompts | None = None,
    *,
    workloads: Sequence[str] | None = None,
    allowed: Allowed | None = None,
    goal: Goal = "speed",
    loss: float = 0.0,
    draft: str | None = None,
    budget: float = 0.5,
    methods: Iterable[str] = (),
    max_new_tokens: int | None = None,
    limit: int = 14,
    repeats: int = PAIRS,
    temperature: float = 1.0,
    tail: int | None = None,
    seed: int = 0,
    resources: dict[str, Any] | None = None,
    progress: bool = True,
) -> Choice:
    """Measure the methods that may be used here side by side, and recommend one.

    A method can be recommended if it can run with the model, if lossless ones were lossless here, and if the answers of
    others were no worse than plain's by more than `loss`; where no prompt has an answer, those others can't be judged,
    and are measured only. Of speed the median over the pairs of all tasks decides, and plain remains unless the best
    one's lower quartile is above 1 and plain's median; a better quality must be by two standard errors. Where Tokenry's
    own loop does not serve the model, transformers' plain `generate` stands in plain's place.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        prompts: As `compare` takes them; those with answers tell the quality.
        workloads: Bundled workloads; all four where there are no prompts either.
        allowed: What may change; by default nothing.
        goal: What the best method is best in.
        loss: Quality that may be lost, as a difference of mean scores between 0 and 1.
        draft: The second model of all methods that take one; by default each method's own.
        budget: What cache policies keep: slots, or below 1 a share of the prompt.
        methods: More text forms to measure, whatever the taxonomy says of them.
        max_new_tokens, limit, repeats, temperature, tail, seed, resources, progress: As of `compare`.

    Raises:
        BadParameter: The goal, the loss or the budget is out of range.
        BadPrompt, PromptTooLong, MethodNotFound: As `compare` does.
        UnsupportedModel: Not even transformers' plain `generate` can be measured on the model.
    """
    allowed = allowed or Allowed()
    Chooser(goal=goal, loss=loss, budget=budget)
    asked = [str(read_method(text)) for text in methods]
    if workloads is None and prompts is None:
        workloads = ("code", "recall", "arithmetic", "edit")
    groups = collect(prompts, workloads, limit=limit, seed=seed)
    kept, out = candidates(allowed)
    runner = Runner(model, tokenizer, resources=resources)
    first, group = next(iter(groups.items()))
    task = runner.prepare(
        first, group[: allowed.batch_size], max_new_tokens=max_new_tokens, batch_size=allowed.batch_size, tail=tail
    )
    setting = Setting(True, temperature) if allowed.sampled else Setting()
    chosen: dict[Method | Combination, str] = {}
    for form in [*kept, *asked]:
        try:
            each = read_method(form) if form in asked else _ready(form, draft, budget)
            own = Setting(True, temperature) if samples(each) else setting
            runner.run(Variant(each, own), task.batches[0], min(4, task.max_new_tokens), seed)
        except Exception as error:
            # Another library may refuse by failing midway; of ours, only what it says itself is no fault.
            if not isinstance(error, TokenryError) and not isinstance(read_method(form), Peer):
                raise
            # Results are shared; whose machine they come from is nobody's business.
            out[form] = _one_line(error).replace(str(Path.home()), "~")
        else:
            chosen.setdefault(each, form)
            out.pop(form, None)
    if read_method(REFERENCE) not in chosen:
        said = "; ".join(f"{form}: {out[form]}" for form in (PLAIN, REFERENCE) if form in out)
        raise UnsupportedModel(f"nothing can be measured on {type(model).__name__} ({said}); take another model")
    found = compare(
        model, tokenizer, groups, list(chosen), max_new_tokens=max_new_tokens, repeats=repeats,
        batch_size=allowed.batch_size, seed=seed, sample=True if allowed.sampled else None, temperature=temperature,
        tail=tail, resources=resources, progress=progress,
    )  # fmt: skip
    forms = {str(method): form for method, form in chosen.items()}
    answers = {name: sum(bool(example.answer) for example in examples) for name, examples in groups.items()}
    standings = _standings(found, forms, answers, loss)
    return _choice(standings, found, goal, allowed, out)


def _ready(form: str, draft: str | None, budget: float) -> Method | Combination:
    """The method with an automatic size, the second model and the budget that were asked for."""
    method = read_method(form)
    if isinstance(method, Combination):
        return method
    method = automatic(method) or method
    known = parameters(type(method))
    changes: dict[str, Any] = {}
    if method.role == "policy" and "budget" in known:
        changes["budget"] = int(budget) if budget >= 1 else budget
    if draft is not None:
        changes |= {name: draft for name in _SECOND if name in type(method).resources}
    return dataclasses.replace(method, **changes)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# --- from figures to a choice -------------------------------------------------------------------


def _standings(found: Comparison, forms: Mapping[str, str], answers: Mapping[str, int], loss: float) -> list[Standing]:
    """One standing for each label of a comparison, all tasks together."""
    groups: dict[str, list[Row]] = {}
    for row in found.rows:
        groups.setdefault(row.label, []).append(row)
    scores = {label: _quality(group, answers) for label, group in groups.items()}
    standings = []
    for label, group in groups.items():
        method = group[0].method
        traits = traits_of(forms.get(method, method))
        score, count = scores[label]
        plain = next((scores[name][0] for name in _BASES if name in scores), None)
        standings.append(
            Standing(
                label=label,
                method=method,
                way=traits.way,
                exactness=traits.exactness,
                speed=Spread.of(pair for row in group for pair in row.pairs),
                kv_bytes=max(row.kv_bytes for row in group),
                kv_peak_bytes=max(row.kv_peak_bytes for row in group),
                quality=score,
                answers=count,
                against=_against(group, traits, score, plain, loss),
            )
        )
    return standings


def _quality(group: Iterable[Row], answers: Mapping[str, int]) -> tuple[float | None, int]:
    """Mean score over all answers, and their number."""
    scored = [(row.quality, answers.get(row.workload, 0)) for row in group if row.quality is not None]
    count = sum(number for _, number in scored)
    return (sum(score * number for score, number in scored) / count if count else None), count


def _against(group: Sequence[Row], traits: Traits, score: float | None, plain: float | None, loss: float) -> str | None:
    """Why a method cannot be recommended."""
    if broken := sum(row.broken for row in group):
        return f"{broken} outputs differ from plain's, though it promises them"
    if traits.exactness == "distribution" or (traits.exactness == "greedy" and not group[0].seeds):
        return None
    if score is None or plain is None:
        return "its answers cannot be judged: no prompt has an answer"
    if plain == 0:
        return "its answers cannot be judged: plain's own are all wrong"
    if score < plain - loss:
        return f"its answers are worse than plain's by {plain - score:.2f}"
    return None


def _choice(
    standings: Sequence[Standing], found: Comparison, goal: Goal, allowed: Allowed, out: dict[str, str]
) -> Choice:
    if not standings:
        raise KeyboardInterrupt  # before anything was measured
    order = sorted(standings, key=lambda each: (each.against is not None, _rank(each, goal)))
    labels = {each.label: each for each in standings}
    base = next(labels[name] for name in _BASES if name in labels)
    # transformers' own generate, and plain under another setting, are no other way.
    rivals = [each for each in order if each.against is None and each.way != "one-by-one"]
    best = rivals[0] if rivals else None
    chosen = best if best is not None and _ahead(best, base, goal) else base
    reason = _reason(chosen, base, found, goal) if chosen is not base else _refusal(best, base, goal)
    if PLAIN in out:
        reason += f"; plain itself cannot run: {out[PLAIN]}"
    return Choice(
        recommended=chosen.label,
        method=chosen.method,
        reason=reason,
        goal=goal,
        allowed=allowed,
        standings=tuple(order),
        left_out=out,
        comparison=found,
    )


def _rank(standing: Standing, goal: Goal) -> tuple[float, float]:
    if goal == "memory":
        return standing.kv_bytes, -standing.speed.median
    if goal == "quality":
        return -(standing.quality or 0.0), -standing.speed.median
    return -standing.speed.median, standing.kv_bytes


def _ahead(best: Standing, base: Standing, goal: Goal) -> bool:
    """Whether the best one is better than plain beyond the spread."""
    if goal == "speed":
        # Both are ratios to transformers; plain's own loop can be the faster one.
        return best.speed.lower > max(1.0, base.speed.median)
    if goal == "memory":
        return best.kv_bytes < base.kv_bytes
    return _gain(best, base) > _SURE * _error(best, base)


def _gain(best: Standing, base: Standing) -> float:
    return (best.quality or 0.0) - (base.quality or 0.0)


def _error(*standings: Standing) -> float:
    """Standard error of the difference of two mean scores, each of independent answers between 0 and 1."""
    variances = [(each.quality or 0.0) * (1 - (each.quality or 0.0)) / max(1, each.answers) for each in standings]
    return math.sqrt(sum(variances))


def _refusal(best: Standing | None, base: Standing, goal: Goal) -> str:
    """Why plain remains."""
    if best is None:
        return "nothing else that was measured can be chosen"
    if goal == "speed":
        return f"the fastest other, {best.label}, is not faster beyond the spread: {ratio(best.speed)} of transformers"
    if goal == "memory":
        return f"no other keeps less than its {size(base.kv_bytes)} of keys and values"
    if base.quality is None:
        return "no prompt has an answer, so nothing tells which method answers better"
    return (
        f"the best other score, {best.quality or 0.0:.2f} of {best.label}, is not above its {base.quality:.2f} by two "
        "standard errors"
    )


def _reason(chosen: Standing, base: Standing, found: Comparison, goal: Goal) -> str:
    """Why a method is recommended, and on which tasks it is slower than plain."""
    pairs = min(row.speed.count for row in found.rows)
    said = {
        "speed": f"{ratio(chosen.speed)} the tokens per second of transformers' plain generate",
        "memory": f"{size(chosen.kv_bytes)} of keys and values instead of {size(base.kv_bytes)}, at "
        f"{ratio(chosen.speed)} the speed of transformers' plain generate",
        "quality": f"{_gain(chosen, base):+.2f} in score, at {ratio(chosen.speed)} the speed of transformers' plain "
        "generate",
    }[goal]
    if pairs < PAIRS:
        said += f" (of {pairs} pairs, too few for a claim)"
    said += ", plain's own output" if chosen.exactness == "distribution" else ", another output than plain's"
    if chosen.quality is not None and base.quality is not None:
        said += f", score {chosen.quality:.2f} against {base.quality:.2f}"
    mine = [row for row in found.rows if row.label == chosen.label and row.speed.upper < 1]
    slower = ", ".join(f"{row.workload} ({row.speed.median:.2f}×)" for row in mine)
    return said + (f"; slower on {slower}" if slower else "")


def recommendation(data: Mapping[str, Any]) -> str:
    """In one sentence what was recommended, of a choice as it stands in the JSON; no speed of few pairs is a reason."""
    may = [name.replace("_", " ") for name, free in data["allowed"].items() if free is True and name != "sampled"]
    asked = f"`tokenry choose` for the {GOALS[data['goal']]}, where {' and '.join(may) or 'nothing'} may change"
    pairs = min((each["speed"]["count"] for each in data["standings"]), default=0)
    if pairs < PAIRS and data["goal"] == "speed":
        return f"{asked}: fewer than {PAIRS} pairs, from which no speed should be claimed."
    why = f": {data['reason']}" if pairs >= PAIRS else ""
    return f"{asked}, recommends `{data['label']}` among {len(data['standings'])} ways{why}."


# --- the taxonomy as a table --------------------------------------------------------------------


def taxonomy(*families: str) -> str:
    """The taxonomy of some families as a Markdown table."""
    lines = ["| method | how tokens come | output | trained | second model | cache |", "|---|---|---|---|---|---|"]
    for form, traits in TRAITS.items():
        if BY_SLUG[form.partition(":")[0]].family in families:
            output = "plain's" if traits.exactness == "distribution" else traits.exactness
            second = "yes" if traits.second_model else "no"
            cells = (f"`{form}`", WAYS[traits.way], output, traits.training, second, CACHE[traits.cache])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
