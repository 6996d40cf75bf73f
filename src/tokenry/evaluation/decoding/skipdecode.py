"""SkipDecode: loss on functions of held-out packages behind a prompt, as decoding under the schedule reads them, and
what decoding under it takes."""

import statistics
from typing import Any

import torch
from torch import Tensor

from tokenry.decoding import SkipDecode
from tokenry.decoding.skipdecode.training import SkipDecodeTrainer, losses_by_index
from tokenry.errors import BadParameter, ResourceError
from tokenry.models import anatomy, context_length
from tokenry.workloads import functions

from .engine import Bench, Tally, few, promised
from .named import early_as, schedule_of
from .results import SPEED

_PROMPT = 64
_DECODED = 4  # prompts whose decoding is timed
_LOSS, _LAYERS = "nats a token", "layers a new token"
_FULL, _TUNED, _EARLY, _RAW, _RAW_EARLY = "all layers", "skip, tuned", "early exit, tuned", "skip", "early exit"
_FULL_TUNED = "all layers, tuned for skip"

PROMISES = (
    promised("skipdecode-below-full", "all layers, untuned, lose no more than SkipDecode", _LOSS, _FULL, _TUNED,
             smaller=True, otherwise="fine-tuning on this text also teaches the text, which only one side had"),
    promised("skipdecode-below-full-tuned", "the model fine-tuned for SkipDecode loses no more with all layers", _LOSS,
             _FULL_TUNED, _TUNED, smaller=True,
             otherwise="fine-tuning made the top layers read what the bottom ones leave"),
    promised("skipdecode-above-early", "SkipDecode loses no more than early exit of as many layers at every token",
             _LOSS, _TUNED, _EARLY, smaller=True,
             otherwise="few layers leave little between the bottom ones and the top ones"),
    promised("skipdecode-above-raw", "early exit after training loses no more than without", _LOSS, _EARLY, _RAW_EARLY,
             smaller=True, otherwise="it was trained too shortly, or on other text"),
    promised("skipdecode-tuned-above-raw", "SkipDecode after training loses less than without", _LOSS, _TUNED, _RAW,
             smaller=True, strict=True, otherwise="it was trained too shortly, or on other text"),
    promised("skipdecode-layers", "SkipDecode computes fewer layers a new token than the model has", _LAYERS, "skip",
             _FULL, smaller=True, strict=True),
)  # fmt: skip


def method_of(bench: Bench) -> SkipDecode:
    """The decoder that a fine-tuned model was trained for; without one, what `tokenry train skipdecode` trains for."""
    if bench.named.tuned is not None:
        return bench.named.tuned.method
    if bench.named.tuned_early is not None:
        schedule = bench.named.tuned_early.schedule
        return SkipDecode(first=schedule.first, last=schedule.last, warmup=min(1, schedule.last - 1),
                          horizon=schedule.horizon, shape=schedule.shape, alpha=schedule.alpha)  # fmt: skip
    return SkipDecodeTrainer().method()


def largest(bench: Bench) -> int:
    """The largest limit that the rows of text are enough for."""
    return len(_rows(bench)) // bench.seeds


