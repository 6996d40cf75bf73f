"""What every decoder promises, on every architecture that it serves."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import StaticCache
from transformers.generation import StoppingCriteria

from tests import tiny
from tests.contracts.registered import drafters, made, registered, resources
from tokenry.errors import BadParameter, TokenryError, UnsupportedModel
from tokenry.generation import GenerationResult
from tokenry.generation.engine import Options
from tokenry.kvcache import H2O

NEW = 20
EVERY = [made(cls) for cls in registered("decoder")]
DRAFTERS = [made(cls) for cls in drafters()]
TOKENIZER = tiny.tokenizer()
# No layer of it is ruled by a cache policy, which drafts here.
REFUSED = {("self-draft", "mistral")}


def generate(method, model, inputs, **options):
    """Generate through the native door, with what methods may ask for at hand."""
    settings = {"max_new_tokens": NEW, "do_sample": False} | options
    extra = Options(seed=settings.pop("seed", None), resources={"tokenizer": TOKENIZER, **resources(method, model)})
    return model.generate(**inputs, custom_generate=method, tokenry_options=extra, **settings)


class Pair(StoppingCriteria):
    """Ends a row whose last two tokens are the given ones, as a stop string of two tokens does."""

    def __init__(self, first: torch.Tensor, second: torch.Tensor) -> None:
        self.pair = torch.stack([first, second])

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return (input_ids[:, -2:] == self.pair).all(-1)


@pytest.mark.parametrize("kind", tiny.SERVED)
@pytest.mark.parametrize("method", EVERY, ids=str)
def test_greedy_is_transformers_greedy_for_a_padded_batch(method, kind):
    """Decoders that sample among continuations have nothing to choose greedily; drafters are lossless."""
    model = tiny.model(kind)
    inputs = tiny.prompts((24, 13, 18, 6))
    if (method.slug, kind) in REFUSED:
        with pytest.raises(UnsupportedModel, match="every layer of MistralForCausalLM has a sliding window"):
            generate(method, model, inputs)
        return
    wanted = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
    assert torch.equal(generate(method, model, inputs), wanted)
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert not model._forward_pre_hooks and not model.base_model._forward_pre_hooks


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_several_end_tokens_and_other_criteria_end_each_row_where_plain_ends_it(method):
    model = tiny.model()
    inputs = tiny.prompts((24, 13, 18))
    free = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)[:, 24:]
    ends = [int(free[0, 5]), int(free[1, 9])]
    options = {"eos_token_id": ends, "pad_token_id": 0}
    wanted = model.generate(**inputs, do_sample=False, max_new_tokens=NEW, **options)
    assert torch.equal(generate(method, model, inputs, **options), wanted)
    stop = {"stopping_criteria": [Pair(free[0, 7], free[0, 8])], "pad_token_id": 0}
    got = generate(method, model, inputs, **stop)
    # transformers' own loop lets such a row run on while others are unfinished; it ends here all the same.
    assert torch.equal(got[0, 24:33], free[0, :9]) and bool((got[0, 33:] == 0).all())
    assert torch.equal(got[1:, 24:], free[1:])


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_processors_that_read_the_text_see_what_plain_sees(method):
    model = tiny.model()
    inputs = tiny.prompts((24, 13))
    for options in (
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 3},
        {"min_new_tokens": 12, "eos_token_id": list(range(3, 40)), "pad_token_id": 0},
        {"bad_words_ids": [[5], [6, 7]], "repetition_penalty": 1.2},
    ):
        wanted = model.generate(**inputs, do_sample=False, max_new_tokens=NEW, **options)
        assert torch.equal(generate(method, model, inputs, **options), wanted)


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_the_returned_cache_goes_on_as_plains(method):
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((24,))
    options = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    got = generate(method, model, inputs, **options)
    wanted = model.generate(**inputs, do_sample=False, max_new_tokens=NEW, **options)
    assert isinstance(got, GenerationResult)
    assert got.past_key_values.get_seq_length() == got.sequences.shape[1] - 1
    for mine, theirs in ((got.logits, wanted.logits), (got.scores, wanted.scores)):
        assert len(mine) == len(theirs) == NEW
        assert torch.allclose(torch.stack(mine), torch.stack(theirs), atol=1e-4)
    assert got.sources.shape == got.sequences.shape
    assert bool((got.sources[:, :24] == -1).all()) and bool((got.sources[:, 24:] >= 0).all())
    more = torch.cat([got.sequences, tiny.prompts((5,), seed=4)["input_ids"]], 1)
    fresh = model.generate(more, do_sample=False, max_new_tokens=NEW)
    for again in (None, method):
        cached = generate(method, model, inputs, return_dict_in_generate=True).past_key_values
        settings = {"past_key_values": cached, "do_sample": False, "max_new_tokens": NEW}
        if again is None:
            assert torch.equal(model.generate(more, **settings), fresh)
        else:
            assert torch.equal(generate(again, model, {"input_ids": more}, past_key_values=cached), fresh)


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_a_chat_of_a_batch_goes_on_from_the_returned_cache(method):
    """Rows end by themselves in each turn, so padding comes to stand between the turns."""
    model = tiny.model(dtype=torch.float64)
    start = tiny.prompts((12, 7, 9), seed=3)
    free = model.generate(**start, do_sample=False, max_new_tokens=9)[:, 12:]
    options = {"eos_token_id": [int(free[0, 4]), int(free[1, 6])], "pad_token_id": 0, "return_dict_in_generate": True}
    chats = []
    for again in (None, method):
        ids, mask, cache, turns = start["input_ids"], start["attention_mask"], None, []
        for turn in range(3):
            settings = options | {"max_new_tokens": 9} | ({} if cache is None else {"past_key_values": cache})
            inputs = {"input_ids": ids, "attention_mask": mask}
            if again is None:
                result = model.generate(**inputs, do_sample=False, **settings)
            else:
                result = generate(again, model, inputs, **settings)
            new, cache = result.sequences[:, ids.shape[1] :], result.past_key_values
            more = tiny.prompts((3, 3, 3), seed=10 + turn)["input_ids"]
            turns.append(new.tolist())
            ids = torch.cat([result.sequences, more], 1)
            mask = torch.cat([mask, (new != 0).long(), torch.ones_like(more)], 1)
        assert not mask[:, 12:].all(), "a row must end before the others in this test"
        chats.append(turns)
    assert chats[0] == chats[1]


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_rows_and_return_sequences_keep_their_order(method):
    model = tiny.model()
    inputs = tiny.prompts((12, 7))
    torch.manual_seed(0)
    out = generate(method, model, inputs, do_sample=True, num_return_sequences=3, max_new_tokens=8)
    assert out.shape == (6, 20)
    for row in range(6):
        assert torch.equal(out[row, :12], inputs["input_ids"][row // 3])
    assert len({tuple(row) for row in out[:3].tolist()}) > 1


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_a_seed_decides_everything(method):
    model = tiny.model()
    inputs = tiny.prompts((12, 7))
    one, two, other = (generate(method, model, inputs, do_sample=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("method", DRAFTERS, ids=str)
def test_a_seeded_drafter_samples_what_plain_samples(method):
    from tokenry.generation import Plain

    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((12, 7))
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 3}
    assert torch.equal(generate(method, model, inputs, **options), generate(Plain(), model, inputs, **options))


@pytest.mark.parametrize("method", DRAFTERS, ids=str)
def test_drafters_never_take_more_passes_than_tokens(method):
    model = tiny.model()
    result = generate(method, model, tiny.prompts((24,)), return_dict_in_generate=True)
    stats = result.stats
    assert stats.committed == NEW
    assert stats.forwards <= NEW
    assert stats.accepted <= stats.drafted


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_a_policy_that_leaves_no_room_for_drafts_is_told_once_for_each_line(method, caplog):
    model, inputs = tiny.model(), tiny.prompts((30,))
    text = Options(resources={"tokenizer": TOKENIZER, **resources(method, model)})

    def said():
        texts = [record.getMessage() for record in caplog.records if record.name == "tokenry"]
        return [text for text in texts if "drafts nothing" in text]

    with caplog.at_level(logging.WARNING, "tokenry"):
        with H2O(budget=24, compact_every=16)(model):
            generate(method, model, inputs)
        assert not said()
        with H2O(budget=24)(model):
            for _ in range(3):
                model.generate(**inputs, custom_generate=method, max_new_tokens=4, tokenry_options=text)
            model.generate(**inputs, custom_generate=method, max_new_tokens=4, tokenry_options=text)
    texts = said()
    assert len(texts) == (2 if method.drafts else 0)
    assert all("h2o" in text and "compact_every=16" in text and method.slug in text for text in texts)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("method", EVERY, ids=str)
def test_half_precision_differs_at_near_ties_alone(method, dtype):
    """The first difference may stand only where plain's two best logits are within four units in the last place."""
    model = tiny.model(dtype=dtype)
    inputs = tiny.prompts((24,))
    got = generate(method, model, inputs, max_new_tokens=40)[0]
    plain = model.generate(
        **inputs, do_sample=False, max_new_tokens=40, return_dict_in_generate=True, output_logits=True
    )
    wanted = plain.sequences[0]
    different = (got != wanted).nonzero()
    if len(different):
        top = plain.logits[int(different[0]) - 24][0].topk(2).values
        unit = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(top[0].abs()))
        assert float(top[0] - top[1]) <= 4 * float(unit)


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_what_cannot_be_honoured_is_refused_and_the_model_left_as_it_was(method):
    model = tiny.model()
    inputs = tiny.prompts((8,))
    for options in (
        {"num_beams": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"output_attentions": True, "return_dict_in_generate": True},
    ):
        with pytest.raises(BadParameter, match="not allowed"):
            generate(method, model, inputs, **options)
    with pytest.raises(TokenryError, match="StaticCache"):
        generate(method, model, inputs, past_key_values=StaticCache(config=model.config, max_cache_len=64))
    with pytest.raises(BadParameter, match="inputs_embeds"):
        generate(method, model, {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])})
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks and not model.base_model._forward_pre_hooks


@pytest.mark.parametrize("kind", tiny.REFUSED)
@pytest.mark.parametrize("method", DRAFTERS, ids=str)
def test_models_that_cannot_be_served_are_refused_by_name(method, kind):
    model = tiny.model(kind)
    with pytest.raises(UnsupportedModel, match=type(model).__name__):
        generate(method, model, tiny.prompts((8,)))


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(method):
    model = tiny.model()

    def fail(ids, scores, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(method, model, tiny.prompts((8,)), stopping_criteria=[fail])
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks and not model.base_model._forward_pre_hooks
