"""Workloads: the same everywhere for a seed, disjoint splits, answers that score, outputs that do not."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import subprocess
import sys
import threading

import pytest

from tokenry.errors import BadParameter, BadPrompt
from tokenry.workloads import WORKLOADS, examples, functions, is_held_out, jsonl


@pytest.mark.parametrize("name", WORKLOADS)
def test_answers_score_one_and_others_less(name):
    found = examples(name, 12)
    for example in found:
        assert example.prompt.strip() and example.answer.strip()
        assert example.check(example.answer) == 1
        assert example.check("") == 0
    assert sum(example.check(other.answer) for example, other in itertools.pairwise(found)) < 6


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_and_a_split_decide_the_examples(name):
    texts = [example.prompt for example in examples(name, 6)]
    assert texts == [example.prompt for example in examples(name, 6)]
    assert texts != [example.prompt for example in examples(name, 6, seed=1)]
    assert not set(texts) & {example.prompt for example in examples(name, 200, split="train")}


def test_arithmetic_answers_are_right():
    for example in examples("arithmetic", 50):
        question = re.match(r"# compute ([\d +-]+)\n", example.prompt)[1]
        assert example.check(f"anything answer {eval(question)}.") == 1
        assert example.check(f"answer {eval(question) + 1}.") == 0
        for clause in example.answer.split("; ")[:-1]:
            left, right = clause.split(" = ")
            assert eval(left) == int(right)


def test_recall_may_have_been_asked_before():
    for plain, example in zip(examples("recall", 5), examples("recall:asked=3;length=5400", 5), strict=True):
        key = re.search(r"# recall (KEY_\w+)\n", plain.prompt)[1]
        assert example.answer == plain.answer
        value = example.answer.split('"')[0]
        places = [match.start() for match in re.finditer(f'{key} = "{value}"', example.prompt)]
        assert len(places) == 4  # planted, and answered three times
        assert example.prompt.count(f"# recall {key}") == 4 and example.prompt.endswith(f'# recall {key}\n{key} = "')
        asked = f'\n# recall {key}\n{key} = "{value}"\n\n'
        assert sorted(example.prompt.replace(asked, "").split("\n")) == sorted(plain.prompt.split("\n"))


@pytest.mark.parametrize(
    "name",
    [
        "recall:asked=much",
        "recall:asked",
        "recall:ask=3",
        "code:asked=3",
        "recall:asked=-3",
        "recall:length=0",
        "recall:depth=1.5",
        "recall:keys=2.5",
        "recall:questions=9",
        "edit:longest=5",
        "ruler-words:common=0",
    ],
)
def test_bad_options(name):
    with pytest.raises(BadParameter, match=r"option|number|is not allowed"):
        examples(name, 1)


def test_recall_may_ask_for_several_keys():
    one, several = (examples("recall", 3, keys=4, questions=questions) for questions in (1, 3))
    for alone, example in zip(one, several, strict=True):
        assert example.prompt == alone.prompt and example.answer.startswith(alone.answer)
        asked = re.findall(r'# recall (KEY_\w+)\n\1 = "(\d+)"\n', example.prompt + example.answer)
        assert len(asked) == 3 and all(f'{key} = "{value}"\n' in example.prompt for key, value in asked[1:])


def test_recall_plants_one_value_at_the_wanted_depth():
    for example in examples("recall", 10):
        key = re.search(r"# recall (KEY_\w+)\n", example.prompt)[1]
        planted = [line for line in example.prompt.split("\n")[:-1] if line.startswith(f"{key} = ")]
        assert len(planted) == 1
        assert example.check(planted[0].split('"')[1]) == 1
        place = example.prompt.index(planted[0]) / len(example.prompt)
        assert abs(place - example.meta["depth"]) < 0.25
        assert len(example.prompt) > 5000


def test_edits_change_one_name_and_nothing_else():
    for example in examples("edit", 20):
        old, new = re.match(r"# rename (\w+) to (\w+)\n", example.prompt).groups()
        source = example.prompt.split("\n", 1)[1].removesuffix("\n# renamed\n")
        renamed = example.answer.removesuffix("\n# end\n")
        ast.parse(renamed)
        assert re.sub(rf"\b{new}\b", old, renamed) == source


def test_code_comes_from_held_out_packages_and_completes_to_python():
    pool = set(functions("test"))
    for example in examples("code", 20):
        whole = (example.prompt + example.answer).rstrip("\n")
        ast.parse(whole)
        assert whole in pool
    assert not pool & set(functions("train"))


def test_vendored_copies_are_held_out():
    from pathlib import Path

    assert is_held_out(Path("pip/_vendor/rich/console.py"))
    assert is_held_out(Path("pytest.py"))
    assert not is_held_out(Path("json/encoder.py"))


def test_files_of_ones_own(tmp_path):
    file = tmp_path / "mine.jsonl"
    lines = ['"a text"', json.dumps({"turns": ["first", "second"], "category": "qa", "question_id": 7})]
    file.write_text("\n".join([*lines, json.dumps({"prompt": "p", "answer": "42"}), ""]))
    one, two, three = examples(str(file), 10)
    assert (one.prompt, two.prompt, three.prompt) == ("a text", "first", "p")
    assert two.meta == {"category": "qa", "question_id": 7}
    assert three.check("it is 42.") == 1 and three.check("it is 41.") == 0


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ('"fine"\n{"prompt": ', "line 2 is not JSON"),
        ("[1, 2]", "line 1 holds a JSON list"),
        ('{"other": "x"}', "line 1 has no prompt"),
        ('{"prompt": "  "}', "line 1 has no prompt"),
        ("", "holds no prompts"),
        ('"fine"\n"\\ud83d"', "line 2 holds half of a character"),
        ('{"prompt": "p", "answer": "\\ud83d"}', "line 1 holds half of a character"),
        ('"fine"\n' + "[" * 100_000, "line 2 is nested too deeply"),
        ("9" * 5000, "line 1 cannot be read"),
    ),
)
def test_malformed_files_name_the_line(tmp_path, text, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(BadPrompt, match=message):
        examples(str(file), 10)


def test_unknown_names_are_refused():
    with pytest.raises(BadParameter, match=r"no workload 'sums'.*code, recall"):
        examples("sums", 1)
    with pytest.raises(BadParameter, match="split"):
        examples("code", 1, split="validation")
    with pytest.raises(BadPrompt, match=r"no prompt file at 'nowhere\.jsonl'"):
        examples("nowhere.jsonl", 1)


def test_no_torch():
    code = "import sys, tokenry.workloads as w; w.examples('edit', 1); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_answers_are_texts_numbers_or_any_of_a_list(tmp_path):
    file = tmp_path / "mine.jsonl"
    # Spec-Bench's references are lists of lists in places.
    answers = [42, [["four", [4]], ""], None, [], True, 0]
    file.write_text("\n".join(json.dumps({"prompt": "p", "answer": answer}) for answer in answers))
    number, several, *none, zero = examples(str(file), 10)
    assert number.answer == "42" and number.check("so 42") == 1 and number.check("so 41") == 0
    assert several.answer == "four" and several.check("4") == several.check("four") == 1 and several.check("5") == 0
    assert [example.answer for example in none] == ["", "", ""] and zero.answer == "0"


@pytest.mark.parametrize(
    "record,words",
    [
        ({"prompt": "p", "category": ["x"]}, "line 1: category must be a text"),
        ({"prompt": "p", "answer": {"x": 1}}, 'line 1: answer must be a text.*not {"x": 1}'),
        ({"prompt": "p", "answer": [[{"x": 1}]]}, "line 1: answer must be"),
    ],
)
def test_fields_of_another_kind_are_refused(record, words, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(record))
    with pytest.raises(BadPrompt, match=words):
        examples(str(file), 1)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    file = tmp_path / "latin.jsonl"
    file.write_bytes('"fine"\n"caf\xe9"\n'.encode("latin-1"))
    with pytest.raises(BadPrompt, match=r"latin\.jsonl, line 2 is not UTF-8"):
        examples(str(file), 2)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    file = tmp_path / "mark.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + '"caf\xe9 \U0001f600"\n'.encode())
    assert [example.prompt for example in examples(str(file), 1)] == ["caf\xe9 \U0001f600"]


def test_folders_are_refused_as_such_and_other_things_read(tmp_path):
    with pytest.raises(BadPrompt, match="is a folder"):
        list(jsonl.read(tmp_path))
    with pytest.raises(BadPrompt, match="holds no prompts"):
        list(jsonl.read(os.devnull))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_read(tmp_path):
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=('"a text"\n',))
    writer.start()
    assert [example.prompt for example in jsonl.read(pipe)] == ["a text"]
    writer.join()
