"""`compare`: methods side by side on one model and text, in one process run."""

import contextlib
import hashlib
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from tokenry.errors import BadParameter, BadPrompt, TokenryError
from tokenry.generation import Plain, Stats
from tokenry.generation.full import effective, taken
from tokenry.generation.full import samples as samples
from tokenry.methods import Combination, Method, load_class
from tokenry.methods import method as read_method
from tokenry.methods import rows as method_rows
from tokenry.models import load, resource, weights_hash

from .environment import describe_model, machine, model_name, versions
from .metrics import PAIRS, Lossless, Spread, agreement, bits_per_byte, check_lossless
from .peers import Peer
from .results import Comparison, Row, Sample
from .running import Outcome, Prompts, Runner, Setting, Task, Variant, collect, deal

REFERENCE = "transformers"
"""The method every speed is a ratio to: transformers' plain `generate`."""

DEFAULT_METHODS = ("plain", "prompt-lookup", "token-recycling", "sinks:budget=256", "h2o:budget=256")

MOST_SEED = 2**62
"""The largest seed; those of single runs, which lie above it, must fit into 64 bits."""

_SEEDS = {"arithmetic": 3}  # sampled runs of each prompt; one elsewhere

Advance = Callable[..., None]


def compare(
    model: Any,
    tokenizer: Any = None,
    prompts: Prompts | None = None,
    methods: Iterable[str | Method | Combination] = DEFAULT_METHODS,
    *,
    workloads: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
    max_new_tokens: int | None = None,
    repeats: int = PAIRS,
    limit: int = 14,
    batch_size: int = 1,
    seed: int = 0,
    sample: bool | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seeds: int | None = None,
    tail: int | None = None,
    ignore_eos: bool = False,
    text: str | None = None,
    trace: bool = False,
    resources: dict[str, Any] | None = None,
    progress: bool = True,
) -> Comparison:
    """Measure methods side by side: speed against transformers' plain `generate`, cost and quality.

    Everything runs in this process, interleaved: each of the `repeats` pairs takes its share of every
    workload's prompts through all methods in turn, in rotating order, and a method's speed is the median
    of its ratios to the reference in the same pair. Methods that sample (CNTP) run sampled, beside `plain`
    and the reference sampled with the same options; all others run greedily. Interrupted by Ctrl-C, it
    returns what is measured so far, marked as partial.

    Args:
        model: A loaded model, or a name that `tokenry.load` takes.
        tokenizer: Its tokenizer; by default the one that lies beside the model.
        prompts: Texts or `Example`s, a mapping from names to lists of them, or the path of a JSONL file.
        methods: Text forms or methods. The reference is added.
        workloads: Names of bundled workloads, or a mapping from names to their options; all four where
            there are no prompts either.
        max_new_tokens: New tokens a prompt; by default what the longest answer takes, from 64 to 256.
        repeats: Interleaved pairs; below 7 no speed should be claimed from the result.
        limit: Examples of each named workload.
        batch_size: Prompts that run together.
        seed: Seed of workloads and of sampling.
        sample: True or False: all methods run sampled or greedily.
        temperature: Of the sampled rows, as `top_p` and `top_k` are.
        seeds: Seeds each prompt is sampled with; by default 3 on arithmetic and 1 elsewhere.
        tail: Keep only the last so many tokens of each prompt.
        ignore_eos: Go on after an end of text, so that all outputs have the same length.
        text: Text on which the bits per byte of plain and of every cache policy are measured, token by token.
        trace: Note for the report which cached tokens each policy kept.
        resources: Second models that are loaded already, by name, such as `{"draft": model}`.
        progress: Show progress on a terminal.

    Raises:
        MethodNotFound, BadParameter: A method or an option is not known or not allowed.
        BadPrompt, PromptTooLong: The prompts cannot be used.
        UnsupportedModel: A method cannot serve the model.
    """
    if repeats < 1 or limit < 1 or (seeds is not None and seeds < 1):
        raise BadParameter("repeats, limit and seeds must each be at least 1")
    if abs(seed) > MOST_SEED:
        raise BadParameter(f"seed={seed} is not allowed; it must be from -{MOST_SEED} to {MOST_SEED}")
    sampled = Setting(True, temperature, top_p, top_k)
    if text is not None and not text.strip():
        raise BadPrompt("the text to measure bits per byte on is empty; give some, or leave it out")
    if isinstance(methods, str | Method | Combination):
        methods = [methods]
    # A row is named after what runs, which for a drafter beside a policy can differ from what was asked for.
    chosen = [effective(each) for each in methods]
    if not chosen:
        raise BadParameter("there are no methods; name at least one, such as plain")
    _check_resources(chosen, resources or {})
    variants = _variants(chosen, sampled, sample)
    if workloads is None and prompts is None:
        workloads = ("code", "recall", "arithmetic", "edit")
    groups = collect(prompts, workloads, limit=limit, seed=seed)
    if tokenizer is None or isinstance(model, str | Path):
        model, found = load(model)
        tokenizer = tokenizer or found
    runner = Runner(model, tokenizer, ignore_eos, resources)
    tasks = [
        runner.prepare(name, group, max_new_tokens=max_new_tokens, batch_size=batch_size, tail=tail)
        for name, group in groups.items()
    ]
    bench = _Bench(runner, variants, tasks, repeats, seed, seeds)
    with _progress(progress, bench.steps) as advance:
        partial = bench.measure(advance)
        try:
            bits = bench.bits(text, advance) if text and not partial else {}
            rows = bench.rows(advance, bits)
            samples = bench.samples(trace and not partial, advance)
        except KeyboardInterrupt:
            partial, rows, samples = True, bench.rows(advance, {}, check=False), bench.samples(False, advance)
    return Comparison(
        rows=tuple(rows),
        samples=tuple(samples),
        about={
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": describe_model(model),
            "resources": _resources(model, variants, resources or {}),
            "machine": machine(model.device),
            "versions": versions(),
            "settings": {
                "reference": REFERENCE,
                "repeats": repeats,
                "batch_size": batch_size,
                "seed": seed,
                "tail": tail,
                "ignore_eos": ignore_eos,
                "settings": list(dict.fromkeys(str(variant.setting) for variant in variants)),
            },
            "workloads": [
                {
                    "name": task.name,
                    "prompts": task.prompts,
                    "prompt_tokens": task.prompt_tokens,
                    "max_new_tokens": task.max_new_tokens,
                    "scored": task.scored,
                }
                for task in tasks
            ],
        },
        partial=partial,
    )


