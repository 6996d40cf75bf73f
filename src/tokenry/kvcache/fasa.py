"""FASA: a few rotary frequency planes of each head find the tokens that a step attends to."""

from __future__ import annotations

import json
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.errors import BadPrompt, ResourceError
from tokenry.kvcache.engine import AttentionRows, RetrievalPolicy, TokenLayer
from tokenry.models import TokenCache, anatomy, attached, context_length, loaded_name, planes
from tokenry.models.fingerprint import describe, is_described

_SAMPLE = 1024
_CHUNK = 8


@dataclass(frozen=True)
class FASAPlan:
    """How well each plane of each query head ranks tokens, measured once for a model.

    Attributes:
        agreement: Contextual agreement ``[layers, heads, planes]`` in [0, 1]: the share of a head's ``k`` largest
            logits that are also among the ``k`` largest of the plane alone, averaged over decode steps (section 3.2 of
            the paper).
        planes: Dimensions of each plane ``[planes, 2]``.
        model: What the plan was made for, the model's shape, positions and weights, as JSON; other models are refused.
    """

    agreement: Tensor
    planes: Tensor
    model: str

    @classmethod
    def calibrate(
        cls,
        model: PreTrainedModel,
        input_ids: Tensor,
        k: int = 256,
        steps: int = 64,
        layout: Literal["model", "adjacent"] = "model",
    ) -> FASAPlan:
        """Measure a model's planes on a text, and note whose they are.

        Args:
            model: The model.
            input_ids: ``[batch, length]`` without padding.
            k: Size of the compared sets (the official runs: the budget, else 1,024).
            steps: Last tokens of the text that count as decode steps.
            layout: ``"model"``: the planes that the model rotates; ``"adjacent"``: neighbouring dimensions whatever
                the model rotates, as the official code takes them.

        Raises:
            BadPrompt: The text is shorter than ``4 * k + steps``, where all planes agree by chance.
            UnsupportedModel: The model cannot run on Tokenry's attention.
        """
        if input_ids.shape[1] < 4 * k + steps:
            raise BadPrompt(
                f"{input_ids.shape[1]} tokens are too few to compare sets of {k} over {steps} steps: give at least "
                f"{4 * k + steps}, or a smaller k"
            )
        return cls(*cls._measured(model, input_ids, k, steps, layout), _made_for(model))

    @staticmethod
    def _measured(
        model: PreTrainedModel, input_ids: Tensor, k: int, steps: int, layout: str = "model"
    ) -> tuple[Tensor, Tensor]:
        """Agreement and planes."""
        parts = anatomy(model)
        dims = planes(model, parts.head_dim)
        if layout == "adjacent":
            dims = torch.arange(parts.head_dim).view(-1, 2)
        collector = _Calibration(k=k, steps=steps, planes=tuple(dims.flatten().tolist()))
        # Not in inference mode: the plan serves forwards outside it, too.
        with attached(model), torch.inference_mode(False), torch.no_grad():
            cache = TokenCache(model, collector)
            cache.beside = True
            model(input_ids.to(model.device).clone(), past_key_values=cache, use_cache=True)
        none = torch.zeros(1, parts.heads, len(dims), device=model.device)
        found = [layer.state.get("agreement", none).mean(0).float() for layer in cache.layers]
        return torch.stack(found).cpu(), dims

    def save(self, path: str | Path) -> None:
        """Write the plan to a safetensors file."""
        save_file({"agreement": self.agreement, "planes": self.planes}, path, {"model": self.model})

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> FASAPlan:
        """Read a plan of ``model``.

        Raises:
            ResourceError: There is no plan there, or it was made for a model of another shape or other weights.
        """
        try:
            with safe_open(path, "pt") as file:
                made_for = (file.metadata() or {}).get("model", "")
                plan = cls(file.get_tensor("agreement"), file.get_tensor("planes"), made_for)
        except (OSError, SafetensorError) as error:
            raise ResourceError(f"cannot read a plan at {path} ({error}): make one with FASAPlan.calibrate") from error
        try:
            facts = json.loads(made_for)
            weights = facts.pop("weights")
            right = is_described(weights, model)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ResourceError(
                f"the plan at {path} does not say what weights it was made for: make a new one with FASAPlan.calibrate"
            ) from error
        if facts != (own := json.loads(json.dumps(_shape(model), default=str))):
            raise ResourceError(f"the plan at {path} was made for {facts}, not for {own}: calibrate this model")
        if not right:
            raise ResourceError(
                f"the plan at {path} was made for {weights['class']} {weights['name']!r}, and this "
                f"{type(model).__name__} ({loaded_name(model)!r}) has other weights: calibrate this model"
            )
        return plan

    def dominant(self, share: float) -> Tensor:
        """The planes of largest agreement, ``[layers, heads, chosen]``, at least one of each head."""
        count = max(1, round(share * len(self.planes)))
        return self.agreement.topk(count, -1).indices.sort(-1).values


