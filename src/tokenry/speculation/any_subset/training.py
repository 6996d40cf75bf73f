"""`tokenry train any-order`: make a decoder an any-subset model by the joint loss (2504.20456, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenry.errors import BadParameter
from tokenry.models import context_length
from tokenry.objectives import Context, Objective, Precision, Trainable, fit, log_probs, mixed, token_rows
from tokenry.objectives.trainable import RUN
from tokenry.speculation.any_subset.scoring import any_subset, columns_where, two_streams


class AnyOrder(Objective):
    """The joint loss: hide a share of each row, read the row at its levels, ask for every hidden token.

    Args:
        rates: Least and most share of a row that is hidden, drawn uniformly; the rows of a step, over all processes,
            take one part of that range each, which lowers the variance of the loss.
        start: Share that is hidden at the first step; the range is reached after `reach` steps.
        reach: Steps until then.
        spans: Share of the rows that hide runs of neighbours instead of scattered tokens.
        run: Longest run; a row's length of runs is drawn from 2 to this.
    """

    def __init__(self, rates: tuple[float, float], start: float, reach: int, spans: float, run: int) -> None:
        self.rates, self.start, self.reach, self.spans, self.run = rates, start, reach, spans, run

    def prepare(self, window: list[dict[str, Any]], ctx: Context) -> list[dict[str, Any]]:
        generator = ctx.generator(0)
        total = sum(len(batch["input_ids"]) for batch in window)
        reached = min(1.0, ctx.step / self.reach) if self.reach and ctx.training else 1.0
        low, high = (self.start + (rate - self.start) * reached for rate in self.rates)
        before = ctx.rank * total
        found = []
        for batch in window:
            ids = batch["input_ids"]
            share = (before + torch.arange(len(ids)) + torch.rand(len(ids), generator=generator)) / (
                total * ctx.processes
            )
            runs = torch.randint(2, self.run + 1, (len(ids),), generator=generator) if self.run > 1 else 1
            runs = torch.where(torch.rand(len(ids), generator=generator) < self.spans, runs, 1)
            hidden = hide(low + (high - low) * share, runs, ids.shape[1], generator)
            found.append({"input_ids": ids, "hidden": hidden.to(ids.device)})
            before += len(ids)
        return found

    def counts(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"joint": batch["hidden"].sum()}

    def terms(
        self, model: PreTrainedModel, extra: nn.ModuleDict, batch: Mapping[str, Any], ctx: Context
    ) -> tuple[dict[str, Tensor], Any]:
        ids, hidden = batch["input_ids"], batch["hidden"]
        levels = torch.where(hidden, hidden.long().cumsum(-1), 0)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        asked = columns_where(hidden)
        places = asked.clamp(min=0)
        logits = two_streams(model, ids, positions, levels, places, levels.gather(1, places))
        real = asked >= 0
        return {"joint": -log_probs(logits[real], ids.gather(1, places)[real]).sum()}, None


def hide(shares: Tensor, runs: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Which of `length` tokens are hidden in each row, bool `[rows, length]`.

    Args:
        shares: Share of each row `[rows]`; rounded down to tokens, at least one.
        runs: Length of the runs that are hidden together `[rows]`; the last is cut.
    """
    shift = (torch.rand(runs.shape, generator=generator) * runs).long()
    piece = (torch.arange(length) + shift[:, None]) // runs[:, None]
    order = torch.rand(len(runs), length + 1, generator=generator).gather(1, piece)
    rank = order.argsort(dim=1, stable=True).argsort(dim=1)
    return rank < (shares * length).long().clamp(min=1)[:, None]


@dataclass(frozen=True, kw_only=True)
class AnyOrderTrainer(Trainable):
    """Train a decoder to predict tokens from any subset of the others, the order among them from left to right.

    The saved folder is a checkpoint of the decoder's own class whose configuration says `any_subset`; `tokenry.load`
    and `AutoModelForCausalLM` read it, and `tokenry.fill` fills with it. It no longer continues text as it did.

    Hidden shares, clipping, linear decay and low-variance bins are the paper's for infilling single lines of code,
    which it trains on millions of rows at 1e-5; length, steps and learning rate are ours, for minutes on two cores.
    Half of the rows hide runs instead of scattered tokens, which is ours too: lines are runs.

    Args:
        length: Tokens of a row.
        batch: Rows of a step.
        lr: Highest learning rate (AdamW).
        low: Least share of a row that is hidden; the paper's range for long texts is 0.85 to 0.99.
        high: Most.
        start: Share at the first step; the range is reached when the warm-up ends.
        warmup: Share of the steps over which learning rate and hidden share warm up.
        spans: Share of the rows that hide runs.
        run: Longest run in tokens.
        precision: Of matrix products; `"auto"` is bfloat16 where the device has instructions for it, else float32.
    """

    help: ClassVar[str] = "Turn a decoder into a model that fills masked places (any-subset speculative decoding)."

    length: int = 256
    batch: int = 8
    lr: float = 1e-3
    low: float = 0.05
    high: float = 0.25
    start: float = 0.15
    warmup: float = 0.1
    spans: float = 0.5
    run: int = 24
    precision: Precision = "float32"

    _STEPS: ClassVar[int] = 600

    def validate(self) -> None:
        self.check("length", "at least 2", self.length >= 2)
        self.check("batch", "at least 1", self.batch >= 1)
        self.check("lr", "above 0", self.lr > 0)
        self.check("low", "above 0 and at most high", 0 < self.low <= self.high)
        self.check("high", "below 1", self.high < 1, why="something must be given")
        self.check("start", "above 0 and below 1", 0 < self.start < 1)
        for name in ("warmup", "spans"):
            self.check(name, "from 0 to 1", 0 <= getattr(self, name) <= 1)
        self.check("run", "at least 1", self.run >= 1)

    def train(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        texts: Sequence[str],
        out: Path,
        *,
        steps: int | None,
        seed: int,
    ) -> dict[str, Any]:
        if tokenizer.mask_token_id is None:
            raise BadParameter(f"{self.slug}: the tokenizer has no mask token; set tokenizer.mask_token to a spare one")
        context = context_length(model)
        self.check("length", f"at most the model's context, {context}", context is None or self.length <= context)
        any_subset(model, tokenizer.mask_token_id)
        steps = self._STEPS if steps is None else steps
        warmup = round(self.warmup * steps)
        rows = token_rows(texts, tokenizer, self.length, seed, rows=steps * self.batch)
        objective = AnyOrder((self.low, self.high), self.start, warmup, self.spans, self.run)
        bundle = fit(
            model,
            objective,
            rows,
            out / RUN,
            steps=steps,
            batch=self.batch,
            lr=self.lr,
            seed=seed,
            warmup=warmup,
            schedule="linear",
            dtype=mixed(self.precision, model.device),
            settings=str(self),
        )
        trained: Any = bundle.model
        trained.save_pretrained(out)
        tokenizer.save_pretrained(out)
        return {"rows": len(rows), "hidden": [self.low, self.high]}
