"""`exact-byte-probabilities` as `generate` runs it, on prompts that end within a token."""

from __future__ import annotations

import pytest
import torch

import tokenry
from tests.decoding import byte_tokenizers as kinds
from tokenry.decoding import ByteView, ExactByteProbabilities
from tokenry.errors import BadParameter, TokenryError, UnsupportedModel
from tokenry.kvcache import H2O
from tokenry.vocabulary import token_bytes

CUT = ["def ret", "return valu", "x = val"]


@pytest.fixture(scope="module")
def pair():
    tokenizer = kinds.trained()
    model = kinds.model(tokenizer, torch.float32)
    model.generation_config.eos_token_id = None
    return model, tokenizer


def generate(pair, prompt, method="exact-byte-probabilities", **options):
    return tokenry.generate(*pair, prompt, method=method, **({"max_new_tokens": 10} | options))


def new_bytes(result, tokenizer, row=0):
    spelled = token_bytes(tokenizer)
    return b"".join(spelled[i] for i in result.new_tokens[row])


def test_greedy_bytes_are_the_views_and_rows_do_not_depend_on_each_other(pair):
    """The view chooses byte after byte; here several rows of unequal length share forwards, and tokens come out."""
    model, tokenizer = pair
    together = generate(pair, CUT)
    assert {0, 1, 2} >= set(together.stats.extra["healed"]) and together.past_key_values is None
    for row, prompt in enumerate(CUT):
        alone = generate(pair, prompt)
        assert together.new_tokens[row] == alone.new_tokens[0]
        data = new_bytes(alone, tokenizer)
        context = [tokenizer.bos_token_id] if tokenizer(prompt)["input_ids"][0] == tokenizer.bos_token_id else None
        # Without a beginning-of-text token, the first token of the prompt is the context.
        first = tokenizer(prompt)["input_ids"][:1]
        rest = prompt.encode()[len(token_bytes(tokenizer)[first[0]]) :]
        view = ByteView(model, tokenizer, paths="fast").start(rest, context or first)
        wanted = view.generate(max_bytes=len(data), temperature=0)
        assert wanted.data == data or wanted.ended
        assert alone.sequences[0, : len(tokenizer(prompt)["input_ids"])].tolist() == tokenizer(prompt)["input_ids"]
        assert alone.stats.forwards <= alone.stats.extra["bytes"] + 2


@pytest.mark.parametrize("paths", ("fast", "canonical"))
def test_a_token_across_the_end_of_the_prompt_is_found(pair, paths):
    """Token by token, what the tokenizer never writes can still be chosen; the byte view knows the whole words."""
    model, tokenizer = pair
    whole = tokenizer("def return")["input_ids"]
    piece = tokenizer("def retur")["input_ids"]
    assert whole[: len(piece)] != piece
    spelled = token_bytes(tokenizer)
    shared = next(i for i, (one, two) in enumerate(zip(whole, piece, strict=False)) if one != two)
    target = whole[shared]

    # A model that writes the whole word wherever it can.
    model = kinds.model(tokenizer, torch.float32)
    model.generation_config.eos_token_id = None
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    model.lm_head.bias.data[target] = 60
    plain = generate((model, tokenizer), "def retur", "plain", max_new_tokens=2)
    assert new_bytes(plain, tokenizer) == spelled[target] * 2
    for unit in ("byte", "token"):
        method = ExactByteProbabilities(unit=unit, paths=paths)
        result = generate((model, tokenizer), "def retur", method, max_new_tokens=3)
        assert (b" retur" + new_bytes(result, tokenizer)).startswith(spelled[target] * 2)
        assert result.stats.extra["healed"] == [0]