def _check_resources(chosen: Sequence[Method | Combination], resources: Mapping[str, Any]) -> None:
    """Refuse a name that no method takes; one set may serve some of the methods."""
    lost = set(resources).difference(*(taken(each, resources) for each in chosen))
    if not lost:
        return
    known = {"tokenizer"}
    for row in method_rows():
        with contextlib.suppress(TokenryError):  # a method of another package that does not load
            known.update(load_class(row.slug).resources)
    if strange := sorted(lost - known):
        raise BadParameter(
            f"{', '.join(map(repr, strange))} is no resource of any method; there are {', '.join(sorted(known))}"
        )


def lossless(method: Method | Combination) -> bool:
    """Whether a method promises plain's own output: plain itself and peers do, and drafters that verify."""
    if isinstance(method, Plain | Peer):
        return True
    return bool(getattr(method, "drafts", False)) and getattr(method, "lossless", True) is True


def _variants(methods: list[Method | Combination], sampled: Setting, sample: bool | None) -> list[Variant]:
    """Greedy rows first, then sampled ones, each group led by the reference."""
    groups: dict[Setting, list[Method | Combination]] = {}
    for method in methods:
        sampling = samples(method) if sample is None else sample
        # A sampled row says little without plain sampling beside it.
        lead = [read_method(REFERENCE), *([read_method("plain")] if sampling else [])]
        groups.setdefault(sampled if sampling else Setting(), lead).append(method)
    order = sorted(groups, key=lambda setting: setting.do_sample)
    return list(dict.fromkeys(Variant(method, setting) for setting in order for method in groups[setting]))


def _resources(model: Any, variants: list[Variant], given: dict[str, Any]) -> list[dict[str, Any]]:
    """Name and weights hash of every second model and table that a method uses."""
    found = []
    for part in dict.fromkeys(part for variant in variants for part in variant.parts):
        for name in type(part).resources:
            entry = {"method": str(part), "resource": name}
            place = getattr(part, name)
            second = given.get(name)
            if second is None and place and not Path(place).is_file():
                with contextlib.suppress(TokenryError):  # a folder of other weights than a whole model
                    second = resource(place, model)
            if isinstance(second, PreTrainedModel):
                found.append({**entry, "name": model_name(second), "weights_hash": weights_hash(second)})
            elif second is None and place and Path(place).exists():
                found.append({**entry, "name": Path(place).name, "weights_hash": _files_hash(Path(place))})
    return found


