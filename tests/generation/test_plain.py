"""Plain equals transformers' own loop to the bit, whatever is asked of it."""

import pytest
import torch
from transformers import DynamicCache
from transformers.generation import StoppingCriteria

from tests import tiny
from tokenry.generation import NO_SOURCE, GenerationResult, Plain, Source
from tokenry.models import TokenCache

EOS = [5, 9, 30, 31, 32, 33]
RECORDS = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}


def both(model, inputs, **options):
    results = []
    for extra in ({}, {"custom_generate": Plain()}):
        torch.manual_seed(11)
        results.append(model.generate(**inputs, **options, **extra))
    return results


def assert_same(ours, theirs):
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("logits", "scores"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert len(mine) == len(other)
        assert all(map(torch.equal, mine, other))
    for mine, other in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        assert type(mine) is type(other)
        assert torch.equal(mine.keys, other.keys) and torch.equal(mine.values, other.values)


@pytest.mark.parametrize("kind", [*tiny.SERVED, "bloom"])
def test_greedy_equals_transformers_in_every_record(kind):
    theirs, ours = both(
        tiny.model(kind), tiny.prompts((10, 6, 3)), max_new_tokens=14, do_sample=False, eos_token_id=EOS, **RECORDS
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20, "temperature": 0.8},
        {"do_sample": True, "top_p": 0.9, "num_return_sequences": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"min_new_tokens": 8},
        {"prefill_chunk_size": 4},
        {"max_length": 11},
        {"bad_words_ids": [[7], [8, 9]], "suppress_tokens": [11, 12]},
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(9,), (9, 4)], ids=str)
def test_options_equal_transformers(options, lengths):
    length = {} if "max_length" in options else {"max_new_tokens": 14}
    options = {"do_sample": False, "eos_token_id": EOS} | length | options
    theirs, ours = both(tiny.model(), tiny.prompts(lengths), **options, **RECORDS)
    assert_same(ours, theirs)


def test_a_tensor_comes_back_unless_a_dict_is_asked_for():
    model, inputs = tiny.model(), tiny.prompts((5,))
    assert isinstance(model.generate(**inputs, custom_generate=Plain(), max_new_tokens=3), torch.Tensor)
    result = model.generate(**inputs, custom_generate=Plain(), max_new_tokens=3, return_dict_in_generate=True)
    assert isinstance(result, GenerationResult) and result.logits is None and result.scores is None


def test_sources_and_counts():
    result = tiny.model().generate(
        **tiny.prompts((6, 4)), custom_generate=Plain(), max_new_tokens=5, return_dict_in_generate=True
    )
    assert result.sources.shape == result.sequences.shape
    assert (result.sources[:, :6] == NO_SOURCE).all() and (result.sources[:, 6:] == Source.PLAIN).all()
    assert result.stats.committed == 10 and result.stats.forwards == 5 and result.stats.tokens_per_pass == 1
    assert result.new_tokens == result.sequences[:, 6:].tolist()
    assert result.stats.kv_bytes == result.stats.kv_peak_bytes == 2 * 3 * 2 * 2 * 10 * 8 * 4
    assert "10 tokens in 5 passes" in str(result)


class _After(StoppingCriteria):
    """Stops a row whose last two ids are given; reads scores as a criterion may."""

    def __init__(self, pair):
        self.pair = torch.tensor(pair)
        self.widths = []

    def __call__(self, input_ids, scores, **kwargs):
        self.widths.append((input_ids.shape, len(scores or ())))
        return (input_ids[:, -2:] == self.pair).all(1)


def test_other_criteria_see_what_transformers_shows_them():
    model, inputs = tiny.model(), tiny.prompts((6, 6))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 5}
    free = model.generate(**inputs, **options)
    pair = free[1, 10:12].tolist()
    seen = []
    for extra in ({}, {"custom_generate": Plain()}):
        criterion = _After(pair)
        seen.append(
            (model.generate(**inputs, **options, **RECORDS, stopping_criteria=[criterion], **extra), criterion.widths)
        )
    assert_same(seen[1][0], seen[0][0])
    assert seen[0][1] == seen[1][1]


@pytest.mark.parametrize("whole", [True, False])
def test_continuing_from_a_cache_equals_continuing_plainly(whole):
    model, inputs = tiny.model(), tiny.prompts((7, 5))
    first = model.generate(**inputs, max_new_tokens=6, custom_generate=Plain(), return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.tensor([[20, 21, 22], [23, 24, 25]])], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 9, dtype=torch.long)], 1)
    held = first.past_key_values.get_seq_length()
    results = []
    for extra in ({}, {"custom_generate": Plain()}):
        cache = DynamicCache(config=model.config)
        for number, layer in enumerate(first.past_key_values.layers):
            cache.update(layer.keys.clone(), layer.values.clone(), number)
        ids = more if whole else more[:, held:]
        results.append(
            model.generate(
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False, **RECORDS, **extra
            )
        )
    assert_same(results[1], results[0])


def test_a_passed_cache_is_filled():
    model, inputs = tiny.model(), tiny.prompts((7,))
    for cache in (DynamicCache(config=model.config), TokenCache(model)):
        model.generate(**inputs, max_new_tokens=4, custom_generate=Plain(), past_key_values=cache)
        assert cache.get_seq_length() == 10
