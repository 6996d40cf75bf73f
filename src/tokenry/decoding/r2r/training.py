"""From a pair of models and texts to a router: labels, training, a threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from tokenry.decoding.r2r.decoder import R2R
from tokenry.decoding.r2r.labels import Positions, label_positions, rejoins, same_text, sentence_ends, write_answers
from tokenry.decoding.r2r.router import Router, auc, quantiles, threshold_for_recall
from tokenry.errors import BadParameter, ResourceError
from tokenry.models import context_length, load, weights_hash
from tokenry.objectives import Context, Objective, Trainable, fit, token_rows
from tokenry.objectives.trainable import RUN


class RouterObjective(Objective):
    """Binary cross entropy of a router's log-odds with labels; the small model stays as it is.

    Items are `{"hidden": [hidden], "token": [], "top": [topk], "label": []}`.

    Args:
        positive: Weight of the divergent positions, which are few.
        shape: Of the `Router`: width, blocks, topk, dropout.
    """

    def __init__(self, positive: float, hidden: int, **shape: Any) -> None:
        self.positive, self.hidden, self.shape = positive, hidden, shape

    def modules(self, model: PreTrainedModel) -> Mapping[str, nn.Module]:
        model.requires_grad_(False)
        return {"router": Router(self.hidden, _embedding(model), **self.shape).to(model.device)}

    def counts(self, batch: dict[str, Tensor]) -> Mapping[str, float]:
        return {"divergence": len(batch["label"])}

    def terms(
        self, model: PreTrainedModel, extra: nn.ModuleDict, batch: dict[str, Tensor], ctx: Context
    ) -> tuple[dict[str, Tensor], None]:
        odds = odds_of(extra["router"], model, batch)
        weight = torch.tensor(self.positive, device=odds.device)
        loss = F.binary_cross_entropy_with_logits(odds, batch["label"].float(), pos_weight=weight, reduction="sum")
        return {"divergence": loss}, None


def odds_of(router: nn.Module, small: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """A router's log-odds `[n]` for positions."""
    embed: Any = small.get_input_embeddings()
    with torch.no_grad():
        embedded = embed(batch["token"]).float()
    return router(batch["hidden"], embedded, batch["top"])


class _Items(Dataset):
    def __init__(self, positions: Positions) -> None:
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tensors = self.positions.tensors()
        return {name: tensors[name][index] for name in ("hidden", "token", "top", "label")}


