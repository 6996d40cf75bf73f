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
    or Spec-Bench's ``turns`` (the first is used). An optional ``answer`` (or ``reference``), a text, a
    number or a list of them, which may be nested, is scored by containment, any of them counts; lines without one are
    not scored.

    Raises:
        BadPrompt: The file is missing, a folder or empty, or a line is not UTF-8 or not of these forms (the message
            names the line).
    """
    path = Path(path)
    if path.is_dir():
        raise BadPrompt(f"{str(path)!r} is a folder: give the path of a JSONL file in it, one prompt a line")
    # A pipe or a device is read like a file.
    if not path.exists():
        raise BadPrompt(f"no prompt file at {str(path)!r}: give the path of a JSONL file, one prompt a line")
    empty = True
    try:
        # Bytes that are not UTF-8 come through as surrogates, so that their line can be named.
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                empty = False
                yield _example(line, f"{path}, line {number}")
    except OSError as error:
        raise BadPrompt(f"cannot read {path}: {error}") from error
    if empty:
        raise BadPrompt(f"{path} holds no prompts: write one JSON string or object a line")


def _example(line: str, where: str) -> Example:
    if not _is_unicode(line):
        raise BadPrompt(f"{where} is not UTF-8 text: save the file as UTF-8")
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadPrompt(
            f"{where} is not JSON ({error.msg} at column {error.colno}): one string or object a line"
        ) from None
    except RecursionError:
        raise BadPrompt(f"{where} is nested too deeply to read: one string or object a line") from None
    except ValueError as error:
        raise BadPrompt(f"{where} cannot be read ({error}): one string or object a line") from None
    if isinstance(record, str):
        record = {"prompt": record}
    if not isinstance(record, dict):
        raise BadPrompt(f"{where} holds a JSON {type(record).__name__}: a string or an object is wanted")
    turns = record.get("turns")
    prompt = turns[0] if isinstance(turns, list) and turns else next((record[k] for k in _FIELDS if k in record), None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadPrompt(f"{where} has no prompt: give one of {', '.join(_FIELDS)} or turns as a text that is not empty")
    answers = _answers(record.get("answer", record.get("reference")), where)
    meta = {k: record[k] for k in ("category", "question_id") if k in record}
    for key, value in meta.items():
        if not isinstance(value, str | int):
            raise BadPrompt(f"{where}: {key} must be a text or a number, not a JSON {type(value).__name__}")
    if not _is_unicode(json.dumps([prompt, answers, meta], ensure_ascii=False)):
        raise BadPrompt(f"{where} holds half of a character (a lone surrogate such as \\ud83d): write the whole one")
    if not answers:
        return Example(prompt, "", lambda output: 1.0, meta)
    # The longest stands for all, so that each finds room in the output.
    longest = max(answers, key=len)
    return Example(prompt, longest, lambda output: float(any(answer in output for answer in answers)), meta)


def _is_unicode(text: str) -> bool:
    """Whether every character is whole; a lone surrogate is half of one, and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _answers(given: object, where: str) -> list[str]:
    if isinstance(given, list):
        # Spec-Bench has lists of lists.
        return [text for each in given for text in _answers(each, where)]
    if isinstance(given, dict):
        raise BadPrompt(f"{where}: answer must be a text, a number or a list of them, not {json.dumps(given)[:60]}")
    return [str(given)] if isinstance(given, str | int | float) and not isinstance(given, bool) and given != "" else []
