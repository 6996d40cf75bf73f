"""The parts of the bench together."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tokenry.errors import BadParameter, TokenryError
from tokenry.methods import Method

from ..decoding import SEEDS
from ..environment import describe_model, machine, versions
from ..kvpress import PRESSES, peers_python
from ..metrics import PAIRS
from . import bits, quality, timing
from .checks import checked
from .engine import Bench, default_methods, policies
from .results import KVCacheBench

PARTS: dict[str, Callable[[Bench], None]] = {
    "quality": quality.measure,
    "bits": bits.measure,
    "time": timing.measure,
    "prefill": timing.measure_prefill,
}
"""What measures each part."""

SHARES = (0.5, 0.25, 0.125)
LENGTHS = (4096, 8192, 16384, 32768)


def bench_kvcache(
    model: Any,
    tokenizer: Any,
    *,
    parts: Sequence[str] | None = None,
    methods: Sequence[str | Method] | None = None,
    workloads: Sequence[str] | None = None,
    shares: Sequence[float] = SHARES,
    tokens: int = 800,
    limit: int = 2,
    seeds: int = SEEDS,
    batch_size: int = 10,
    bits_tokens: int = 1024,
    bits_prompt: int = 0,
    lengths: Sequence[int] = LENGTHS,
    prefill: int = 8192,
    budget: int = 512,
    repeats: int = PAIRS,
    presses: Sequence[str] = PRESSES,
    peers: str | Path | None = None,
    resources: dict[str, Any] | None = None,
    progress: bool = True,
) -> KVCacheBench:
    """Measure cache policies at shares of the cache, beside the full cache and kvpress, and check what is promised.

    Interrupted by Ctrl-C, it returns what is measured so far, marked as partial.

    Args:
        model: A causal model; the tasks are those that the bundled ones were trained on.
        tokenizer: Its tokenizer.
        parts: Of `PARTS`; by default all.
        methods: Cache policies, whose budgets are set to what is measured; by default all that are available.
        workloads: Tasks with a question: recall and those that begin with ``ruler-``; by default all of them.
        shares: Of the prompt's slots that are kept.
        tokens: About how many a prompt has.
        limit: Prompts of each seed and task.
        seeds: Values of each figure of quality, and texts that bits are measured on; below 5 no ordering should be
            claimed.
        batch_size: Prompts that run together.
        bits_tokens: Tokens of a text that bits are measured on.
        bits_prompt: How many of them are read at once, as a prompt, and not scored.
        lengths: Tokens of context that decode steps are timed behind.
        prefill: Tokens of the prompt whose reading is timed.
        budget: Slots that policies keep where steps are timed.
        repeats: Interleaved rounds of what is timed; below 7 no speed should be claimed.
        presses: Of kvpress; none leaves it out.
        peers: Interpreter of an environment with kvpress; by default that of `make peers`, and without one kvpress is
            left out.
        resources: What some methods need, loaded already, by name.
        progress: Show progress on a terminal.

    Raises:
        BadParameter: A part, task or press is not known, a method is no cache policy, or a number is out of bounds.
        ResourceError: There is no interpreter where `peers` says.
    """
    chosen = _chosen("part", parts, tuple(PARTS))
    tasks = _chosen("workload", workloads, quality.TASKS)
    pressed = _chosen("press", presses, PRESSES) if presses else []
    least = {"limit": limit, "tokens": tokens, "batch_size": batch_size, "budget": budget, "repeats": repeats}
    for name, value in least.items():
        if value < 1:
            raise BadParameter(f"{name}={value} is not allowed; it must be at least 1")
    several = {"seeds": [seeds], "bits_tokens": [bits_tokens], "prefill": [prefill], "length": list(lengths)}
    for name, numbers in several.items():
        if not numbers or min(numbers) < 2:
            raise BadParameter(f"{name}={min(numbers, default=0)} is not allowed; it must be at least 2")
    if not 0 <= bits_prompt < bits_tokens - 1:
        raise BadParameter(
            f"bits_prompt={bits_prompt} is not allowed; of {bits_tokens} tokens at most {bits_tokens - 2} are a prompt"
        )
    if not shares or not all(0 < share < 1 for share in shares):
        raise BadParameter(f"share={', '.join(map(str, shares)) or 'none'} is not allowed; shares lie between 0 and 1")
    skipped: dict[str, str] = {}
    if methods is None:
        found, skipped = default_methods()
    else:
        found = policies(methods)
    python = None
    if pressed and {"quality", "time"} & set(chosen):
        try:
            python = peers_python(peers)
        except TokenryError as error:
            if peers is not None:
                raise
            skipped["kvpress"] = str(error)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    partial = False
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal), transient=True) as bar:
        task = bar.add_task("", total=0)

        def expect(count: int) -> None:
            bar.update(task, total=(bar.tasks[task].total or 0) + count)

        def tick(what: str) -> None:
            # Progress is counted when the next one begins; the bar goes when the last has ended.
            bar.update(task, description=what, advance=1)

        bench = Bench(
            model=model, tokenizer=tokenizer, methods=found, workloads=tasks, shares=tuple(shares), tokens=tokens,
            limit=limit, seeds=seeds, batch_size=batch_size, bits_tokens=bits_tokens, bits_prompt=bits_prompt,
            lengths=tuple(lengths), prefill=prefill, budget=budget, repeats=repeats, resources=dict(resources or {}),
            python=python, presses=pressed, expect=expect, tick=tick, skipped=skipped,
        )  # fmt: skip
        try:
            for part in chosen:
                try:
                    PARTS[part](bench)
                except TokenryError as error:
                    bench.skipped[part] = " ".join(str(error).split()).replace(str(Path.home()), "~")
        except KeyboardInterrupt:
            partial = True
    return KVCacheBench(
        figures=tuple(bench.figures),
        checks=tuple(checked(bench.figures)),
        broken=tuple(bench.broken),
        skipped=bench.skipped,
        about={
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": describe_model(model),
            "machine": machine(model.device),
            "versions": versions(),
            "peers": bench.peers,
            "settings": {"parts": chosen, "workloads": tasks, "shares": list(shares), "tokens": tokens, "limit": limit,
                         "seeds": seeds, "batch_size": batch_size, "bits_tokens": bits_tokens,
                         "bits_prompt": bits_prompt, "lengths": list(lengths), "prefill": prefill,
                         "budget": budget, "repeats": repeats},
        },
        partial=partial,
    )  # fmt: skip


def _chosen(what: str, given: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    found = list(dict.fromkeys(known if given is None else given))
    if unknown := [name for name in found if name.partition(":")[0] not in known]:
        raise BadParameter(f"no {what} {unknown[0]!r}; there are {', '.join(known)}")
    return found