@pytest.mark.parametrize("unit", ("byte", "token"))
def test_samples_follow_the_byte_view(pair, unit):
    """First bytes of 600 samples against the view by a chi-square test; false alarms once in 10**6, seed fixed."""
    model, tokenizer = pair
    prompt = "return valu"
    ids = tokenizer(prompt)["input_ids"]
    data = prompt.encode()[len(token_bytes(tokenizer)[ids[0]]) :]
    probs = ByteView(model, tokenizer, paths="fast").start(data, ids[:1]).log_probs().exp()
    result = generate(
        pair, prompt, ExactByteProbabilities(unit=unit), do_sample=True, top_k=0, seed=5, max_new_tokens=1,
        num_return_sequences=600,
    )  # fmt: skip
    spelled, symbols = token_bytes(tokenizer), [0, 1, 2]
    counts = torch.zeros(256 + len(symbols), dtype=torch.float64)
    for own in result.new_tokens:
        counts[spelled[own[0]][0] if spelled[own[0]] else 256 + symbols.index(own[0])] += 1
    # Outcomes too rare for the test go into one.
    common = probs * 600 >= 5
    seen = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([probs[common], probs[~common].sum()[None]]) * 600
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    # Wilson and Hilferty's approximation of the quantile; 4.753 is the normal one.
    bound = freedom * (1 - 2 / (9 * freedom) + 4.753 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < bound


def test_ends_and_limits_hold_behind_a_healed_prompt(pair):
    _, tokenizer = pair
    free = generate(pair, CUT)
    assert [len(own) for own in free.new_tokens] == [10, 10, 10]
    end = free.new_tokens[0][4]
    stopped = generate(pair, CUT, eos_token_id=[end, 2])
    for own, whole in zip(stopped.new_tokens, free.new_tokens, strict=True):
        place = whole.index(end) + 1 if end in whole else 10
        assert own == whole[:place]
    text = free.texts()[0]
    mark = text[3:5]
    assert generate(pair, CUT[0], stop_strings=[mark]).texts()[0].startswith(text[: text.index(mark) + 2])
    pieces = []
    streamed = generate(pair, CUT[0], stream=pieces.append)
    assert "".join(pieces) == streamed.text()
    records = generate(pair, CUT[:2], output_logits=True, output_scores=True)
    assert len(records.logits) == len(records.scores) == 10 and records.logits[0].shape == (2, len(tokenizer))


@pytest.mark.parametrize("unit", ("byte", "token"))
def test_the_cache_of_a_prompt_that_ends_on_a_boundary_goes_on(unit):
    """No id reaches over a full stop here, so the prompt's tokens stay, and the cache is the result's."""
    tokenizer = kinds.byte_level([("a", "b"), ("b", "c"), ("ab", "c")], "abc.")
    model = kinds.model(tokenizer)
    model.generation_config.eos_token_id = None
    result = generate((model, tokenizer), ["abcab.", "ab."], ExactByteProbabilities(unit=unit))
    assert result.stats.extra["healed"] == []
    cache = result.past_key_values
    ids = result.sequences
    assert cache.get_seq_length() == ids.shape[1] - 1
    one = generate((model, tokenizer), "abcab.", ExactByteProbabilities(unit=unit))
    with torch.no_grad():
        more = model(one.sequences[:, -1:], past_key_values=one.past_key_values).logits[0, -1]
        whole = model(one.sequences).logits[0, -1]
    assert torch.allclose(more, whole, atol=1e-8)


def test_token_unit_takes_a_forward_a_token(pair):
    result = generate(pair, CUT[0], ExactByteProbabilities(unit="token"), do_sample=True, seed=1, max_new_tokens=20)
    assert result.stats.forwards <= 20 + 3
    canonical = generate(pair, CUT[0], ExactByteProbabilities(unit="token", paths="canonical"), max_new_tokens=8)
    assert canonical.stats.committed == 8


def test_what_cannot_be_served_is_refused(pair):
    model, tokenizer = pair
    with H2O(budget=8)(model), pytest.raises(BadParameter, match="budget above the whole text"):
        generate(pair, "def returns(value):\n    return valu")
    pieces = kinds.word_piece()
    with pytest.raises(UnsupportedModel, match="byte-level"):
        generate((kinds.model(pieces), pieces), "a b")
    inputs = tokenizer(CUT[0], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with pytest.raises(TokenryError, match="none loads"):
        model.generate(**inputs, custom_generate=ExactByteProbabilities(), max_new_tokens=2)
    with pytest.raises(BadParameter, match="prune"):
        ExactByteProbabilities(prune=1.5)
