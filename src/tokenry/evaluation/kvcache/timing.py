"""Time and bytes by length of the context, on random weights of the model's shape, which take as long as trained ones.

``measure`` is about decoding: a step behind ever longer texts, all methods in turns. Policies that drop tokens read the
text in chunks and drop between them, so that no more than a chunk and the budget is ever held; the others read it at
once, and only up to `SHORT` tokens, since their prompts take time that grows with the square of the length.

``measure_prefill`` is about a whole prompt read at once: time in interleaved pairs, and the operations of its products
as they run, statistics and auxiliary models included.
"""

import contextlib
import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

from tokenry.kvcache.engine import BudgetedPolicy
from tokenry.kvcache.kv_prediction.predictor import KVPredictor, pruned
from tokenry.methods import Method, parameters
from tokenry.models import anatomy

from ..kvpress import KVPress
from .engine import PLAIN, Bench, drops, said, way

SHORT = 8192
"""Longest text that policies which drop nothing, and kvpress, read here."""

CHUNK = 512
"""Tokens of a chunk."""

STEPS = 4
"""Decode steps of a round."""

STEP = "milliseconds of a decode step behind so many tokens"
FASTER = "steps of the full cache in the time of one, behind so many tokens"
READ = f"milliseconds to read so many tokens (where tokens are dropped: in chunks of {CHUNK})"
HELD = "bytes of keys and values held in decoding behind so many tokens"
STORED = "bytes of their buffers in decoding behind so many tokens"
KNOWN = "bytes of what is known of the slots in decoding behind so many tokens"
PEAK = "bytes of keys and values held at most while so many tokens are read"
_EAGER = 4096  # longest text that kvpress reads with all probabilities at hand

SAVERS = ("fastkv", "lazyllm", "spatten", "kv-prediction")
"""Methods that promise a cheaper prompt."""

TIME, OPERATIONS = "time", "operations"


