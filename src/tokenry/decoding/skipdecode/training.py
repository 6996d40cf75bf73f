"""Fine-tuning under a schedule of layers: every layer on the first part of the sequence that will run through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import PreTrainedModel

from tokenry.decoding.skipdecode.decoder import SkipDecode
from tokenry.decoding.skipdecode.layers import skipping
from tokenry.decoding.skipdecode.schedule import Exit, Shape, SkipSchedule
from tokenry.errors import UnsupportedModel
from tokenry.models import anatomy, context_length
from tokenry.objectives import (
    Context,
    Objective,
    Precision,
    Trainable,
    fit,
    label_count,
    log_probs,
    mixed,
    shifted_ce,
    token_rows,
)
from tokenry.objectives.losses import IGNORED
from tokenry.objectives.trainable import RUN

_HELD_OUT = 32  # rows that losses are measured on


def scheduled(model: PreTrainedModel, ids: Tensor, prompt: int, schedule: SkipSchedule) -> Tensor:
    """Logits of texts whose first tokens are a prompt, as decoding under the schedule computes them, in one forward: a
    layer runs for the first tokens alone.

    Args:
        model: The model.
        ids: `[batch, length]` without padding.
        prompt: Tokens of each that are the prompt.
        schedule: The schedule.

    Returns:
        `[batch, length, vocab]`.
    """
    with skipping(model) as depth:
        depth.prefixes(schedule.reach(prompt, ids.shape[1]))
        return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def losses_by_index(
    model: PreTrainedModel, ids: Tensor, prompt: int, schedule: SkipSchedule | None = None, batch: int = 16
) -> Tensor:
    """Mean cross entropy in nats of the tokens behind a prompt, by index of the token that predicts them.

    Args:
        model: The model.
        ids: Texts `[rows, length]` without padding.
        prompt: Tokens of each that are the prompt.
        schedule: In force; None: all layers run.
        batch: Rows that run together.

    Returns:
        `[length - prompt]`; its mean is the loss of the texts.
    """
    total = torch.zeros(ids.shape[1] - prompt, dtype=torch.float64)
    model = model.eval()
    for part in ids.split(batch):
        part = part.to(model.device)
        if schedule is None:
            logits = model(input_ids=part, use_cache=False).logits
        else:
            logits = scheduled(model, part, prompt, schedule)
        total -= log_probs(logits[:, prompt - 1 : -1], part[:, prompt:]).sum(0).cpu().double()
    return total / len(ids)


class SkipObjective(Objective):
    """Next-token cross entropy of what follows a prompt, with the schedule in force (no losses at inner layers).

    The prompt of a micro-batch ends at random, late enough for nothing of the schedule to be missed, the same for all
    of its rows. Items are `{"input_ids": [length], "labels": [length]}`.

    Args:
        schedule: The schedule.
        anneal: Whether the last budget falls from the first one's during the first half of the run.
    """

    def __init__(self, schedule: SkipSchedule, *, anneal: bool = False) -> None:
        self.schedule, self.anneal = schedule, anneal

    def prepare(self, window: list[dict[str, Any]], ctx: Context) -> list[dict[str, Any]]:
        for number, batch in enumerate(window):
            latest = max(1, batch["input_ids"].shape[1] - self.schedule.horizon)
            prompt = int(torch.randint(1, latest + 1, (), generator=ctx.generator(number)))
            batch["prompt"] = prompt
            batch["labels"] = batch["labels"].clone()
            batch["labels"][:, :prompt] = IGNORED
        return window

    def counts(self, batch: dict[str, Any]) -> Mapping[str, Tensor]:
        return {"output": label_count(batch["labels"])}

    def terms(
        self, model: PreTrainedModel, extra: nn.ModuleDict, batch: dict[str, Any], ctx: Context
    ) -> tuple[dict[str, Tensor], None]:
        logits = scheduled(model, batch["input_ids"], batch["prompt"], self.at(ctx.progress if ctx.training else 1.0))
        return {"output": shifted_ce(logits, batch["labels"])}, None

    def at(self, progress: float) -> SkipSchedule:
        """The schedule at a share of the run."""
        whole = self.schedule
        if not self.anneal or progress >= 0.5:
            return whole
        return replace(whole, last=round(whole.first + (whole.last - whole.first) * 2 * progress))


@dataclass(frozen=True, kw_only=True)
class SkipDecodeTrainer(Trainable):
    """Fine-tune a model to write under a schedule of layers.

    All weights are trained, on the loss of the last layer alone, as in SkipDecode (arXiv 2307.02628). AdamW's learning
    rate is within the range that was searched; batch, lengths and schedule are reconstructions that suit small models.

    Attributes:
        first, last, warmup, shape, alpha, exit: As of the decoder `skipdecode`.
        horizon: Tokens over which the budget falls; the median length of the outputs that are wanted.
        anneal: Whether `last` falls from `first` during the first half of the run.
        length: Tokens of a row: a prompt and what follows it.
        batch: Rows of a step.
        lr: Learning rate.
        weight_decay: Weight decay.
        precision: Of matrix products; `"auto"` is bfloat16 where the device has instructions for it, else float32.
    """

    help: ClassVar[str] = "A copy of the model that writes well under skipdecode's schedule."

    first: int | None = None
    last: int | None = None
    warmup: int = 1
    horizon: int = 128
    shape: Shape = "linear"
    alpha: float = 0.98
    exit: Exit = "skip"
    anneal: bool = False
    length: int = 256
    batch: int = 16
    lr: float = 2e-4
    weight_decay: float = 0.01
    precision: Precision = "float32"

    def validate(self) -> None:
        self.method()
        self.check("length", "above horizon", self.length > self.horizon, why="a prompt comes before the schedule")
        self.check("batch", "at least 1", self.batch >= 1)
        self.check("lr", "above 0", self.lr > 0)
        self.check("weight_decay", "at least 0", self.weight_decay >= 0)

    def method(self) -> SkipDecode:
        """The decoder that the model is trained for."""
        return SkipDecode(
            first=self.first, last=self.last, warmup=self.warmup, horizon=self.horizon, shape=self.shape,
            alpha=self.alpha, exit=self.exit,
        )  # fmt: skip

    def train(
        self, model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], out: Path, *, steps: int | None, seed: int
    ) -> dict[str, Any]:
        steps = 1000 if steps is None else steps
        if getattr(model.config, "layerdrop", 0):
            raise UnsupportedModel(
                f"{type(model).__name__} drops layers at random while it is trained (layerdrop), which would skip "
                "twice: set model.config.layerdrop to 0"
            )
        if model.is_gradient_checkpointing:
            raise UnsupportedModel(
                "gradient checkpointing runs layers again in the backward pass, where no schedule is in force: call "
                "model.gradient_checkpointing_disable()"
            )
        longest = context_length(model) or self.length
        self.check("length", f"at most {longest}", self.length <= longest, why="the model reads no further")
        schedule = self.method().schedule(len(anatomy(model).layers), self.horizon)
        rows = token_rows(texts, tokenizer, self.length, seed, rows=steps * self.batch + _HELD_OUT)
        held_out = min(_HELD_OUT, max(1, len(rows) // 8)) if len(rows) > 1 else 0
        learned: Any = Subset(rows, range(len(rows) - held_out))
        measured = rows.ids[len(rows) - max(held_out, 1) :]
        prompt, dtype = self.length - self.horizon, model.dtype
        model.float()
        found = {
            "full": _mean(losses_by_index(model, measured, prompt)),
            "before": _mean(losses_by_index(model, measured, prompt, schedule)),
        }
        tuned = fit(
            model, SkipObjective(schedule, anneal=self.anneal), learned, out / RUN / "fit",
            steps=steps, batch=self.batch, lr=self.lr, weight_decay=self.weight_decay, seed=seed,
            warmup=min(100, steps // 10), schedule="cosine", settings=str(self),
            dtype=mixed(self.precision, model.device),
        ).model  # fmt: skip
        found["after"] = _mean(losses_by_index(tuned, measured, prompt, schedule))
        tuned.to(dtype)  # type: ignore[arg-type]
        tuned.save_pretrained(out)
        tokenizer.save_pretrained(out)
        return {
            "rows": len(learned),
            "steps": steps,
            "loss": found,
            "layer_speedup": round(schedule.speedup(), 4),
            "use": str(self.method()),
        }


def _mean(losses: Tensor) -> float:
    return float(losses.mean())
