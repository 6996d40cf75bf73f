"""Drafters against plain decoding and other libraries, task by task: what `tokenry bench speculation` prints."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Group

from tokenry.errors import BadParameter, PromptTooLong, TokenryError
from tokenry.generation.follower import second_model
from tokenry.methods import Combination, Method, load_class, parameters, rows
from tokenry.methods import method as read_method
from tokenry.models import context_length
from tokenry.workloads import Example

from .checks import Check, Ordering, lossless_check, not_slower_checks, ordering_checks
from .comparison import compare
from .metrics import PAIRS
from .peers import Peer
from .results import SCHEMA_VERSION, Comparison, finite, printed
from .running import Prompts, Runner, Setting, Variant, collect, join

PEERS = (
    "transformers",
    "transformers-prompt-lookup",
    "transformers-assisted",
    "transformers-assisted:schedule=heuristic",
)
"""transformers' own ways: plain, prompt lookup, assisted generation with its constant and its dynamic schedule."""

_BOTH = "Goose accepts at least as many tokens per pass as its {} alone, at the same tree size"

ORDERINGS = (
    Ordering(
        name="goose-above-its-spine",
        statement=_BOTH.format("copied text"),
        method="goose:extra=0",
        other="goose:extra=0;sources=spine",
    ),
    Ordering(
        name="goose-above-its-branches",
        statement=_BOTH.format("table"),
        method="goose:extra=0",
        other="goose:extra=0;sources=branches",
    ),
    Ordering(
        name="goose-above-isotropic",
        statement="Goose accepts more tokens per pass than a balanced tree from its table, at the same tree size",
        method="goose:extra=0",
        other="goose:extra=0;tree=isotropic",
        strict=True,
    ),
    Ordering(
        name="dyspec-above-chain",
        statement="DySpec accepts more tokens per pass than a chain of the same size from the same draft model",
        method="dyspec:size=16",
        other="draft-model:tokens=16;confidence=0.0",
        strict=True,
    ),
    *(
        Ordering(
            name=f"dyspec-above-fixed-tree-of-{children}",
            statement=f"DySpec accepts more tokens per pass than a fixed tree ({children} children a node) of the same "
            "size from the same draft model",
            method="dyspec:size=16",
            other=f"draft-tree:children={children}",
            strict=True,
        )
        for children in (2, 3)
    ),
)
"""What the papers promise at one tree size, whatever the speed."""

_SIZES = ("tokens", "size", "template", "mode")  # what the drafters call the size of a draft
_ALSO = ("hamburger:lossless=true",)  # drafters that by default are no drafters
_WORKLOADS = ("code", "recall", "arithmetic", "edit")
_LIMIT = 14
# MT-Bench's questions in Spec-Bench's file, whose eight categories Spec-Bench counts as one task.
_MT_BENCH = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
_MT_BENCH_QUESTIONS = range(81, 161)


