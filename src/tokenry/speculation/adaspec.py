"""Distil a draft model on the tokens it can still learn.

A small draft cannot match its target everywhere. A copy of it, distilled on all tokens, shows what its size can reach:
the reference. The draft itself is then distilled, in each micro-batch, on the tokens where it is furthest behind the
reference alone. What comes out is an ordinary model folder for `draft-model:draft=PATH`.
"""

from __future__ import annotations

import copy
import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel

from tokenry.errors import BadParameter, ResourceError
from tokenry.models import context_length, load, weights_hash
from tokenry.objectives import (
    Context,
    Objective,
    Precision,
    TokenRows,
    Trainable,
    fit,
    kl,
    label_count,
    mixed,
    token_rows,
)
from tokenry.objectives.losses import IGNORED, overlap
from tokenry.objectives.trainable import RUN
from tokenry.speculation.draft_model import DraftModel

Kept = Literal["largest", "smallest", "random"]
_HELD_OUT = 32  # rows that acceptance is measured on
_STORED = 2**31  # most bytes of a target's logits that are kept instead of computed at every step


class SelectiveDistillation(Objective):
    """Forward KL from the target to the draft, over the tokens with the largest gap to a reference.

    For each learned position t, `l_t = KL(target_t || draft_t)` and `D_t = l_t - KL(target_t || reference_t)`; kept are
    the positions of a micro-batch with `D_t` at least the quantile `1 - keep` of all its `D`, and the term `kl` is the
    sum of `l_t` over them (AdaSPEC 2510.19779). Without a reference, or with `keep=1`, all are kept: DistillSpec with
    forward KL on given text. No gradient goes to target or reference, and rows that are `Taught` ask neither.

    Args:
        target: The model that will verify.
        reference: A copy of the draft distilled on all tokens of the same text, from the same weights.
        keep: Share of the tokens that are kept; equal gaps at the threshold are all kept.
        normaliser: The sum is divided by all learned tokens of the step (`"all"`, as the authors' trainer), or each
            micro-batch's by what it keeps (`"kept"`, and micro-batches count alike).
        kept: Which tokens are kept; others than the largest gaps are controls.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        reference: PreTrainedModel | None = None,
        *,
        keep: float = 1.0,
        normaliser: Literal["all", "kept"] = "all",
        kept: Kept = "largest",
    ) -> None:
        self.target = target.eval()
        self.reference = None if reference is None or keep == 1 else reference.eval()
        self.keep, self.normaliser, self.kept = keep, normaliser, kept

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        count = label_count(batch["labels"])
        local = self.reference is not None and self.normaliser == "kept"
        return {"kl": (count > 0).float() if local else count}

    def terms(
        self, model: PreTrainedModel, extra: nn.ModuleDict, batch: Mapping[str, Tensor], ctx: Context
    ) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        learned = batch["labels"][:, 1:] != IGNORED
        with torch.no_grad():
            target = batch["target"][learned] if "target" in batch else _logits(self.target, batch, learned)
        draft = _logits(model, batch, learned)
        width = min(target.shape[-1], draft.shape[-1])
        losses = kl(target[:, :width], draft[:, :width])
        chosen = torch.ones_like(losses, dtype=torch.bool)
        if self.reference is not None:
            with torch.no_grad():
                if "reference" in batch:
                    reached = batch["reference"][learned]
                else:
                    reached = kl(target[:, :width], _logits(self.reference, batch, learned)[:, :width])
                gap = losses.detach() - reached
            chosen = self._chosen(gap, ctx)
        total = losses[chosen].sum()
        if self.reference is not None and self.normaliser == "kept":
            total = total / chosen.sum().clamp(min=1)
        count = learned.sum()
        found = {"kept": (chosen.sum(), count), "kl": (losses.detach().sum(), count)}
        if not ctx.training:
            found["acceptance"] = (overlap(target[:, :width], draft[:, :width]).sum(), count)
        return {"kl": total}, found

    def metrics(
        self, batch: Mapping[str, Tensor], outputs: dict[str, tuple[Tensor, Tensor]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        return outputs

    def _chosen(self, gap: Tensor, ctx: Context) -> Tensor:
        if self.kept == "smallest":
            return largest(-gap, self.keep)
        if self.kept == "random":
            generator = ctx.generator(len(gap))
            return largest(torch.rand(len(gap), generator=generator).to(gap.device), self.keep)
        return largest(gap, self.keep)


def largest(gap: Tensor, keep: float) -> Tensor:
    """Which gaps `[n]` are at least their quantile `1 - keep`, bool `[n]`: the largest, ties included; n may be 0.

    The quantile is taken at a rank, so neither the precision of `keep` nor the number of gaps limits it.
    """
    if not len(gap):
        return torch.zeros_like(gap, dtype=torch.bool)
    # Rounded, because 1 - keep in binary can lie just above the rank that is meant.
    rank = math.ceil(round((1 - keep) * (len(gap) - 1), 6))
    gap = gap if gap.dtype == torch.float64 else gap.float()
    return gap >= gap.kthvalue(rank + 1).values


def _logits(model: PreTrainedModel, batch: Mapping[str, Tensor], learned: Tensor) -> Tensor:
    """Logits of the positions before learned labels, `[n, vocab]`."""
    out = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False)
    return out.logits[:, :-1][learned]


class Taught(Dataset):
    """Rows with what frozen models say of them, asked once, so that reading a row again costs the draft's pass alone.

    Items have besides `input_ids` and `labels` the target's logits `target` `[length - 1, vocabulary]`, and once a
    reference is known, its divergence from the target `reference` `[length - 1]` in nats.

    Args:
        rows: Items with `input_ids` and `labels`.
        target: The model that will verify; its logits are kept as it gives them.
        batch: Rows that run together.
    """

    def __init__(self, rows: Dataset | Sequence[Mapping[str, Tensor]], target: PreTrainedModel, batch: int = 8) -> None:
        self.rows, self.batch = rows, batch
        self.targets = torch.cat([logits.cpu() for _, logits in self._logits(target)])
        self.references: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {**self.rows[index], "target": self.targets[index]}
        return item if self.references is None else {**item, "reference": self.references[index]}

    @torch.no_grad()
    def _logits(self, model: PreTrainedModel) -> Iterator[tuple[slice, Tensor]]:
        start = 0
        for part in DataLoader(self.rows, batch_size=self.batch):  # type: ignore[arg-type]
            ids = part["input_ids"].to(model.device)
            yield slice(start, start + len(ids)), model(input_ids=ids, use_cache=False).logits[:, :-1]
            start += len(ids)

    def beside(self, reference: PreTrainedModel) -> Taught:
        """The same rows and logits with the divergences of a reference."""
        found = copy.copy(self)
        parts = []
        with torch.no_grad():
            for place, logits in self._logits(reference.eval()):
                target = self.targets[place].to(logits.device)
                width = min(target.shape[-1], logits.shape[-1])
                parts.append(kl(target[..., :width], logits[..., :width]).cpu())
        found.references = torch.cat(parts)
        return found


def taught(rows: Dataset | Sequence[Mapping[str, Tensor]], target: PreTrainedModel) -> Taught | None:
    """Rows with the target's logits, or None where these would take more than 2 GiB."""
    length = rows[0]["input_ids"].shape[0]
    size = len(rows) * (length - 1) * _width(target) * target.dtype.itemsize  # type: ignore[arg-type]
    return Taught(rows, target.eval()) if size <= _STORED else None


