"""Text as it is committed: ids in, pieces of text out that never cut a character."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# A tokenizer writes this where bytes do not make a character yet.
_UNFINISHED = "\ufffd"


class TextStream:
    """Turns runs of ids into pieces of text.

    Ids are decoded together with a few before them, because what an id reads as depends on its neighbours
    (a leading blank, the bytes of one character).
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], Any], prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.write = write
        self._ids = list(prompt[-4:])
        self._shown = len(self._ids)
        self._before = 0

    def __call__(self, ids: list[int] | None) -> None:
        """Take a run of ids; None ends the text."""
        self._ids += ids or []
        known = self._decode(self._ids[self._before : self._shown])
        text = self._decode(self._ids[self._before :])
        if len(text) > len(known) and (ids is None or not text.endswith(_UNFINISHED)):
            self.write(text[len(known) :])
            self._before, self._shown = self._shown, len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