@dataclass(frozen=True, kw_only=True)
class SpeculationBench:
    """What the bench of the drafters measured; prints itself as tables and writes itself as JSON.

    Args:
        runs: One comparison for each batch size, a workload being a task.
        checks: What should hold between the methods, and whether it did.
        skipped: Methods that could not run here, with the reason and the batch size.
        prompts: Name and SHA-256 of the file the prompts came from; None for workloads and texts.
    """

    runs: tuple[Comparison, ...]
    checks: tuple[Check, ...]
    skipped: tuple[dict[str, Any], ...] = ()
    prompts: dict[str, str] | None = None
    created: str = field(default="", repr=False)

    @property
    def partial(self) -> bool:
        """Whether it was interrupted."""
        return any(run.partial for run in self.runs)

    @property
    def broken(self) -> int:
        """Outputs of lossless methods that differ from plain's otherwise than from a near tie on."""
        return sum(row.broken for run in self.runs for row in run.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but sample outputs as plain data."""
        runs = [run.to_dict() for run in self.runs]
        for run in runs:
            del run["samples"]
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "speculation",
            "created": self.created,
            "partial": self.partial,
            "prompts": self.prompts,
            "runs": runs,
            "checks": [asdict(check) for check in self.checks],
            "skipped": list(self.skipped),
        }

    def to_json(self) -> str:
        """Return the bench as JSON."""
        return json.dumps(finite(self.to_dict()), indent=1, ensure_ascii=False)

    def __rich__(self) -> Group:
        from .tables import speculation_tables

        return speculation_tables(self)

    def __str__(self) -> str:
        return printed(self)


def bench_speculation(
    model: Any,
    tokenizer: Any,
    prompts: Prompts | None = None,
    *,
    methods: Sequence[str | Method | Combination] | None = None,
    workloads: Sequence[str] | None = None,
    per_task: int | None = None,
    batch_sizes: Sequence[int] = (1,),
    max_new_tokens: int = 64,
    tail: int | None = None,
    repeats: int = PAIRS,
    draft: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    resources: dict[str, Any] | None = None,
    progress: bool = True,
) -> SpeculationBench:
    """Measure drafters task by task: ratio to plain, tokens per forward pass, acceptance by depth, drafter time.

    All methods run interleaved in one process, transformers' plain `generate`, prompt lookup and assisted generation
    among them. Every greedy output is compared with plain's over the same batch.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        prompts: Texts or examples, a mapping from tasks to lists of them, or the path of a JSONL file such as
            Spec-Bench's, whose categories are the tasks (MT-Bench's eight count as one).
        methods: Drafters. By default every available one with its automatic size, plain, transformers' own ways, and
            the methods that the checks compare at one tree size; those that cannot run are skipped with a reason.
        workloads: Bundled workloads; by default all four if there are no prompts.
        per_task: Prompts of each task, evenly chosen from a file's; by default 14 of a workload and all others.
        batch_sizes: Prompts that run together, one comparison for each.
        max_new_tokens: New tokens a prompt.
        tail: Keep only the last so many tokens of each prompt; by default what fits the model's context.
        repeats: Interleaved pairs over which the prompts are dealt.
        draft: The draft model of all default methods that take one; by default each method's own.
        temperature: 0 is greedy; above it everything is sampled.
        seed: Seed of workloads and of sampling.
        resources: Second models that are loaded already, by name.
        progress: Show progress on a terminal.

    Raises:
        BadPrompt, PromptTooLong, BadParameter, MethodNotFound: As `compare` does.
    """
    if per_task is not None and per_task < 1:
        raise BadParameter(f"per_task={per_task} is not allowed; it must be at least 1")
    if temperature < 0:
        raise BadParameter(f"temperature={temperature} is not allowed; it must be at least 0, which is greedy")
    if tail is None and (context := context_length(model)):
        tail = context - max_new_tokens
        if tail < 1:
            raise PromptTooLong(
                f"{max_new_tokens} new tokens leave no room for a prompt in the model's context of {context}; "
                "ask for fewer new tokens"
            )
    tasks = _tasks(prompts, workloads, per_task, seed)
    if draft is not None:
        # A draft model that was named and cannot serve is an error, not a row that is left out.
        second_model("draft-model", "draft", draft, model, {"tokenizer": tokenizer})
    setting = Setting(True, temperature) if temperature else Setting()
    skipped: list[dict[str, Any]] = []
    if methods is None:
        runner = Runner(model, tokenizer, resources=resources)
        chosen, skipped = _available(runner, next(iter(tasks.values())), max_new_tokens, tail, setting, draft)
    else:
        chosen = [read_method(each) for each in methods]
    labels = {Variant(each, setting).label: each for each in chosen}
    sized = [label for label, each in labels.items() if _chooses_size(each)]
    free = [label for label, each in labels.items() if label in sized and not _needs_model(each)]
    # In its own size prompt lookup is held against transformers' own, which has the same.
    free += [label for label, each in labels.items() if str(each) == "prompt-lookup"]
    lookup, plain = (Variant(read_method(text), setting).label for text in ("transformers-prompt-lookup", "plain"))
    alone = [each for each in chosen if isinstance(each, Peer) and not each.batches]
    if chosen and len(alone) == len(chosen) and 1 not in batch_sizes:
        raise BadParameter(
            f"{', '.join(map(str, chosen))} takes one prompt at a time, and batches of "
            f"{', '.join(map(str, batch_sizes))} are asked for: add a batch size of 1, or other methods"
        )
    runs: list[Comparison] = []
    checks: list[Check] = []
    for size in batch_sizes:
        serving = [each for each in chosen if size == 1 or each not in alone]
        reason = f"takes one prompt at a time, not {size}"
        skipped += [_skip(each, reason, size) for each in chosen if each not in serving]
        if chosen and not serving:
            continue
        run = compare(
            model, tokenizer, tasks, serving, max_new_tokens=max_new_tokens, tail=tail, repeats=repeats,
            batch_size=size, seed=seed, sample=setting.do_sample, temperature=setting.temperature,
            resources=resources, progress=progress,
        )  # fmt: skip
        runs.append(run)
        checks += lossless_check(run) + ordering_checks(run, _orderings(draft)) + not_slower_checks(run, sized)
        checks += not_slower_checks(run, [plain] if plain in labels else []) + not_slower_checks(run, free, lookup)
        if run.partial:
            break
    return SpeculationBench(
        runs=tuple(runs),
        checks=tuple(checks),
        skipped=tuple(skipped),
        prompts=_file(prompts),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


# --- tasks --------------------------------------------------------------------------------------


def _tasks(
    prompts: Prompts | None, workloads: Sequence[str] | None, per_task: int | None, seed: int
) -> dict[str, list[Example]]:
    """Examples by task: a workload's name, a JSONL's category, or the name the prompts were given under."""
    if prompts is None and workloads is None:
        workloads = _WORKLOADS
    found: dict[str, list[Example]] = {}
    if prompts is not None:
        for name, group in collect(prompts, None, limit=0, seed=seed).items():
            tasks: dict[str, list[Example]] = {}
            for example in group:
                tasks.setdefault(_task(example, name), []).append(example)
            join(found, {task: _evenly(examples, per_task) for task, examples in tasks.items()})
    if workloads:
        join(found, collect(None, workloads, limit=per_task or _LIMIT, seed=seed))
    return found


def _task(example: Example, name: str) -> str:
    category = example.meta.get("category")
    if category in _MT_BENCH and example.meta.get("question_id") in _MT_BENCH_QUESTIONS:
        return "mt-bench"
    return str(category) if category else name


def _evenly(examples: list[Example], count: int | None) -> list[Example]:
    if count is None or count >= len(examples):
        return examples
    return [examples[index * len(examples) // count] for index in range(count)]


def _file(prompts: Prompts | None) -> dict[str, str] | None:
    if isinstance(prompts, Path) or (isinstance(prompts, str) and prompts.endswith((".json", ".jsonl"))):
        path = Path(prompts)
        return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return None


# --- methods ------------------------------------------------------------------------------------


def _available(
    runner: Runner, examples: list[Example], new: int, tail: int | None, setting: Setting, draft: str | None
) -> tuple[list[Method | Combination], list[dict[str, Any]]]:
    """The default methods that can run with this model, and those that cannot with the reason: a try of few tokens."""
    task = runner.prepare("a try", examples[:1], max_new_tokens=min(4, new), tail=tail)
    names = ["plain", *PEERS, *(row.slug for row in _drafters()), *_ALSO]
    texts = [*names, *(text for order in ORDERINGS for text in (order.method, order.other))]
    found: dict[Method | Combination, None] = {}
    skipped = []
    for text in dict.fromkeys(texts):
        try:
            each = _with_draft(read_method(text), draft)
            if text in names and isinstance(each, Method):
                each = automatic(each) or each
            if each not in found:
                runner.run(Variant(each, setting), task.batches[0], task.max_new_tokens)
                found[each] = None
        except (TokenryError, ValueError) as error:
            # Another library refuses by a ValueError; one of ours is a fault.
            if not isinstance(error, TokenryError) and text not in PEERS:
                raise
            skipped.append(_skip(text, " ".join(str(error).split()), 1))
    return list(found), skipped


def _drafters() -> Iterable[Any]:
    """Rows of the drafters that are available, other packages' included."""
    for row in rows():
        if row.kind != "peer" and row.family in ("speculation", "external"):
            try:
                drafts = getattr(load_class(row.slug), "drafts", False)
            except TokenryError:
                # Whoever names it gets the error; a list of all goes on without.
                continue
            if drafts:
                yield row


