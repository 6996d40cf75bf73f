"""`tokenry train hamburger`: a copy of the model learns to read and write groups; and what it then does."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenry.errors import BadParameter
from tokenry.generation import generate
from tokenry.objectives import Context, Objective, Trainable, entropy, fit, log_probs, mixed, token_rows
from tokenry.objectives.losses import IGNORED
from tokenry.objectives.trainable import RUN
from tokenry.speculation.hamburger.decoding import Hamburger
from tokenry.speculation.hamburger.model import HamburgerModel, group_starts
from tokenry.workloads import Example

Batch = dict[str, Any]


class HamburgerObjective(Objective):
    """Next-token loss through the micro outputs, and the stop head's, on text that a frozen base has cut into groups.

    Each row of text is a prompt, one entry a token, and a response in groups; the group behind an entry is predicted
    from that entry. The first token of a group is the base's own prediction, the others the micro decoder's, with the
    true tokens before them. The last group of a row may be cut short by the row's end and is not predicted.

    Args:
        model: The model that is trained.
        teacher: The base as it was, whose entropies cut the text.
        entropy_low: As `low` of `group_starts`.
        entropy_ratio: As `ratio` of it.
        stop_weight: Factor of the stop head's loss.
        prompt: Shortest and longest prompt as shares of a row.
        end: Id behind which a group ends, or None.
    """

    def __init__(
        self,
        model: HamburgerModel,
        teacher: PreTrainedModel,
        *,
        entropy_low: float = 0.05,
        entropy_ratio: float = 0.3,
        stop_weight: float = 0.5,
        prompt: tuple[float, float] = (0.05, 0.5),
        end: int | None = None,
    ) -> None:
        self.model = model
        self.teacher = teacher.eval().requires_grad_(False)
        self.entropy_low, self.entropy_ratio = entropy_low, entropy_ratio
        self.stop_weight, self.prompt, self.end = stop_weight, prompt, end

    def modules(self, model: PreTrainedModel) -> Mapping[str, nn.Module]:
        return {"merger": self.model.merger, "micro": self.model.micro, "stop": self.model.stop}

    def prepare(self, window: list[Batch], ctx: Context) -> list[Batch]:
        found = []
        for number, batch in enumerate(window):
            ids = batch["input_ids"]
            rows, length = ids.shape
            shortest, longest = (max(1, round(share * length)) for share in self.prompt)
            prompt = torch.randint(shortest, longest + 1, (rows,), generator=ctx.generator(number)).to(ids.device)
            found.append(self.grouped(ids, batch["labels"], prompt))
        return found

    def grouped(self, ids: Tensor, labels: Tensor, prompt: Tensor) -> Batch:
        """Cut rows of ids `[batch, length]` behind prompts of so many tokens `[batch]`, by the teacher's entropies."""
        uncertain = F.pad(entropy(self.teacher(ids, use_cache=False).logits[:, :-1]), (1, 0))
        column = torch.arange(ids.shape[1], device=ids.device)
        cuts = column <= prompt[:, None]
        if self.end is not None:
            cuts = cuts | F.pad(ids[:, :-1] == self.end, (1, 0))
        starts = group_starts(uncertain, self.model.max_group, self.entropy_low, self.entropy_ratio, cuts)
        return self.arranged(ids, labels, starts, prompt)

    def arranged(self, ids: Tensor, labels: Tensor, starts: Tensor, prompt: Tensor) -> Batch:
        """Arrange rows by entries, of which `starts` `[batch, length]` says where they begin.

        Returns:
            `tokens` and `labels` of each entry `[batch, entries, max_group]`, its size `sizes` `[batch, entries]`, and
            which entries are predicted, `target`, bool `[batch, entries]`.
        """
        column = torch.arange(ids.shape[1], device=ids.device)
        entry = starts.cumsum(1) - 1
        sizes = torch.zeros(ids.shape[0], int(entry.max()) + 1, dtype=torch.long, device=ids.device)
        sizes.scatter_add_(1, entry, torch.ones_like(entry))
        begin = sizes.cumsum(1) - sizes
        place = entry * self.model.max_group + column - begin.gather(1, entry)
        shape = (sizes.shape[0], sizes.shape[1] * self.model.max_group)
        filled = [
            torch.full(shape, fill, device=ids.device).scatter_(1, place, values)
            for values, fill in ((ids, 0), (labels, IGNORED))
        ]
        number = torch.arange(sizes.shape[1], device=ids.device)
        target = (begin >= prompt[:, None]) & (sizes > 0) & (number < entry[:, -1:])
        tokens, kept = (values.view(*sizes.shape, -1) for values in filled)
        return {"tokens": tokens, "labels": kept, "sizes": sizes, "target": target}

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        target = batch["target"]
        return {"ce": (batch["labels"][target] != IGNORED).sum(), "stop": batch["sizes"][target].sum()}

    def weights(self, ctx: Context) -> Mapping[str, float]:
        return {"stop": self.stop_weight}

    def terms(
        self, model: PreTrainedModel, extra: nn.ModuleDict, batch: Batch, ctx: Context | None = None
    ) -> tuple[Mapping[str, Tensor], Any]:
        whole, target = self.model, batch["target"][:, 1:]
        features, first = self.read(batch)
        features, first = features[:, :-1][target], first[:, :-1][target]
        tokens, labels, sizes = (batch[name][:, 1:][target] for name in ("tokens", "labels", "sizes"))
        known = labels[:, 0] != IGNORED
        first_loss = -log_probs(first[known], labels[known, 0]).sum()
        stops = [(whole.stop(features[:, -1])[:, 0], sizes == 1)]
        micro_loss = first_loss.new_zeros(())
        many = sizes > 1
        if bool(many.any()):
            hidden, logits = self.roll_out(features[many], tokens[many])
            rest, real = labels[many, 1:], torch.arange(1, whole.max_group, device=sizes.device) < sizes[many, None]
            known = rest != IGNORED
            micro_loss = -log_probs(logits[known], rest[known]).sum()
            last = torch.arange(2, whole.max_group + 1, device=sizes.device) == sizes[many, None]
            stops.append((whole.stop(hidden)[..., 0][real], last[real]))
        raw, ends = (torch.cat(part) for part in zip(*stops, strict=True))
        stop_loss = F.binary_cross_entropy_with_logits(raw.float(), ends.float(), reduction="sum")
        outputs = (first_loss.detach(), micro_loss.detach(), sizes, labels, (raw > 0) == ends)
        return {"ce": first_loss + micro_loss, "stop": stop_loss}, outputs

    def metrics(self, batch: Batch, outputs: Any) -> Mapping[str, tuple[Tensor | float, Tensor | float]]:
        first, micro, sizes, labels, right = outputs
        known = (labels != IGNORED).sum(0)
        return {
            "first_token_loss": (first, known[0]),
            "micro_token_loss": (micro, known[1:].sum()),
            "stop_accuracy": (right.sum(), right.numel()),
            "tokens_per_group": (sizes.sum(), sizes.numel()),
        }

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features `[batch, entries, features, width]` and logits `[batch, entries, vocab]` behind each entry."""
        sizes, whole = batch["sizes"], self.model
        output = whole.base(
            inputs_embeds=whole.merged(batch["tokens"], sizes),
            # Without a mask, transformers would take positions that skip numbers for several texts in one row.
            attention_mask=(sizes > 0).long(),
            position_ids=sizes.cumsum(1) - 1,
            use_cache=False,
            output_hidden_states=True,
            return_dict=True,
        )
        return torch.stack([output.hidden_states[layer] for layer in whole.feature_layers], 2), output.logits

    def roll_out(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The micro decoder on groups of true tokens `[groups, max_group]`: hidden states `[groups, max_group - 1,
        width]` and logits for the second token on."""
        keep = self.model.max_group - 1
        embeddings = self.model.embed(tokens[:, :keep])
        return self.model.micro_step(torch.cat([features.to(embeddings.dtype), embeddings], 1), keep)


