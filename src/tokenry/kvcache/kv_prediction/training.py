"""Training of the auxiliary model and the linear maps, through a base model that stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import PreTrainedModel

from tokenry.errors import ResourceError, UnsupportedModel
from tokenry.kvcache.kv_prediction.policy import KVPrediction
from tokenry.kvcache.kv_prediction.predictor import (
    CacheMaps,
    KVPredictor,
    check_map,
    check_pair,
    contiguous_map,
    handed_over,
    pruned,
)
from tokenry.kvcache.kv_prediction.projections import Placement, remember, replaced
from tokenry.models import anatomy, context_length, load, weights_hash
from tokenry.objectives import Context, Objective, Precision, Trainable, fit, label_count, log_probs, mixed, token_rows
from tokenry.objectives.losses import IGNORED
from tokenry.objectives.trainable import RUN

_HELD_OUT = 32  # rows that losses are measured on


class KVPredictionObjective(Objective):
    """Next-token losses of the base model on a predicted cache and of the auxiliary model, and the distance of the
    predicted from the true cache (arXiv 2410.08391, section 3.3).

    The model that is trained is the auxiliary model; the base model is frozen, and gradients flow through it into maps
    and auxiliary model. Each of its tokens attends to predicted keys and values alone, its own included, where decoding
    has true ones of the last token of the prompt and of all later ones: so the paper trains.

    Terms: ``base`` and ``auxiliary``, cross entropy by label; ``keys`` and ``values``, the mean absolute error of a
    layer's keys (behind its norm, before rotary positions) and values, summed over layers, by real token; ``z``, the
    squared log-partition of both logits, by label.

    Items are ``{"input_ids": [length], "labels": [length]}``, with ``"attention_mask": [length]`` where there is
    padding.

    Args:
        base: The base model.
        layer_map: The auxiliary layer of each base layer.
        same: Base layers whose auxiliary layer began as their own copy.
        consistency: Factor of ``keys`` and ``values``; None: 1 / layers of the base model, a mean over layers, as in
            the paper's text (its released configurations have 1).
        z_loss: Factor of ``z``.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        layer_map: Sequence[int],
        same: Sequence[int] = (),
        *,
        consistency: float | None = None,
        z_loss: float = 1e-4,
    ) -> None:
        if base.is_gradient_checkpointing:
            raise UnsupportedModel(
                "gradient checkpointing runs layers again in the backward pass, where no keys are put in their place: "
                "call model.gradient_checkpointing_disable()"
            )
        self.base = base.eval().requires_grad_(False)
        self.layer_map, self.same = tuple(layer_map), tuple(same)
        self.consistency = 1 / len(self.layer_map) if consistency is None else consistency
        self.z_loss = z_loss
        self.placement = Placement(base)

    def modules(self, model: PreTrainedModel) -> Mapping[str, nn.Module]:
        check_pair(self.base, model)
        check_map(self.base, model, self.layer_map)
        return {"maps": CacheMaps(self.base, model, self.layer_map, self.same).to(model.device)}

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        labels = label_count(batch["labels"])
        mask = batch.get("attention_mask")
        tokens = torch.tensor(batch["input_ids"].numel()) if mask is None else mask.sum()
        return {"base": labels, "auxiliary": labels, "z": labels, "keys": tokens, "values": tokens}

    def terms(
        self, model: PreTrainedModel, extra: nn.ModuleDict, batch: Mapping[str, Tensor], ctx: Context
    ) -> tuple[Mapping[str, Tensor], None]:
        mask = batch.get("attention_mask")
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"]}
        inputs |= {} if mask is None else {"attention_mask": mask}
        known, auxiliary = remember(model, whole=True, **inputs)
        predicted = extra["maps"](known)
        with replaced(self.base, predicted):
            base = self.base(**inputs, use_cache=False, return_dict=True)
        losses = {}
        z: Any = 0.0
        for name, logits in (("base", base.logits), ("auxiliary", auxiliary.logits)):
            losses[name], partition = _losses(logits, batch["labels"])
            z = z + partition
        losses["z"] = z
        with torch.no_grad():
            true, _ = remember(self.base, **inputs)
        errors: dict[str, Any] = {"keys": 0.0, "values": 0.0}
        for layer, (own, wanted) in enumerate(zip(predicted, true, strict=True)):
            pair = (self.placement.normed(layer, own[0]).flatten(2), own[1])
            aim = (self.placement.normed(layer, wanted[0]).flatten(2), wanted[1])
            for name, one, other in zip(errors, pair, aim, strict=True):
                errors[name] = errors[name] + _distance(one, other, mask)
        return losses | errors, None

    def weights(self, ctx: Context) -> Mapping[str, float]:
        return {"keys": self.consistency, "values": self.consistency, "z": self.z_loss}


