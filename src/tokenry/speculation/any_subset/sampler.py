"""Any-subset speculative decoding: fill masked places in parallel, with the joint law of filling them one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import PreTrainedModel

from tokenry.errors import BadParameter, BadPrompt
from tokenry.generation.infill import Canvas, Infiller, InfillResult
from tokenry.generation.result import NO_SOURCE, Source, Stats
from tokenry.sampling import probabilities
from tokenry.speculation.any_subset.scoring import Places, columns_where, levels_of, reader
from tokenry.speculation.engine import rejection


@dataclass(frozen=True, kw_only=True)
class AnySubset(Infiller):
    """Any-subset speculative decoding (ASSD, 2504.20456, algorithm 1).

    A round drafts the next `k` places at once, each given all that is known, then scores them under the order from left
    to right with the same model, and keeps the longest run that rejection sampling accepts. The first draft's law is
    the target's own, so it is always kept: a round of two calls fills at least two places, and calls never exceed
    tokens. With `k=1` drafts are final, which is sequential sampling.

    The tokens have the law of sequential sampling from left to right at this temperature, and are its tokens where the
    temperature is 0. Batches, texts of different lengths and different numbers of places are served. Two-stream
    decoders (`tokenry train any-order`) run in float32, bfloat16 and float16 on a cache of what they have read;
    XLNet runs in float32 and reads the whole text at every call.

    Args:
        k: Places drafted a round.
        temperature: Of drafts and target alike; 0 is greedy.
        drafter: `self`, or `bigram`: draft each token from what followed its left neighbour in the text known so far
            (from single tokens where it was never followed). It costs no model call; then the first draft can be
            rejected too.
    """

    k: int = 5
    temperature: float = 1.0
    drafter: Literal["self", "bigram"] = "self"

    def validate(self) -> None:
        self.check("k", "at least 1", self.k >= 1)
        self.check("temperature", "0 or more", 0 <= self.temperature < float("inf"))

    @torch.no_grad()
    def fill(self, model: PreTrainedModel, canvas: Canvas) -> InfillResult:
        run = _Run(self, model, canvas)
        while bool((run.left > 0).any()):
            run.round()
        run.stats.committed = int(canvas.masked.sum())
        run.stats.extra["calls"] = run.calls.tolist()
        run.stats.settle()
        return InfillResult(sequences=run.ids, sources=run.sources, stats=run.stats)  # type: ignore[arg-type]

    def law(self, logits: Tensor, mask_id: int) -> Tensor:
        """Probabilities of logits `[..., vocab]` at the temperature, none of it on the mask token."""
        logits = logits.clone()
        logits[..., mask_id] = -torch.inf
        if self.temperature == 0:
            return one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        return probabilities(logits / self.temperature)


class _Run:
    """One call: of row `b`, `done[b]` places are filled and `left[b]` are open; `fresh` is filled but not read yet."""

    def __init__(self, method: AnySubset, model: Any, canvas: Canvas) -> None:
        self.method, self.canvas = method, canvas
        self.reader = reader(model, canvas)
        self.vocab = model.get_output_embeddings().weight.shape[0]
        self.ids = canvas.ids.clone()
        self.levels = levels_of(canvas)
        self.places = columns_where(canvas.masked)
        self.left = canvas.masked.sum(1)
        self.done = torch.zeros_like(self.left)
        self.calls = torch.zeros_like(self.left)
        self.sources = torch.full_like(self.ids, NO_SOURCE, dtype=torch.int8)
        given = columns_where(self.levels == 0)
        self.fresh = Places(given, torch.zeros_like(given))
        self.host_positions = canvas.positions.tolist()
        self.stats = Stats()

    def round(self) -> None:
        method, self_drafted = self.method, self.method.drafter == "self"
        width = min(method.k, int(self.left.max()))
        ahead = torch.arange(width, device=self.ids.device)
        levels = self.done[:, None] + 1 + ahead
        real = ahead < self.left[:, None]
        columns = self.places.gather(1, (levels - 1).clamp(max=self.places.shape[1] - 1)).masked_fill(~real, -1)
        block = Places(columns, levels)
        if self_drafted:
            q = self._law(Places(columns, (self.done[:, None] + 1).expand_as(levels)), self.left > 0)
            drafts = self._draw(q, block)
        else:
            q, drafts = self._bigrams(block)
        self.ids = block.put(self.ids, drafts)
        # Drafts of the model's own are verified from the second on; the first has the target's law already.
        verified = real.sum(1) > 1 if self_drafted else real[:, 0]
        p = None
        if bool(verified.any()):
            self.fresh = Places.joined([self.fresh, Places(columns[:, :-1], levels[:, :-1])])
            first = int(self_drafted)
            p = self._law(Places(columns[:, first:], levels[:, first:]), verified)
            p = torch.cat([q[:, :first], p], 1)
        self._accept(block, drafts, q, p, verified)

    def _law(self, asked: Places, served: Tensor) -> Tensor:
        """One call for the rows served, `[batch, asked, vocab]`."""
        logits = self.reader.read(self.ids, self.fresh, asked)
        self.fresh = Places(self.fresh.columns[:, :0], self.fresh.levels[:, :0])
        self.stats.forwards += 1
        self.stats.passes += int(served.sum())
        self.calls += served
        return self.method.law(logits, self.canvas.mask_id)

    def _accept(self, block: Places, drafts: Tensor, q: Tensor, p: Tensor | None, verified: Tensor) -> None:
        """Keep each row's drafts up to the first that is rejected, and replace that one."""
        host = zip(block.columns.tolist(), drafts.tolist(), verified.tolist(), strict=True)
        kept, gained = [], []
        for row, (columns, tokens, checked) in enumerate(host):
            columns = [column for column in columns if column >= 0]
            place = 0
            for column, token in zip(columns, tokens, strict=False):
                if checked and (place > 0 or self.method.drafter == "bigram"):
                    assert p is not None
                    (chance,), rest = rejection(p[row, place], q[row, place], [token])
                    position = self.host_positions[row][column]
                    if not self.canvas.noise.uniform(row, position, 1)[0] < chance:
                        self.ids[row, column] = self.canvas.noise.sample(rest[None], [row], [position], [1])[0]
                        break
                place += 1
            kept.append(place)
            gained.append(min(place + 1, len(columns)))
            self.sources[row, columns[:place]] = int(Source.DRAFT if checked else Source.PLAIN)
            self.sources[row, columns[place : gained[-1]]] = int(Source.BONUS)
            if checked:
                self.stats.steps += 1
                self.stats.drafted += len(columns)
                self.stats.accepted += place
                self.stats.verified += gained[-1]
        accepted = torch.tensor(kept, device=self.ids.device)
        gain = torch.tensor(gained, device=self.ids.device)
        if bool(verified.any()):
            self.stats.note_walk(block.real.sum(1)[verified], accepted[verified])
        # Known to the reader are the accepted drafts that it was given to read: all but a block's last.
        known = torch.where(verified, accepted.clamp(max=block.columns.shape[1] - 1), 0)
        self.reader.forget(self.done + known)
        unread = torch.arange(block.columns.shape[1], device=self.ids.device)
        unread = (unread >= known[:, None]) & (unread < gain[:, None])
        columns = block.columns.masked_fill(~unread, -1)
        # At most one place of a row is unread; it is moved to the front.
        order = columns.sort(1, descending=True).indices[:, : max(1, int(unread.sum(1).max()))]
        self.fresh = Places(columns.gather(1, order), block.levels.gather(1, order))
        self.done = self.done + gain
        self.left = self.left - gain

    # --- drafts ---------------------------------------------------------------------------------

    def _draw(self, law: Tensor, block: Places) -> Tensor:
        """A token for each real place from its law `[batch, n, vocab]`, `[batch, n]`."""
        real = block.real
        rows, places = real.nonzero(as_tuple=True)
        positions = block.take(self.canvas.positions)[rows, places]
        count = len(rows)
        tokens = self.canvas.noise.sample(law[rows, places], rows.tolist(), positions.tolist(), [0] * count)
        return torch.zeros_like(block.columns).masked_scatter(real, tokens)

    def _bigrams(self, block: Places) -> tuple[Tensor, Tensor]:
        """Laws `[batch, n, vocab]` and drafts `[batch, n]` from the pairs of neighbours that are known."""
        known = (self.levels <= self.done[:, None]).double()
        pairs = known[:, :-1] * known[:, 1:]
        laws, drafts, ids = [], [], self.ids
        for place in range(block.columns.shape[1]):
            here = Places(block.columns[:, place : place + 1], block.levels[:, place : place + 1])
            # Places are filled from left to right, so the left neighbour is known or was just drafted.
            before = ids.gather(1, (here.columns - 1).clamp(min=0))
            first = here.take(self.canvas.positions) == 0
            follows = pairs * (ids[:, :-1] == before) * ~first
            counts = known.new_zeros(len(ids), self.vocab).scatter_add_(1, ids[:, 1:], follows)
            single = torch.zeros_like(counts).scatter_add_(1, ids, known)
            every = torch.ones_like(counts)
            every[:, self.canvas.mask_id] = 0
            counts = torch.where(counts.sum(1, keepdim=True) > 0, counts, single)
            counts = torch.where(counts.sum(1, keepdim=True) > 0, counts, every)
            law = counts / counts.sum(1, keepdim=True)
            if self.method.temperature == 0:
                law = one_hot(law.argmax(-1), self.vocab).double()
            drafts.append(self._draw(law[:, None], here))
            laws.append(law)
            ids = here.put(ids, drafts[-1])
        return torch.stack(laws, 1), torch.cat(drafts, 1)


