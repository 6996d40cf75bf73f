"""Several drafts of a completion from one pass: the model reads a mixture of their last tokens' embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.decoding.several import Several, SeveralDecoder, read
from tokenry.decoding.superposed.ngram import NgramTable, shared, width
from tokenry.errors import BadParameter, ResourceError
from tokenry.generation.engine import Commit, Session
from tokenry.generation.plain import plain_step
from tokenry.generation.result import Source
from tokenry.models import loaded_name, trained_folder

_UNSUPPORTED = -200.0  # what a draft pays where no kept token follows its text in the table
_LEAST = -1e30  # stands for -inf where a difference is taken


@dataclass
class _State:
    table: NgramTable | None
    done: bool = False


@dataclass
class Drafts:
    """Drafts in the making, `[batch, k]` of them, best first.

    Attributes:
        ids: `[batch, k, room]`.
        slots: Which draft each id was chosen behind, likewise; its scores are found by that.
        scores: Sum of the scores of a draft's tokens, float32 `[batch, k]`; -inf where there is no draft.
        nodes: State of the n-gram table behind each, `[batch, k, order]`, or None.
        ended, ended_slots: Drafts that have ended, as `ids` and `slots`.
        ended_scores: Their scores, -inf where there is none.
        ended_lengths: Their lengths, `[batch, k]`.
    """

    ids: Tensor
    slots: Tensor
    scores: Tensor
    nodes: Tensor | None
    ended: Tensor
    ended_slots: Tensor
    ended_scores: Tensor
    ended_lengths: Tensor

    @classmethod
    def none(cls, active: Tensor, k: int, room: int, nodes: Tensor | None) -> Drafts:
        """One empty draft for every active row, bool `[batch]`; `nodes` `[batch, order]`."""
        batch = len(active)
        ids = torch.zeros(batch, k, room, dtype=torch.long, device=active.device)
        scores = torch.full((batch, k), -torch.inf, device=active.device)
        ended_scores, ended_lengths = scores.clone(), torch.ones_like(ids[..., 0])
        scores[:, 0] = torch.where(active, 0.0, -torch.inf)
        nodes = None if nodes is None else nodes[:, None].expand(-1, k, -1)
        return cls(ids, ids.clone(), scores, nodes, ids.clone(), ids.clone(), ended_scores, ended_lengths)

    @property
    def going(self) -> Tensor:
        """Rows that have a draft to go on with, bool `[batch]`."""
        return (self.scores > -torch.inf).any(1)

    @property
    def weights(self) -> Tensor:
        """Share of each draft in the mixture, float32 `[batch, k]`."""
        return self.scores.clamp(min=_LEAST).softmax(-1)

    def best(self, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The k best of those going on, at a length, and those that have ended, by score a token: ids, slots, lengths
        and scores; length 0 where there is none."""
        lengths = torch.cat([torch.full_like(self.ended_lengths, length), self.ended_lengths], 1)
        scores = torch.cat([self.scores, self.ended_scores], 1)
        pick = (scores / lengths).topk(self.scores.shape[1], 1).indices
        ids, slots = torch.cat([self.ids, self.ended], 1), torch.cat([self.slots, self.ended_slots], 1)
        scores = scores.gather(1, pick)
        lengths = lengths.gather(1, pick).masked_fill(scores == -torch.inf, 0)
        return _drafts(ids, pick), _drafts(slots, pick), lengths, scores


