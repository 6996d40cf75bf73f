"""A tokenizer seen as bytes."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from tokenry.errors import UnsupportedModel

__all__ = ["token_bytes"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLANK = "\u2581"  # how SentencePiece writes a blank


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes that each id adds to a text, by id; empty for special tokens and ids without a token.

    Serves fast tokenizers of two kinds: byte-level BPE, and SentencePiece pieces with or without byte fallback.

    Raises:
        UnsupportedModel: The tokenizer is of another kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel(f"{type(tokenizer).__name__} is not a fast tokenizer, so its bytes are not known")
    spec = json.loads(backend.to_str())
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
            found[number] = piece.encode()
    return found


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