def randomised(model: Any, longest: int) -> Any:
    """A model of the same shape with random weights and room for `longest` tokens."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.max_position_embeddings = max(longest, text.max_position_embeddings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    return built.to(model.device).eval()


@dataclass
class Running:
    """A method with a text in its cache, to be stepped on.

    Args:
        label, budget: Names of its row.
        step: Makes some decode steps and returns their seconds.
        read: Seconds that reading took.
        held: Bytes of keys and values that are held.
        stored: Bytes of their buffers; None where nobody says.
        known: Bytes of positions, scores, means and lists beside them; None where nobody says.
        peak: Bytes held at most while reading; None where nobody says.
        limit: Bytes that may be held in decoding; None without a limit.
        seconds: Of the rounds so far, a step each.
    """

    label: str
    budget: str
    step: Callable[[int], float]
    read: float
    held: Callable[[], int]
    stored: Callable[[], int | None]
    known: Callable[[], int | None]
    peak: int | None
    limit: int | None
    close: Callable[[], None]
    seconds: list[float] = dataclasses.field(default_factory=list)
    most: int = 0


def measure(bench: Bench) -> None:
    """Decode steps behind each length, methods in turns; time of reading; bytes held."""
    ours = [each for each in bench.budgeted([bench.budget]) if each[2]]
    bench.expect(len(bench.lengths) * (1 + len(ours) + len(bench.presses if bench.python else ())))
    model = randomised(bench.model, max(bench.lengths) + (STEPS + 1) * (bench.repeats + 1) + CHUNK)
    with bench.peer(model) as peer:
        for length in bench.lengths:
            _behind(bench, model, ours, peer, length)


def _behind(bench: Bench, model: Any, ours: Sequence[tuple[Method, Method, str]], peer: Any, length: int) -> None:
    ids = _text(model, length)
    running: list[Running] = []

    def begin(way: str, start: Callable[[], Running]) -> None:
        bench.attempt(way, lambda: running.append(start()), f"(time, {length:,} tokens)")

    begin(PLAIN, lambda: _started(model, None, PLAIN, "", ids))
    for base, method, budget in ours:
        if _in_chunks(method) or length <= SHORT:
            start = functools.partial(_started, model, method, way(base), budget, ids)
            begin(f"{way(base)}, {budget}", start)
    if peer is not None and length <= SHORT:
        for press in bench.presses:
            if press != "ObservedAttention" or length <= _EAGER:
                start = functools.partial(_pressed, peer, press, bench.budget, ids)
                begin(f"kvpress: {press}, {said(bench.budget)}", start)
    # The first steps make what is made once, and are not counted.
    for each in running:
        each.step(STEPS)
    for _ in range(bench.repeats):
        for each in running:
            # What the method before read, such as a whole cache, has thrown this one's weights out of the processor's.
            each.step(1)
            each.seconds.append(each.step(STEPS) / STEPS)
            each.most = max(each.most, each.held())
    full = next((each for each in running if each.label == PLAIN), None)
    column = f"{length:,}"
    for each in running:
        bench.add("time", STEP, each.label, each.budget, column, "milliseconds", [1e3 * s for s in each.seconds])
        if full is not None and each is not full:
            ratios = [one / other for one, other in zip(full.seconds, each.seconds, strict=True)]
            bench.add("time", FASTER, each.label, each.budget, column, "ratio", ratios)
        bench.add("time", READ, each.label, each.budget, column, "milliseconds", [1e3 * each.read])
        bench.add("time", HELD, each.label, each.budget, column, "bytes", [each.most])
        if (stored := each.stored()) is not None:
            bench.add("time", STORED, each.label, each.budget, column, "bytes", [stored])
        if (known := each.known()) is not None:
            bench.add("time", KNOWN, each.label, each.budget, column, "bytes", [known])
        if each.peak is not None:
            bench.add("time", PEAK, each.label, each.budget, column, "bytes", [each.peak])
        if each.limit is not None and each.most > each.limit:
            bench.broken.append(
                f"{each.label} held {each.most:,} bytes behind {length:,} tokens, where its budget of {each.budget} "
                f"slots is {each.limit:,}"
            )
        each.close()


def _in_chunks(method: Any) -> bool:
    """Whether a method drops tokens between chunks of a prompt; one that skips layers serves a whole prompt alone."""
    return method is not None and drops(method) and not getattr(method, "skips", False)


def _text(model: Any, length: int) -> torch.Tensor:
    size = model.config.get_text_config().vocab_size
    return torch.randint(3, size, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)


@torch.inference_mode()
def _started(model: Any, method: Any, label: str, budget: str, ids: torch.Tensor) -> Running:
    """A method that has read a text, on a copy of the model, so that no policy's switches are in the way of others."""
    model = copy.deepcopy(model)
    cache: Any = DynamicCache(config=model.config) if method is None else method.cache(model)
    chunk = CHUNK if _in_chunks(method) else ids.shape[1]
    _wait(model)
    begin = time.perf_counter()
    for start in range(0, ids.shape[1], chunk):
        model(input_ids=ids[:, start : start + chunk], past_key_values=cache, use_cache=True, logits_to_keep=1)
    _wait(model)
    read = time.perf_counter() - begin
    token = ids[:, -1:]

    @torch.inference_mode()
    def step(count: int) -> float:
        nonlocal token
        begin = time.perf_counter()
        for _ in range(count):
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        _wait(model)
        return time.perf_counter() - begin

    limit = None
    # A policy that gives layers budgets of their own says itself what it holds.
    if method is not None and drops(method) and type(method).layer_budget is BudgetedPolicy.layer_budget:
        parts = anatomy(model)
        slot = 2 * parts.kv_heads * parts.head_dim * model.dtype.itemsize * len(parts.layers)
        limit = (method.budget + method.compact_every - 1) * slot
    held = (lambda: _nbytes(cache)) if method is None else cache.nbytes
    peak = _nbytes(cache) if method is None else cache.peak_nbytes
    stored: Callable[[], int | None] = (lambda: None) if method is None or not drops(method) else lambda: _stored(cache)

    known: Callable[[], int | None] = (lambda: None) if method is None else cache.state_nbytes

    def close() -> None:
        nonlocal cache, model
        cache = model = None

    return Running(label, budget, step, read, held, stored, known, peak, limit, close)