class AnySubsetSampler:
    """A model with a way to fill: samples and densities of masked places.

    Args:
        model: XLNet (`XLNetLMHeadModel`), or a decoder made any-subset by `tokenry train any-order`.
        k: Places drafted a round.
        temperature: 0 is greedy.
        drafter: `self` or `bigram`.
        mask_id: The mask token; by default the one that the model's configuration names. XLNet's is 6.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        k: int = 5,
        temperature: float = 1.0,
        drafter: Literal["self", "bigram"] = "self",
        mask_id: int | None = None,
    ) -> None:
        self.method = AnySubset(k=k, temperature=temperature, drafter=drafter)
        self.model = model
        if mask_id is None:
            mask_id = getattr(model.config, "mask_token_id", None)
        if mask_id is None:
            raise BadParameter(
                f"the configuration of {type(model).__name__} names no mask token: pass mask_id (XLNet's is 6)"
            )
        self.mask_id = int(mask_id)

    def fill(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, seed: int | torch.Generator | None = None
    ) -> tuple[Tensor, Stats]:
        """Fill the places that hold the mask token.

        Args:
            input_ids: `[batch, length]`; rows may differ in what is masked.
            attention_mask: `[batch, length]`, 0 under padding.
            seed: Sampling depends on it alone; a generator gives one, None takes it from torch's global generator.

        Returns:
            Ids `[batch, length]`, and counts: `passes` are model calls of all rows, `extra["calls"]` of each.

        Raises:
            BadPrompt: A row has nothing to fill.
            UnsupportedModel: The model is no any-subset model, or in a form that cannot be asked.
        """
        device = self.model.device
        mask = None if attention_mask is None else attention_mask.to(device)
        result = self.method.fill(self.model, Canvas.of(input_ids.to(device), mask, self.mask_id, seed))
        assert result.stats is not None and result.sequences is not None
        return result.sequences.to(input_ids.device), result.stats

    @torch.no_grad()
    def log_prob(self, input_ids: Tensor, visible: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Log-density `[batch]` in nats of the tokens that are not visible given those that are, by one call.

        It is the density of what `fill` samples at temperature 1.

        Args:
            input_ids: `[batch, length]`.
            visible: Which tokens are given, bool `[batch, length]`.
            attention_mask: `[batch, length]`, 0 under padding.

        Raises:
            BadPrompt: A token that is given or scored is the mask token, or a row has none to score.
            UnsupportedModel: As `fill`.
        """
        ids = input_ids.to(self.model.device)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        valid = mask.to(ids.device).bool()
        if visible.shape != ids.shape:
            raise BadPrompt(f"visible is {tuple(visible.shape)} and the ids are {tuple(ids.shape)}")
        if bool((valid & (ids == self.mask_id)).any()):
            raise BadPrompt(f"the mask token (id {self.mask_id}) has no density: give tokens, and hide by `visible`")
        hidden = valid & ~visible.to(ids.device)
        canvas = Canvas.of(ids.masked_fill(hidden, self.mask_id), valid, self.mask_id, 0)
        levels = levels_of(canvas)
        places = columns_where(hidden)
        asked = Places(places, Places(places, places).take(levels))
        content = columns_where(valid)
        logits = reader(self.model, canvas).read(ids, Places(content, Places(content, content).take(levels)), asked)
        logits[..., self.mask_id] = -torch.inf
        scores = logits.log_softmax(-1).gather(-1, asked.take(ids)[..., None])[..., 0]
        return scores.masked_fill(~asked.real, 0).sum(-1)
