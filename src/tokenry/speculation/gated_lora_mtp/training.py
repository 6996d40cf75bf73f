"""Training of masks, gated LoRA and sampler beside a frozen model, for every prefix of a text in one pass."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenry.errors import BadParameter
from tokenry.generation.auxiliary import Auxiliary, listening
from tokenry.models import TokenCache, attached, context_length
from tokenry.models.fingerprint import rounded_hash
from tokenry.objectives import Context, Objective, Precision, TokenRows, Trainable, fit, mixed, token_rows
from tokenry.objectives.losses import IGNORED, log_probs
from tokenry.objectives.trainable import RUN
from tokenry.speculation.gated_lora_mtp.adapters import Adapters, gated
from tokenry.speculation.gated_lora_mtp.drafter import GatedLoRAMTP, own_block

# Rows whose second part the model writes itself are generated so many at a time.
_TOGETHER = 128


class Pass(NamedTuple):
    """What the interleaved pass gives.

    Attributes:
        states: Hidden states of the masks `[batch, blocks, k, hidden]`.
        anchors: Hidden states of the tokens `[batch, length, hidden]`, without gradient: the base model's own.
    """

    states: Tensor
    anchors: Tensor


def interleaved(model: PreTrainedModel, adapters: Adapters, ids: Tensor, blocks: Tensor) -> Pass:
    """One forward over texts `[batch, length]` with a block of masks behind each of the tokens `blocks` `[count]`.

    Mask j behind token i stands at position i + j, sees the tokens up to i and the masks of its block up to itself, as
    in decoding; `model` must be inside `attached`.
    """
    batch, length = ids.shape
    k = adapters.k
    tree = torch.ones(1, length, length, dtype=torch.bool, device=ids.device).tril()
    depth = (blocks[:, None] + torch.arange(1, k + 1, device=ids.device)).flatten()[None]
    masks = adapters.masks.repeat(len(blocks), 1)[None]
    rows = Auxiliary(masks, depth, tree[:, blocks].repeat_interleave(k, 1), own_block(len(blocks), k, ids.device))
    positions = torch.cat([torch.arange(length, device=ids.device)[None], depth], 1)
    embed: Any = model.get_input_embeddings()
    embedded = embed(ids)
    inputs = torch.cat([embedded, masks.to(embedded.dtype).expand(batch, -1, -1)], 1)
    cache = TokenCache(model)
    cache.stage(relation=rows.relation(tree))
    before, width = length, length + rows.count
    # The head is kept from its work; what it would have read is all that is wanted.
    with listening(model, slice(0, 1)) as heard, gated(model, adapters, before, width):
        model(
            inputs_embeds=inputs,
            position_ids=positions.expand(batch, -1),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
    assert heard.hidden is not None
    states = heard.hidden[:, length:].unflatten(1, (len(blocks), k))
    return Pass(states, heard.hidden[:, :length].detach())


class MTPObjective(Objective):
    """Draft the tokens behind the next one from the masks of random prefixes (section 3.3 of the paper).

    Terms: `base`, cross entropy of the head on a mask's state; `sampler`, likewise on the sampler's state, given the
    true token before; `consistency`, the squared distance of a mask's state from the state of the real token that
    predicts the same target, as a share of that state's square, so that one factor suits models of any scale. Metrics
    are of the sampler: accuracy and loss by mask, and the tokens that a step would give (drafts that are right up to
    the first wrong one, and the target's own).

    Items are `{"input_ids": [length], "labels": [length], "written": []}`; tokens a step are counted where all tokens
    from the one behind the prefix on stand at `written` or later.

    Args:
        k, r, alpha: As of `Adapters`.
        blocks: Prefixes of a row that get masks, drawn anew for every micro-batch.
        consistency: Factor of its term.
    """

    def __init__(self, *, k: int, r: int, alpha: float, blocks: int, consistency: float = 1.0) -> None:
        self.k, self.r, self.alpha = k, r, alpha
        self.blocks, self.consistency = blocks, consistency

    def modules(self, model: PreTrainedModel) -> Mapping[str, nn.Module]:
        model.requires_grad_(False)
        return {"adapters": Adapters(model, self.k, self.r, self.alpha)}

    def prepare(self, window: list[dict[str, Any]], ctx: Context) -> list[dict[str, Any]]:
        for number, batch in enumerate(window):
            batch["blocks"] = self._drawn(batch["labels"], ctx.generator(number))
            behind = batch["blocks"][:, None] + torch.arange(self.k, device=batch["blocks"].device) + 2
            # [batch, blocks, k], ignored where a target lies behind the row.
            batch["targets"] = nn.functional.pad(batch["labels"], (0, self.k + 1), value=IGNORED)[:, behind]
        return window

    def _drawn(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Prefixes that have a target in any row of labels `[batch, length]`, ascending."""
        wanted = (labels != IGNORED).any(0)[2:].nonzero()[:, 0]
        if len(wanted) == 0:
            return wanted
        pick = torch.randperm(len(wanted), generator=generator)[: self.blocks].to(wanted.device)
        return wanted[pick].sort().values

    def counts(self, batch: dict[str, Any]) -> Mapping[str, Tensor]:
        count = (batch["targets"] != IGNORED).sum()
        return {"base": count, "sampler": count, "consistency": count}

    def terms(
        self, model: PreTrainedModel, extra: nn.ModuleDict, batch: dict[str, Any], ctx: Context
    ) -> tuple[Mapping[str, Tensor], Any]:
        # The frozen path runs as it will run: the base model without dropout.
        model.eval()
        adapters: Any = extra["adapters"]
        ids, blocks, targets = batch["input_ids"], batch["blocks"], batch["targets"]
        real = targets != IGNORED
        if not bool(real.any()):
            nothing = adapters.masks.sum().float() * 0
            return {"base": nothing, "sampler": nothing, "consistency": nothing}, None
        with attached(model):
            found = interleaved(model, adapters, ids, blocks)
        # The token before target i + 1 + j is i + j, whose own state predicts the target too.
        ahead = (blocks[:, None] + torch.arange(1, self.k + 1, device=ids.device)).clamp(max=ids.shape[1] - 1)
        embed: Any = model.get_input_embeddings()
        drafted = adapters.sampler(embed(ids[:, ahead]), found.states)
        head: Any = model.get_output_embeddings()
        scored = [log_probs(states[real], targets[real], head=head) for states in (found.states, drafted)]
        anchors = found.anchors[:, ahead].float()
        distance = (found.states.float() - anchors).square().sum(-1) / anchors.square().sum(-1).clamp(min=1e-6)
        terms = {"base": -scored[0].sum(), "sampler": -scored[1].sum(), "consistency": distance[real].sum()}
        with torch.no_grad():
            right = torch.zeros_like(real)
            right[real] = head(drafted[real]).argmax(-1) == targets[real]
            losses = torch.zeros(real.shape, device=ids.device)
            losses[real] = -scored[1].detach().float()
        return terms, (real, right, losses)

    def weights(self, ctx: Context) -> Mapping[str, float]:
        return {"consistency": self.consistency}

    def metrics(self, batch: dict[str, Any], outputs: Any) -> Mapping[str, tuple[Tensor, Tensor]]:
        if outputs is None:
            return {}
        real, right, losses = outputs
        whole = real.all(-1) & (batch["blocks"] + 1 >= batch["written"][:, None])
        found = {"tokens_per_step": (right.cumprod(-1).sum(-1)[whole].sum() + whole.sum(), whole.sum())}
        for j in range(self.k):
            found[f"accuracy_{j + 1}"] = (right[..., j].sum(), real[..., j].sum())
            found[f"loss_{j + 1}"] = (losses[..., j].sum(), real[..., j].sum())
        return found


@dataclass(frozen=True, kw_only=True)
class MTPTrainer(Trainable):
    """Train mask embeddings, gated LoRA and sampler for `gated-lora-mtp`, beside a model that stays as it is.

    The paper trains an 8-billion-parameter model with k = 8, rank 128 and a learning rate of 2e-4 for 50,000 steps; the
    defaults here suit a small model and some minutes on two CPU cores. `alpha` is twice the rank, as there.

    Of a share of the rows the model writes the last three quarters itself, greedily (an addition): those targets are
    the very tokens that it will be asked to draft, so `tokens_per_step` of the log, which counts there, is what greedy
    decoding behind such texts would give. Where no row is written, it counts on the texts.

    The report gives the means of the log's last tenth: loss, tokens a step, and by mask loss and accuracy of the
    sampler.

    Attributes:
        k: Mask tokens, so the most drafts of a step.
        r: Rank of the LoRA pairs.
        length: Tokens of a row.
        batch: Rows of a step.
        rows: Rows in all; a longer run reads them again, with other prefixes.
        blocks: Prefixes of a row that get masks.
        own: Share of the rows that the model writes to their end.
        steps: Steps of the optimizer.
        lr: Learning rate of AdamW; `mask_lr` is that of the mask embeddings.
        consistency: Factor of the consistency term.
        precision: Of matrix products; `"auto"` is bfloat16 where the device has instructions for it, else float32.
    """

    help: ClassVar[str] = "Mask embeddings, gated LoRA and sampler with which a frozen model drafts for itself."
    k: int = 6
    r: int = 64
    length: int = 192
    batch: int = 8
    rows: int = 1280
    blocks: int = 48
    own: float = 1.0
    steps: int = 600
    lr: float = 1e-3
    mask_lr: float = 5e-3
    consistency: float = 1.0
    precision: Precision = "auto"

    def validate(self) -> None:
        for name in ("k", "r", "batch", "rows", "blocks", "steps"):
            self.check(name, "at least 1", getattr(self, name) >= 1)
        self.check("length", f"at least {2 * self.k + 4}", self.length >= 2 * self.k + 4, why="blocks need targets")
        self.check("own", "from 0 to 1", 0 <= self.own <= 1)
        for name in ("lr", "mask_lr"):
            self.check(name, "above 0", getattr(self, name) > 0)
        self.check("consistency", "0 or more", self.consistency >= 0)

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
        context = context_length(model)
        if context is not None and self.length > context:
            raise BadParameter(f"{self.slug}: length={self.length} is beyond the model's context of {context}")
        model.eval()
        total = self.steps if steps is None else steps
        rows = token_rows(texts, tokenizer, self.length, seed, rows=min(self.rows, total * self.batch))
        features = self._features(model, rows, out / RUN / "written.safetensors", seed)
        objective = MTPObjective(
            k=self.k, r=self.r, alpha=2.0 * self.r, blocks=self.blocks, consistency=self.consistency
        )
        bundle = fit(
            model,
            objective,
            features,
            out / RUN / "fit",
            steps=total,
            lr=self.lr,
            batch=self.batch,
            seed=seed,
            warmup=min(50, total // 10),
            schedule="cosine",
            groups={"extra.adapters.masks": self.mask_lr / self.lr},
            dtype=mixed(self.precision, model.device),
            settings=str(self),
        )
        adapters: Any = bundle.extra["adapters"]
        report = _report(out / RUN / "fit" / "log.jsonl", self.k)
        adapters.save(out, model, training=report)
        return {**report, "drafter": str(GatedLoRAMTP(adapter=str(out)))}

    def _features(self, model: PreTrainedModel, rows: TokenRows, kept: Path, seed: int) -> list[dict[str, Tensor]]:
        """Rows with the model's own endings, which a run that was stopped finds in the file `kept`."""
        ids, labels = rows.ids, rows.labels.clone()
        count, start = round(self.own * len(ids)), self.length // 4
        written = torch.full((len(ids),), self.length if count else 0)
        if count:
            about = {"of": f"{self} {seed} {rounded_hash(model)}"}
            ended = _read(kept, about)
            if ended is None or ended.shape != (count, self.length):
                ended = written_rows(model, ids[:count, :start], self.length)
                kept.parent.mkdir(parents=True, exist_ok=True)
                save_file({"ids": ended}, kept, metadata=about)
            ids = torch.cat([ended.clamp(min=0), ids[count:]])
            labels[:count, start:] = ended[:, start:]
            written[:count] = start
        return [{"input_ids": i, "labels": t, "written": w} for i, t, w in zip(ids, labels, written, strict=True)]


def written_rows(model: PreTrainedModel, prompts: Tensor, length: int) -> Tensor:
    """What a model writes greedily behind prompts `[rows, prompt]`, up to `length` tokens in all: ids `[rows, length]`,
    -100 behind an end of text."""
    found = torch.full((len(prompts), length), IGNORED)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for start in bar.track(range(0, len(prompts), _TOGETHER), description="the model writes"):
            part = prompts[start : start + _TOGETHER].to(model.device)
            generator: Any = model
            whole = generator.generate(
                part,
                attention_mask=torch.ones_like(part),
                max_new_tokens=length - part.shape[1],
                do_sample=False,
                num_beams=1,
                pad_token_id=_pad(model),
            )
            new = whole[:, part.shape[1] :]
            ends = torch.isin(new, torch.tensor(_ends(model), dtype=new.dtype, device=new.device))
            over = ends.long().cumsum(1) - ends.long() > 0
            found[start : start + len(part), : whole.shape[1]] = torch.cat(
                [part, new.masked_fill(over, IGNORED)], 1
            ).cpu()
    return found


def _ends(model: PreTrainedModel) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def _pad(model: PreTrainedModel) -> int:
    pad = model.generation_config.pad_token_id
    return next((number for number in (pad, *_ends(model)) if number is not None), 0)


def _read(path: Path, about: dict[str, str]) -> Tensor | None:
    if not path.is_file():
        return None
    with safe_open(str(path), "pt") as file:
        return file.get_tensor("ids") if file.metadata() == about else None


def _report(log: Path, k: int) -> dict[str, Any]:
    """Means over the last tenth of a run's log."""
    lines = [line for line in map(json.loads, log.read_text(encoding="utf-8").splitlines()) if "loss" in line]
    last = lines[-max(1, len(lines) // 10) :]

    def mean(name: str) -> float:
        return round(sum(line[name] for line in last) / len(last), 4)

    return {
        "loss": mean("loss"),
        "terms": {name: mean(f"term/{name}") for name in ("base", "sampler", "consistency")},
        "tokens_per_step": mean("metric/tokens_per_step"),
        "loss_by_mask": [mean(f"metric/loss_{j}") for j in range(1, k + 1)],
        "accuracy_by_mask": [mean(f"metric/accuracy_{j}") for j in range(1, k + 1)],
    }