def _made_for(model: PreTrainedModel) -> str:
    return json.dumps(_shape(model) | {"weights": describe(model)}, sort_keys=True, default=str)


def _shape(model: PreTrainedModel) -> dict[str, Any]:
    """The shape and the positions that a plan depends on."""
    parts = anatomy(model)
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None)
    return {
        "type": config.model_type, "layers": len(parts.layers), "heads": parts.heads, "kv_heads": parts.kv_heads,
        "head_dim": parts.head_dim, "rope": rope,
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Calibration(RetrievalPolicy):
    """Attends to everything and compares planes with whole heads."""

    slug: ClassVar[str] = "fasa-calibration"
    needs_attention: ClassVar[bool] = True

    k: int
    steps: int
    planes: tuple[int, ...]

    def score(self, layer: TokenLayer, query: Tensor, visible: Tensor | None) -> Tensor:
        raise NotImplementedError

    def observe(self, layer: TokenLayer, rows: AttentionRows) -> None:
        wide = torch.promote_types(rows.query.dtype, torch.float32)
        keys = rows.key.repeat_interleave(rows.groups, 1).to(wide)
        batch, heads, slots, _ = keys.shape
        dims = torch.tensor(self.planes, device=keys.device).view(-1, 2)
        split = keys[..., dims]  # [batch, heads, slots, planes, 2]
        shared = torch.zeros(batch, heads, len(dims), dtype=wide, device=keys.device)
        for start in range(rows.count - self.steps, rows.count, _CHUNK):
            stop = min(start + _CHUNK, rows.count)
            query = rows.query[:, :, start:stop].to(wide)
            late = torch.arange(slots, device=keys.device) > torch.arange(start, stop, device=keys.device)[:, None]
            whole = (query @ keys.transpose(-1, -2)).masked_fill(late, float("-inf"))
            top = torch.zeros_like(whole, dtype=torch.bool).scatter_(-1, whole.topk(self.k, -1).indices, True)
            single = torch.einsum("bhrpc,bhspc->bhrps", query[..., dims], split)
            best = single.masked_fill(late[:, None], float("-inf")).topk(self.k, -1).indices
            hits = top[:, :, :, None].expand(-1, -1, -1, len(dims), -1).gather(-1, best)
            shared += hits.to(wide).mean(-1).sum(2)
        layer.state["agreement"] = shared / self.steps


@dataclass(frozen=True)
class _Selector:
    """Where the dominant dimensions of each layer are: those of any query head of a KV head, ``dims``
    ``[kv_heads, size]``, and which of them each query head uses, ``uses`` ``[heads, size]`` of 0 and 1."""

    dims: Tensor
    uses: Tensor


@dataclass(frozen=True, kw_only=True)
class FASA(RetrievalPolicy):
    """Attend to the tokens that a few frequency planes of each head select (arXiv 2602.03152, section 3).

    A plane is a pair of dimensions that rotary positions turn together; where a model has none, a pair of neighbouring
    dimensions. The logits of a head's dominant planes alone, which few dimensions of the keys give, rank all tokens,
    and the step attends to the first of them with all dimensions. Prompts attend to everything, so the first token
    takes as long as without.

    Args:
        budget: Slots that a decode step attends to in each layer and head (the paper's main runs: 256).
        plan: Path of a plan that ``FASAPlan.save`` wrote. Without one the model is calibrated when first used, on
            random tokens that repeat themselves, and the plan is kept in memory; a text like those to come may serve
            better.
        planes: Share of a head's planes that are dominant (the paper: a quarter).
        per: ``"query"``: every query head chooses tokens for itself, as in the official code; ``"kv"``: the query heads
            of a KV head share a choice, by the sum of their scores.
        recent: Newest tokens that are chosen in any case; none in the paper.
        dense_layers: First layers that attend to everything (the official code: 1).
    """

    resources: ClassVar[tuple[str, ...]] = ("plan",)

    plan: str = ""
    planes: float = 0.25
    per: Literal["query", "kv"] = "query"
    recent: int = 0
    dense_layers: int = 1

    def validate(self) -> None:
        self.check("planes", "above 0 and at most 1", 0 < self.planes <= 1)
        self.check("recent", "at least 0", self.recent >= 0)
        self.check("dense_layers", "at least 0", self.dense_layers >= 0)
        super().validate()

    def least(self) -> int:
        return self.recent + 1

    def prepare(self, model: PreTrainedModel) -> list[_Selector]:
        plan = FASAPlan.load(self.plan, model) if self.plan else _calibrated(model)
        groups = anatomy(model).heads // anatomy(model).kv_heads
        dims = plan.planes[plan.dominant(self.planes)].flatten(2)  # [layers, heads, dimensions]
        used = torch.zeros(*dims.shape[:2], plan.planes.numel(), dtype=torch.bool).scatter_(-1, dims, True)
        selectors = []
        for layer in used:
            any_head = layer.view(-1, groups, layer.shape[-1]).any(1)
            size = int(any_head.sum(-1).max())
            # KV heads whose heads agree more have fewer dimensions; unused ones fill up.
            chosen = any_head.byte().argsort(dim=-1, descending=True, stable=True)[:, :size]
            uses = layer.gather(-1, chosen.repeat_interleave(groups, 0))
            selectors.append(_Selector(chosen.to(model.device), uses.to(model.device, model.dtype)))
        return selectors

    def index(self, layer: TokenLayer, keys: Tensor) -> dict[str, Tensor]:
        if layer.number < self.dense_layers:
            return {}
        dims = layer.cache.prepared[layer.number].dims
        return {"dominant": keys.gather(-1, dims[None, :, None].expand(keys.shape[0], -1, keys.shape[2], -1))}

    def retrieve(self, layer: TokenLayer, query: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        return None if layer.number < self.dense_layers else super().retrieve(layer, query, visible)

    def score(self, layer: TokenLayer, query: Tensor, visible: Tensor | None) -> Tensor:
        selector: _Selector = layer.cache.prepared[layer.number]
        batch, heads, rows, _ = query.shape
        kv_heads, size = selector.dims.shape
        dims = selector.dims.repeat_interleave(heads // kv_heads, 0)
        small = query.gather(-1, dims[None, :, None].expand(batch, -1, rows, -1)) * selector.uses[:, None]
        packed = small.reshape(batch, kv_heads, -1, size)
        score = torch.matmul(packed, layer.indexed("dominant").transpose(-1, -2))
        score = score.to(torch.promote_types(score.dtype, torch.float32)).view(batch, heads, rows, -1)
        if self.per == "kv":
            score = score.view(batch, kv_heads, -1, rows, score.shape[-1]).sum(2)
        if self.recent:
            slots, own = layer.positions(layer.cache.forward_block)
            near = own[:, None, :, None] - slots[:, :, None] < self.recent
            score = score.masked_fill(near, float("inf"))
        return score


_plans: weakref.WeakKeyDictionary[PreTrainedModel, FASAPlan] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def _calibrated(model: PreTrainedModel) -> FASAPlan:
    """The plan of a model that brings none, made once."""
    with _lock:
        if model not in _plans:
            # Nobody saves it, so the weights need no hash.
            _plans[model] = FASAPlan(*FASAPlan._measured(model, **_sample(model)), "")
        return _plans[model]


def _sample(model: PreTrainedModel) -> dict[str, Any]:
    """Random tokens that repeat themselves once: what a retrieving head has to find is among them, in every language
    and vocabulary."""
    length = min(_SAMPLE, context_length(model) or _SAMPLE)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    half = torch.randint(vocabulary, (1, length // 2), generator=torch.Generator().manual_seed(0))
    return {"input_ids": torch.cat([half, half], 1), "k": length // 8, "steps": length // 8}


__all__ = ["FASA", "FASAPlan"]