@dataclass(frozen=True, kw_only=True)
class HamburgerTrainer(Trainable):
    """Fine-tune a copy of the model and train the grafts, on text cut into groups by the model's own entropies.

    Losses, rule and group size are the paper's; sizes, rates and steps are for a model of some ten million parameters
    on a few cores. The paper trains 4 micro layers beside 16 of the base, at 1e-4 and the base at half of that, over
    an epoch of 8,192-token instruction data.

    Attributes:
        max_group: Most tokens of a group.
        features: Into how many parts the features divide the base's depth.
        micro_layers: Layers of the micro decoder.
        entropy_low: Nats below which a token joins the group before it.
        entropy_ratio: Share of the group's largest entropy below which it does.
        stop_weight: Factor of the stop head's loss.
        length: Tokens of a row.
        batch: Rows of a step.
        lr: Learning rate of the grafts.
        base_lr: The base's, as a multiple of it.
    """

    help: ClassVar[str] = "Train a model to read and write several tokens a step (HAMburger)."

    max_group: int = 4
    features: int = 4
    micro_layers: int = 2
    entropy_low: float = 0.05
    entropy_ratio: float = 0.3
    stop_weight: float = 0.5
    length: int = 256
    batch: int = 16
    lr: float = 1e-3
    base_lr: float = 0.2

    def validate(self) -> None:
        for name in ("features", "micro_layers", "batch"):
            self.check(name, "at least 1", getattr(self, name) >= 1)
        self.check("max_group", "at least 2", self.max_group >= 2)
        self.check("length", "at least 16", self.length >= 16)
        self.check("entropy_low", "at least 0", self.entropy_low >= 0)
        self.check("entropy_ratio", "from 0 to 1", 0 <= self.entropy_ratio <= 1)
        self.check("stop_weight", "above 0", self.stop_weight > 0, why="nothing else ends a group")
        for name in ("lr", "base_lr"):
            self.check(name, "above 0", getattr(self, name) > 0)

    def train(
        self, model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], out: Path, *, steps: int | None, seed: int
    ) -> dict[str, Any]:
        steps = 300 if steps is None else steps
        dtype, teacher = model.dtype, copy.deepcopy(model)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            whole = HamburgerModel(
                model, max_group=self.max_group, features=self.features, micro_layers=self.micro_layers
            )
        rows = token_rows(texts, tokenizer, self.length, seed, rows=steps * self.batch)
        objective = HamburgerObjective(
            whole, teacher, entropy_low=self.entropy_low, entropy_ratio=self.entropy_ratio,
            stop_weight=self.stop_weight, end=tokenizer.eos_token_id,
        )  # fmt: skip
        products = mixed("auto" if dtype in (torch.bfloat16, torch.float16) else "float32", model.device)
        fit(
            model, objective, rows, out / RUN, steps=steps, lr=self.lr, batch=self.batch, seed=seed,
            warmup=steps // 20, schedule="cosine", groups={"model.": self.base_lr}, dtype=products, settings=str(self),
        )  # fmt: skip
        log = [json.loads(line) for line in (out / RUN / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        # A run that was complete already has no line of its own beyond those of its steps.
        last: dict[str, Any] = next((line for line in reversed(log) if "term/ce" in line), {})
        whole.to(dtype).eval()
        whole.save(out, tokenizer)
        grafts = sum(whole.state_dict()[name].numel() for name in whole._graft_names())
        named = {name.partition("/")[2]: value for name, value in last.items() if "/" in name}
        return {"trained_steps": steps, "tokens": steps * self.batch * self.length, "graft_parameters": grafts, **named}


def report(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    weights: str | None = None,
    confidences: Sequence[float] = (1.0, 0.9, 0.8, 0.7, 0.6),
    max_new_tokens: int = 64,
    resources: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Measure, greedily and prompt by prompt, what each confidence gains and costs.

    Args:
        model: The model that the weights were trained from.
        examples: Prompts, scored where they have an answer.
        weights: As of :class:`Hamburger`.
        confidences: The first is what the others' output is compared with; 1 is the fine-tuned base itself.
        max_new_tokens: Most tokens a prompt.

    Returns:
        For each confidence, as JSON: `tokens_per_macro_step`, `kv_entries_per_token` (new entries of the cache, the
        last group counted as if it were in), `score` (mean of the answers' checks, None without answers), `agreement`
        (mean share of the tokens before the first that differs), `tokens_per_second`, and `groups` of 1, 2, ... tokens.
    """
    if not examples:
        raise BadParameter("report needs at least one example; give prompts")
    found: list[dict[str, Any]] = []
    reference: list[list[int]] = []
    for confidence in confidences:
        method = Hamburger(weights=weights, confidence=confidence)
        outputs: list[list[int]] = []
        scores: list[float] = []
        groups: list[int] = []
        seconds = 0.0
        for example in examples:
            result = generate(
                model, tokenizer, example.prompt, method=method, resources=resources, max_new_tokens=max_new_tokens,
                do_sample=False,
            )  # fmt: skip
            assert result.stats is not None
            outputs.append(result.new_tokens[0])
            seconds += result.stats.seconds
            counted = result.stats.extra["groups"]
            groups = [a + b for a, b in zip(groups, counted, strict=True)] if groups else counted
            if example.answer:
                scores.append(example.check(result.text()))
        reference = reference or outputs
        shares = [_leading(a, b) for a, b in zip(reference, outputs, strict=True)]
        tokens = sum(map(len, outputs))
        found.append(
            {
                "confidence": confidence,
                "tokens_per_macro_step": tokens / max(1, sum(groups)),
                "kv_entries_per_token": sum(groups) / max(1, tokens),
                "score": sum(scores) / len(scores) if scores else None,
                "agreement": sum(shares) / len(shares),
                "tokens_per_second": tokens / seconds if seconds else 0.0,
                "groups": groups,
            }
        )
    return found


def _leading(expected: list[int], got: list[int]) -> float:
    """Share of the longer of two outputs that stands before their first difference."""
    pairs = zip(expected, got, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(got)))
    return same / max(1, len(expected), len(got))