def _pressed(peer: KVPress, press: str, budget: int, ids: torch.Tensor) -> Running:
    opened = peer.ask("open", press=press, ids=ids[0].tolist(), keep=budget)
    handle, nbytes = opened["handle"], opened["bytes"]

    def step(count: int) -> float:
        nonlocal nbytes
        reply = peer.ask("steps", handle=handle, count=count)
        nbytes = reply["bytes"]
        return float(reply["seconds"])

    def close() -> None:
        peer.ask("close", handle=handle)

    # What kvpress held at most while it read is not known: its hooks compress layer by layer.
    return Running(
        label=f"kvpress: {press}", budget=said(budget), step=step, read=opened["seconds"], held=lambda: nbytes,
        stored=lambda: None, known=lambda: None, peak=None, limit=None, close=close,
    )  # fmt: skip


def _nbytes(cache: Any) -> int:
    """Bytes of a cache of transformers'."""
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


def _stored(cache: Any) -> int:
    """Bytes of the buffers that a cache of Tokenry's keeps its keys and values in, room to grow included."""
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values) if part is not None]
    return sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}.values())


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    elif model.device.type == "mps":
        torch.mps.synchronize()


# --- prompts ------------------------------------------------------------------------------------


def measure_prefill(bench: Bench) -> None:
    """Operations and time, in pairs, of methods that promise a cheaper prompt and of two that do not, over plain's."""
    ours = [each for each in bench.methods if each.slug in SAVERS or each.slug in ("h2o", "snapkv")]
    bench.expect((1 + len(ours)) * (bench.repeats + 2))
    model = randomised(bench.model, bench.prefill + 1)
    ids = _text(model, bench.prefill)
    group = f"prompts of {bench.prefill:,} tokens, over the full prompt's"
    full = copy.deepcopy(model)
    whole, _ = counted(full, None, ids)
    ways: list[tuple[str, str, Any, Any]] = []
    for each in ours:
        mine = copy.deepcopy(model)

        def count(each: Method = each, mine: Any = mine) -> None:
            if each.slug == "kv-prediction":
                # No weights are trained for a random model; what they hold changes no time.
                KVPredictor(mine, pruned(mine, 0.5)[0]).serve(mine)
            operations, share = counted(mine, each, ids)
            budget = said(each.budget) if "budget" in parameters(type(each)) else ""  # type: ignore[attr-defined]
            ways.append((way(each), budget, each, mine))
            bench.add("prefill", group, way(each), budget, OPERATIONS, "ratio", [operations / whole])
            if share is not None:
                bench.add("prefill", group, way(each), budget, "tokens run, mean over layers", "share", [share])

        bench.attempt(way(each), count, "(prefill, operations)")
    if not ways:
        return
    reading(full, None, ids)
    for label, _, each, mine in ways:
        bench.tick(f"{label} (prefill, warming up)")
        reading(mine, each, ids)
    pairs: dict[str, list[float]] = {label: [] for label, *_ in ways}
    for _ in range(bench.repeats):
        bench.tick("plain (prefill)")
        base = reading(full, None, ids)
        for label, _, each, mine in ways:
            bench.tick(f"{label} (prefill)")
            pairs[label].append(reading(mine, each, ids) / base)
    for label, budget, *_ in ways:
        bench.add("prefill", group, label, budget, TIME, "ratio", pairs[label])


@torch.inference_mode()
def reading(model: Any, method: Any, ids: torch.Tensor) -> float:
    """Seconds until a prompt is read and its first token known."""
    block: Any = contextlib.nullcontext() if method is None else method(model)
    with block:
        _wait(model)
        begin = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        _wait(model)
        return time.perf_counter() - begin


@torch.inference_mode()
def counted(model: Any, method: Any, ids: torch.Tensor) -> tuple[float, float | None]:
    """Operations of all products that reading a prompt takes, and the share of tokens that the layers ran for."""
    flops = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    block: Any = contextlib.nullcontext() if method is None else method(model)
    with block, FlopCounterMode(display=False, custom_mapping=flops) as counter:
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    return float(counter.get_total_flops()), None if method is None else float(cache.computed_share())


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Operations of the fused attention on CPUs; of a causal one half, as it skips what is hidden."""
    batch, heads, rows, dim = query
    slots = key[2]
    causal = kwargs.get("is_causal", args[1] if len(args) > 1 else False)
    return 4 * batch * heads * rows * slots * dim // (2 if causal and rows == slots else 1)