def _rows(bench: Bench) -> Tensor:
    """Texts of a prompt and a horizon, `[rows, length]`, in a random order."""
    horizon = method_of(bench).horizon
    assert horizon is not None
    width = _PROMPT + horizon
    text = "\n\n".join(functions("test"))
    ids = torch.tensor(bench.tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // width * width].view(-1, width)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def measure(bench: Bench) -> None:
    """Loss with all layers and under both schedules, before and after fine-tuning; layers and speed of decoding."""
    method, rows = method_of(bench), _rows(bench)
    context = context_length(bench.model)
    if context is not None and rows.shape[1] > context:
        raise BadParameter(
            f"the schedule's horizon of {method.horizon} and a prompt of {_PROMPT} tokens exceed the model's context "
            f"of {context}: train with a shorter horizon"
        )
    early = early_as(method, bench.model)
    skip_tuned, early_tuned = bench.named.tuned, bench.named.tuned_early

    def lose(way: str, model: Any, decoder: SkipDecode | None) -> None:
        schedule = None if decoder is None else schedule_of(model, decoder)
        layers = len(anatomy(model).layers)
        _check_skips(schedule, layers)
        tally = Tally()
        for seed in range(bench.seeds):
            part = rows[seed * bench.limit : (seed + 1) * bench.limit]
            tally.timed(lambda part=part: tally.values.append(  # type: ignore[misc]
                float(losses_by_index(model, part, _PROMPT, schedule).mean())
            ))  # fmt: skip
        mean = float(layers) if schedule is None else schedule.average()
        bench.add("skipdecode", way, _LOSS, tally, f"{mean:.2f} of {layers} layers a new token, {decoder or 'plain'}")

    def tuned(way: str, which: Any, decoder: SkipDecode | None, why: str) -> None:
        if which is None:
            raise ResourceError(why)
        bench.note(way, which.model)
        lose(way, which.model, decoder)

    bench.attempt(_FULL, lambda: lose(_FULL, bench.model, None))
    bench.attempt(_RAW, lambda: lose(_RAW, bench.model, method))
    bench.attempt(_RAW_EARLY, lambda: lose(_RAW_EARLY, bench.model, early))
    missing = bench.named.missing
    bench.attempt(_FULL_TUNED, lambda: tuned(_FULL_TUNED, skip_tuned, None, missing))
    bench.attempt(_TUNED, lambda: tuned(_TUNED, skip_tuned, method, missing))
    # Of early exit there is no place by default: both runs would overwrite each other.
    missing_early = "name the folder of `tokenry train skipdecode --exit early --out FOLDER` (tuned_early)"
    bench.attempt(_EARLY, lambda: tuned(_EARLY, early_tuned, early, missing_early))
    bench.attempt(f"skipdecode: {SPEED}", lambda: _decode(bench, rows, {_RAW: method, _RAW_EARLY: early}))


def _check_skips(schedule: Any, layers: int) -> None:
    if schedule is not None and schedule.average() >= layers:
        raise BadParameter(
            f"the schedule runs all {layers} layers for every token, which is no skipping: fine-tune a model under one "
            "with a lower last, and name its folder (tuned)"
        )


def _decode(bench: Bench, rows: Tensor, methods: dict[str, SkipDecode]) -> None:
    """Layers that decoding computes for a token, and its speed; neither depends on what the weights are."""
    layers = len(anatomy(bench.model).layers)
    for method in methods.values():
        _check_skips(schedule_of(bench.model, method), layers)
    prompts = few(rows[:, :_PROMPT].tolist(), _DECODED)
    length = rows.shape[1] - _PROMPT
    # Whatever ends a text, each way writes as many tokens.
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": length, "min_new_tokens": length}
    found: dict[str, Tally] = {way: Tally() for way in (_FULL, *methods)}

    def run(way: str, method: Any, tally: Tally) -> None:
        before = tally.passes, tally.tokens, tally.seconds
        for result in bench.run(tally, prompts, method, **options):
            assert result.stats is not None
            active = result.stats.extra.get("active_layers", [layers])
            found[way].values.append(statistics.fmean(active))
        own = tally.passes - before[0], tally.tokens - before[1], tally.seconds - before[2]
        found[way].count(*own)

    bench.race(
        "skipdecode",
        lambda tally: run(_FULL, "plain", tally),
        {
            way: (lambda tally, way=way, method=method: run(way, method, tally), "plain runs all layers")  # type: ignore[misc]
            for way, method in methods.items()
        },
    )
    for way, tally in found.items():
        # Every run computes the same layers: one value for each seed.
        tally.values = [statistics.fmean(tally.values)] * bench.seeds
        bench.add("skipdecode", way, _LAYERS, tally, f"{len(prompts)} prompts, {length} tokens each")