@dataclass(frozen=True, kw_only=True)
class RouterTrainer(Trainable):
    """Label where the small model leaves the large model's path, train a router on it, and choose its threshold.

    The large model answers the beginnings of the texts greedily; positions are labelled as `label_positions` says and
    split by answers, an eighth for the threshold. Network, loss, weight decay, batch and the threshold by recall are
    those of R2R (arXiv 2505.21600); its width is the paper's in proportion to the small model, its learning rate is
    higher and its steps are fixed, since small models are trained on few positions; and the judge is not another model.

    Attributes:
        small: The small model, a name or folder; it shares the tokenizer.
        rows: Texts that the large model goes on from.
        length: Tokens of a row, answer included.
        prompt: Those of them that are given.
        judge: `"rejoin"`: a token diverges if behind its sentence the large model does not go on as it did; `"text"`:
            if the sentence differs in more than white space and capitals.
        sentence: Most tokens in which a sentence must end.
        after: Tokens behind a sentence that `"rejoin"` compares.
        width: Of the router; none: 2/3 of the small model's, in multiples of 8 from 64 to 1024.
        blocks: Residual blocks.
        topk: Logits that it reads.
        factor: Multiple of the weight that makes up for the few divergent positions.
        recall: The threshold routes this share of the divergent positions at least.
        share: Instead, the share of all held-out positions that the threshold routes.
        batch: Positions of a step.
        lr: Learning rate.
        weight_decay: Weight decay.
    """

    help: ClassVar[str] = "A router for r2r between a small model and the model."
    resources: ClassVar[tuple[str, ...]] = ("small",)

    small: str = "tokenry/code-draft"
    rows: int = 384
    length: int = 160
    prompt: int = 32
    judge: Literal["rejoin", "text"] = "rejoin"
    sentence: int = 32
    after: int = 8
    width: int | None = None
    blocks: int = 6
    topk: int = 100
    factor: float = 1.0
    recall: float = 0.95
    share: float | None = None
    batch: int = 1024
    lr: float = 5e-4
    weight_decay: float = 5e-4

    def validate(self) -> None:
        self.check("rows", "at least 8", self.rows >= 8, why="an eighth is held out")
        self.check("prompt", "at least 1 and below length", 1 <= self.prompt < self.length)
        for name in ("sentence", "after", "blocks", "topk", "batch"):
            self.check(name, "at least 1", getattr(self, name) >= 1)
        self.check("width", "at least 8, or none", self.width is None or self.width >= 8)
        self.check("factor", "above 0", self.factor > 0)
        self.check("recall", "above 0 and at most 1", 0 < self.recall <= 1)
        self.check("share", "from 0 to 1, or none", self.share is None or 0 <= self.share <= 1)
        self.check("lr", "above 0", self.lr > 0)
        self.check("weight_decay", "at least 0", self.weight_decay >= 0)

    def train(
        self, model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], out: Path, *, steps: int | None, seed: int
    ) -> dict[str, Any]:
        steps = 1000 if steps is None else steps
        small = self._small(model, tokenizer)
        longest = min((n for n in (context_length(model), context_length(small)) if n is not None), default=self.length)
        most = longest - self.sentence - self.after
        self.check("length", f"at most {most}", self.length <= most, why="one of the models reads no further")
        rows = token_rows(texts, tokenizer, self.prompt, seed, rows=self.rows).ids
        known = self._positions(model, small, tokenizer, rows, out / RUN / "positions.safetensors", seed)
        clear, held_out = known.label >= 0, known.row >= len(rows) - max(1, len(rows) // 8)
        # The router is asked at every position, at those that cannot be told too.
        learned, asked = known[clear & ~held_out], known[held_out]
        told = asked.label >= 0
        measured = asked[told]
        for name, part in (("learned", learned), ("held-out", measured)):
            if not bool((part.label == 1).any()) or not bool((part.label == 0).any()):
                raise BadParameter(
                    f"{self.slug}: all {len(part)} {name} positions have one label, which teaches nothing; give more "
                    "rows, more text, or another judge"
                )
        router = self._fit(small, learned, out / RUN / "fit", steps, seed)
        every = self._chances(router, small, asked)
        chances = every[told]
        if self.share is None:
            threshold = threshold_for_recall(chances, measured.label, self.recall)
        else:
            router.note = {"quantiles": {"router": quantiles(every)}}
            threshold = router.threshold_for(self.share)
        divergent = measured.label == 1
        report = {
            "positions": len(known),
            "mismatch": _share(known.mismatch),
            "divergent": _share(known.label[clear] == 1),
            "dropped": _share(known.label < 0),
            "auc": {
                "router": round(auc(chances, measured.label), 4),
                "entropy": round(auc(measured.entropy, measured.label), 4),
            },
            "threshold": threshold,
            "recall": _share(chances[divergent] >= threshold),
            "share": _share(every >= threshold),
        }
        router.save(
            out, small, model, threshold=threshold,
            quantiles={"router": quantiles(every), "entropy": quantiles(asked.entropy)}, training=report,
        )  # fmt: skip
        return {**report, "use": str(R2R(small=self.small, router=str(out)))}

    def _small(self, model: PreTrainedModel, tokenizer: Any) -> PreTrainedModel:
        """A copy of the small model of its own, in float32."""
        small, its = load(self.small, device=model.device)
        if its.get_vocab() != tokenizer.get_vocab():
            raise ResourceError(
                f"{self.slug}: the small model {self.small!r} has another tokenizer than the model; both must share "
                "one: give the model's own small sibling as small="
            )
        return small.float()

    def _positions(
        self, model: PreTrainedModel, small: PreTrainedModel, tokenizer: Any, rows: Tensor, kept: Path, seed: int
    ) -> Positions:
        """Labelled positions, which a run that was stopped finds in the file `kept`."""
        about = {"of": f"{self} {seed} {weights_hash(model)} {weights_hash(small)}"}
        if kept.is_file():
            with safe_open(str(kept), "pt") as file:
                if file.metadata() == about:
                    return Positions(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        judge = same_text(tokenizer) if self.judge == "text" else rejoins
        found = label_positions(
            model, small, write_answers(model, rows, self.length), self.prompt, sentence_ends(tokenizer), judge,
            topk=self.topk, sentence=self.sentence, after=self.after,
        )  # fmt: skip
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in found.tensors().items()}, kept, metadata=about)
        return found

    def _fit(self, small: PreTrainedModel, learned: Positions, folder: Path, steps: int, seed: int) -> Router:
        hidden = learned.hidden.shape[1]
        width = self.width or min(1024, max(64, round(hidden / 12) * 8))
        positive = int((learned.label == 1).sum())
        weight = (len(learned) - positive) / positive * self.factor
        objective = RouterObjective(weight, hidden, width=width, blocks=self.blocks, topk=learned.top.shape[1])
        bundle = fit(
            small, objective, _Items(learned), folder, steps=steps, batch=min(self.batch, len(learned)), lr=self.lr,
            weight_decay=self.weight_decay, warmup=min(50, steps // 10), schedule="cosine", seed=seed,
            settings=str(self),
        )  # fmt: skip
        router = bundle.extra["router"]
        assert isinstance(router, Router)
        return router

    @torch.no_grad()
    def _chances(self, router: Router, small: PreTrainedModel, positions: Positions) -> Tensor:
        parts = []
        for start in range(0, len(positions), self.batch):
            part = positions[torch.arange(start, min(start + self.batch, len(positions)))].tensors()
            batch = {name: tensor.to(small.device) for name, tensor in part.items()}
            parts.append(odds_of(router, small, batch).sigmoid().cpu())
        return torch.cat(parts)


def _embedding(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.shape[1]


def _share(which: Tensor) -> float:
    return round(float(which.float().mean()), 4)
