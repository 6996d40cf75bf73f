"""A tokenizer seen as bytes: what each id spells, which ids fit a place in a text, which sequences are canonical."""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import re
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tokenry.errors import BadPrompt, UnsupportedModel

__all__ = ["ByteVocabulary", "token_bytes"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLANK = "\u2581"  # how SentencePiece writes a blank
_SPACES = b" \t\n\r"
# Behind a run of blanks the encoding depends on what follows; one of each kind of thing that may follow.
_PROBES = ("a", "0", ".", "\n", " a")
_MASKS = 512  # masks of canonical continuations that are remembered


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes that each id adds to a text, by id; empty for special tokens and ids without a token.

    Serves fast tokenizers of two kinds: byte-level BPE, and SentencePiece pieces with or without byte fallback.

    Raises:
        UnsupportedModel: The tokenizer is of another kind.
    """
    spec = _spec(tokenizer)
    parts = {name for key in ("decoder", "pre_tokenizer", "normalizer") for name in _types(spec.get(key))}
    pieces: dict[str, int] = tokenizer.get_vocab()
    if "ByteLevel" in parts:
        decode = _from_byte_level
    elif {"Metaspace", "ByteFallback"} & parts or any(piece.startswith(_BLANK) for piece in pieces):
        decode = _from_sentence_piece
    else:
        raise UnsupportedModel(
            "the tokenizer is neither byte-level BPE nor SentencePiece, so the bytes of its ids are not known"
        )
    added = {token["id"]: token for token in spec.get("added_tokens", [])}
    found = [b""] * (max(pieces.values(), default=-1) + 1)
    for piece, number in pieces.items():
        if number not in added:
            found[number] = decode(piece)
        elif not added[number]["special"]:
            # Added tokens of a byte-level tokenizer stand for their text as it is; SentencePiece's decoder reads them
            # as it reads pieces.
            found[number] = decode(piece) if decode is _from_sentence_piece else piece.encode()
    return found


def _spec(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel(f"{type(tokenizer).__name__} is not a fast tokenizer, so its bytes are not known")
    return json.loads(backend.to_str())


def _types(part: Any) -> list[str]:
    if not isinstance(part, dict):
        return []
    inner = [name for value in part.values() if isinstance(value, list) for item in value for name in _types(item)]
    return [part.get("type", ""), *inner]


@functools.cache
def _bytes_of_letters() -> dict[str, int]:
    # GPT-2 writes printable bytes as themselves and the others as letters from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _from_byte_level(piece: str) -> bytes:
    letters = _bytes_of_letters()
    return bytes(letters[letter] for letter in piece) if all(c in letters for c in piece) else piece.encode()


def _from_sentence_piece(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(_BLANK, " ").encode()


# --- ids by their bytes -------------------------------------------------------------------------


class ByteVocabulary:
    """The ids of a tokenizer in the order of their bytes, and the canonical encodings among their sequences.

    Ids that begin alike are neighbours in this order, so a node of the trie of all spellings is a range of places,
    and a sum over the ids below it is a sum over a slice. A sequence is canonical if the tokenizer itself would cut
    its text that way, or the beginning of some longer text.

    Attributes:
        bytes_of: What each id spells, by id; empty for ids that spell nothing.
        spellings: The same without the empty ones, sorted; a place is an index into it.
        ids: The id at each place, `[places]`.
        letters: The bytes at each place, 0 behind the last, uint8 `[places, longest]`.
        symbols: Special ids, which spell nothing, ascending.
        lead: What the tokenizer puts before a text of its own accord: a blank, or nothing.

    Raises:
        UnsupportedModel: The tokenizer is neither byte-level BPE nor SentencePiece.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.bytes_of = token_bytes(tokenizer)
        pairs = sorted((spelled, number) for number, spelled in enumerate(self.bytes_of) if spelled)
        if not pairs:
            raise UnsupportedModel("no id of the tokenizer spells anything: is its vocabulary all special tokens?")
        self.spellings = [spelled for spelled, _ in pairs]
        self.longest = max(map(len, self.spellings))
        self.ids = torch.tensor([number for _, number in pairs])
        self.place_of = {number: place for place, (_, number) in enumerate(pairs)}
        packed = b"".join(spelled.ljust(self.longest, b"\0") for spelled in self.spellings)
        self.letters = torch.frombuffer(bytearray(packed), dtype=torch.uint8).view(len(pairs), self.longest)
        self.symbols = sorted(i for i in tokenizer.get_vocab().values() if not self.bytes_of[i])
        self._raw = _without_additions(tokenizer)
        self._cuts_ahead = _cuts_ahead(self._raw)
        self._local = _spec(tokenizer)["model"]["type"] == "BPE"
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self._lock = threading.Lock()
        whole = self.spelled(tokenizer("a", add_special_tokens=False)["input_ids"])
        self.lead = b" " if whole == b" a" else b""

    @classmethod
    def of(cls, tokenizer: Any) -> ByteVocabulary:
        """The vocabulary of a tokenizer, made once for each."""
        known = _known.get(tokenizer)
        # A tokenizer can gain tokens.
        if known is None or known[0] != len(tokenizer):
            known = _known[tokenizer] = (len(tokenizer), cls(tokenizer))
        return known[1]

    def __len__(self) -> int:
        """Places."""
        return len(self.spellings)

    def spelled(self, ids: Sequence[int]) -> bytes:
        """What ids spell."""
        return b"".join(self.bytes_of[i] for i in ids)

    def narrow(self, start: bytes, low: int = 0, high: int | None = None) -> tuple[int, int, int]:
        """Of the places `low` to `high`, those whose bytes start with `start`: where they begin, where those that
        equal it end, and where they end."""
        high = len(self) if high is None else high
        low = bisect.bisect_left(self.spellings, start, low, high)
        exact = bisect.bisect_right(self.spellings, start, low, high)
        bare = start.rstrip(b"\xff")
        if bare:
            high = bisect.bisect_left(self.spellings, bare[:-1] + bytes([bare[-1] + 1]), exact, high)
        return low, exact, high

    def encode(self, data: bytes) -> list[int]:
        """The tokenizer's own ids of bytes that begin a text, nothing added.

        Raises:
            BadPrompt: The bytes are not UTF-8, or the tokenizer rewrites or does not know some of them.
        """
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise BadPrompt(f"{data[error.start :][:8]!r} is not UTF-8: give the bytes of a text") from error
        ids: list[int] = self._raw.encode(text, add_special_tokens=False).ids
        if self.spelled(ids) != data:
            raise BadPrompt(
                f"the tokenizer reads {text[:40]!r} as {self.spelled(ids)[:40]!r}: give the text in the form that it "
                "rewrites texts into"
            )
        return ids

    def spell(self, data: bytes) -> list[int]:
        """Ids that spell any bytes: the tokenizer's own where they are a text, else one id a byte.

        Raises:
            BadPrompt: A byte has no id of its own.
        """
        try:
            return self.encode(data)
        except BadPrompt:
            ids = []
            for byte in data:
                low, exact, _ = self.narrow(bytes([byte]))
                if low == exact:
                    raise
                ids.append(int(self.ids[low]))
            return ids

    def check_canonical(self) -> None:
        """Refuse a tokenizer whose canonical sequences `canonical` would not tell.

        Raises:
            UnsupportedModel: It cuts digits into groups from their end, so that every further digit moves all cuts.
        """
        if self._cuts_ahead:
            raise UnsupportedModel(
                "the tokenizer groups digits from the end of a number, so its ids of a number depend on digits that "
                "are not there yet, and canonical sequences are not known; take another tokenizer, or count all "
                "sequences: ByteView(model, tokenizer, canonical=False)"
            )

    def begins_text(self, ids: Sequence[int]) -> bool:
        """Whether what ids spell is the beginning of some UTF-8."""
        return bool(_continued(self.spelled(ids)))

    def canonical(self, sequences: Sequence[Sequence[int]]) -> list[bool]:
        """Whether the tokenizer cuts some text that begins with what a sequence spells, in the sequence's way.

        A text that may go on is undecided where it ends in blanks or within a character: such a sequence is canonical
        if one of a few continuations of each kind bears it out.
        """
        found = [False] * len(sequences)
        waiting = {number: _continued(self.spelled(ids)) for number, ids in enumerate(sequences)}
        take = 2
        while waiting:
            # Most are settled by the first continuations, so the many of a broken character are tried later.
            texts = [text for continued in waiting.values() for text in continued[:take]]
            owners = [number for number, continued in waiting.items() for _ in continued[:take]]
            for owner, encoding in zip(owners, self._encoded(texts), strict=True):
                ids = sequences[owner]
                found[owner] = found[owner] or encoding.ids[: len(ids)] == list(ids)
            waiting = {n: rest for n, continued in waiting.items() if not found[n] and (rest := continued[take:])}
            take = 64
        return found

    def _encoded(self, texts: list[str]) -> list[Any]:
        return self._raw.encode_batch_fast(texts, add_special_tokens=False)

    def continuations(self, ids: Sequence[int]) -> Tensor:
        """Which places may follow a canonical sequence so that it stays canonical, bool `[places]`."""
        key = self._tail(ids)
        with self._lock:
            mask = self._masks.get(key)
        if mask is None:
            mask = torch.tensor(self.canonical([[*key, number] for number in self.ids.tolist()]))
            with self._lock:
                if len(self._masks) >= _MASKS:
                    del self._masks[next(iter(self._masks))]
                self._masks[key] = mask
        return mask

    def _tail(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The end of a canonical sequence that decides what may follow it."""
        if self._local:
            # Merges never reach over more than two neighbours, so a sequence is canonical where all its neighbours are
            # (arXiv 2506.07956); words before the last tell how the rest is cut into words.
            words = [i for i in range(1, len(ids)) if self._starts_word(ids, i)][-2:]
            if words and self._cut_alike(ids, words[0]):
                return tuple(ids[words[0] :])
        return tuple(ids)

    def settled(self, ids: Sequence[int]) -> tuple[int, int]:
        """How many ids of a text no canonical encoding of the text or of a longer one would change.

        Returns:
            Their number, at least 1, and the index from which the ids can be encoded by themselves. Ids that are no
            canonical encoding themselves are settled up to the last word.
        """
        first = 1 + next((i for i in range(len(ids) - 1, -1, -1) if ids[i] not in self.place_of), 0)
        words = [i for i in range(first, len(ids)) if self._starts_word(ids, i)]
        start = words[-3] if len(words) > 2 else first
        if self._holds(ids, max(start, len(ids) - 32), len(ids)):
            return len(ids), max(start, len(ids) - 32)
        for number, place in enumerate(reversed(words[-8:])):
            start = words[max(0, len(words) - number - 4)]
            if self._holds(ids, start, place):
                return place, start
        if first == len(ids) or (len(ids) - first <= 64 and self._cut_alike(ids, first)):
            return first, first
        for place in range(len(ids) - 1, max(first, len(ids) - 32), -1):
            if self._holds(ids, max(first, place - 8), place):
                return place, max(first, place - 8)
        # The caller cut the text in a way of its own: up to the last word it stays so.
        last = words[-1] if words else first
        return last, last

    def _starts_word(self, ids: Sequence[int], i: int) -> bool:
        before = self.bytes_of[ids[i - 1]]
        return self.bytes_of[ids[i]][0] in _SPACES and bool(before) and before[-1] not in _SPACES

    def _cut_alike(self, ids: Sequence[int], start: int) -> bool:
        return self.canonical([ids[start:]])[0]

    def _holds(self, ids: Sequence[int], start: int, place: int) -> bool:
        """Whether the ids from `start` to `place` come first in every encoding of what the ids from `start` spell, and
        of each shorter text down to `place`, and no id begins before `place` and reaches the end."""
        if start == place:
            return False
        before, after = self.spelled(ids[start:place]), self.spelled(ids[place:])
        whole = before + after
        for i in range(max(0, len(whole) - self.longest), len(before)):
            low, exact, high = self.narrow(whole[i:])
            # What ends where the settled ids end is among them.
            if (low if after else exact) < high:
                return False
        texts = [whole[:end] for end in range(len(before), len(whole) + 1)]
        own = list(ids[start:place])
        encoded = self._encoded([text for data in texts for text in _whole(data)])
        return bool(encoded) and all(encoding.ids[: len(own)] == own for encoding in encoded)


_known: weakref.WeakKeyDictionary[Any, tuple[int, ByteVocabulary]] = weakref.WeakKeyDictionary()


def _without_additions(tokenizer: Any) -> Tokenizer:
    """The tokenizer without what it adds to a text: blanks in front, special tokens, padding."""
    spec = _spec(tokenizer)
    for key in ("normalizer", "pre_tokenizer"):
        spec[key] = _bare(spec.get(key))
    raw = Tokenizer.from_str(json.dumps(spec | {"post_processor": None, "padding": None, "truncation": None}))
    raw.encode_special_tokens = True
    return raw


def _cuts_ahead(raw: Tokenizer) -> bool:
    """Whether a digit behind a number changes the cuts before the number's last part."""
    if raw.pre_tokenizer is None:
        return False
    runs = ([part for part, _ in raw.pre_tokenizer.pre_tokenize_str("1" * count)] for count in range(1, 10))
    return any(longer[: len(run) - 1] != run[:-1] for run, longer in itertools.pairwise(runs))


def _bare(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if kind == "ByteLevel":
        return part | {"add_prefix_space": False}
    lists = {key: value for key, value in part.items() if key in ("normalizers", "pretokenizers")}
    return part | {key: [bare for item in value if (bare := _bare(item))] for key, value in lists.items()}


def _whole(data: bytes) -> list[str]:
    try:
        return [data.decode()]
    except UnicodeDecodeError:
        return []


def _continued(data: bytes) -> list[str]:
    """Texts that begin with the bytes: the bytes themselves where they are a text that is decided."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            return []
        head = data[: error.start].decode()
        return [head + character for character in _characters(data[error.start :])]
    return [text, *(text + probe for probe in _PROBES)] if data[-1:] in (b" ", b"\t", b"\n", b"\r") else [text]


@functools.cache
def _characters(start: bytes) -> list[str]:
    """Characters whose UTF-8 begins with the bytes: all of them where one byte is missing, else some of each block."""
    size = 2 if start[0] < 0xE0 else 3 if start[0] < 0xF0 else 4
    missing = size - len(start)
    choices = [range(0x80, 0xC0), *[range(0x80, 0xC0, 16 if size == 3 else 32)] * (missing - 1)]
    found = [text for rest in itertools.product(*choices) for text in _whole(start + bytes(rest))]
    # The middle of a block is where its characters are.
    half = len(found) // 2
    return found[half:] + found[:half][::-1]