def _losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over labels of cross entropy and of the squared log-partition."""
    target = labels[:, 1:]
    kept = target != IGNORED
    rows, tokens = logits[:, :-1][kept], target[kept]
    chosen = log_probs(rows, tokens)
    partition = rows.gather(-1, tokens[:, None])[:, 0].to(chosen.dtype) - chosen
    return -chosen.sum(), partition.square().sum()


def _distance(one: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
    """Mean absolute error of each token ``[batch, length, width]``, summed over the real ones."""
    # In float32, of which half precision has too few digits for a sum.
    wide = torch.promote_types(one.dtype, torch.float32)
    error = (one.to(wide) - other.to(wide)).abs().mean(-1)
    return (error if mask is None else error * mask).sum()


# --- what it is for -----------------------------------------------------------------------------


@torch.no_grad()
def continuation_losses(
    base: PreTrainedModel, predictor: KVPredictor, ids: Tensor, prompt: int, batch: int = 8
) -> dict[str, float]:
    """Mean cross entropy in nats of what follows a prompt: of the base model that has read the prompt (``full``), of
    the base model on a predicted prompt (``predicted``), and of the auxiliary model by itself (``auxiliary``).

    Args:
        base: The base model.
        predictor: Its predictor, in its dtype and on its device.
        ids: Texts ``[rows, length]`` without padding.
        prompt: Tokens of each that are the prompt.
        batch: Rows that run together.
    """
    sums = dict.fromkeys(("full", "predicted", "auxiliary"), 0.0)
    for part in ids.split(batch):
        part = part.to(base.device)
        with handed_over(base, predictor), KVPrediction()(base):
            begun = base(input_ids=part[:, :prompt], use_cache=True)
            first, cache = begun.logits[:, -1:], begun.past_key_values
            rest = base(input_ids=part[:, prompt:-1], past_key_values=cache, use_cache=True).logits
        found = {
            "predicted": torch.cat([first, rest], 1),
            "full": base(input_ids=part, use_cache=False).logits[:, prompt - 1 : -1],
            "auxiliary": predictor.auxiliary(input_ids=part, use_cache=False).logits[:, prompt - 1 : -1],
        }
        for name, logits in found.items():
            sums[name] -= float(log_probs(logits, part[:, prompt:]).sum())
    count = ids[:, prompt:].numel()
    return {name: total / count for name, total in sums.items()}


# --- training -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class KVPredictionTrainer(Trainable):
    """Train an auxiliary model and linear maps for `kv-prediction`, through a model that stays as it is.

    Losses, layer maps, weight decay and the factor of the z-loss are those of KV Prediction (arXiv 2410.08391), whose
    runs read about 140 billion tokens with a learning rate of 1.2e-3; steps, batch, length and learning rate here suit
    a small model and some minutes on two CPU cores. The report gives the loss of what follows a prompt of half a row,
    on held-out rows (`continuation_losses`), and the share of the operations that are left before the first token of a
    prompt as long as a row.

    Attributes:
        auxiliary: A small model of the same tokenizer, a name or folder; none: a copy of some of the model's layers.
        share: Of the model's layers that such a copy has: every second one at 0.5, as in the paper. Not with
            `auxiliary`, which is taken as it is.
        consistency: Factor of the distance between predicted and true cache; none: 1 / layers of the model.
        z_loss: Factor of the squared log-partition of both logits.
        length: Tokens of a row.
        batch: Rows of a step.
        lr: Highest learning rate; it warms up over a twentieth of the steps and falls to zero by a cosine.
        weight_decay: Weight decay.
        precision: Of matrix products; `"auto"` is bfloat16 where the device has instructions for it, else float32.
    """

    help: ClassVar[str] = "A small model that reads prompts for the model, and maps to its cache (kv-prediction)."
    resources: ClassVar[tuple[str, ...]] = ("auxiliary",)

    auxiliary: str | None = None
    share: float = 0.5
    consistency: float | None = None
    z_loss: float = 1e-4
    length: int = 256
    batch: int = 8
    lr: float = 5e-4
    weight_decay: float = 0.1
    precision: Precision = "auto"

    def validate(self) -> None:
        self.check("share", "above 0 and below 1", 0 < self.share < 1)
        pruned = self.auxiliary is None or self.share == type(self).share
        self.check("share", "left out beside auxiliary", pruned, why="such a model is taken as it is")
        self.check("consistency", "at least 0, or none", self.consistency is None or self.consistency >= 0)
        self.check("z_loss", "at least 0", self.z_loss >= 0)
        self.check("length", "at least 4", self.length >= 4)
        self.check("batch", "at least 1", self.batch >= 1)
        self.check("lr", "above 0", self.lr > 0)
        self.check("weight_decay", "at least 0", self.weight_decay >= 0)

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
        auxiliary, layer_map, same = self._start(model, tokenizer)
        longest = min((n for n in (context_length(auxiliary), context_length(model)) if n is not None), default=None)
        fits = longest is None or self.length <= longest
        self.check("length", f"at most {longest}", fits, why="one of the models reads no further")
        rows = token_rows(texts, tokenizer, self.length, seed, rows=steps * self.batch + _HELD_OUT)
        held_out = min(_HELD_OUT, max(1, len(rows) // 8)) if len(rows) > 1 else 0
        learned: Any = Subset(rows, range(len(rows) - held_out))
        measured, prompt = rows.ids[len(rows) - max(held_out, 1) :], self.length // 2
        objective = KVPredictionObjective(model, layer_map, same, consistency=self.consistency, z_loss=self.z_loss)
        bundle = fit(
            auxiliary, objective, learned, out / RUN / "fit",
            steps=steps, batch=self.batch, lr=self.lr, weight_decay=self.weight_decay, seed=seed,
            warmup=max(1, steps // 20), schedule="cosine", settings=f"{self} for {weights_hash(model)}",
            dtype=mixed(self.precision, model.device),
        )  # fmt: skip
        trained: Any = bundle.model
        maps: Any = bundle.extra["maps"]
        predictor = KVPredictor(model, trained.to(model.dtype), layer_map, maps.to(model.dtype))
        losses = continuation_losses(model, predictor, measured, prompt)
        predictor.save(out, model, training={"steps": steps, "loss": losses})
        return {
            "rows": len(learned),
            "steps": steps,
            "loss": losses,
            "prefill_share": round(predictor.operations(model, self.length).share, 4),
            "use": str(KVPrediction(predictor=str(out))),
        }

    def _start(
        self, model: PreTrainedModel, tokenizer: Any
    ) -> tuple[PreTrainedModel, tuple[int, ...], tuple[int, ...]]:
        """The auxiliary model as it is before, a copy of its own, its layer map, and the layers that it copies."""
        count = len(anatomy(model).layers)
        if self.auxiliary is None:
            auxiliary, kept = pruned(model, self.share)
            fewer = len(kept) < count
            self.check("share", "one that leaves layers out", fewer, why=f"the model has only {count} layers")
            # The largest retained layer up to each.
            layer_map = tuple(sum(layer <= number for layer in kept) - 1 for number in range(count))
            return auxiliary, layer_map, kept
        auxiliary, own = load(self.auxiliary, device=model.device)
        if own.get_vocab() != tokenizer.get_vocab():
            raise ResourceError(
                f"{self.slug}: the auxiliary model {self.auxiliary!r} has another tokenizer than the model; it must "
                "share it: give the model's own small sibling as auxiliary="
            )
        check_pair(model, auxiliary)
        return auxiliary, contiguous_map(len(anatomy(auxiliary).layers), count), ()