def _files_hash(place: Path) -> str:
    """Twelve hexadecimal digits that change with any byte of a file, or of the files of a folder."""
    digest = hashlib.sha256()
    for path in [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def _progress(show: bool, steps: int) -> Iterator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task("", total=steps)

        def advance(what: str, done: int = 0) -> None:
            bar.update(task, description=f"{what:<44.44}", advance=done)

        yield advance


def _sizes(task: Task) -> dict[int, int]:
    """The first batch of each batch size: the last one is often smaller."""
    found: dict[int, int] = {}
    for index, batch in enumerate(task.batches):
        found.setdefault(len(batch.examples), index)
    return found


@dataclass
class _Tally:
    """What the runs of one variant on one task gave: tokens per second by pair, outcomes by (pair, batch, draw)."""

    speeds: list[float] = field(default_factory=list)
    outcomes: dict[tuple[int, int, int], Outcome] = field(default_factory=dict)

    @property
    def distinct(self) -> dict[int, tuple[int, int, int]]:
        """The first run of each batch: greedily, later ones repeat it."""
        found: dict[int, tuple[int, int, int]] = {}
        for key in sorted(self.outcomes):
            found.setdefault(key[1], key)
        return found


@dataclass
class _Bench:
    """The runs of all variants on all tasks, and what they say."""

    runner: Runner
    variants: list[Variant]
    tasks: list[Task]
    repeats: int
    seed: int
    seeds: int | None

    def __post_init__(self) -> None:
        self.tallies = {(task.name, variant): _Tally() for task in self.tasks for variant in self.variants}

    @property
    def steps(self) -> int:
        """Steps of the progress bar: a variant's share of a task in a pair, and its warm-ups."""
        return len(self.variants) * sum(self.repeats + len(_sizes(task)) for task in self.tasks)

    def draws(self, task: Task, variant: Variant) -> int:
        """How many times a variant runs each prompt of a pair."""
        return (self.seeds or _SEEDS.get(task.name, 1)) if variant.setting.do_sample else 1

    # --- running ---

    def measure(self, advance: Advance) -> bool:
        """Run everything; return whether it was interrupted."""
        try:
            # Second models load, kernels are chosen and `auto` sizes are found, for each batch size, before the
            # clock runs; and what a method cannot serve is refused before minutes were spent.
            for task in self.tasks:
                for batch in _sizes(task).values():
                    for variant in self.variants:
                        advance(f"warm-up · {task.name} · {variant.label}")
                        self.runner.run(variant, task.batches[batch], min(8, task.max_new_tokens), self.seed)
                        advance(f"warm-up · {task.name} · {variant.label}", 1)
            for pair in range(self.repeats):
                for task in self.tasks:
                    self._pair(pair, task, advance)
        except KeyboardInterrupt:
            return True
        return False

    def _pair(self, pair: int, task: Task, advance: Advance) -> None:
        batches = deal(len(task.batches), self.repeats)[pair]
        turn = pair % len(self.variants)
        found: dict[Variant, dict[tuple[int, int, int], Outcome]] = {}
        for variant in self.variants[turn:] + self.variants[:turn]:
            where = f"{pair + 1}/{self.repeats} · {task.name} · {variant.label}"
            advance(where)
            found[variant] = {
                # Prompts, draws and pairs never share a seed, so no run repeats another's draws.
                (pair, batch, draw): self.runner.run(
                    variant,
                    task.batches[batch],
                    task.max_new_tokens,
                    self.seed + 1_000_003 * draw + 1009 * batch + pair,
                )
                for batch in batches
                for draw in range(self.draws(task, variant))
            }
            advance(where, 1)
        # Only a complete pair counts: parts of one would compare different moments of the machine.
        for variant, outcomes in found.items():
            tally = self.tallies[task.name, variant]
            tally.outcomes |= outcomes
            tokens = sum(len(row) for outcome in outcomes.values() for row in outcome.tokens)
            tally.speeds.append(tokens / sum(outcome.seconds for outcome in outcomes.values()))

    # --- what the runs say ---

    def rows(self, advance: Advance, bits: dict[Variant, float], check: bool = True) -> list[Row]:
        """One row for each task and variant that has a complete pair."""
        found = []
        for task in self.tasks:
            for variant in self.variants:
                if self.tallies[task.name, variant].speeds:
                    advance(f"checking · {task.name} · {variant.label}")
                    found.append(self._row(task, variant, bits.get(variant), check))
        return found

    def _row(self, task: Task, variant: Variant, bits: float | None, check: bool) -> Row:
        tally = self.tallies[task.name, variant]
        reference = self.tallies[task.name, Variant(read_method(REFERENCE), variant.setting)]
        outcomes = list(tally.outcomes.values())
        ratios = tuple(mine / its for mine, its in zip(tally.speeds, reference.speeds, strict=True))
        greedy = not variant.setting.do_sample
        total = Stats.total(outcome.stats for outcome in outcomes)
        by_batch = (tally.outcomes[key].stats.tokens_per_pass for key in tally.distinct.values())
        drafting = [outcome.drafter_seconds for outcome in outcomes if outcome.drafter_seconds is not None]
        promised = greedy and tally is not reference and lossless(variant.method)
        checked = self._lossless(task, tally, reference) if promised and check else None
        quality, deviation = self._quality(task, variant, tally)
        return Row(
            workload=task.name,
            method=str(variant.method),
            label=variant.label,
            family=variant.family,
            setting=str(variant.setting),
            speed=Spread.of(ratios),
            tokens_per_second=Spread.of(tally.speeds),
            pairs=ratios,
            tokens=total.committed,
            forwards=total.forwards,
            passes=total.passes,
            draft_forwards=sum(outcome.draft_forwards for outcome in outcomes),
            seconds=sum(outcome.seconds for outcome in outcomes),
            drafter_seconds=sum(drafting) if drafting else None,
            steps=total.steps,
            drafted=total.drafted,
            accepted=total.accepted,
            drafted_to=tuple(total.drafted_to),
            accepted_to=tuple(total.accepted_to),
            forwards_per_token=total.passes / max(1, total.committed),
            tokens_per_pass=total.tokens_per_pass,
            tokens_per_pass_by_batch=tuple(by_batch),
            tokens_per_step=total.tokens_per_step if total.steps else None,
            kv_bytes=total.kv_bytes,
            kv_peak_bytes=total.kv_peak_bytes,
            quality=quality,
            quality_sd=deviation,
            seeds=0 if greedy else self.draws(task, variant),
            agreement=self._agreement(tally, reference) if greedy else None,
            lossless=str(checked) if checked else None,
            near_ties=checked.near_ties if checked else 0,
            broken=checked.broken if checked else 0,
            bits_per_byte=bits,
        )

    def _agreement(self, tally: _Tally, reference: _Tally) -> float:
        return statistics.fmean(
            agreement(expected, got).leading
            for key in tally.distinct.values()
            for expected, got in zip(reference.outcomes[key].tokens, tally.outcomes[key].tokens, strict=True)
        )

    def _lossless(self, task: Task, tally: _Tally, reference: _Tally) -> Lossless:
        total = Lossless()
        for index, key in tally.distinct.items():
            batch = task.batches[index]
            expected, got = reference.outcomes[key].tokens, tally.outcomes[key].tokens
            total += check_lossless(
                self.runner.model, batch.input_ids, batch.attention_mask, expected, got, **self.runner.options
            )
        return total

    def _quality(self, task: Task, variant: Variant, tally: _Tally) -> tuple[float | None, float | None]:
        """Mean score of the examples with an answer, and its standard deviation over draws where there are several."""
        if not task.scored:
            return None, None
        # Greedily a repetition adds nothing; sampled, every run is a draw of its own.
        keys = tally.outcomes if variant.setting.do_sample else tally.distinct.values()
        scores: dict[int, list[float]] = {}
        for key in keys:
            for example, row in zip(task.batches[key[1]].examples, tally.outcomes[key].tokens, strict=True):
                if not example.answer:
                    continue
                output = self.runner.tokenizer.decode(row, skip_special_tokens=True)
                scores.setdefault(key[2], []).append(example.check(output))
        # An interrupted run can lack the prompts with answers.
        if not scores:
            return None, None
        means = [statistics.fmean(group) for group in scores.values()]
        return statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else None

    def bits(self, text: str, advance: Advance) -> dict[Variant, float]:
        """Bits per byte of plain decoding and of every cache policy, in the same windows."""
        found: dict[Variant, float] = {}
        known: dict[str, float] = {}
        for variant in self.variants:
            policy = next((part for part in variant.parts if part.role == "policy"), None)
            if policy is None and variant.family != "generation":
                continue
            if str(policy) not in known:
                advance(f"bits per byte · {variant.label}")
                known[str(policy)] = bits_per_byte(
                    self.runner.model, self.runner.tokenizer, text, policy=policy, stepwise=True
                )
            found[variant] = known[str(policy)]
        return found

    def samples(self, trace: bool, advance: Advance) -> list[Sample]:
        """The first output of every row; with `trace` also which cached tokens a policy kept."""
        found = []
        for task in self.tasks:
            batch = task.batches[0]
            prompt = batch.input_ids[0][batch.attention_mask[0].bool()]
            for variant in self.variants:
                outcome = next(iter(self.tallies[task.name, variant].outcomes.values()), None)
                if outcome is None:
                    continue
                new = outcome.tokens[0]
                sources = outcome.sources[0] if outcome.sources else [""] * len(new)
                kept = None
                if trace and any(part.role == "policy" for part in variant.parts):
                    advance(f"trace · {task.name} · {variant.label}")
                    kept = self.runner.kept_tokens(variant, prompt[None], task.max_new_tokens)
                found.append(
                    Sample(
                        workload=task.name,
                        label=variant.label,
                        prompt=self.runner.tokenizer.decode(prompt),
                        tokens=tuple(zip(self._texts(new), sources, strict=True)),
                        kept=kept,
                        prompt_tokens=tuple(self._texts(prompt.tolist())) if kept else (),
                    )
                )
        return found

    def _texts(self, ids: list[int]) -> list[str]:
        return [self.runner.tokenizer.decode([token]) for token in ids]
