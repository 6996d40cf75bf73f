"""Infill: holes of whole lines in held-out functions, with as many masks as the tokenizer needs."""

from __future__ import annotations

import ast

import pytest

from tokenry.workloads import examples, functions, infill


@pytest.mark.parametrize("lines", [1, 3])
def test_a_hole_filled_with_its_answer_is_a_held_out_function(lines):
    pool = set(functions("test"))
    for example in examples("infill", 30, lines=lines):
        assert example.prompt.count(infill.MASK) == 1
        whole = example.prompt.replace(infill.MASK, example.answer)
        assert whole.removesuffix("\n") in pool
        ast.parse(whole)
        assert example.answer.count("\n") == lines - 1 and example.answer[0].strip() and example.answer.strip()
        before, after = example.prompt.split(infill.MASK)
        assert before.strip() and after.startswith("\n") and after.strip()
        assert example.check(example.answer) == 1 and example.check(example.answer[:-1]) == 0


def test_a_hole_has_a_mask_for_each_token():
    class Letters:
        mask_token = "[M]"

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [*text, *["end"] * add_special_tokens]}

    (example,) = examples("infill", 1)
    text = infill.with_masks(example, Letters())
    assert text.count("[M]") == len(example.answer) and text.replace("[M]", "") == example.prompt.replace("<mask>", "")
