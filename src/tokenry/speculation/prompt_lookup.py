"""Draft what followed the last few tokens when they stood in the text before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenry.speculation.copying import CopyDrafter, Match
from tokenry.speculation.sources import Text


@dataclass(frozen=True, kw_only=True)
class PromptLookup(CopyDrafter):
    """Copy the continuation of an earlier occurrence of the last n-gram, the longest n that occurs.

    The baseline drafter, as Apoorv Saxena published it (prompt-lookup-decoding, 2023), whose n-gram size, number of
    drafted tokens and match are the defaults; transformers' `prompt_lookup_num_tokens` drafts 10 tokens from n-grams of
    at most 2, the first match as well. A copy that reaches the end of the text goes on with what it has drafted itself,
    so that repetitions shorter than `tokens` are drafted in full.

    Attributes:
        tokens: Most tokens drafted, or `"auto"`: as many as pay, see `CopyDrafter`.
        ngram: Longest n-gram that is looked up.
        match: Which of several occurrences of one length is copied. The last follows text that changes its mind, such
            as steps of arithmetic; the first follows a source that is repeated.
    """

    tokens: int | Literal["auto"] = 10
    ngram: int = 3
    match: Literal["first", "last"] = "first"

    def validate(self) -> None:
        super().validate()
        self.check("ngram", "at least 1", self.ngram >= 1)

    @property
    def reach(self) -> int:
        return self.ngram

    def find(self, text: Text) -> Match | None:
        ends, runs = text.matches()
        if not len(ends):
            return None
        run = int(runs.max())
        return int(ends[runs == run][-1 if self.match == "last" else 0]), run
