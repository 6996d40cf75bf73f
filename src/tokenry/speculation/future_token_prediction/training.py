"""Training: a future decoder for a model that is there, or a future token prediction model of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenry.objectives import Context, Objective, TokenRows, Trainable, fit, mixed, token_rows
from tokenry.objectives.trainable import RUN
from tokenry.speculation.future_token_prediction.measure import future_losses, smoothness
from tokenry.speculation.future_token_prediction.model import IGNORED, FTPForCausalLM, config_for

_HELD_OUT = 32  # rows that are measured and not trained on


class FutureTokens(Objective):
    """Cross-entropy of the next N tokens at positions drawn from each row, offset j weighted by gamma^(j-1).

    The term's count is the weight of all targets of all positions, drawn or not, and each drawn position stands for its
    share of its row: so the gradient's expectation is that of the loss over all positions.
    """

    def prepare(self, window: list[dict[str, Any]], ctx: Context) -> list[dict[str, Any]]:
        model: Any = ctx.bundle.model
        count = model.config.positions_per_sequence if ctx.training else None
        for number, batch in enumerate(window):
            batch["targets"] = model.targets(batch["input_ids"], batch["labels"])
            batch["positions"], batch["scale"] = model.draw(batch["targets"], count, ctx.generator(number))
            batch["weight"] = (model.offset_weights(batch["scale"]) * _counted(batch["targets"])).sum()
        return window

    def counts(self, batch: dict[str, Any]) -> Mapping[str, Tensor | float]:
        return {"future": batch["weight"]}

    def terms(
        self, model: PreTrainedModel, extra: nn.ModuleDict, batch: dict[str, Any], ctx: Context
    ) -> tuple[Mapping[str, Tensor], Any]:
        ftp: Any = model
        states = ftp.state_vectors(batch["input_ids"])
        sums = ftp.offset_sums(states, batch["input_ids"], batch["targets"], batch["positions"], batch["scale"])
        return {"future": (ftp.offset_weights(sums) * sums).sum()}, sums

    def metrics(self, batch: dict[str, Any], outputs: Any) -> Mapping[str, tuple[Tensor | float, Tensor | float]]:
        pairs = zip(outputs.detach(), _counted(batch["targets"]), strict=True)
        return {f"offset_{number}": pair for number, pair in enumerate(pairs, 1)}


def _counted(targets: Tensor) -> Tensor:
    return (targets != IGNORED).sum((0, 1))


@dataclass(frozen=True, kw_only=True)
class FutureTokenPredictionTrainer(Trainable):
    """Train future token prediction (arXiv 2410.18160) with a model's body as the encoder.

    The paper pre-trains with 3 decoder layers and 128 positions a row, as a GPT-2 on its text; the defaults here are
    for minutes on two cores.

    Attributes:
        encoder: `frozen` trains a decoder on the model's states, which drafts for that model unchanged; `tuned` goes on
            training the body and the head too, and `scratch` starts them anew: both give an `FTPForCausalLM`, its own
            target. With `decoder_layers=0;future_tokens=1;pseudo_len=1` the latter is a GPT, to compare with.
        future_tokens: N.
        pseudo_len: P.
        decoder_layers: Layers of the decoder.
        gamma: Weight of an offset's loss relative to the one before.
        positions: Positions drawn from each row at a step.
        start: First input of the decoder, `bos` (a learned vector) or `token`.
        length: Tokens of a row.
        batch: Rows of a step.
        lr: Highest learning rate; it warms up over a twentieth of the steps and falls to zero by a cosine.
    """

    help: ClassVar[str] = "Train a decoder of the next N tokens from one state vector (future-token-prediction)."

    encoder: Literal["frozen", "tuned", "scratch"] = "frozen"
    future_tokens: int = 8
    pseudo_len: int = 12
    decoder_layers: int = 2
    gamma: float = 0.8
    positions: int = 32
    start: Literal["bos", "token"] = "bos"
    length: int = 256
    batch: int = 16
    lr: float = 1e-3

    def validate(self) -> None:
        for name in ("future_tokens", "pseudo_len", "positions", "batch"):
            self.check(name, "at least 1", getattr(self, name) >= 1)
        self.check("length", "at least 2", self.length >= 2)
        self.check("decoder_layers", "0 or more", self.decoder_layers >= 0)
        self.check("gamma", "from 0 to 1", 0 <= self.gamma <= 1)
        self.check("lr", "above 0", self.lr > 0)

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
        steps = 600 if steps is None else steps
        dtype = model.dtype
        rows = token_rows(texts, tokenizer, self.length, seed, rows=steps * self.batch + _HELD_OUT).ids
        held = min(_HELD_OUT, max(1, len(rows) // 10))
        ftp = self.built(model, seed)
        bundle = fit(
            ftp, FutureTokens(), TokenRows(rows[: max(1, len(rows) - held)], tokenizer.bos_token_id), out / RUN,
            steps=steps, lr=self.lr, batch=self.batch, seed=seed, warmup=max(1, steps // 20), schedule="cosine",
            settings=str(self), dtype=mixed("auto" if self.length * self.batch >= 1024 else "float32", model.device),
        )  # fmt: skip
        trained: Any = bundle.model
        report = {
            "decoder_parameters": sum(parameter.numel() for parameter in trained.future.parameters()),
            "held_out_rows": held,
            "future": future_losses(trained, rows[-held:], seed=seed),
            "smoothness": smoothness(trained, rows[-held:], seed=seed),
        }
        if self.encoder == "frozen":
            trained.future.to(dtype).save_pretrained(out)
        else:
            trained.to(dtype).save_pretrained(out)
            tokenizer.save_pretrained(out)
        return report

    def built(self, model: PreTrainedModel, seed: int) -> FTPForCausalLM:
        """The model to train, with only what is trained requiring gradients."""
        settings: dict[str, Any] = {
            "num_future_tokens": self.future_tokens, "pseudo_len": self.pseudo_len, "gamma": self.gamma,
            "decoder_layers": self.decoder_layers, "positions_per_sequence": self.positions, "start": self.start,
        }  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if self.encoder == "scratch":
                ftp = FTPForCausalLM(config_for(model, **settings)).to(model.device)  # type: ignore[arg-type]
                ftp.generation_config.eos_token_id = model.generation_config.eos_token_id
            else:
                ftp = FTPForCausalLM.around(model, **settings)
        ftp.requires_grad_(self.encoder != "frozen")
        ftp.future.requires_grad_(True)
        return ftp
