"""LazyLLM: later layers run for the prompt tokens that the next token attends to; the others wait until one does."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.errors import BadParameter
from tokenry.kvcache.engine import AttentionRows, SkippingPolicy, TokenLayer, marked
from tokenry.models import Rows, TokenCache, anatomy

# Where the paper prunes (figures 4 and 7), as shares of the layers: 30 % of them read everything, 10 % the least.
_DEPTHS = (0.3, 0.6, 0.9)


@dataclass(frozen=True, kw_only=True)
class LazyLLM(SkippingPolicy):
    """Compute a prompt token in a layer only when the next token needs it (arXiv 2407.14057, section 3).

    Behind some layers the tokens that the newest one attends to least, in the mean over the query heads of that layer
    (section 3.1), are left out: no later layer runs for them or attends to them in this step. Each step chooses anew.
    A token that stopped behind a layer waits there with its hidden state and goes on from it when a step wants it
    (section 3.2), so every token runs through every layer at most once. Such a token attends to what the step that
    wanted it has chosen, not to everything, and to nothing newer than itself.

    Nothing is dropped: a layer holds every token that it ran for. The hidden states that wait are counted among the
    cache's bytes; in models whose keys and values are few they can take more room than they save. A prompt's outputs
    are NaN where a token did not reach the last layer, its last one is not. A chunk of a prompt and a further turn are
    prompts, too. ``cache.computed_share()`` says how much of all tokens the layers have run for, ``reached`` how many
    of the prompt's came past each choice. Short, dense prompts lose more than long ones. Sliding-window layers behind
    a choice see of their windows what is chosen.

    Args:
        budget: Prompt tokens that the last layers attend to, as a count or a share of the prompt tokens so far; between
            the layers where tokens are left out equal shares go on. The paper's schedule leaves out 30 % three times.
        layers: Numbers of the layers behind which tokens are left out, counted from 0. Empty: behind 30, 60 and 90 % of
            the layers, as in the paper, or behind the nearest before that attends in full.
        rates: Share of the remaining tokens that goes on behind each of them, rounded up, in place of the budget, such
            as 0.75 and 0.25 in the paper's sweeps.
        revive: Whether tokens that wait may come back; otherwise the prompt's last token chooses once for all steps.
        prune_generated: Whether generated tokens may be left out, too; the paper does not say.
        compact_every: Choose anew only for every ``compact_every``-th token of a row; those between attend to what it
            chose. Drafters need it above 1.
    """

    budget: int | float = 0.343
    layers: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    revive: bool = True
    prune_generated: bool = False

    def validate(self) -> None:
        ascending = all(one < two for one, two in itertools.pairwise((-1, *self.layers)))
        self.check("layers", "numbers of layers in ascending order", ascending)
        self.check("rates", "shares above 0 and at most 1", all(0 < rate <= 1 for rate in self.rates))
        fitting = not self.rates or len(self.rates) == (len(self.layers) or len(_DEPTHS))
        self.check("rates", "one for each layer behind which tokens are left out", fitting)
        own = self.budget == type(self).budget
        self.check("rates", "none where a budget is given", own or not self.rates, why="rates take its place")
        super().validate()

    def prepare(self, model: PreTrainedModel) -> tuple[int, ...]:
        """The layers behind which tokens are left out."""
        windows = anatomy(model).windows
        full = [number for number, window in enumerate(windows[:-1]) if window is None]
        if not self.layers:
            wished = [int(depth * len(windows)) - 1 for depth in _DEPTHS]
            found = {next((n for n in reversed(full) if n <= wish), full[0]) for wish in wished} if full else set()
        else:
            found = set(self.layers)
        if not found or not found <= set(full) or len(found) != (len(self.rates) or len(found)):
            raise BadParameter(
                f"{self.slug}: layers={self.layers} with {len(self.rates)} rates is not allowed for this model; layers "
                f"must be among those of it that attend in full, without the last ({', '.join(map(str, full))})"
            )
        return tuple(sorted(found))

    def counts(self, length: int, stages: int) -> list[int]:
        """Prompt tokens that go on behind each of ``stages`` layers, of ``length``."""
        left, counts = length, []
        for stage in range(stages):
            if self.rates:
                left = min(left, math.ceil(self.rates[stage] * left - 1e-9))
            else:
                budget = self.budget if isinstance(self.budget, int) else self.slots(self.budget, length)
                share = min(1.0, budget / max(1, length)) ** ((stage + 1) / stages)
                left = min(left, math.ceil(length * share - 1e-9))
            counts.append(left)
        return counts

    def reached(self, cache: TokenCache) -> Tensor:
        """Share of each row's prompt tokens that ran behind each layer where some are left out, ``[stages, batch]``."""
        first = cache.layers[cache.prepared[0]]
        prompt = first.beside["prompt"]
        shares = []
        for number in cache.prepared:
            beside = cache.layers[number].beside
            waits = _table(beside.get("dead"), prompt)
            if self.revive:
                waits = torch.zeros_like(waits)
                if "waiting" in beside:
                    waiting = beside["waiting"]
                    waits = marked(waiting, waiting >= 0, prompt.shape[1])
            shares.append(1 - (waits & prompt).sum(-1) / prompt.sum(-1).clamp(min=1))
        return torch.stack(shares)

    def passes(self, layer: TokenLayer, rows: AttentionRows | None) -> Rows | None:
        cache = layer.cache
        if layer.number not in cache.prepared or rows is None:
            return None
        dead = self._dead(layer, rows)
        waiting = layer.beside.get("waiting")
        if not bool(dead.any()) and waiting is None:
            return None
        layer.lay("dead", dead)
        for later in cache.layers[layer.number + 1 :]:
            later.evicted = True
        if waiting is None:
            waiting = torch.empty(cache.batch, 0, dtype=torch.long, device=layer.device)
        return _chosen(layer, dead, waiting, self.revive)

    def _dead(self, layer: TokenLayer, rows: AttentionRows) -> Tensor:
        """The tokens that later layers do not see in this step, by position, bool ``[batch, length]``."""
        cache, stage = layer.cache, layer.cache.prepared.index(layer.number)
        block = cache.forward_block
        step = block.new == 1 or block.deferred
        places = torch.arange(cache.total + block.new, device=layer.device)
        before, after = cache.seen_before[:, None], cache.seen_after[:, None]
        if stage == 0:
            prompt = _table(layer.beside.get("prompt"), places.expand(cache.batch, -1)) & (places < before)
            layer.lay("prompt", prompt if step else prompt | ((places >= before) & (places < after)))
        prompt = cache.layers[cache.prepared[0]].beside["prompt"]
        old = _table(layer.beside.get("dead"), prompt)
        gone = torch.zeros_like(old) if cache.rows is None else _table(cache.rows.block.dead, prompt)
        due = cache.seen_before % self.compact_every == 0 if step else cache.seen_after > cache.seen_before
        if step and block.valid is not None:
            due = due & block.valid[:, 0]
        if step and not bool(due.any()):
            return old
        if self.prune_generated:
            prompt = places < (before if step else after)
        # The newest token is not judged; it is one of the prompt's where it ends the prompt.
        judged = prompt & (places != (before if step else after - 1)) & ~gone
        if not self.revive:
            judged = judged & ~old
        score = self._attention(layer, rows, step, len(places)).masked_fill(~judged, float("-inf"))
        # Of equal ones the later go on.
        order = score.flip(-1).argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(-1, order, places.expand_as(order)).flip(-1)
        lengths = prompt.sum(-1).tolist()
        keep = [self.counts(length, len(cache.prepared))[stage] - (not step) for length in lengths]
        pruned = judged & (rank >= torch.tensor(keep, device=layer.device)[:, None])
        fresh = gone | pruned if self.revive else gone | pruned | old
        return torch.where(due[:, None], fresh, old)

    def _attention(self, layer: TokenLayer, rows: AttentionRows, step: bool, length: int) -> Tensor:
        """What the newest token gives to each token, by position, ``[batch, length]``."""
        cache = layer.cache
        newest = rows.count - 1
        if step:
            newest = 0 if cache.rows is None else cache.rows.block.before
        index = torch.full((cache.batch,), newest, device=layer.device)
        if not step and rows.valid is not None:
            index = (rows.valid * torch.arange(rows.count, device=layer.device)).amax(-1)
        score = rows.at(index).logits().softmax(-1).mean((1, 2))[:, 0]
        valid, positions = (part[:, 0] for part in layer.slots.materialise(cache.batch, layer.device))
        # The drafts stand behind the slots.
        score = score[:, : positions.shape[1]]
        positions = torch.where(valid, positions, length)
        return score.new_zeros(cache.batch, length + 1).scatter_(1, positions, score)[:, :length]

    def hand_on(self, layer: TokenLayer, rows: Rows, tensors: list[Tensor]) -> list[Tensor]:
        assert isinstance(rows, _Chosen)
        handed = []
        for number, tensor in enumerate(tensors):
            name = f"waiting{number}"
            if rows.fetched:
                tensor = torch.cat([layer.beside[name], tensor], 1)
            if rows.stays is not None:
                index = rows.stays.view(*rows.stays.shape, *[1] * (tensor.ndim - 2))
                layer.lay(name, tensor.gather(1, index.expand(-1, -1, *tensor.shape[2:])))
            handed.append(rows.taken(tensor))
        if rows.stays is not None:
            assert rows.waiting is not None
            layer.lay("waiting", rows.waiting)
        return handed


