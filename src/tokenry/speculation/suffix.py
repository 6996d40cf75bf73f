"""Draft what followed the longest run of last tokens that stood in the text before."""

from __future__ import annotations

from dataclasses import dataclass

from tokenry.speculation.copying import CopyDrafter, Match
from tokenry.speculation.sources import Text


@dataclass(frozen=True, kw_only=True)
class Suffix(CopyDrafter):
    """Copy what followed the longest suffix of prompt and output that occurred before.

    The baseline drafter of suffix decoding (SuffixDecoding, arXiv 2411.04975) on the text of one request, one path: of
    several longest occurrences it goes the way that most of them went, the newest of these, and the longer the match,
    the more it drafts. `longest` and `factor` are vLLM's defaults. Outputs of earlier requests are not kept. Where
    `tokens="auto"`, counted acceptance and measured cost decide in place of `factor`, see `CopyDrafter`.

    Attributes:
        tokens: Most tokens drafted, or `"auto"`.
        longest: Most tokens that a match is counted over.
        factor: Where `tokens` is a number: tokens drafted for each token of the match.
    """

    longest: int = 24
    factor: float = 1.0

    def validate(self) -> None:
        super().validate()
        self.check("longest", "at least 1", self.longest >= 1)
        self.check("factor", "above 0", self.factor > 0)

    @property
    def reach(self) -> int:
        return self.longest

    def most(self, run: int) -> int:
        assert self.tokens != "auto"
        return min(self.tokens, max(1, int(self.factor * run)))

    def find(self, text: Text) -> Match | None:
        return text.longest()
