"""Many answers to one prompt: first tokens from prompts that list what was found, the rest from the prompt itself."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from tokenry.decoding.several import Several, SeveralDecoder, read
from tokenry.errors import BadParameter, PromptTooLong, ResourceError
from tokenry.generation.engine import Commit, Session
from tokenry.generation.result import Source
from tokenry.models import context_length


@dataclass(frozen=True)
class Surfaces:
    """What ids look like as text.

    Attributes:
        alike: For each id the first id of the same text, `[ids]`.
        closed: Ids that no answer begins with: special ones, and those that no token has, bool `[ids]`.
        ends: Ids whose text holds the mark that ends an answer, bool `[ids]`.
    """

    alike: Tensor
    closed: Tensor
    ends: Tensor


@dataclass
class _State:
    tokenizer: Any
    done: bool = False


@dataclass
class _Round:
    """Answers of one round, `count` for each row.

    Attributes:
        firsts, ranks: First tokens and their places in the ranking that they come from, both `[batch, count]`.
        tokens, lengths: The answers, `[batch, count, m]` and `[batch, count]`.
        capped: For each row whether the list that it read had to be cut.
        logits, scores: For each of the m places `[batch * count, vocab]`, if the call wants them.
    """

    firsts: Tensor
    ranks: Tensor
    tokens: Tensor
    lengths: Tensor
    capped: list[bool]
    logits: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class InContextNavigation(SeveralDecoder):
    """Write many answers to a prompt, each from another first token, and list them in the prompt to find new ones.

    In-Context Navigation, arXiv 2410.02284, with the constants and texts of the authors' code. A round reads the prompt
    with a numbered list of all answers so far, takes the best-ranked first tokens whose text was not tried before, and
    decodes an answer from each, from the prompt without the list. The prompt is the instruction; `header`, the list
    and `cue` are read behind it, and are no part of what comes back.

    A result has `rounds * per_round` rows for each prompt, laid out as `num_return_sequences` lays them out, in the
    order in which they were found; `max_new_tokens` bounds each. `stats.extra["answers"]` has for each row of the
    batch the answers' text, first token, rank, round, and whether the list was capped: one that the model's context
    does not hold loses its oldest answers. First tokens are always the best-ranked; what follows is sampled where the
    call samples. Logits processors see the prompt and the answer.

    Attributes:
        rounds: Rounds; between two of them the list grows.
        per_round: Answers of a round.
        navigate: Whether answers are listed; otherwise all first tokens come from one ranking, the paper's baseline.
        original: Whether answers are decoded from the prompt without the list.
        pool: Best-ranked tokens that a first one may be among; none: all.
        header: Text between the prompt and the list.
        item: Text of an answer in the list, with `{answer}` and perhaps `{number}`.
        cue: Text that asks for the next answer, perhaps with `{number}`.
        end: Text that ends an answer; the token that holds it is the answer's last. Empty: none does.
    """

    rounds: int = 10
    per_round: int = 10
    navigate: bool = True
    original: bool = True
    pool: int | None = None
    header: str = "\n\nAnswer:\n"
    item: str = '{number}. "{answer}"\n'
    cue: str = '{number}. "'
    end: str = '"'

    def validate(self) -> None:
        self.check("rounds", "at least 1", self.rounds >= 1)
        self.check("per_round", "at least 1", self.per_round >= 1)
        self.check("pool", f"none, or at least {self.per_round}", self.pool is None or self.pool >= self.per_round)
        listed = self.navigate and self.rounds > 1
        self.check("item", "a text with {answer}", not listed or "{answer}" in self.item)

    @property
    def single(self) -> bool:
        return self.rounds * self.per_round == 1 and not self.header and not self.cue

    def start(self, session: Session) -> _State:
        # Without texts the ids are enough.
        worded = self.header or self.item or self.cue or self.end
        return _State(_tokenizer(session) if worded else None)

    def step(self, session: Session, state: _State) -> Commit:
        if state.done:
            # An answer that its mark has ended does not end the session's row.
            session.halt(session.active)
            return Commit(session.anchor[:, None], torch.zeros_like(session.length))
        state.done = True
        return self._write(session, state)

    def _write(self, session: Session, state: _State) -> Commit:
        logits = session.next_logits()
        surfaces = self._surfaces(session, state)
        base, opened, _ = self._asked(session, state, [[] for _ in range(session.batch)])
        logits = logits if opened is None else opened
        tried = surfaces.closed.expand(session.batch, -1).clone()
        found: list[list[dict[str, Any]]] = [[] for _ in range(session.batch)]
        rounds: list[_Round] = []
        for number in range(self.rounds):
            source, ranking, capped = base, logits, [False] * session.batch
            if number and self.navigate:
                listed = [[answer["text"] for answer in own] for own in found]
                source, behind, capped = self._asked(session, state, listed)
                assert behind is not None
                ranking = behind
            scores = session.process(ranking)
            firsts, ranks = self._firsts(scores, tried, surfaces.alike)
            branch, done = self._answers(session, base if self.original else source, firsts, surfaces.ends)
            done.ranks, done.capped = ranks, capped
            for name, first in (("logits", ranking), ("scores", scores)):
                if getattr(session, f"want_{name}"):
                    getattr(done, name).insert(0, first.repeat_interleave(self.per_round, 0))
            self._note(state, done, number, found)
            rounds.append(done)
        session.stats.extra["answers"] = found
        return self._finish(session, branch, rounds)

    def _asked(
        self, session: Session, state: _State, listed: list[list[str]]
    ) -> tuple[Session, Tensor | None, list[bool]]:
        """A branch that has read the prompt with a list for each row, the logits `[batch, vocab]` behind it (None where
        there is nothing to read), and which lists were cut."""
        branch = session.branch(torch.arange(session.batch, device=session.device))
        if not self.header and not self.cue and not any(listed):
            return branch, None, [False] * session.batch
        seen = branch.cache.seen.tolist()
        # An answer is decoded behind the list if it is not decoded from the prompt alone.
        after = session.max_length - session.prompt_length if not any(listed) or not self.original else 1
        texts, capped = [], []
        for row, answers in enumerate(listed):
            text, cut = self._fitting(state.tokenizer, answers, _room(session, seen[row], after))
            texts.append(text)
            capped.append(cut)
        width = max(map(len, texts))
        ids = torch.tensor([[session.pad] * (width - len(own)) + own for own in texts], device=session.device)
        lengths = torch.tensor([len(own) for own in texts], device=session.device)
        valid = torch.arange(width, device=session.device) >= width - lengths[:, None]
        return branch, read(branch, valid, input_ids=ids), capped

    def _fitting(self, tokenizer: Any, answers: list[str], room: float) -> tuple[list[int], bool]:
        """Ids of header, list and cue, the oldest answers left out where there is no room for them, and whether any
        are."""
        kept = answers
        while True:
            lines = [_filled(self.item, number, answer) for number, answer in enumerate(kept, 1)]
            text = self.header + "".join(lines) + _filled(self.cue, len(kept) + 1)
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if len(ids) <= room and ids:
                return ids, len(kept) < len(answers)
            if not kept:
                raise PromptTooLong(
                    f"{self.slug}: header and cue take {len(ids)} tokens behind the prompt and the model's context has "
                    f"{max(room, 0)} left beside an answer; shorten the prompt, or lower max_new_tokens"
                    if ids
                    else f"{self.slug}: the tokenizer makes no token of header and cue; leave both empty, or give text"
                )
            kept = kept[1:]

    def _surfaces(self, session: Session, state: _State) -> Surfaces:
        size = session.vocab
        if state.tokenizer is None:
            none = torch.zeros(size, dtype=torch.bool, device=session.device)
            return Surfaces(torch.arange(size, device=session.device), none, none)
        return surfaces(state.tokenizer, self.end, size, session.device)

    def _firsts(self, scores: Tensor, tried: Tensor, alike: Tensor) -> tuple[Tensor, Tensor]:
        """The best first tokens whose text was not tried, and their ranks, both `[batch, per_round]`; `tried`
        `[batch, vocab]` takes them in."""
        rest = scores.masked_fill(tried, -torch.inf)
        if self.pool is not None:
            least = scores.topk(min(self.pool, scores.shape[-1]), -1).values[:, -1:]
            rest = rest.masked_fill(scores < least, -torch.inf)
        firsts, ranks, values = [], [], []
        for _ in range(self.per_round):
            value, first = rest.max(-1)
            same = alike == alike[first][:, None]
            rest = rest.masked_fill(same, -torch.inf)
            tried |= same
            values.append(value)
            firsts.append(first)
            ranks.append((scores > value[:, None]).sum(-1) + 1)
        if bool((torch.stack(values) == -torch.inf).any()):
            raise BadParameter(
                f"{self.slug}: rounds={self.rounds} is not allowed; a prompt has fewer first tokens than "
                f"{self.rounds} rounds of {self.per_round} take: lower rounds, or raise pool"
            )
        return torch.stack(firsts, 1), torch.stack(ranks, 1)

    def _answers(self, session: Session, source: Session, firsts: Tensor, ends: Tensor) -> tuple[Session, _Round]:
        """Go on from each first token `[batch, count]` as plain decoding does, to the mark that ends an answer."""
        batch, count = firsts.shape
        rows = torch.arange(batch, device=firsts.device).repeat_interleave(count)
        branch = source.branch(rows)
        start = branch.length
        tokens = firsts.flatten()
        logits, scores = [], []
        while True:
            branch.accept(Commit(tokens[:, None], branch.active.long()))
            branch.halt(ends[tokens])
            if not branch.running:
                break
            behind = branch.next_logits()
            processed = branch.process(behind)
            tokens = branch.choose(processed)
            if session.want_logits:
                logits.append(behind)
            if session.want_scores:
                scores.append(processed)
        lengths = branch.length - start
        column = start[:, None] + torch.arange(int(lengths.max()), device=firsts.device)
        written = branch.ids.gather(1, column.clamp(max=branch.ids.shape[1] - 1))
        shape = (batch, count)
        return branch, _Round(firsts, firsts, written.view(*shape, -1), lengths.view(shape), [], logits, scores)

    def _note(self, state: _State, done: _Round, number: int, found: list[list[dict[str, Any]]]) -> None:
        lengths, firsts, ranks = done.lengths.tolist(), done.firsts.tolist(), done.ranks.tolist()
        for row, answers in enumerate(done.tokens.tolist()):
            for place, ids in enumerate(answers):
                text = ""
                if state.tokenizer is not None:
                    text = state.tokenizer.decode(ids[: lengths[row][place]], skip_special_tokens=True)
                found[row].append(
                    {
                        "text": text.partition(self.end)[0] if self.end else text,
                        "first": firsts[row][place],
                        "rank": ranks[row][place],
                        "round": number,
                        "capped": done.capped[row],
                    }
                )

    def _finish(self, session: Session, branch: Session, rounds: list[_Round]) -> Commit:
        longest = max(done.tokens.shape[2] for done in rounds)
        tokens = torch.cat([_padded(done.tokens, longest) for done in rounds], 1)
        lengths = torch.cat([done.lengths for done in rounds], 1)
        kept: dict[str, list[Tensor]] = {}
        for name in ("logits", "scores"):
            if getattr(session, f"want_{name}"):
                kept[name] = _joined([getattr(done, name) for done in rounds], session.batch, longest)
        if self.single:
            session.adopt(branch, torch.arange(session.batch, device=session.device))
            session.cache.compact()
        else:
            place = Several.of(session)
            place.start, place.pad = session.prompt_length, session.pad
            place.tokens, place.counts = tokens, lengths
            place.logits, place.scores = kept.get("logits", []), kept.get("scores", [])
        first = {name: torch.stack([step[:, 0] for step in steps], 1) for name, steps in kept.items()}
        return Commit(tokens[:, 0], lengths[:, 0], Source.PLAIN, **first)


def _padded(tokens: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, width - tokens.shape[-1]))


def _joined(rounds: list[list[Tensor]], batch: int, longest: int) -> list[Tensor]:
    """For each place of an answer `[batch, answers, vocab]`, from those of each round; zeros where one has ended."""
    whole = [steps + [torch.zeros_like(steps[0])] * (longest - len(steps)) for steps in rounds]
    places = zip(*(steps[:longest] for steps in whole), strict=True)
    return [torch.cat([step.view(batch, -1, step.shape[-1]) for step in place], 1) for place in places]


def _filled(text: str, number: int, answer: str = "") -> str:
    return text.replace("{number}", str(number)).replace("{answer}", answer)


def _room(session: Session, seen: int, after: int) -> float:
    """Tokens that the context has left between a prompt and what is decoded behind it."""
    context = context_length(session.model)
    return float("inf") if context is None else context - seen - after


def _tokenizer(session: Session) -> Any:
    tokenizer = session.resources.get("tokenizer")
    if tokenizer is not None:
        return tokenizer
    name = session.model.name_or_path or ""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ResourceError(
            f"in-context-navigation writes lists as text, and no tokenizer loads from {name!r}: use tokenry.generate"
        ) from error


_known: weakref.WeakKeyDictionary[Any, dict[tuple[str, int, torch.device], Surfaces]] = weakref.WeakKeyDictionary()


def surfaces(tokenizer: Any, end: str, size: int, device: torch.device) -> Surfaces:
    """The surfaces of a tokenizer's ids, for logits of a width."""
    known = _known.setdefault(tokenizer, {})
    if (end, size, device) not in known:
        count = min(len(tokenizer), size)
        texts = tokenizer.batch_decode([[number] for number in range(count)])
        first: dict[str, int] = {}
        alike = torch.arange(size)
        alike[:count] = torch.tensor([first.setdefault(text, number) for number, text in enumerate(texts)])
        closed = torch.arange(size) >= count
        closed[[number for number in tokenizer.all_special_ids if number < size]] = True
        ends = torch.zeros(size, dtype=torch.bool)
        if end:
            ends[:count] = torch.tensor([end in text for text in texts])
        known[end, size, device] = Surfaces(alike.to(device), closed.to(device), ends.to(device))
    return known[end, size, device]
