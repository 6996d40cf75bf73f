"""The vocabulary's keys: what a query is multiplied with, and which keys lie together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.decoding.in_context_navigation.asking import Answer
from tokenry.errors import BadParameter, UnsupportedModel
from tokenry.generation.auxiliary import listening
from tokenry.models.anatomy import text_config

_CHUNK = 2**25  # distances that are held at a time
_ITERATIONS = 100


@dataclass(frozen=True)
class Clusters:
    """Clusters of keys: of each id its own, -1 for ids left out, `[ids]`, and their centres `[clusters, hidden]`."""

    ids: Tensor
    centres: Tensor


class KeySpace:
    """Next-token logits as products of one query, the final hidden state, with fixed keys, the head's rows.

    Attributes:
        keys: Rows of the head, float32 or wider, `[ids, hidden]`.
        bias: `[ids]`, or None.
        cap: Bound of the logits where the model has a final soft cap, or None.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        head: Any = model.get_output_embeddings()
        if head is None or not isinstance(getattr(head, "weight", None), Tensor):
            raise UnsupportedModel(f"{type(model).__name__} has no head whose rows could be read as keys")
        self.model = model
        self.keys = _wide(head.weight.detach())
        bias = getattr(head, "bias", None)
        self.bias = None if bias is None else _wide(bias.detach())
        self.cap: float | None = getattr(text_config(model), "final_logit_softcapping", None)

    @torch.no_grad()
    def query(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The final hidden state behind prompts `[batch, length]`, padded on the left, `[batch, hidden]`."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        last = input_ids.shape[1] - 1
        with listening(self.model, slice(last, last + 1)) as heard:
            self.model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False)
        assert heard.hidden is not None
        return _wide(heard.hidden[:, -1])

    def logits(self, query: Tensor) -> Tensor:
        """Logits of queries `[batch, hidden]`, `[batch, ids]`."""
        logits = query.to(self.keys) @ self.keys.T
        if self.bias is not None:
            logits = logits + self.bias
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()

    def clusters(self, count: int, *, tokenizer: Any = None, seed: int = 0, normalise: bool = False) -> Clusters:
        """k-means of the keys by Euclidean distance; the paper takes 1,024 clusters for 128,256 ids.

        Args:
            count: Clusters.
            tokenizer: Where given, special ids and those that no token has are left out, which otherwise form clusters
                of their own.
            seed: Seed of the first centres, which k-means++ draws.
            normalise: Whether keys count by direction alone.
        """
        used = torch.ones(len(self.keys), dtype=torch.bool, device=self.keys.device)
        if tokenizer is not None:
            used[len(tokenizer) :] = False
            used[[number for number in tokenizer.all_special_ids if number < len(used)]] = False
        points = self.keys[used]
        if not 1 <= count <= len(points):
            raise BadParameter(f"count={count} is not allowed; it must be from 1 to the {len(points)} keys there are")
        if normalise:
            points = torch.nn.functional.normalize(points, dim=-1)
        numbers, centres = kmeans(points, count, seed)
        ids = torch.full((len(used),), -1, dtype=torch.long, device=points.device)
        ids[used] = numbers
        return Clusters(ids, centres)


def kmeans(points: Tensor, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from k-means++ centres: the cluster of each point `[n]` and the centres `[count, d]`."""
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(points), (1,), generator=generator))
    centres = [points[first]]
    nearest = (points - centres[0]).square().sum(-1)
    for _ in range(count - 1):
        # Points are drawn in proportion to their squared distance from the centres there are.
        mass = nearest.double().cumsum(0).cpu()
        drawn = torch.rand((), generator=generator, dtype=torch.float64) * mass[-1]
        pick = int(torch.searchsorted(mass, drawn, right=True).clamp(max=len(points) - 1))
        centres.append(points[pick])
        nearest = torch.minimum(nearest, (points - centres[-1]).square().sum(-1))
    middle = torch.stack(centres)
    numbers, distances = _assigned(points, middle)
    for _ in range(_ITERATIONS):
        sums = torch.zeros_like(middle).index_add_(0, numbers, points)
        sizes = torch.bincount(numbers, minlength=count)
        middle = sums / sizes.clamp(min=1)[:, None]
        empty = (sizes == 0).nonzero()[:, 0]
        if len(empty):
            # An empty cluster begins anew at a point that is far from its centre.
            middle[empty] = points[distances.topk(len(empty)).indices]
        again, distances = _assigned(points, middle)
        if bool((again == numbers).all()):
            break
        numbers = again
    return numbers, middle


def _assigned(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each point and its squared distance, both `[n]`."""
    found = []
    for part in points.split(max(1, _CHUNK // len(centres))):
        found.append(torch.cdist(part, centres).square().min(1))
    return torch.cat([each.indices for each in found]), torch.cat([each.values for each in found])


def correlation(answers: Sequence[Answer], clusters: Clusters, *, main: int = 10) -> dict[str, Any]:
    """Whether middle ranks that lie near the top ones are less often right: the paper's diagnostic.

    The clusters of the `main` best-ranked first tokens are the main ones. All other answers fall into two groups, those
    whose first token lies in a main cluster and those outside.

    Args:
        answers: Judged answers of one ranking, as `navigate` gives them with a judge and a method of `navigate=False`.
        clusters: Clusters of the same model's keys.
        main: Ranks that make the main clusters.

    Returns:
        JSON: `top` (mean correctness of the main ranks), and for `in_cluster` and `out_of_cluster` the mean
        `correctness` and `rank` (None in an empty group), the `share` of the answers, and their `count`.
    """
    if any(answer.correct is None for answer in answers):
        raise BadParameter("the answers are not judged; give navigate a judge")
    if len({answer.rank for answer in answers}) < len(answers):
        raise BadParameter("the answers come from several rankings; say navigate=False in the method")
    if not 1 <= main < len(answers):
        raise BadParameter(f"main={main} is not allowed; it must be from 1 to {len(answers) - 1}, below the answers")
    ordered = sorted(answers, key=lambda answer: answer.rank)
    numbers = clusters.ids[torch.tensor([answer.first for answer in ordered], device=clusters.ids.device)].tolist()
    near = set(numbers[:main])
    groups: dict[str, list[Answer]] = {"in_cluster": [], "out_of_cluster": []}
    for answer, number in zip(ordered[main:], numbers[main:], strict=True):
        groups["in_cluster" if number in near else "out_of_cluster"].append(answer)
    rest = len(ordered) - main
    found: dict[str, Any] = {"top": fmean(bool(answer.correct) for answer in ordered[:main])}
    for name, group in groups.items():
        found[name] = {
            "correctness": fmean(bool(answer.correct) for answer in group) if group else None,
            "rank": fmean(answer.rank for answer in group) if group else None,
            "share": len(group) / rest,
            "count": len(group),
        }
    return found


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
