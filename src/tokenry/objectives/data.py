"""Texts to rows of tokens: where texts come from, documents end to end, cut into rows of one length."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tokenry.errors import BadParameter, BadPrompt
from tokenry.objectives.losses import IGNORED
from tokenry.workloads import library_files

_MOST_BYTES = 2_000_000  # a longer file of a folder is data rather than text
_PIECE = 64  # texts that are encoded together


class TokenRows(Dataset):
    """Rows of tokens, each the item `{"input_ids": [length], "labels": [length]}`.

    Labels are the tokens themselves, ignored where a document begins: no text says which one does.

    Attributes:
        ids: `[rows, length]`.
        labels: `[rows, length]`.
    """

    def __init__(self, ids: Tensor, start: int | None = None) -> None:
        self.ids = ids
        self.labels = ids if start is None else ids.masked_fill(ids == start, IGNORED)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def token_rows(
    texts: Sequence[str], tokenizer: Any, length: int, seed: int = 0, *, rows: int | None = None
) -> TokenRows:
    """Shuffle texts, join them as `<bos> text <eos>` (where the tokenizer has them) and cut rows of `length` tokens.

    Args:
        texts: One document each.
        length: Tokens of a row; the rest at the end is left out.
        seed: Order of the texts.
        rows: Encode no more than so many rows need.

    Raises:
        BadParameter: The texts do not fill one row.
    """
    order = list(texts)
    random.Random(seed).shuffle(order)
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found: list[int] = []
    for start in range(0, len(order), _PIECE):
        for ids in tokenizer(order[start : start + _PIECE], add_special_tokens=False, verbose=False)["input_ids"]:
            found += [*before, *ids, *after]
        if rows is not None and len(found) >= rows * length:
            break
    count = len(found) // length if rows is None else min(rows, len(found) // length)
    if count == 0:
        raise BadParameter(
            f"the text holds {len(found)} tokens, fewer than one row of {length}; give more text or a shorter length"
        )
    return TokenRows(torch.tensor(found[: count * length]).view(count, length), tokenizer.bos_token_id)


def training_texts(source: str | Path | None = None) -> list[str]:
    """The texts to train on.

    Args:
        source: A JSONL file (one string, or object with `text`, a line), any other text file, a folder whose text
            files are taken in order of their names, or None for the standard library's own sources; packages that
            tests and benches read are never among those.

    Raises:
        BadPrompt: There is nothing there, or it is not text.
    """
    if source is None:
        return [text for path in library_files() if (text := _text(path))]
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
        texts = [text for file in files if (text := _text(file))]
        if not texts:
            raise BadPrompt(f"{str(path)!r} holds no text files (UTF-8, not hidden, up to {_MOST_BYTES:,} bytes)")
        return texts
    if not path.is_file():
        raise BadPrompt(f"no text at {str(path)!r}: give a folder of text files, a .txt or a .jsonl file")
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadPrompt(f"cannot read {path} as UTF-8 text: {error}") from error
    texts = _lines(path, content) if path.suffix == ".jsonl" else [content] if content.strip() else []
    if not texts:
        raise BadPrompt(f"{path} is empty; give a file with text")
    return texts


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _text(path: Path) -> str:
    """The text of a file, empty if it is none."""
    if path.stat().st_size > _MOST_BYTES:
        return ""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    return text if text.strip() and "\0" not in text else ""


def _lines(path: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadPrompt(
                f"{path}, line {number} is not JSON ({error.msg}); write one string or object a line"
            ) from None
        text = record.get("text") if isinstance(record, dict) else record
        if not isinstance(text, str) or not text.strip():
            raise BadPrompt(f"{path}, line {number} has no text; write a string, or an object with text, a line")
        texts.append(text)
    return texts