class _Chosen(Rows):
    """Rows that go on, of those that waited, ``fetched`` of them in each row of the batch, and those that ran; and
    those of them that wait from now on, ``stays`` ``[batch, waiting]``, with their positions, negative where there is
    none."""

    fetched: int = 0
    stays: Tensor | None = None
    waiting: Tensor | None = None


def _chosen(layer: TokenLayer, dead: Tensor, waiting: Tensor, revive: bool) -> _Chosen:
    """The rows behind ``layer`` that run for what is not dead.

    Args:
        dead: By position, bool ``[batch, length]``.
        waiting: Positions of the tokens that stopped behind this layer in earlier forwards, ``[batch, count]``.
    """
    cache = layer.cache
    block = cache.forward_block
    if cache.rows is None:
        positions = layer._new_positions(block).expand(cache.batch, -1)
        columns = torch.arange(block.new, device=layer.device).expand(cache.batch, -1)
        valid, before = block.valid, 0
    else:
        now = cache.rows.block
        assert now.positions is not None
        positions, columns, valid, before = now.positions, cache.rows.columns, now.valid, now.before
    real = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
    fetched = waiting.shape[1]
    positions = torch.cat([waiting, positions], 1)
    columns = torch.cat([torch.full_like(waiting, -1), columns], 1)
    real = torch.cat([waiting >= 0, real], 1)
    # Tokens of a step go on in any case, behind those that it wants.
    step = block.new == 1 or block.deferred
    free = fetched + before if step else positions.shape[1]
    alive = ~dead.gather(1, positions[:, :free].clamp(min=0))
    goes = real[:, :free] & alive
    most = int(goes.sum(-1).max()) if free else 0
    index = torch.where(goes, positions[:, :free], -1).argsort(dim=-1, stable=True)[:, free - most :]
    valid = goes.gather(1, index)
    if step:
        own = torch.arange(free, positions.shape[1], device=layer.device).expand(cache.batch, -1)
        index = torch.cat([index, own], 1)
        valid = torch.cat([valid, real[:, free:]], 1)
    columns = columns.gather(1, index)
    earlier = bool(((columns < 0) & valid).any())
    rows = _Chosen(
        index, columns, positions.gather(1, index), None if bool(valid.all()) else valid,
        relation=_related(block.relation, most), deferred=block.deferred, before=most if earlier else 0, dead=dead,
    )  # fmt: skip
    rows.fetched = fetched
    stays = real[:, :free] & ~alive
    if revive and bool(goes[:, :fetched].any() | stays[:, fetched:].any()):
        count = int(stays.sum(-1).max())
        rows.stays = stays.byte().argsort(dim=-1, descending=True, stable=True)[:, :count]
        rows.waiting = torch.where(stays, positions[:, :free], -1).gather(1, rows.stays)
    return rows


def _related(relation: Tensor | None, most: int) -> Tensor | None:
    """The relation of drafts behind ``most`` rows in causal order, which all of them see."""
    if relation is None or most == 0:
        return relation
    new = relation.shape[-1]
    above = torch.ones(most, most + new, dtype=torch.bool, device=relation.device).tril()
    below = F.pad(relation, (most, 0), value=True)
    return torch.cat([above.expand(below.shape[0], -1, -1), below], 1)


def _table(known: Tensor | None, like: Tensor) -> Tensor:
    """A table by position, bool ``[batch, length]``, as long as ``like``; False for what is not known."""
    if known is None:
        return torch.zeros_like(like, dtype=torch.bool)
    return F.pad(known, (0, like.shape[1] - known.shape[1]))


__all__ = ["LazyLLM"]