def automatic(method: Method) -> Method | None:
    """A drafter with its automatic size: `"auto"` where a size of its knows that word; None where none does."""
    for name in _SIZES:
        if name in parameters(type(method)):
            with contextlib.suppress(BadParameter):
                return dataclasses.replace(method, **{name: "auto"})
    return None


def _chooses_size(method: Method | Combination) -> bool:
    return any(getattr(method, name, None) == "auto" for name in _SIZES)


def _needs_model(method: Method | Combination) -> bool:
    """Whether it drafts with a second model or with weights of its own."""
    return isinstance(method, Combination) or bool({"draft", "weights", "adapter"} & set(type(method).resources))


def _with_draft(method: Method | Combination, draft: str | None) -> Method | Combination:
    if draft is None or isinstance(method, Combination) or "draft" not in type(method).resources:
        return method
    return dataclasses.replace(method, draft=draft)  # type: ignore[call-arg]


def _orderings(draft: str | None) -> list[Ordering]:
    """The orderings whose methods are available, named as they run."""
    found = []
    for order in ORDERINGS:
        try:
            mine, its = (str(_with_draft(read_method(text), draft)) for text in (order.method, order.other))
        except TokenryError:
            continue
        found.append(dataclasses.replace(order, method=mine, other=its))
    return found


def _skip(method: str | Method | Combination, reason: str, batch_size: int) -> dict[str, Any]:
    # Results are shared; whose machine they come from is nobody's business.
    return {"method": str(method), "reason": reason.replace(str(Path.home()), "~"), "batch_size": batch_size}
