"""Figures against what can be computed by hand."""

import gzip
import math

import pytest
import torch

from tests.evaluation import tiny_text
from tokenry.errors import BadParameter, BadPrompt
from tokenry.evaluation.metrics import (
    Lossless,
    Spread,
    agreement,
    bits_per_byte,
    check_lossless,
    compressed_bits_per_byte,
    first_difference,
    ulp,
)
from tokenry.evaluation.running import deal
from tokenry.kvcache import Sinks

MODEL, TOKENIZER = tiny_text.model(), tiny_text.tokenizer()
TEXT = "def add(a, b):\n    return a + b  # ü\n" * 3


def direct(text):
    """Bits per byte by one forward over the whole text."""
    ids = torch.tensor([[1, *TOKENIZER(text, add_special_tokens=False)["input_ids"]]])
    with torch.inference_mode():
        logs = MODEL(ids).logits[0, :-1].double().log_softmax(-1)
    return -logs.gather(1, ids[0, 1:, None]).sum().item() / math.log(2) / len(text.encode())


def test_bits_per_byte_is_the_likelihood_of_the_text():
    assert bits_per_byte(MODEL, TOKENIZER, TEXT) == pytest.approx(direct(TEXT), abs=1e-5)


def test_bits_per_byte_of_several_texts_weighs_them_by_size():
    texts = [TEXT, "x = 1\n"]
    sizes = [len(text.encode()) for text in texts]
    expected = sum(direct(text) * size for text, size in zip(texts, sizes, strict=True)) / sum(sizes)
    assert bits_per_byte(MODEL, TOKENIZER, texts) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("window,stride", [(16, 8), (16, 15), (40, 7), (500, None)])
def test_every_token_is_scored_once_in_windows(window, stride):
    ids = torch.tensor([[1, *TOKENIZER(TEXT, add_special_tokens=False)["input_ids"]]])[0]
    window_used = min(window, 256)
    step = stride or window_used // 2
    nats, scored = 0.0, 1
    for begin in range(0, len(ids), step):
        piece = ids[begin : begin + window_used]
        with torch.inference_mode():
            logs = MODEL(piece[None]).logits[0].double().log_softmax(-1)
        for place in range(scored, begin + len(piece)):
            nats -= logs[place - 1 - begin, ids[place]].item()
        scored = max(scored, begin + len(piece))
    expected = nats / math.log(2) / len(TEXT.encode())
    assert bits_per_byte(MODEL, TOKENIZER, TEXT, window=window, stride=stride) == pytest.approx(expected, abs=1e-4)


def test_a_policy_with_room_for_all_changes_nothing_and_a_small_one_does():
    plain = bits_per_byte(MODEL, TOKENIZER, TEXT)
    assert bits_per_byte(MODEL, TOKENIZER, TEXT, stepwise=True) == pytest.approx(plain, abs=1e-5)
    assert bits_per_byte(MODEL, TOKENIZER, TEXT, policy=Sinks(budget=200)) == pytest.approx(plain, abs=1e-5)
    assert bits_per_byte(MODEL, TOKENIZER, TEXT, policy=Sinks(budget=8)) != pytest.approx(plain, abs=1e-3)


def test_bits_per_byte_refuses_what_it_cannot_measure():
    with pytest.raises(BadPrompt, match="no text"):
        bits_per_byte(MODEL, TOKENIZER, "")
    with pytest.raises(BadParameter, match="window=1 "):
        bits_per_byte(MODEL, TOKENIZER, TEXT, window=1)
    with pytest.raises(BadParameter, match="from 1 to 15"):
        bits_per_byte(MODEL, TOKENIZER, TEXT, window=16, stride=16)


def test_compressors_are_measured_over_all_texts_as_one_stream():
    found = compressed_bits_per_byte([TEXT, TEXT])
    assert found["gzip"] == 8 * len(gzip.compress((TEXT + TEXT).encode(), 9)) / len((TEXT + TEXT).encode())
    assert set(found) == {"gzip", "xz"}
    with pytest.raises(BadPrompt):
        compressed_bits_per_byte([])


