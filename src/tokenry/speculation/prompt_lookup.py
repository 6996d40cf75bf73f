"""Draft what followed the last few tokens when they stood in the text before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from tokenry.generation.engine import Session
from tokenry.speculation.engine import Drafter, DraftTree, TreeShape


@dataclass(frozen=True, kw_only=True)
class PromptLookup(Drafter):
    """Copy the continuation of an earlier occurrence of the last n-gram, the longest n that occurs first.

    The baseline drafter, as Apoorv Saxena published it (prompt-lookup-decoding, 2023), whose n-gram size and number of
    drafted tokens are the defaults; transformers' `prompt_lookup_num_tokens` drafts 10 tokens from n-grams of at most
    2, the first match. A copy that reaches the end of the text goes on with what it has drafted itself, so that
    repetitions shorter than `tokens` are drafted in full.

    Attributes:
        tokens: Most tokens drafted.
        ngram: Longest n-gram that is looked up.
        match: Which of several occurrences of one length is copied.
    """

    tokens: int = 10
    ngram: int = 3
    match: Literal["last", "first"] = "last"

    def validate(self) -> None:
        self.check("tokens", "at least 1", self.tokens >= 1)
        self.check("ngram", "at least 1", self.ngram >= 1)

    def propose(self, session: Session, state: Any, room: int) -> DraftTree:
        width = max(session.lengths)
        ids, device = session.ids[:, :width], session.device
        column = torch.arange(width, device=device)
        # Finished rows can be longer than the unfinished ones; nothing is read of what they draft.
        end = (session.length[:, None] - 1).clamp(max=width - 1)
        # How many tokens up to each column agree with those up to the row's last one, which does not match itself.
        real = column >= session.first[:, None]
        agree = column < end
        run = torch.zeros_like(ids)
        for back in range(min(self.ngram, width - 1)):
            same = (ids == ids.gather(1, (end - back).clamp(min=0))) & real
            agree = agree & same if back == 0 else agree[:, 1:] & same[:, : width - back]
            run[:, back:] += agree
        order = column if self.match == "last" else width - 1 - column
        best = (run * width + order).argmax(1, keepdim=True)
        found = (run.gather(1, best) > 0) & session.active[:, None]
        if not bool(found.any()):
            return DraftTree.root(session.anchor)
        count = min(self.tokens, room)
        period = (end - best).clamp(min=1)
        source = best + 1 + torch.arange(count, device=device) % period
        drafts = ids.gather(1, source.clamp(max=width - 1))
        tokens = torch.cat([session.anchor[:, None], drafts], 1)
        valid = None
        if not bool(found.all()):
            valid = found.expand(-1, count + 1).clone()
            valid[:, 0] = True
        return DraftTree(tokens, TreeShape.chain(count + 1, device), valid)