@dataclass(frozen=True, kw_only=True)
class Superposed(SeveralDecoder):
    """Write k drafts in one pass: feed a mixture of their last tokens, and tell them apart by an n-gram table.

    Superposed Decoding, arXiv 2405.18400, section 3, with the constants of the authors' runs. Each step the model
    reads one token: the embeddings of the drafts' last tokens, weighted by the softmax of the drafts' scores. Of the
    distribution that comes out, the likeliest tokens are kept and mixed, for each draft by itself, with what follows
    its own last tokens in the table: `(1 - alpha) ln p + alpha ln g`. Of all drafts and tokens the k best go on. One
    that ends is kept aside; the best of both are returned, by score a token. They are short completions: the mixture
    stays close to the drafts for about ten tokens, and long ones need `reset`.

    A token that the table does not have behind a draft pays 200, and comes in only where the table has none of those
    kept, as in the paper, or where fewer than k others are left, so that there are always k drafts.

    A result has k rows for each prompt, laid out as `num_return_sequences` lays them out, best first;
    `stats.extra["scores"]` has the drafts' scores, which are no log-probabilities of the model. There is one row of
    cache a prompt; it is returned where k=1 alone. Logits processors see each draft's own text. The first token takes
    the table into account as well, as in the authors' code.

    Attributes:
        k: Drafts.
        alpha: Share of the table in a token's score; 0 needs no table.
        temperature: Divides the logits before their softmax. The paper has alpha and temperature 0.54 and 0.06 for
            three drafts of ten tokens, 0.62 and 0.06 for two, 0.54 and 0.12 for ten; 0.55 and 0.1 with n-grams of
            length 2 to 4, or behind 40 tokens.
        tokens: Likeliest tokens that are kept; none: 3k, as in the authors' code.
        weights: Of the relative frequencies behind the last 1, 2, ... tokens.
        table: Folder or file that `tokenry train ngram` wrote; none: where it writes for this model by default. The
            resource `table` hands over a loaded `NgramTable`.
        prefix: Tokens that plain decoding writes first: the paper's way to several prefixes by sampling.
        reset: After so many tokens the best draft, or where the call samples one by its weight, is read again token by
            token, and k fresh drafts start from it; none never.
    """

    resources: ClassVar[tuple[str, ...]] = ("table",)

    k: int = 3
    alpha: float = 0.54
    temperature: float = 0.06
    tokens: int | None = None
    weights: tuple[float, ...] = (0.01, 0.04, 0.15, 0.18, 0.12)
    table: str | None = None
    prefix: int = 0
    reset: int | None = None

    def validate(self) -> None:
        self.check("k", "at least 1", self.k >= 1)
        self.check("alpha", "at least 0 and below 1", 0 <= self.alpha < 1)
        self.check("temperature", "above 0", self.temperature > 0)
        least = 2 * self.k if self.k > 1 else 1
        self.check("tokens", f"none, or at least {least}", self.tokens is None or self.tokens >= least)
        positive = bool(self.weights) and all(weight >= 0 for weight in self.weights) and sum(self.weights) > 0
        self.check("weights", "0 or more, and not all 0", positive or self.alpha == 0)
        self.check("prefix", "at least 0", self.prefix >= 0)
        self.check("reset", "none, or at least 1", self.reset is None or self.reset >= 1)

    @property
    def single(self) -> bool:
        return self.k == 1

    def start(self, session: Session) -> _State:
        if session.do_sample and not self.prefix and not self.reset:
            raise BadParameter(
                f"{self.slug}: do_sample=True is not allowed, because drafts are chosen by their scores; say "
                "do_sample=False, or prefix=5 for five sampled tokens before the drafts"
            )
        if self.reset and session.policy is not None:
            raise BadParameter(
                f"{self.slug}: reset={self.reset} is not allowed inside {session.policy}, because what a cache policy "
                "has dropped does not come back; leave one of both out"
            )
        return _State(self._table(session) if self.alpha else None)

    def _table(self, session: Session) -> NgramTable:
        table = session.resources.get("table")
        if table is None:
            path = self.table or trained_folder("ngram", loaded_name(session.model))
            table = shared(path, session.device)
        if not isinstance(table, NgramTable):
            raise ResourceError(f"{self.slug}: the resource 'table' must be an NgramTable, not {type(table).__name__}")
        ids = width(session.model)
        if table.vocab != ids:
            raise ResourceError(
                f"{self.slug}: the n-gram table was counted over {table.vocab} ids and the model has {ids}; count one "
                "for this model with `tokenry train ngram`"
            )
        if len(self.weights) >= table.order:
            raise ResourceError(
                f"{self.slug}: {len(self.weights)} weights need n-grams of length {len(self.weights) + 1}, and the "
                f"table's go to {table.order}; give fewer weights, or count longer ones (`tokenry train ngram --order`)"
            )
        return table.to(session.device)

    def step(self, session: Session, state: _State) -> Commit:
        if state.done:
            # The call's criteria may hold for a draft and no longer when it is committed (one that counts its calls).
            session.halt(session.active)
            return Commit(session.anchor[:, None], torch.zeros_like(session.length))
        if max(session.lengths) - session.prompt_length < self.prefix:
            return plain_step(session)
        state.done = True
        return self._write(session, state.table)

    def _write(self, session: Session, table: NgramTable | None) -> Commit:
        place, start = Several.of(session), max(session.lengths)
        room = session.max_length - start
        logits = session.next_logits()
        drafts = Drafts.none(session.active, self.k, room, self._behind(session, table, start))
        held = session.cache.fork() if self.reset and self.k > 1 else None
        shares: list[Tensor] = []
        fresh = 0  # where the drafts last had one text
        going = session.active
        for column in range(room):
            scores = self._scores(session, drafts, logits, column)
            if session.want_logits:
                place.logits.append(logits[:, None].expand(-1, self.k, -1))
            if session.want_scores:
                place.scores.append(scores.expand(-1, self.k, -1))
            self._extend(session, place, table, drafts, scores, column)
            before, going = going, drafts.going
            if column + 1 == room or not bool(going.any()):
                break
            shares.append(drafts.weights)
            if held is not None and column + 1 - fresh == self.reset:
                session.cache = held
                logits = self._restart(session, drafts, fresh, column + 1, going)
                held, fresh = session.cache.fork(), column + 1
            else:
                mixture = mixed(session.model, drafts.ids[..., column], shares[-1])
                # A cache that is returned holds the end token of a row that ended before others.
                fed = before if self.single else going
                logits = read(session, fed[:, None], inputs_embeds=mixture)
        return self._finish(session, place, drafts, start, column + 1, shares)

    def _behind(self, session: Session, table: NgramTable | None, start: int) -> Tensor | None:
        """State of the table behind each row's text, `[batch, order]`."""
        if table is None:
            return None
        column = torch.arange(start, device=session.device)
        return table.start(session.ids[:, :start], column >= session.first[:, None])

    def _scores(self, session: Session, drafts: Drafts, logits: Tensor, column: int) -> Tensor:
        """Processed scores of the next token, `[batch, 1 or k, vocab]`."""
        if not session.processors or session.context_free or column == 0:
            return session.process(logits)[:, None]
        found = []
        for draft in range(self.k):
            for ahead in range(column):
                session.look_ahead(drafts.ids[:, draft, ahead], ahead)
            found.append(session.process(logits, column))
        return torch.stack(found, 1)

    def token_scores(
        self, scores: Tensor, table: NgramTable | None, nodes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tokens that are kept for each draft, what each adds to its score, and which of them come behind all
        others, for the table has none of them where it has others; all `[batch, 1 or k, kept]`."""
        best = scores.topk(min(self.tokens or 3 * self.k, scores.shape[-1]), -1)
        # The difference first: a small temperature would leave the range of float32.
        near = (best.values - best.values[..., :1].clamp(min=_LEAST)) / self.temperature
        own = near.log_softmax(-1).nan_to_num(nan=-torch.inf, neginf=-torch.inf).float()
        if table is None or nodes is None:
            return best.indices, own, None
        kept = best.indices.expand(-1, nodes.shape[1], -1)
        support = table.probabilities(nodes, kept, self.weights)
        own = (1 - self.alpha) * own
        both = torch.where(support > 0, own + self.alpha * support.log(), own + _UNSUPPORTED)
        return kept, both, (support == 0) & (support > 0).any(-1, keepdim=True)

    def _extend(
        self, session: Session, place: Several, table: NgramTable | None, drafts: Drafts, scores: Tensor, column: int
    ) -> None:
        """Let every draft go on with its best tokens, keep the k best, and set aside those that end."""
        kept, added, behind = self.token_scores(scores, table, drafts.nodes)
        total = (drafts.scores[..., None] + added).flatten(1)
        order = total if behind is None else _behind(total, behind.flatten(1))
        # So many that k remain if each end token closes k of them; a single draft that ends is the answer.
        count = 1 if self.k == 1 else self.k * (1 + max(1, len(place.ends)))
        order, pick = order.topk(min(count, total.shape[1]), 1)
        values = total.gather(1, pick)
        parents = pick // added.shape[-1]
        chosen = kept.expand(-1, self.k, -1).flatten(1).gather(1, pick)
        ids, slots = _drafts(drafts.ids, parents), _drafts(drafts.slots, parents)
        ids[..., column], slots[..., column] = chosen, parents
        ends = place.stopped(_texts(session, ids, column + 1, bool(len(place.criteria)))).view_as(values)
        self._set_aside(drafts, ids, slots, values.masked_fill(~ends, -torch.inf), column + 1)
        pick = order.masked_fill(ends, -torch.inf).topk(self.k, 1).indices
        drafts.scores = values.masked_fill(ends, -torch.inf).gather(1, pick)
        drafts.ids, drafts.slots = _drafts(ids, pick), _drafts(slots, pick)
        if table is not None and drafts.nodes is not None:
            before = _drafts(drafts.nodes, parents.gather(1, pick))
            drafts.nodes = table.advance(before, drafts.ids[..., column])

    def _set_aside(self, drafts: Drafts, ids: Tensor, slots: Tensor, scores: Tensor, length: int) -> None:
        """Keep the k best by score a token of the drafts that have ended, those of this step among them."""
        lengths = torch.cat([drafts.ended_lengths, torch.full_like(scores, length, dtype=torch.long)], 1)
        scores = torch.cat([drafts.ended_scores, scores], 1)
        pick = (scores / lengths).topk(self.k, 1).indices
        drafts.ended = _drafts(torch.cat([drafts.ended, ids], 1), pick)
        drafts.ended_slots = _drafts(torch.cat([drafts.ended_slots, slots], 1), pick)
        drafts.ended_scores, drafts.ended_lengths = scores.gather(1, pick), lengths.gather(1, pick)

    def _restart(self, session: Session, drafts: Drafts, begin: int, end: int, going: Tensor) -> Tensor:
        """Choose one draft of each row, go on from it alone, and read its tokens from `begin` to `end`: logits
        `[batch, vocab]`; the cache holds what came before."""
        pick = session.choose(drafts.scores.clamp(min=_LEAST), end)[:, None]
        drafts.ids, drafts.slots = (_drafts(own, pick).repeat(1, self.k, 1) for own in (drafts.ids, drafts.slots))
        drafts.scores = torch.nn.functional.pad(drafts.scores.gather(1, pick), (0, self.k - 1), value=-torch.inf)
        if drafts.nodes is not None:
            drafts.nodes = _drafts(drafts.nodes, pick).repeat(1, self.k, 1)
        return read(session, going[:, None].expand(-1, end - begin), input_ids=drafts.ids[:, 0, begin:end])

    def _finish(
        self, session: Session, place: Several, drafts: Drafts, start: int, length: int, shares: list[Tensor]
    ) -> Commit:
        """Leave the drafts for the result, and commit the best of each row."""
        ids, slots, lengths, scores = drafts.best(length)
        ids, slots = ids[..., :length], slots[..., :length]
        extra = session.stats.extra
        extra["scores"] = scores.tolist()
        extra["weights"] = torch.stack(shares, 1).tolist() if shares else []
        for name in ("logits", "scores"):
            steps = getattr(place, name)
            setattr(place, name, [_drafts(step, slots[..., column]) for column, step in enumerate(steps)])
        if not self.single:
            place.start, place.pad = start, session.pad
            place.tokens, place.counts = ids, lengths
        return Commit(
            ids[:, 0],
            lengths[:, 0],
            Source.PLAIN,
            logits=torch.stack([step[:, 0] for step in place.logits], 1) if session.want_logits else None,
            scores=torch.stack([step[:, 0] for step in place.scores], 1) if session.want_scores else None,
        )


def mixed(model: PreTrainedModel, tokens: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the input embeddings of tokens `[batch, k]`, `[batch, 1, embedding]`."""
    embedded: Tensor = model.get_input_embeddings()(tokens)
    # A sum in half precision would lose the drafts of little weight.
    precise = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
    return (weights[..., None].to(precise) * precise).sum(1, keepdim=True).to(embedded.dtype)


def _behind(scores: Tensor, behind: Tensor) -> Tensor:
    """Scores by which those that are `behind` come behind all others, in their own order."""
    precise = scores if scores.device.type == "mps" else scores.double()
    return torch.where(behind, precise - 1e6, precise)


def _drafts(values: Tensor, pick: Tensor) -> Tensor:
    """Drafts `[batch, m]` of `[batch, n, ...]`."""
    return values.gather(1, pick[..., None].expand(-1, -1, values.shape[-1]))


def _texts(session: Session, ids: Tensor, length: int, whole: bool) -> Tensor:
    """Texts of drafts `[batch, n, room]`, `[batch * n, columns]`; their last token alone unless `whole`."""
    own = ids[..., :length].flatten(0, 1)
    if not whole:
        return own[:, -1:]
    before = session.ids[:, : max(session.lengths)].repeat_interleave(ids.shape[1], 0)
    return torch.cat([before, own], 1)