# --- what it is for -----------------------------------------------------------------------------


@torch.no_grad()
def acceptance(
    draft: PreTrainedModel, target: PreTrainedModel, rows: Dataset | Sequence[Mapping[str, Tensor]], batch: int = 8
) -> float:
    """Mean of `sum_x min(p(x), q(x))` over the labels of rows: the chance that a token drafted at T = 1 is accepted.

    Teacher-forced, so it is an acceptance rate of speculative sampling on these rows' text: take text that the target
    has sampled for the rate that it will meet.

    Args:
        draft: Draws from q.
        target: Verifies by p; ids that only one of both has count as never drawn.
        rows: Items with `input_ids` and `labels`, as `TokenRows` has them.
        batch: Rows that run together.

    Raises:
        BadParameter: No row has a label.
    """
    total, count = 0.0, 0
    draft, target = draft.eval(), target.eval()
    for part in DataLoader(rows, batch_size=batch):  # type: ignore[arg-type]
        part = {name: tensor.to(target.device) for name, tensor in part.items()}
        learned = part["labels"][:, 1:] != IGNORED
        p, q = _logits(target, part, learned), _logits(draft, part, learned)
        width = min(p.shape[-1], q.shape[-1])
        total += overlap(p[:, :width], q[:, :width]).sum().item()
        count += int(learned.sum())
    if not count:
        raise BadParameter("the rows have no labels to measure acceptance on; give rows of at least two tokens")
    return total / count


