"""Cautious Next Token Prediction: where the model hesitates, try several clauses and keep the surest."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.errors import BadParameter, ResourceError
from tokenry.generation.engine import Commit, Decoder, Session
from tokenry.generation.plain import plain_step
from tokenry.generation.result import Source
from tokenry.sampling import probabilities

MARKS = ".,\n?!:;)]}"
"""The marks that end a trial in the authors' code."""


@dataclass(frozen=True, kw_only=True)
class CNTP(Decoder):
    """Sample several short continuations where the entropy is high, commit the one of least perplexity.

    Cautious Next Token Prediction, arXiv 2507.03038, algorithm 1 with the constants of the authors' runs. Each trial
    runs to the first punctuation token or stop. Rows of a batch hesitate independently. It chooses among samples:
    ``tokenry.generate`` and the command line sample unless they are told otherwise. The trials of a greedy call would
    all be one text, so such a call decodes as plain does, and a warning says so.

    Args:
        entropy_low: Entropy in nats up to which one token is sampled as usual.
        entropy_high: Entropy in nats from which ``max_trials`` trials are run.
        min_trials: Trials at ``entropy_low``.
        max_trials: Trials at ``entropy_high``.
        rule: How trials grow in between: ``"released"`` is the authors' code (linear from ``min_trials``, rounded
            down), ``"paper"`` the printed formula (linear from 0, rounded down, at least 1). For comparison, as in the
            authors' ablation: ``"fixed"`` runs ``fixed_trials`` wherever ``"released"`` runs more than one,
            ``"inverted"`` turns its numbers round (``max_trials`` where the entropy is low).
        fixed_trials: Trials of the rule ``"fixed"``.
        distribution: What entropy and perplexity are taken on: ``"warped"`` is the distribution that tokens are drawn
            from, after temperature, top-p and all other processors; ``"raw"`` is the model's own, on which the
            thresholds mean something else.
        punctuation: Ids that end a trial, below the model's number of ids; or ``"surface"``: every id that spells only
            marks of ``.,?!:;)]}`` and spaces, or holds a line break; or ``"released"``: the first id of each mark
            encoded alone, as in the authors' code, which misses merged and word-initial forms.
    """

    sampled: ClassVar[bool] = True

    entropy_low: float = 0.01
    entropy_high: float = 1.5
    min_trials: int = 1
    max_trials: int = 10
    rule: Literal["released", "paper", "fixed", "inverted"] = "released"
    fixed_trials: int = 6
    distribution: Literal["warped", "raw"] = "warped"
    punctuation: Literal["surface", "released"] | tuple[int, ...] = "surface"

    def validate(self) -> None:
        self.check("entropy_low", "at least 0", self.entropy_low >= 0)
        self.check("entropy_high", "above entropy_low", self.entropy_high > self.entropy_low)
        self.check("min_trials", "at least 1", self.min_trials >= 1)
        self.check("max_trials", "at least min_trials", self.max_trials >= self.min_trials)
        self.check("fixed_trials", "at least 2", self.fixed_trials >= 2)
        known = isinstance(self.punctuation, str) or all(token >= 0 for token in self.punctuation)
        self.check("punctuation", "surface, released, or ids of at least 0", known)

    def trials(self, entropy: Tensor) -> Tensor:
        """Number of trials at each entropy in nats."""
        share = ((entropy - self.entropy_low) / (self.entropy_high - self.entropy_low)).clamp(0, 1)
        if self.rule == "paper":
            return (share * self.max_trials).floor().long().clamp(min=1)
        released = (self.min_trials + (self.max_trials - self.min_trials) * share).long()
        if self.rule == "fixed":
            return released.clamp(max=1).masked_fill(released > 1, self.fixed_trials)
        return self.max_trials + self.min_trials - released if self.rule == "inverted" else released

    def start(self, session: Session) -> Tensor:
        """Which ids end a trial, bool ``[ids]``."""
        session.stats.extra["segments"] = []
        marks = self.punctuation
        if isinstance(marks, tuple):
            _check_ids(session, marks)
        ids = marks if isinstance(marks, tuple) else _punctuation(session, marks)
        ends = torch.zeros(max(ids, default=0) + 1, dtype=torch.bool, device=session.device)
        ends[list(ids)] = True
        return ends

    def step(self, session: Session, state: Tensor) -> Commit:
        logits = session.next_logits()
        scores = session.process(logits)
        probs = probabilities(self._measured(logits, scores))
        # The authors' form of the entropy; 1e-10 keeps removed tokens finite.
        entropy = -(probs * (probs + 1e-10).log()).sum(-1)
        counts = self.trials(entropy).masked_fill(~session.active, 1).tolist()
        if max(counts) == 1 or not session.do_sample:
            return plain_step(session, logits, scores)
        return self._try(session, state, logits, scores, counts, entropy)

    def _measured(self, logits: Tensor, scores: Tensor) -> Tensor:
        """What entropy and perplexity are taken on."""
        return scores if self.distribution == "warped" else logits

    def _try(
        self, session: Session, ends: Tensor, logits: Tensor, scores: Tensor, counts: list[int], entropy: Tensor
    ) -> Commit:
        rows = torch.arange(session.batch, device=session.device)
        rows = rows.repeat_interleave(torch.tensor(counts, device=session.device))
        single = torch.tensor([counts[row] == 1 for row in rows.tolist()], device=session.device)
        branch = session.branch(rows)
        start = branch.length
        # Rows that do not hesitate sample as themselves, whatever their neighbours do.
        own = session.choose(scores)[rows] if bool(single.any()) else None
        scores, logits = scores[rows], logits[rows]
        surprise = torch.zeros(len(rows), dtype=_precision(scores), device=session.device)
        records: list[tuple[Tensor, Tensor]] = []
        while True:
            # All first tokens come from the same distribution; no forward is needed for them.
            tokens = branch.choose(scores)
            if own is not None:
                tokens, own = torch.where(single, own, tokens), None
            chosen = self._measured(logits, scores).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            surprise = surprise - chosen.to(surprise.dtype).masked_fill(~branch.active, 0)
            if session.want_logits or session.want_scores:
                records.append((logits, scores))
            branch.accept(Commit(tokens[:, None], branch.active.long()))
            ended = tokens < len(ends)
            ended &= ends[tokens.clamp(max=len(ends) - 1)]
            # Rows that commit a single token are done after it; the token that ends a trial belongs to it.
            branch.halt(ended | single | ~branch.active)
            if not branch.running:
                break
            logits = branch.next_logits()
            scores = branch.process(logits)
        lengths = branch.length - start
        perplexity = (surprise / lengths.clamp(min=1)).exp()
        best = _first_least(perplexity, rows, session.batch)
        self._trace(session, rows, counts, entropy, perplexity, lengths, best)
        session.adopt(branch, best)
        session.cache.compact()
        longest = max(int(lengths[best].max()), 1)
        column = start[best][:, None] + torch.arange(longest, device=session.device)
        return Commit(
            branch.ids[best].gather(1, column.clamp(max=branch.ids.shape[1] - 1)),
            lengths[best],
            Source.TRIAL,
            logits=_stacked([own for own, _ in records], best, longest) if session.want_logits else None,
            scores=_stacked([own for _, own in records], best, longest) if session.want_scores else None,
        )

    def _trace(
        self, session: Session, rows: Tensor, counts: list[int], entropy: Tensor, perplexity: Tensor,
        lengths: Tensor, best: Tensor,
    ) -> None:  # fmt: skip
        for row, count in enumerate(counts):
            if count > 1:
                own = rows == row
                session.stats.extra["segments"].append(
                    {
                        "row": row,
                        "position": session.lengths[row] - session.prompt_length,
                        "entropy": float(entropy[row]),
                        "trials": count,
                        "perplexities": perplexity[own].tolist(),
                        "lengths": lengths[own].tolist(),
                        "kept": int(best[row] - own.nonzero()[0, 0]),
                    }
                )


