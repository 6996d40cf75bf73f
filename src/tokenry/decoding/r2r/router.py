"""The router: from what the small model has computed anyway to the chance that its token changes the path."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenry.errors import BadParameter, ResourceError
from tokenry.models.fingerprint import describe, is_described

WEIGHTS, ABOUT = "router.safetensors", "router.json"
_SCHEMA = 2
_QUANTILES = 200


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(self.dropout(F.gelu(self.up(self.norm(x))))))


class Router(nn.Module):
    """Predicts whether a small model's token diverges, as the authors' network does (R2R, arXiv 2505.21600).

    Its inputs are the hidden state that the small model's head reads, the input embedding of the token that it chose,
    and its largest raw logits, sorted. Of the small model nothing is kept.

    Args:
        hidden: Size of the hidden states.
        embedding: Size of the embeddings.
        width: Width of the residual blocks; 1024 in the paper, beside a small model of 1536.
        blocks: Residual blocks.
        topk: Logits that are read.
        dropout: In the blocks, while training.

    Attributes:
        note: What `router.json` says: threshold, distribution of the scores, both models; empty before it is saved.
    """

    def __init__(
        self, hidden: int, embedding: int, *, width: int = 1024, blocks: int = 6, topk: int = 100, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.shape = {"hidden": hidden, "embedding": embedding, "width": width, "blocks": blocks, "topk": topk}
        self.topk = topk
        self.note: dict[str, Any] = {}
        self.logits = nn.Linear(topk, hidden)
        self.inputs, self.project = nn.Linear(2 * hidden + embedding, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(blocks))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, hidden: Tensor, embedded: Tensor, top: Tensor) -> Tensor:
        """Log-odds of divergence `[...]` from hidden states `[..., hidden]`, embeddings of the chosen tokens
        `[..., embedding]` and the largest logits `[..., topk]`, descending."""
        x = self.project(self.inputs(torch.cat([hidden, embedded, self.logits(top)], -1)))
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))[..., 0]

    @property
    def threshold(self) -> float:
        """The threshold that was chosen on held-out text; 0.5 before that."""
        return float(self.note.get("threshold", 0.5))

    def threshold_for(self, share: float, rule: str = "router") -> float:
        """The threshold from which a share of the held-out positions is routed, by the router's chances or by
        `rule="entropy"`.

        Raises:
            ResourceError: The router was never calibrated.
        """
        if "quantiles" not in self.note:
            raise ResourceError(
                "this router knows no scores of held-out text, so no threshold for a share: make one by "
                "tokenry train router, or give a threshold"
            )
        quantiles = self.note["quantiles"][rule]
        if share >= 1:
            return 0.0
        place = (1 - share) * (len(quantiles) - 1)
        low = min(int(place), len(quantiles) - 2)
        found = quantiles[low] + (place - low) * (quantiles[low + 1] - quantiles[low])
        # The largest score that was seen is a share of nothing.
        return float(found) if share > 0 else float("inf")

    def save(self, folder: str | Path, small: PreTrainedModel, large: PreTrainedModel, **about: Any) -> None:
        """Write `router.safetensors` and `router.json`, which remembers both models and what is given."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.detach().float().cpu().contiguous() for n, t in self.state_dict().items()}, folder / WEIGHTS)
        self.note = {
            "schema_version": _SCHEMA, "kind": "r2r-router", "shape": self.shape,
            "small": describe(small), "large": describe(large), **about,
        }  # fmt: skip
        (folder / ABOUT).write_text(json.dumps(self.note, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, small: PreTrainedModel, large: PreTrainedModel) -> Router:
        """Read a router between two models, in float32 on the small one's device; each folder is read once.

        Raises:
            ResourceError: There is none, or it was trained for another small or large model.
        """
        place = Path(folder).expanduser()
        try:
            note = json.loads((place / ABOUT).read_text(encoding="utf-8"))
            changed = (place / WEIGHTS).stat().st_mtime_ns
        except (OSError, ValueError) as error:
            raise ResourceError(
                f"no router in {str(folder)!r} ({error}); make one by tokenry train router, or route by "
                "r2r:rule=entropy"
            ) from error
        if note.get("kind") != "r2r-router" or note.get("schema_version") != _SCHEMA:
            raise ResourceError(
                f"{str(place / ABOUT)!r} does not describe a router of this version; make a new one by tokenry train "
                "router"
            )
        for role, model in (("small", small), ("large", large)):
            known = note[role]
            if not is_described(known, model):
                raise ResourceError(
                    f"the router in {str(place)!r} was trained for the {role} model {known['class']} "
                    f"{known['name']!r}, and the {role} model {type(model).__name__} ({str(model.name_or_path)!r}) has "
                    "other weights: train a router for this pair by tokenry train router --model LARGE --small SMALL"
                )
        key = (str(place.resolve()), changed, small.device)
        with _lock:
            if key not in _loaded:
                router = cls(**note["shape"])
                try:
                    router.load_state_dict(load_file(place / WEIGHTS))
                except (OSError, SafetensorError, RuntimeError) as error:
                    raise ResourceError(f"the router in {str(place)!r} does not load: {error}") from error
                router.note = note
                _loaded[key] = router.to(small.device).eval().requires_grad_(False)
                while len(_loaded) > _KEPT:
                    del _loaded[next(iter(_loaded))]
            return _loaded[key]


_KEPT = 4
_loaded: dict[tuple[str, int, torch.device], Router] = {}
_lock = threading.RLock()


# --- thresholds ---------------------------------------------------------------------------------


def quantiles(scores: Tensor) -> list[float]:
    """The scores `[n]` below which 0, 0.5, 1, ... 100 % of them lie."""
    places = torch.linspace(0, len(scores) - 1, _QUANTILES + 1, dtype=torch.float64)
    ordered = scores.double().sort().values
    low = places.floor().long()
    high = (low + 1).clamp(max=len(scores) - 1)
    return (ordered[low] + (places - low) * (ordered[high] - ordered[low])).tolist()


def threshold_for_recall(chances: Tensor, labels: Tensor, recall: float = 0.95) -> float:
    """Of 100 thresholds from 0.01 to 0.99 the one that routes least among those that route at least the share `recall`
    of the divergent positions; if there is none, the one of the highest recall (the authors' rule).

    Args:
        chances: Of divergence `[n]`.
        labels: 1 divergent, 0 not `[n]`.

    Raises:
        BadParameter: No position is divergent, so recall means nothing.
    """
    positive = labels == 1
    if not bool(positive.any()):
        raise BadParameter("no position is divergent, so no threshold can be chosen by recall; give more text")
    grid = torch.linspace(0.01, 0.99, 100, dtype=torch.float64)
    routed = chances.double()[None] >= grid[:, None]
    recalls = routed[:, positive].double().mean(1)
    rates = routed.double().mean(1)
    good = recalls >= min(recall, float(recalls.max()))
    # Of equal rates the highest threshold.
    rates = rates.masked_fill(~good, torch.inf)
    return float(grid[rates == rates.min()].max())


def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: how often a divergent position scores above one that is not, ties half."""
    positive = labels == 1
    count, other = int(positive.sum()), int((~positive).sum())
    if not count or not other:
        return float("nan")
    _, inverse, counts = scores.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * other))
