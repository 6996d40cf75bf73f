"""IceCache: pages of similar tokens are retrieved, found by an index that takes in what is generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenry.kvcache.engine import RetrievalPolicy, TokenLayer, members

_FAR = 2**40
_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class IceCache(RetrievalPolicy):
    """Attend to the pages of similar tokens that hold those a query wants most (arXiv 2604.10539).

    Between the first pages of a text and its newest, keys are grouped by likeness and not by place: some of them, about
    the square root of their number and evenly spread, are centres of cells, every key belongs to the cell of its
    nearest centre, and a cell, sorted along one random direction, is cut into pages. Nearness is that of inner
    products: keys get one more coordinate that makes them all equally long. A step looks into the ``cells`` whose
    centres its queries want most, ranks their pages by the page's best token, and takes pages until the budget is full;
    the last may be cut. The query heads of a KV head take turns: the first page of each, the second of each, and so on.

    When a page of the newest tokens is full, the oldest page of the window joins the index: its tokens go into the
    pages they belong to, and a page that overflows is split in two. Drafts are verified at most up to there, and are
    never in the index themselves. After a prompt, a part of one, a further turn or tokens taken back the index is made
    anew by the next step. These two levels stand for the authors' tree of several; with ``offload`` the index and the
    keys that it is made of are searched on the CPU, as theirs are.

    Args:
        budget: Slots that a decode step attends to in each layer and KV head, first and newest pages included (the
            paper: 256), as a count, or below 1 as a share of the real tokens of each row's prompt.
        page: Tokens of a page.
        sink_pages: First pages of the text, always attended to.
        window_pages: Newest pages, always attended to; the last of them fills up.
        dense_layers: First layers that attend to everything.
        search: ``"cells"``: the cells whose centres promise most; ``"exact"``: all pages.
        cells: Cells that a step looks into, and more where these hold less than the budget (the authors: at least 30).
        reuse: Layers in a row that attend to what the first of them chose, and have no index of their own.
    """

    page: int = 16
    sink_pages: int = 2
    window_pages: int = 2
    dense_layers: int = 2
    search: Literal["cells", "exact"] = "cells"
    cells: int = 30
    reuse: int = 1

    def validate(self) -> None:
        for name, least in (("page", 1), ("sink_pages", 0), ("window_pages", 1), ("dense_layers", 0), ("cells", 1),
                            ("reuse", 1)):  # fmt: skip
            self.check(name, f"at least {least}", getattr(self, name) >= least)
        super().validate()

    def least(self) -> int:
        return (self.sink_pages + self.window_pages) * self.page + 1

    @property
    def stops(self) -> tuple[int, ...]:
        return (self.page, *super().stops)

    # The index -------------------------------------------------------------------------------------------------------
    def index(self, layer: TokenLayer, keys: Tensor) -> dict[str, Tensor]:
        if not layer.will_retrieve(keys.shape[2]):
            layer.state = {}
        return {}

    def cropped(self, layer: TokenLayer) -> None:
        layer.state = {}

    def settled(self, layer: TokenLayer) -> None:
        state = layer.state
        if "pages" not in state:
            return
        covered = int(state["covered"][0])
        take = layer.size - covered
        if take:
            valid, places = layer.slots.materialise(layer.shape[0], layer.device)
            at = places[:, 0, covered:].masked_fill(~valid[:, 0, covered:], -1).to(layer.home)
            slots = torch.arange(covered, layer.size, device=layer.home).expand(at.shape[0], -1)
            state["near"] = torch.cat([state["near"], slots], -1)
            state["near_at"] = torch.cat([state["near_at"], at], -1)
            state["covered"] = state["covered"] + take
        while bool((due := state["until"] < self._until(layer)).any()):
            self._insert(layer, due)

    def _until(self, layer: TokenLayer) -> Tensor:
        """The positions before which tokens are in the index, where they are not among the first, ``[batch]``."""
        pages = layer.cache.seen.to(layer.home) // self.page - (self.window_pages - 1)
        return (pages * self.page).clamp(min=self.sink_pages * self.page)

    def _build(self, layer: TokenLayer) -> None:
        """Make the index of all that was said."""
        (batch, heads), home = layer.shape, layer.home
        valid, places = (part[:, 0].to(home) for part in layer.slots.materialise(batch, layer.device))
        until = self._until(layer)
        inside = valid & (places >= self.sink_pages * self.page) & (places < until[:, None])
        slots, _, count = _listed(inside, places)
        near, near_at, _ = _listed(valid & ~inside, places)
        size = slots.shape[1]
        real = (torch.arange(size, device=home) < count[:, None])[:, None].expand(-1, heads, -1)
        keys = self._keys(layer, slots)
        norms = keys.square().sum(-1).masked_fill(~real, 0)
        reach = F.pad(norms, (0, 1)).amax(-1)
        lift = _lift(norms, reach)
        stride = count.float().sqrt().ceil().long().clamp(min=1)
        centres = (count + stride - 1) // stride
        cells = int(centres.max())
        at = (torch.arange(cells, device=home) * stride[:, None]).clamp(max=max(size - 1, 0))[:, None]
        middle = keys.gather(2, at[..., None].expand(-1, heads, -1, keys.shape[-1]))
        state = {
            "near": near, "near_at": near_at, "until": until, "reach": reach, "centres": middle, "count": centres,
            "norms": norms.gather(-1, at.expand(-1, heads, -1)), "covered": torch.full((batch,), layer.slots.size),
        }  # fmt: skip
        cell = torch.cat(
            [self._nearest(state, keys[:, :, start : start + _ROWS], lift[:, :, start : start + _ROWS])
             for start in range(0, size, _ROWS)] or [slots[:, None].expand(-1, heads, -1)], -1
        )  # fmt: skip
        # By cell, and within a cell along the direction; what a row lacks comes last.
        along = self._along(keys, lift).masked_fill(~real, float("inf"))
        order = along.argsort(dim=-1, stable=True)
        cell = cell.masked_fill(~real, cells)
        order = order.gather(-1, cell.gather(-1, order).argsort(dim=-1, stable=True))
        cell, along = cell.gather(-1, order), along.gather(-1, order)
        sizes = torch.zeros(batch, heads, cells + 1, dtype=torch.long, device=home)
        sizes = sizes.scatter_add(-1, cell, torch.ones_like(cell))
        leaves = (sizes + self.page - 1) // self.page
        leaves[..., -1] = 0
        rank = torch.arange(size, device=home) - (sizes.cumsum(-1) - sizes).gather(-1, cell)
        page = (leaves.cumsum(-1) - leaves).gather(-1, cell) + rank // self.page
        pages = int(leaves.sum(-1).max())
        page = page.masked_fill(cell == cells, pages)  # one more takes what a row lacks
        entry = torch.where(cell == cells, pages * self.page, page * self.page + rank % self.page)

        def table(fill: float, values: Tensor) -> Tensor:
            whole = values.new_full((batch, heads, (pages + 1) * self.page), fill)
            return whole.scatter(-1, entry, values)[..., : pages * self.page].unflatten(-1, (pages, self.page))

        whose = cell.new_full((batch, heads, pages + 1), -1).scatter(-1, page, cell)[..., :pages]
        slots = slots[:, None].expand(-1, heads, -1).gather(-1, order)
        layer.state = state | {"pages": table(-1, slots), "along": table(float("inf"), along), "cell": whose}

    def _insert(self, layer: TokenLayer, due: Tensor) -> None:
        """Put the next page of each row that is ``due``, bool ``[batch]``, into the index."""
        state, home = layer.state, layer.home
        near, near_at, until, count = (state[name] for name in ("near", "near_at", "until", "count"))
        joins = (near_at >= until[:, None]) & (near_at < (until + self.page)[:, None]) & due[:, None]
        slots = near.gather(1, joins.byte().argsort(dim=-1, descending=True, stable=True)[:, : self.page])
        stays = (near_at >= 0) & ~joins
        kept = stays.byte().argsort(dim=-1, descending=True, stable=True)[:, : int(stays.sum(-1).max())]
        state["near"], state["near_at"] = near.gather(1, kept), near_at.masked_fill(~stays, -1).gather(1, kept)
        keys = self._keys(layer, slots)
        new = slots.shape[1]
        norms = keys.square().sum(-1)
        reach = torch.where(due[:, None], torch.maximum(state["reach"], norms.amax(-1)), state["reach"])
        state["reach"], lift = reach, _lift(norms, reach)
        # There are as many centres as the root of the number of tokens: at times the first of a page becomes one.
        rises = due & (count * count < until + self.page - self.sink_pages * self.page)
        width = int((count + rises).max()) - state["norms"].shape[-1]
        state["centres"] = F.pad(state["centres"], (0, 0, 0, width))
        state["norms"] = F.pad(state["norms"], (0, width))
        fresh = ((torch.arange(state["norms"].shape[-1], device=home) == count[:, None]) & rises[:, None])[:, None]
        state["centres"] = torch.where(fresh[..., None], keys[:, :, :1], state["centres"])
        state["norms"] = torch.where(fresh, norms[..., :1], state["norms"])
        state["count"] = count + rises
        cell = self._nearest(state, keys, lift)
        cell[..., 0] = torch.where(rises[:, None], count[:, None], cell[..., 0])
        along = self._along(keys, lift)

        # A new cell starts with a page without tokens.
        used = (state["cell"] >= 0).sum(-1)  # [batch, heads]
        pages, reached, whose = (
            F.pad(state["pages"], (0, 0, 0, new + 1), value=-1),
            F.pad(state["along"], (0, 0, 0, new + 1), value=float("inf")),
            F.pad(state["cell"], (0, new + 1), value=-1),
        )
        first = (torch.arange(whose.shape[-1], device=home) == used[..., None]) & rises[:, None, None]
        whose = torch.where(first, count[:, None, None], whose)
        used = used + rises[:, None]
        # Of the pages of its cell a token goes to the last that begins before it, or to the first.
        low = reached[..., 0].masked_fill(pages[..., 0] < 0, torch.finfo(reached.dtype).min)[:, :, None]
        same_cell = whose[:, :, None] == cell[..., None]
        before = same_cell & (low <= along[..., None])
        target = torch.where(
            before.any(-1), low.masked_fill(~before, float("-inf")).argmax(-1),
            low.masked_fill(~same_cell, float("inf")).argmin(-1),
        )  # fmt: skip
        together = target[..., None] == target[:, :, None]
        leads = (together.byte().argmax(-1) == torch.arange(new, device=home)) & due[:, None, None]
        spread = target[..., None].expand(-1, -1, -1, self.page)
        merged = torch.cat([pages.gather(2, spread), torch.where(together, slots[:, None, None], -1)], -1)
        places = torch.cat([reached.gather(2, spread), torch.where(together, along[:, :, None], float("inf"))], -1)
        places, order = places.sort(dim=-1, stable=True)
        merged = merged.gather(-1, order)
        held = (merged >= 0).sum(-1)
        splits = leads & (held > self.page)
        left = torch.where(splits, (held + 1) // 2, held)
        column = torch.arange(self.page, device=home)
        none = whose.shape[-1] - 1  # the last page takes what is not to be written
        second = torch.where(splits, used[..., None] + splits.cumsum(-1) - 1, none)
        for index, start, stop in (
            (target.masked_fill(~leads, none), torch.zeros_like(left), left), (second, left, held)
        ):  # fmt: skip
            entry = start[..., None] + column
            inside = entry < stop[..., None]
            entry = entry.clamp(max=merged.shape[-1] - 1)
            into = index[..., None].expand(-1, -1, -1, self.page)
            pages = pages.scatter(2, into, merged.gather(-1, entry).masked_fill(~inside, -1))
            reached = reached.scatter(2, into, places.gather(-1, entry).masked_fill(~inside, float("inf")))
        whose = whose.scatter(-1, second, cell)
        size = int((used + splits.sum(-1)).max())
        state["pages"], state["along"], state["cell"] = pages[:, :, :size], reached[:, :, :size], whose[..., :size]
        state["until"] = until + due * self.page

    def _keys(self, layer: TokenLayer, slots: Tensor) -> Tensor:
        """Keys of slots ``[batch, tokens]``, ``[batch, kv_heads, tokens, head_dim]``."""
        keys = layer.keys_at(slots[:, None, None].expand(-1, layer.shape[1], -1, -1))[:, :, 0]
        return keys.to(torch.promote_types(keys.dtype, torch.float32))

    def _nearest(self, state: dict[str, Tensor], keys: Tensor, lift: Tensor) -> Tensor:
        """The cell of each key, ``[batch, kv_heads, keys]``: where lengths are equal, of the largest product."""
        centres = state["centres"]
        product = keys @ centres.transpose(-1, -2)
        product = product + lift[..., None] * _lift(state["norms"], state["reach"])[:, :, None]
        absent = torch.arange(centres.shape[2], device=keys.device) >= state["count"][:, None]
        return product.masked_fill(absent[:, None, None], float("-inf")).argmax(-1)

    def _along(self, keys: Tensor, lift: Tensor) -> Tensor:
        """Where keys stand along one random direction of the lifted space."""
        direction = torch.randn(keys.shape[-1] + 1, generator=torch.Generator().manual_seed(0))
        direction = (direction / direction.norm()).to(keys.device, keys.dtype)
        return keys @ direction[:-1] + lift * direction[-1]

    # Decoding --------------------------------------------------------------------------------------------------------
    def score(self, layer: TokenLayer, query: Tensor, visible: Tensor | None) -> Tensor:
        raise NotImplementedError("pages are scored, not tokens")

    def _leader(self, layer: TokenLayer) -> TokenLayer:
        """The layer whose choice this one attends to."""
        ruled = [each for each in layer.cache.layers if each.window is None and each.number >= self.dense_layers]
        place = ruled.index(layer)
        return ruled[place - place % self.reuse]

    def retrieve(self, layer: TokenLayer, query: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        if layer.number < self.dense_layers:
            return None
        leader = self._leader(layer)
        # Right behind the prompt, whether there is a choice yet or not: a row's pages do not depend on its neighbours.
        if leader is layer and "pages" not in layer.state:
            self._build(layer)
        if min(layer.budgets()) >= layer.size:
            return None
        if leader is layer:
            layer.state |= dict(zip(("chosen", "counts"), self._choose(layer, query), strict=True))
        return leader.state["chosen"], leader.state["counts"]

    def _choose(self, layer: TokenLayer, query: Tensor) -> tuple[Tensor, Tensor]:
        state, block, device = layer.state, layer.cache.forward_block, layer.device
        batch, heads = layer.shape
        rows = query.shape[2]
        # The first and the newest pages, the drafts that a row follows and the row itself.
        path = block.among(device).expand(batch, -1, -1)
        own = layer.size - rows + torch.arange(rows, device=device)
        near = torch.cat([state["near"].to(device), own.expand(batch, -1)], -1)
        near = near[:, None, None].expand(-1, heads, rows, -1)
        held = (state["near_at"] >= 0).to(device)[:, None].expand(-1, rows, -1)
        counts = torch.cat([held, path], -1)
        left = torch.tensor(layer.budgets(), device=device)[:, None] - counts.sum(-1)  # [batch, rows]
        counts = counts[:, None].expand(-1, heads, -1, -1)
        most = min(int(left.max()), layer.slots.size)
        if most < 1 or state["pages"].shape[2] == 0:
            return near, counts
        far, found = self._search(layer, query.to(layer.home), left.to(layer.home), most)
        return torch.cat([far.to(device), near], -1), torch.cat([found.to(device), counts], -1)

    def _search(self, layer: TokenLayer, query: Tensor, left: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """The tokens of the best pages, as many as are ``left`` ``[batch, rows]`` to each row and at most ``most``."""
        state, (batch, heads) = layer.state, layer.shape
        rows, dim = query.shape[2:]
        query = query.view(batch, heads, -1, rows, dim).to(state["centres"].dtype)
        seen = self._visited(state, query, left)  # [batch, kv_heads, 1 or rows, pages]
        looked = seen.any(2)
        pages = looked.byte().argsort(dim=-1, descending=True, stable=True)[..., : int(looked.sum(-1).max())]
        table = state["pages"].gather(2, pages[..., None].expand(-1, -1, -1, self.page))
        real, table = table >= 0, table.clamp(min=0).flatten(2)
        seen = seen.gather(-1, pages[:, :, None].expand(-1, -1, seen.shape[2], -1)).expand(-1, -1, rows, -1)
        keys = layer.keys_at(table[:, :, None])[:, :, 0].to(query.dtype)
        logits = (query.flatten(2, 3) @ keys.transpose(-1, -2)).view(batch, heads, -1, rows, *real.shape[2:])
        best = logits.masked_fill(~real[:, :, None, None], float("-inf")).amax(-1)
        order = interleaved(best.masked_fill(~seen[:, :, None], float("-inf")))
        starts = torch.arange(0, table.shape[-1], self.page, device=table.device).expand(batch, heads, -1)
        rank = torch.arange(most, device=table.device).expand(batch, heads, rows, -1)
        slots, found = members(table, starts, real.sum(-1)[:, :, None] * seen, order, rank)
        return slots, found & (rank < left[:, None, :, None])

    def _visited(self, state: dict[str, Tensor], query: Tensor, left: Tensor) -> Tensor:
        """Which pages each row looks into, bool ``[batch, kv_heads, 1 or rows, pages]``."""
        cell = state["cell"][:, :, None]
        centres = state["centres"]
        if self.search == "exact" or centres.shape[2] <= self.cells:
            return cell >= 0
        wanted = torch.einsum("bhgrd,bhcd->bhgrc", query, centres)
        absent = torch.arange(centres.shape[2], device=query.device) >= state["count"][:, None]
        order = interleaved(wanted.masked_fill(absent[:, None, None, None], float("-inf")))
        sizes = torch.zeros(centres.shape[:3], dtype=torch.long, device=query.device)
        sizes = sizes.scatter_add(-1, cell[:, :, 0].clamp(min=0), (state["pages"] >= 0).sum(-1))
        sizes = sizes[:, :, None].expand(-1, -1, order.shape[2], -1).gather(-1, order)
        ahead = sizes.cumsum(-1) - sizes
        opened = (torch.arange(order.shape[-1], device=query.device) < self.cells) | (ahead < left[:, None, :, None])
        opened = torch.zeros_like(opened).scatter(-1, order, opened)
        return opened.gather(-1, cell.clamp(min=0).expand(-1, -1, order.shape[2], -1)) & (cell >= 0)


def interleaved(score: Tensor) -> Tensor:
    """What the query heads of a KV head take in turn: the best of each, the second of each, and so on.

    Args:
        score: ``[batch, kv_heads, groups, rows, candidates]``; of equal ones the earlier comes first.

    Returns:
        The candidates in that order, ``[batch, kv_heads, rows, candidates]``.
    """
    groups = score.shape[2]
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    turn = rank * groups + torch.arange(groups, device=score.device)[:, None, None]
    return turn.amin(2).argsort(dim=-1)


def _lift(norms: Tensor, reach: Tensor) -> Tensor:
    """The further coordinate of keys of squared length ``norms``, which makes them all as long as the longest."""
    return (reach[..., None] - norms).clamp(min=0).sqrt()


def _listed(chosen: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slots that are ``chosen``, bool ``[batch, slots]``, in the order of time, their positions (negative behind a
    row's last), and how many each row has."""
    count = chosen.sum(-1)
    at, slots = places.masked_fill(~chosen, _FAR).sort(dim=-1, stable=True)
    most = int(count.max())
    at = at[:, :most]
    return slots[:, :most], at.masked_fill(at == _FAR, -1), count


__all__ = ["IceCache", "interleaved"]