def _check_ids(session: Session, ids: tuple[int, ...]) -> None:
    embeddings: Any = session.model.get_input_embeddings()
    vocab = embeddings.weight.shape[0]
    if max(ids, default=0) >= vocab:
        raise BadParameter(
            f"cntp: punctuation={ids} is not allowed; each must be below {vocab}, the model's number of ids"
        )


def _first_least(values: Tensor, rows: Tensor, batch: int) -> Tensor:
    """For each row the index of its least value, the first on ties, ``[batch]``; ``rows`` is ascending."""
    best = values.new_full((batch,), float("inf")).scatter_reduce(0, rows, values, "amin")
    index = torch.arange(len(values), device=values.device).masked_fill(values != best[rows], len(values))
    return torch.full((batch,), len(values), device=values.device).scatter_reduce(0, rows, index, "amin")


def _stacked(records: list[Tensor], best: Tensor, longest: int) -> Tensor:
    return torch.stack([record[best] for record in records[:longest]], 1)


def _precision(scores: Tensor) -> torch.dtype:
    """In which the perplexity adds up: float64, but for devices that have none."""
    return torch.float32 if scores.device.type == "mps" and scores.dtype != torch.float64 else torch.float64


_of_models: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[str, str], tuple[int, ...]]] = (
    weakref.WeakKeyDictionary()
)


def _punctuation(session: Session, mode: str) -> tuple[int, ...]:
    tokenizer = session.resources.get("tokenizer")
    if tokenizer is not None:
        return punctuation_ids(tokenizer, mode)
    # Loading a tokenizer takes longer than many a call.
    name = session.model.name_or_path or ""
    known = _of_models.setdefault(session.model, {})
    if (name, mode) not in known:
        known[name, mode] = punctuation_ids(_load_tokenizer(name), mode)
    return known[name, mode]


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ResourceError(
            f"cntp reads its punctuation from the tokenizer, and none loads from {name!r}: use tokenry.generate, or "
            "give the ids, as in CNTP(punctuation=(11, 13))"
        ) from error


_known: weakref.WeakKeyDictionary[Any, dict[str, tuple[int, ...]]] = weakref.WeakKeyDictionary()


def punctuation_ids(tokenizer: Any, mode: str) -> tuple[int, ...]:
    """The ids that end a trial, by one of the modes of :class:`CNTP`."""
    known = _known.setdefault(tokenizer, {})
    if mode not in known:
        if mode == "released":
            encoded = (tokenizer.encode(mark, add_special_tokens=False) for mark in MARKS)
            ids = {own[0] for own in encoded if own}
        else:
            texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=True)
            ids = {
                i
                for i, text in enumerate(texts)
                if "\n" in text or (text.strip() and not set(text.strip()) - set(MARKS))
            }
        known[mode] = tuple(sorted(ids))
    return known[mode]
