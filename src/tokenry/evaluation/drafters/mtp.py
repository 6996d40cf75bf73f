"""Gated-LoRA multi-token prediction: tokens a pass, acceptance by mask, and the model behind a closed gate."""

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import torch

from tokenry.speculation.gated_lora_mtp.adapters import Adapters, gated

from ..checks import Ordering, not_slower_checks, ordering_checks
from ..results import Comparison
from .engine import Bench, accepted, at, rows_of
from .results import Table

_LEAST = 2.0  # tokens a pass that it is to reach on code
_READ = 256  # tokens of a prompt whose logits are compared


def measure(bench: Bench) -> None:
    """Linear, quadratic and automatic decoding; the model behind a closed gate; acceptance by depth."""
    place = bench.trained("mtp")
    adapters = Adapters.load(place, bench.model)
    bench.note("mtp", adapters, place)
    with bench.saying("the gate"):
        own = _logits(bench)
        closed = _differing(_logits(bench, lambda rows: gated(bench.model, adapters, rows, rows)), own)
        opened = _differing(_logits(bench, lambda rows: gated(bench.model, adapters, 0, rows)), own)
    linear, quadratic, auto = (f"gated-lora-mtp{end}" for end in (":mode=linear", "", ":mode=auto"))
    run = bench.compared([linear, quadratic, auto], {"adapter": adapters})
    bench.checks += ordering_checks(
        run,
        [
            Ordering(
                name="mtp-quadratic-above-linear",
                statement="quadratic decoding gains at least as many tokens a pass as linear decoding",
                method=quadratic,
                other=linear,
            )
        ],
    )
    bench.checks += not_slower_checks(run, [row.label for row in rows_of(run, auto)[:1]])
    if not bench.temperature and any(row.workload == "code" for row in run.rows):
        row = run.row(quadratic, "code")
        bench.ratio(
            "mtp-two-tokens-a-pass",
            f"quadratic decoding gains at least {_LEAST:g} tokens a pass on code",
            "tokens per pass",
            {quadratic: row.tokens_per_pass, "plain": 1.0},
            row.tokens_per_pass_by_batch,
            least=_LEAST,
            reason="possibly because it was trained for minutes on a small corpus, and the model is less sure of "
            "what follows than one of billions of parameters",
        )
    differing = {"gate closed": closed, "after drafting": _differing(_logits(bench), own)}
    leaks = any(differing.values())
    bench.check(
        "mtp-gate-closed",
        "with the gate closed, and after drafting, the model's logits are its own to the bit (an open gate changes "
        f"{opened:,} of their rows)",
        "rows of logits that differ",
        differing,
        passed=not leaks and opened > 0,
        reason="the gate leaks" if leaks else "the adapters change nothing at all",
    )
    _by_mask(bench, run, adapters, linear, quadratic)


def _by_mask(bench: Bench, run: Comparison, adapters: Adapters, linear: str, quadratic: str) -> None:
    training = adapters.note.get("training", {})
    accuracy, losses = training.get("accuracy_by_mask", ()), training.get("loss_by_mask", ())
    rows = []
    for depth in range(adapters.k):
        rows.append(
            {
                "mask": depth + 1,
                "loss in training": at(losses, depth),
                "accuracy in training": at(accuracy, depth),
                **{f"accepted, {mode}": accepted(run, method, depth)
                   for mode, method in (("linear", linear), ("quadratic", quadratic))},
            }
        )  # fmt: skip
    bench.tables.append(
        Table(
            part="mtp",
            method="gated-lora-mtp",
            title="gated-lora-mtp, by mask",
            rows=tuple(rows),
            note="accepted: of the verify steps with a draft from this mask, the share that accepted it. "
            "Loss (nats) and accuracy: of the sampler, its last tokens known, at the end of training.",
        )
    )
    if len(accuracy) > 1:
        rising = sum(after > before for before, after in itertools.pairwise(accuracy))
        bench.check(
            "mtp-falls-with-depth",
            "the sampler's accuracy falls from mask to mask",
            "masks more accurate than the one before",
            {"gated-lora-mtp": rising},
            passed=rising == 0,
            reason="possibly because masks of nearly equal accuracy change places by chance",
        )


def _logits(bench: Bench, around: Callable[[int], Any] | None = None) -> list[torch.Tensor]:
    """The model's logits for each prompt, `[length, vocabulary]`, of its last tokens."""
    found = []
    for example in (example for group in bench.tasks.values() for example in group):
        ids = torch.tensor([bench.tokenizer(example.prompt)["input_ids"][-_READ:]], device=bench.model.device)
        with torch.no_grad(), around(ids.shape[1]) if around else contextlib.nullcontext():
            found.append(bench.model(input_ids=ids, use_cache=False).logits[0])
    return found


def _differing(mine: list[torch.Tensor], its: list[torch.Tensor]) -> int:
    """Rows of logits that differ in any bit."""
    return sum(int((one != other).any(-1).sum()) for one, other in zip(mine, its, strict=True))