def sampled(target: PreTrainedModel, rows: TokenRows, *, prompt: int = 16, seed: int = 0, batch: int = 16) -> TokenRows:
    """Rows that begin as the given ones and go on as the target samples at T = 1; only what it sampled is labelled."""
    length = rows.ids.shape[1]
    if not 0 < prompt < length:
        raise BadParameter(f"prompt={prompt} is not allowed; it must be from 1 to {length - 1}, inside the rows")
    found = []
    with torch.random.fork_rng(devices=[target.device] if target.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for part in rows.ids.split(batch):
            start = part[:, :prompt].to(target.device)
            new = length - prompt
            options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            options |= {"min_new_tokens": new, "max_new_tokens": new}
            generate: Any = target.generate
            found.append(generate(start, attention_mask=torch.ones_like(start), **options))
    made = TokenRows(torch.cat(found).cpu())
    made.labels = made.ids.clone()
    made.labels[:, :prompt] = IGNORED
    return made


# --- training -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AdaSpecTrainer(Trainable):
    """Distil a draft model in two stages, first a reference on all tokens, then the draft on those it can still learn.

    The share of kept tokens, the larger batch of the second stage, the normaliser, AdamW's weight decay, the constant
    learning rate (3e-4 for GSM8K) and the batch are those of AdaSPEC (2510.19779 and the authors' scripts). Their
    length is 512; steps depend on the text.

    Attributes:
        draft: The draft model that is trained further, a name or folder; it shares the target's tokenizer.
        keep: Share of the tokens of a micro-batch that the second stage learns; 1 is DistillSpec.
        normaliser: Whether a step's loss is divided by all its tokens, or each micro-batch's by those kept.
        enlarge: Whether the second stage's batch is larger by `1 / keep`, so that both learn as many tokens a step.
        length: Tokens of a row.
        batch: Rows of a step of the first stage.
        lr: Learning rate.
        weight_decay: Weight decay.
        reference_steps: Steps of the first stage; as many as the second if none.
        precision: Of matrix products; `"auto"` is bfloat16 where the device has instructions for it, else float32.
    """

    help: ClassVar[str] = "A draft model for draft-model:draft=PATH that the target accepts more often."
    resources: ClassVar[tuple[str, ...]] = ("draft",)

    draft: str = "tokenry/code-draft"
    keep: float = 0.4
    normaliser: Literal["all", "kept"] = "all"
    enlarge: bool = True
    length: int = 256
    batch: int = 16
    lr: float = 3e-4
    weight_decay: float = 0.1
    reference_steps: int | None = None
    precision: Precision = "float32"

    def validate(self) -> None:
        self.check("keep", "above 0 and at most 1", 0 < self.keep <= 1)
        self.check("length", "at least 2", self.length >= 2)
        self.check("batch", "at least 1", self.batch >= 1)
        self.check("lr", "above 0", self.lr > 0)
        self.check("weight_decay", "at least 0", self.weight_decay >= 0)
        self.check("reference_steps", "at least 1, or none", self.reference_steps is None or self.reference_steps >= 1)

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
        if Path(self.draft).expanduser().resolve() == out.resolve():
            raise BadParameter(
                f"{self.slug}: draft={self.draft} is the folder that the result goes to, and would be lost; name "
                "another one as out"
            )
        steps = 1000 if steps is None else steps
        first = self.reference_steps or steps
        draft = self.start(model, tokenizer)
        dtype = draft.dtype
        longest = min((n for n in (context_length(draft), context_length(model)) if n is not None), default=self.length)
        self.check("length", f"at most {longest}", self.length <= longest, why="one of the models reads no further")
        wide = math.ceil(self.batch / self.keep) if self.enlarge else self.batch
        rows = token_rows(texts, tokenizer, self.length, seed, rows=max(first * self.batch, steps * wide) + _HELD_OUT)
        held_out = min(_HELD_OUT, max(1, len(rows) // 8))
        learned: Any = Subset(rows, range(len(rows) - held_out)) if len(rows) > 1 else rows
        measured: Any = Subset(rows, range(len(rows) - held_out, len(rows)))
        options: dict[str, Any] = {
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "seed": seed,
            "settings": f"{self} for {weights_hash(model)}",
            "dtype": mixed(self.precision, model.device),
        }
        found = {"before": acceptance(draft.float(), model, measured)}
        reference = None
        if self.keep < 1:
            plain, folder = SelectiveDistillation(model), out / RUN / "reference"
            reference = fit(
                copy.deepcopy(draft), plain, learned, folder, steps=first, batch=self.batch, **options
            ).model
            found["reference"] = acceptance(reference, model, measured)
        chosen = SelectiveDistillation(model, reference, keep=self.keep, normaliser=self.normaliser)
        draft = fit(draft, chosen, learned, out / RUN / "draft", steps=steps, batch=wide, **options).model
        found["after"] = acceptance(draft, model, measured)
        draft.to(dtype)  # type: ignore[arg-type]
        draft.save_pretrained(out)
        tokenizer.save_pretrained(out)
        use = str(DraftModel(draft=str(out)))
        return {"rows": len(learned), "steps": steps, "acceptance": found, "use": use}

    def start(self, model: PreTrainedModel, tokenizer: Any) -> PreTrainedModel:
        """The draft as it is before, a copy of its own.

        Raises:
            ResourceError: It does not share the model's tokenizer, or one of both has too few tokens.
        """
        draft, own = load(self.draft, device=model.device)
        if own.get_vocab() != tokenizer.get_vocab():
            raise ResourceError(
                f"{self.slug}: the draft {self.draft!r} has another tokenizer than the model; a draft must share it: "
                "give the model's own small sibling as draft="
            )
        narrow = min(_width(draft), _width(model))
        if narrow < len(tokenizer):
            raise ResourceError(
                f"{self.slug}: the tokenizer has {len(tokenizer)} tokens, but one of the models only {narrow}; "
                "resize its embeddings with resize_token_embeddings"
            )
        return draft


def _width(model: PreTrainedModel) -> int:
    return model.get_output_embeddings().weight.shape[0]


# --- against plain distillation -----------------------------------------------------------------

ARMS = ("plain", "plain, all compute", "equal steps", "equal tokens", "random tokens", "smallest gaps")
"""Ways to distil that are compared: without selection, with it, and controls that select otherwise."""


def compare_distillation(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    rows: TokenRows,
    *,
    held_out: TokenRows | None = None,
    arms: Sequence[str] = ARMS,
    seeds: int = 3,
    steps: int = 500,
    batch: int = 16,
    keep: float = 0.4,
    lr: float = 3e-4,
    normaliser: Literal["all", "kept"] = "all",
    dtype: torch.dtype | None = None,
    measure: Callable[[PreTrainedModel], Mapping[str, float]] | None = None,
    folder: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Distil a draft with and without selection from the same weights, over seeds, and measure acceptance.

    Plain distillation runs `steps` of `batch` rows; the result of each seed is the reference of the selective arms of
    that seed. `equal steps` selects from as many rows and so learns `keep` of the tokens; `equal tokens` selects from
    a batch larger by `1 / keep`. Neither is plain distillation at equal compute, so `plain, all compute` gets as many
    steps as plain and `equal tokens` have together. The controls keep random tokens, or those with the smallest gaps,
    at equal tokens. Where the target's logits for all rows fit into 2 GiB they are computed once.

    Args:
        rows: Text to distil on.
        held_out: Text to measure on; by default the last eighth of `rows`, which is then not distilled on.
        arms: Of `ARMS`; plain is always among them.
        seeds: Runs of each arm, which differ in the order of rows.
        measure: Figures of a draft beside its acceptance, by name.
        folder: Where every run keeps checkpoints, so that a comparison that was stopped goes on; None keeps none.

    Returns:
        JSON: settings, acceptance `before` with `figures_before`, and by arm acceptance of each seed, its mean and
        standard deviation, the differences from plain seed by seed, the figures of each seed, tokens learned in the
        draft's own stage, and tokens that all drafts in training, the target and the frozen reference have read, the
        stage that made the reference included.

    Raises:
        BadParameter: An arm is not known, or there is nothing to measure on.
        ResourceError: `folder` holds runs of other settings.
    """
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise BadParameter(f"no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    if held_out is None:
        count = max(1, len(rows) // 8)
        if len(rows) < 2:
            raise BadParameter("one row cannot be both learned and measured; give more rows, or held_out")
        measured: Any = Subset(rows, range(len(rows) - count, len(rows)))
        learned: Any = Subset(rows, range(len(rows) - count))
    else:
        learned, measured = rows, held_out
    wide = math.ceil(batch / keep)
    selective: dict[str, tuple[Kept, int]] = {
        "equal steps": ("largest", batch), "equal tokens": ("largest", wide),
        "random tokens": ("random", wide), "smallest gaps": ("smallest", wide),
    }  # fmt: skip
    chosen = [arm for arm in ARMS if arm in arms or arm == "plain"]
    longer = steps + math.ceil(steps * wide / batch)
    length = rows.ids.shape[1]
    scores: dict[str, list[float]] = {}
    figures: dict[str, dict[str, list[float]]] = {}
    text = hashlib.sha256(rows.ids.numpy().tobytes()).hexdigest()[:12]
    about = f"{text} for {weights_hash(target)}, keep={keep}, {normaliser}"
    known = taught(learned, target)

    def distilled(objective: SelectiveDistillation, arm: str, seed: int, count: int, width: int) -> PreTrainedModel:
        data: Any = learned
        if known is not None:
            data = known if objective.reference is None else known.beside(objective.reference)
        place = None if folder is None else folder / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
        made = fit(
            copy.deepcopy(draft).requires_grad_(True), objective, data, place, steps=count, batch=width, lr=lr,
            weight_decay=0.1, seed=seed, dtype=dtype, settings=f"{arm} on {about}", progress=progress,
        ).model  # fmt: skip
        scores.setdefault(arm, []).append(acceptance(made, target, measured))
        for name, value in (measure(made) if measure else {}).items():
            figures.setdefault(arm, {}).setdefault(name, []).append(value)
        return made

    for seed in range(seeds):
        reference = distilled(SelectiveDistillation(target), "plain", seed, steps, batch)
        if "plain, all compute" in chosen:
            distilled(SelectiveDistillation(target), "plain, all compute", seed, longer, batch)
        for arm in (arm for arm in chosen if arm in selective):
            kept, width = selective[arm]
            objective = SelectiveDistillation(target, reference, keep=keep, normaliser=normaliser, kept=kept)
            distilled(objective, arm, seed, steps, width)
    first = steps * batch * length
    read = {"plain": first, "plain, all compute": longer * batch * length}
    read |= {arm: first + steps * width * length for arm, (_, width) in selective.items()}
    found = {
        arm: {
            "acceptance": values,
            "mean": statistics.fmean(values),
            "deviation": statistics.stdev(values) if seeds > 1 else None,
            "over_plain": [one - two for one, two in zip(values, scores["plain"], strict=True)],
            "figures": figures.get(arm, {}),
            "tokens_learned": round(keep * (read[arm] - first)) if arm in selective else read[arm],
            "tokens_read": {
                "draft": read[arm],
                "target": read[arm],
                "reference": read[arm] - first if arm in selective else 0,
            },
        }
        for arm, values in scores.items()
    }
    return {
        "schema_version": 1,
        "target": str(target.name_or_path),
        "draft": str(draft.name_or_path),
        "settings": {
            "seeds": seeds, "steps": steps, "batch": batch, "length": length, "keep": keep, "lr": lr,
            "normaliser": normaliser, "rows": len(learned), "held_out": len(measured),
        },
        "before": acceptance(draft, target, measured),
        "figures_before": dict(measure(draft)) if measure else {},
        "arms": found,
    }  # fmt: skip
