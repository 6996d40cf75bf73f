"""KeyDiff: keep the tokens whose keys are unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from tokenry.kvcache.engine import CachePolicy, TokenLayer, age_first


@dataclass(frozen=True, kw_only=True)
class KeyDiff(CachePolicy):
    """Keep the tokens whose keys differ most from the mean direction of all (KeyDiff, arXiv 2504.15364, section 3).

    A token's score is minus the cosine between its key, rotated as it is stored, and the mean of the normalised keys
    that are held. No query takes part, so what is kept does not depend on what is asked, and there are no statistics of
    the attention to pay for.

    Args:
        budget: Slots a layer and KV head after every forward, the newest included.
        recent: Newest tokens that always stay (none in the paper).
    """

    ordered: ClassVar[bool] = False

    recent: int = 0

    def validate(self) -> None:
        self.check("recent", "at least 0", self.recent >= 0)
        super().validate()

    def protected(self) -> int:
        return self.recent

    def score(self, layer: TokenLayer) -> Tensor:
        keys, _ = layer.held()
        directions = F.normalize(keys.float(), dim=-1)
        valid, _ = layer.slots.materialise(layer.cache.batch, layer.device)
        mean = (directions * valid[..., None]).sum(2, keepdim=True)
        score = -F.cosine_similarity(directions, mean, dim=-1).double()
        # Of two keys both are as far from their mean; rounding would choose, and differently behind drafts. The newer
        # of equal ones stays.
        score = (score * 2**16).round() + layer.slots.places(layer.cache.batch, layer.device) / 2**32
        return score.masked_fill(age_first(layer, self.recent), float("inf"))