def test_agreement_counts_leading_and_equal_tokens_of_the_longer_output():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert agreement([1, 2, 3, 4], [1, 9, 3, 4]).leading == 0.25
    assert agreement([1, 2, 3, 4], [1, 9, 3, 4]).equal == 0.75
    assert agreement([], []).leading == 1
    assert agreement([1, 2], [1, 2, 3, 4]).leading == 0.5


def test_spread_is_median_and_quartiles():
    assert Spread.of([1, 2, 3, 4, 5]) == Spread(3, 2, 4, 5)
    assert Spread.of([7]) == Spread(7, 7, 7, 1)
    assert math.isnan(Spread.of([]).median)


def test_unit_in_the_last_place():
    for value in (1.0, 1.9, 12.5, 0.3):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            number = torch.tensor(value, dtype=dtype)
            step = torch.nextafter(number, torch.tensor(1e4, dtype=dtype)) - number
            assert ulp(number.item(), dtype) == step.item()


@pytest.mark.parametrize("count,repeats", [(2, 7), (7, 7), (20, 7), (480, 7), (1, 1)])
def test_every_batch_is_dealt(count, repeats):
    dealt = deal(count, repeats)
    assert len(dealt) == repeats and all(dealt)
    assert {batch for pair in dealt for batch in pair} == set(range(count))
    if count >= repeats:
        assert sum(map(len, dealt)) == count


# --- the lossless check ---


def outputs(model, ids, mask, count=12):
    new = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return new[:, ids.shape[1] :].tolist()


def batch():
    ids = torch.tensor([[0, 0, 50, 60, 70], [80, 90, 100, 110, 120]])
    return ids, (ids > 0).long()


def test_equal_outputs_are_lossless():
    ids, mask = batch()
    expected = outputs(MODEL, ids, mask)
    found = check_lossless(MODEL, ids, mask, expected, expected)
    assert found == Lossless(2, 0, 0) and found.ok and str(found) == "yes"


def test_any_difference_breaks_the_promise_in_float32():
    ids, mask = batch()
    expected = outputs(MODEL, ids, mask)
    changed = [row.copy() for row in expected]
    changed[1][3] += 1
    found = check_lossless(MODEL, ids, mask, expected, changed)
    assert found == Lossless(2, 0, 1) and str(found) == "no (1 of 2)"


class Scripted(torch.nn.Module):
    """Stands in for a model whose plain scores are given."""

    dtype = torch.bfloat16

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def generate(self, **options):
        self.asked = options
        return type("Output", (), {"scores": self.scores[: options["max_new_tokens"]]})


@pytest.mark.parametrize("ulps,tie", [(0, True), (4, True), (5, False)])
def test_half_precision_allows_a_difference_at_a_near_tie_only(ulps, tie):
    unit = 2**-7 * 4  # of a bfloat16 between 4 and 8
    sure = torch.tensor([[9.0, 0.0, 0.0]])
    close = torch.tensor([[6.0, 6.0 - ulps * unit, 0.0]])
    model = Scripted([sure, close, sure])
    found = check_lossless(model, torch.ones(1, 2), torch.ones(1, 2), [[0, 0, 0]], [[0, 1, 2]])
    assert found == Lossless(1, int(tie), int(not tie))
    assert model.asked["max_new_tokens"] == 2 and model.asked["do_sample"] is False
    assert str(found) == ("yes, 1 near-tie" if tie else "no (1 of 1)")


def test_an_output_that_ends_early_is_no_tie():
    model = Scripted([torch.tensor([[6.0, 6.0, 0.0]])] * 3)
    assert check_lossless(model, torch.ones(1, 2), torch.ones(1, 2), [[0, 0, 0]], [[0, 0]]).broken == 1
