"""Texts from folders and files, and rows that lose no token."""

from __future__ import annotations

import pytest

from tests import tiny
from tokenry.errors import BadParameter, BadPrompt
from tokenry.objectives import data, token_rows, training_texts
from tokenry.workloads import is_held_out, library_files


def test_rows_are_the_documents_end_to_end():
    tokenizer = tiny.tokenizer()
    texts = [" ".join(f"w{n}" for n in range(start, start + 5)) for start in (0, 20, 40, 60)]
    rows = token_rows(texts, tokenizer, 6, seed=3)
    stream = rows.ids.flatten().tolist()
    assert rows.ids.shape == (4, 6)  # 28 tokens, the last four of which fill no row
    documents = [tokenizer(text)["input_ids"] for text in texts]
    found = [[t for t in part if t > 2] for part in _cut(stream, 2)]
    assert all(part in documents for part in found[:-1]) and len(found) == 4
    assert rows[0]["input_ids"].tolist() == stream[:6]
    # The start of a document is not learned, all else is.
    assert all((label == -100) == (token == 1) for token, label in zip(stream, rows.labels.flatten(), strict=True))
    assert token_rows(texts, tokenizer, 6, seed=3).ids.equal(rows.ids)
    assert not token_rows(texts, tokenizer, 6, seed=4).ids.equal(rows.ids)
    assert token_rows(texts, tokenizer, 6, seed=3, rows=2).ids.equal(rows.ids[:2])


def _cut(stream, end):
    parts = [[]]
    for token in stream:
        parts[-1].append(token)
        if token == end:
            parts.append([])
    return parts


def test_too_little_text_is_refused():
    with pytest.raises(BadParameter, match="fewer than one row of 99"):
        token_rows(["w1 w2"], tiny.tokenizer(), 99)


def test_texts_of_a_folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.py").write_text("x = 1\n")
    (tmp_path / "a.md").write_text("# Title\n")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "binary.dat").write_bytes(b"ab\0cd")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("[core]\n")
    assert training_texts(tmp_path) == ["# Title\n", "x = 1\n"]


def test_texts_of_files(tmp_path):
    plain = tmp_path / "book.txt"
    plain.write_text("Once upon a time\n")
    assert training_texts(str(plain)) == ["Once upon a time\n"]
    lines = tmp_path / "book.jsonl"
    lines.write_text('"one"\n\n{"text": "two", "id": 3}\n')
    assert training_texts(lines) == ["one", "two"]


def test_without_a_source_it_is_the_standard_library_without_the_held_out_packages(monkeypatch):
    files = library_files()
    assert len(files) > 100 and not any(is_held_out(path) for path in files)
    monkeypatch.setattr(data, "library_files", lambda: files[:3])
    assert training_texts() == [text for path in files[:3] if (text := path.read_text(encoding="utf-8")).strip()]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "no text at"),
        ("empty.txt", b" ", "is empty"),
        ("bad.txt", b"\xff\xfe\xff", "as UTF-8"),
        ("bad.jsonl", b'"fine"\n{"text": 3}\n', "line 2 has no text"),
        ("worse.jsonl", b"{\n", "line 1 is not JSON"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadPrompt, match=message):
        training_texts(tmp_path / name)


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(BadPrompt, match="holds no text files"):
        training_texts(tmp_path)
