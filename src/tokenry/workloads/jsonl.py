"""Prompts of the user's own: any JSONL file, Spec-Bench's form included."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenry.errors import BadPrompt
from tokenry.workloads.engine import Example

_FIELDS = ("prompt", "text", "question", "input", "instruction")


def read(path: str | Path) -> Iterator[Example]:
    """Yield one example a line of a JSONL file.

    A line is a string, or an object with one of ``prompt``, ``text``, ``question``, ``input``, ``instruction``,
    or Spec-Bench's ``turns`` (the first is used). An optional ``answer`` (or ``reference``) is scored by
    containment; lines without one score 1.

    Raises:
        BadPrompt: The file is missing, empty, or a line is not of these forms (the message names the line).
    """
    path = Path(path)
    if not path.is_file():
        raise BadPrompt(f"no prompt file at {str(path)!r}: give the path of a JSONL file, one prompt a line")
    empty = True
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            empty = False
            yield _example(line, f"{path}, line {number}")
    if empty:
        raise BadPrompt(f"{path} holds no prompts: write one JSON string or object a line")


def _example(line: str, where: str) -> Example:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadPrompt(
            f"{where} is not JSON ({error.msg} at column {error.colno}): one string or object a line"
        ) from None
    if isinstance(record, str):
        record = {"prompt": record}
    if not isinstance(record, dict):
        raise BadPrompt(f"{where} holds a JSON {type(record).__name__}: a string or an object is wanted")
    turns = record.get("turns")
    prompt = turns[0] if isinstance(turns, list) and turns else next((record[k] for k in _FIELDS if k in record), None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadPrompt(f"{where} has no prompt: give one of {', '.join(_FIELDS)} or turns as a text that is not empty")
    answer = record.get("answer", record.get("reference"))
    answer = answer[0] if isinstance(answer, list) and answer else answer
    meta = {k: record[k] for k in ("category", "question_id") if k in record}
    if isinstance(answer, str) and answer:
        return Example(prompt, answer, lambda output: float(answer in output), meta)
    return Example(prompt, "", lambda output: 1.0, meta)
