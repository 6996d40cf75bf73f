"""tokenry.generate: what goes in as text comes out as text, and bad input is refused in words."""

import queue

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from tests.evaluation import tiny_text
from tokenry.errors import BadParameter, BadPrompt, MethodNotFound, PromptTooLong
from tokenry.generation import engine, generate
from tokenry.generation.full import effective, taken
from tokenry.kvcache import H2O
from tokenry.methods import method
from tokenry.models import active_policy

METHODS = ["plain", "token-recycling", "token-recycling:template=20", "prompt-lookup"]


@pytest.fixture(scope="module")
def model():
    return tiny_text.model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_text.tokenizer()


@pytest.mark.parametrize("name", METHODS)
def test_streamed_text_is_the_result(model, tokenizer, name):
    pieces = []
    options = {"max_new_tokens": 40, "do_sample": True, "seed": 4}
    result = generate(model, tokenizer, "abc abc é", method=name, stream=pieces.append, **options)
    assert "".join(pieces) == result.text() and len(pieces) > 1
    assert result.text() in str(result) and "passes" in str(result)


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_gives_every_lossless_method_the_same_samples(model, tokenizer, name):
    options = {"max_new_tokens": 30, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    plain = generate(model, tokenizer, ["one", "another one"], seed=9, **options)
    torch.manual_seed(123)
    other = generate(model, tokenizer, ["one", "another one"], seed=9, method=name, **options)
    assert other.new_tokens == plain.new_tokens
    alone = generate(model, tokenizer, "one", seed=9, method=name, **options)
    assert alone.new_tokens[0] == plain.new_tokens[0]
    assert generate(model, tokenizer, "one", seed=10, **options).new_tokens != alone.new_tokens


@pytest.mark.parametrize("name", METHODS)
def test_stop_strings_end_the_text(model, tokenizer, name):
    free = generate(model, tokenizer, "abc", max_new_tokens=30)
    stop = free.text()[10:13]
    result = generate(model, tokenizer, "abc", method=name, max_new_tokens=30, stop_strings=stop)
    end = free.text().index(stop) + len(stop)
    assert result.text() == free.text()[:end]


def test_a_streamer_of_transformers_gets_the_ids(model, tokenizer):
    class Collector(BaseStreamer):
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.ended = True

    for name in ("stream", "streamer"):
        collector = Collector()
        result = generate(model, tokenizer, "abc", method="prompt-lookup", max_new_tokens=9, **{name: collector})
        assert collector.got == result.sequences[0].tolist() and collector.ended


def test_kinds_of_prompts(model, tokenizer):
    ids = tokenizer("abc")["input_ids"]
    wanted = generate(model, tokenizer, "abc", max_new_tokens=5).new_tokens
    for prompt in (ids, [ids], torch.tensor(ids), torch.tensor([ids]), ["abc"]):
        assert generate(model, tokenizer, prompt, max_new_tokens=5).new_tokens == wanted
    assert generate(model, None, ids, max_new_tokens=5).new_tokens == wanted
    batch = generate(model, tokenizer, ["abc", "a longer one"], max_new_tokens=5)
    assert batch.new_tokens[0] == wanted[0] and len(batch.texts()) == 2


def test_tensors_arrays_and_what_a_tokenizer_gives(model, tokenizer):
    texts = ["abc", "a longer one"]
    wanted = generate(model, tokenizer, texts, max_new_tokens=5).new_tokens
    rows = tokenizer(texts)["input_ids"]
    right = tiny_text.tokenizer()
    right.padding_side = "right"
    batches = [
        tokenizer(texts),
        tokenizer(texts, padding=True, return_tensors="pt"),
        right(texts, padding=True, return_tensors="np"),
        dict(right(texts, padding=True)),
        [torch.tensor(row) for row in rows],
        [np.array(row) for row in rows],
        tuple(map(tuple, rows)),
    ]
    for prompt in batches:
        assert generate(model, tokenizer, prompt, max_new_tokens=5).new_tokens == wanted
    for prompt in (tokenizer("abc"), np.array(rows[0]), np.array([rows[0]], dtype=np.int32), list(np.array(rows[0]))):
        assert generate(model, tokenizer, prompt, max_new_tokens=5).new_tokens == wanted[:1]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (b"abc", "bytes are not a prompt"),
        (bytearray(b"abc"), "bytes are not a prompt"),
        ([b"abc"], "neither text nor integer ids"),
        ([True, False], "neither text nor integer ids"),
        (torch.tensor([True, False]), "neither text nor integer ids"),
        (torch.tensor([1.0, 2.0]), "neither text nor integer ids"),
        (torch.ones(1, 2, 2, dtype=torch.long), "neither text nor integer ids"),
        (torch.tensor(3), "cannot be read"),
        ({"role": "user", "content": "hi"}, "mapping of role, content"),
        ({"input_ids": [[3]], "pixel_values": [[0.0]]}, "mapping of input_ids, pixel_values"),
        ({"input_ids": [[3, 4]], "attention_mask": [[1]]}, "shape of the ids"),
        ({"input_ids": [[3, 4]], "attention_mask": [[1, 1], [1, 1]]}, "shape of the ids"),
        ({"input_ids": [[3, 4]], "attention_mask": [[0, 0]]}, "is empty"),
        ("def \ud83d x", "half of a character.*at place 5"),
        (["fine", "caf\udce9"], "half of a character.*at place 4"),
    ],
)
def test_prompts_that_cannot_be_read(model, tokenizer, prompt, message):
    with pytest.raises(BadPrompt, match=message):
        generate(model, tokenizer, prompt, max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_model": object()}, r"draft-model.*transformers-assisted"),
        ({"custom_generate": method("plain")}, r"custom_generate is not allowed.*method="),
        ({"input_ids": torch.tensor([[3]])}, "input_ids is not allowed.*as the prompt"),
        ({"attention_mask": torch.tensor([[1]])}, "attention_mask is not allowed.*as the prompt"),
        ({"tokenry_options": {}}, "tokenry_options is not allowed.*seed="),
        ({"return_dict_in_generate": False}, "return_dict_in_generate=False.*sequences"),
        ({"streamer": print}, "must have put and end"),
        ({"streamer": queue.Queue()}, "must have put and end"),
        ({"stream": queue.Queue()}, "stream=.*function that takes a text"),
        ({"stream": print, "streamer": BaseStreamer()}, "both given"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens=2\.5 is not allowed; it must be an integer"),
        ({"max_new_tokens": True}, "max_new_tokens=True is not allowed"),
        ({"max_length": "9"}, "max_length='9' is not allowed"),
        ({"seed": 1.5}, r"seed=1\.5 is not allowed"),
        ({"seed": "1"}, "seed='1' is not allowed"),
        ({"method": "token-recycling", "resources": {"tabel": 1}}, "'tabel' is no resource.*'table'"),
        ({"method": "draft-model+h2o", "resources": {"drafts": 1}}, "'drafts' is no resource.*'draft'"),
        ({"method": "token-recycling", "resources": {"draft": 1}}, "'draft' is no resource of tok.*; it takes 'table'"),
        ({"resources": {"draft": 1}}, "'draft' is no resource of plain; it takes none"),
        ({"stop_strings": [3]}, "stop_strings=.3. is not allowed"),
        ({"method": "any-subset-speculative-decoding"}, "it is an infiller"),
    ],
)
def test_options_that_would_be_lost_or_clash(model, tokenizer, options, message):
    with pytest.raises(BadParameter, match=message):
        generate(model, tokenizer, "a", **({"max_new_tokens": 2} | options))


def test_options_that_change_nothing(model, tokenizer):
    wanted = generate(model, tokenizer, "abc", max_new_tokens=3)
    options = {"return_dict_in_generate": True, "assistant_model": None, "stop_strings": [], "streamer": None}
    assert generate(model, tokenizer, "abc", max_new_tokens=np.int64(3), **options).new_tokens == wanted.new_tokens
    # One set of resources may serve several methods.
    shared = taken(method("plain"), {"draft": model, "tokenizer": tokenizer})
    assert generate(model, tokenizer, "abc", max_new_tokens=3, resources=shared).new_tokens == wanted.new_tokens
    assert set(shared) == {"tokenizer"} and set(taken(method("draft-model+h2o"), {"draft": 1, "table": 2})) == {"draft"}


def test_a_name_is_no_model(tokenizer):
    with pytest.raises(BadParameter, match=r"'tokenry/code' is not a model.*tokenry\.load"):
        generate("tokenry/code", tokenizer, "a")


def test_cntp_samples_unless_told_otherwise(model, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(engine, "_warned", set())

    def said():
        return {record.message for record in caplog.records if record.name == "tokenry"}

    def run(**options):
        return generate(model, tokenizer, "abc", method="cntp", seed=3, max_new_tokens=12, **options).new_tokens

    sampled, greedy = run(do_sample=True), generate(model, tokenizer, "abc", max_new_tokens=12).new_tokens
    assert sampled != greedy
    assert run() == run(generation_config=GenerationConfig()) == sampled
    assert not said()
    assert run(do_sample=False) == run(generation_config=GenerationConfig(do_sample=False)) == greedy
    assert said() == {"cntp chooses among samples, and do_sample is off: it decodes as plain does; say do_sample=True"}


def test_chat(model):
    tokenizer = tiny_text.tokenizer()
    message = [{"role": "user", "content": "hi"}]
    with pytest.raises(BadPrompt, match="chat template"):
        generate(model, tokenizer, message)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    with pytest.raises(BadPrompt, match="half of a character"):
        generate(model, tokenizer, [{"role": "user", "content": "\ud83d"}])
    result = generate(model, tokenizer, message, max_new_tokens=4)
    assert result.new_tokens == generate(model, tokenizer, "<user>hi>", max_new_tokens=4).new_tokens


def test_length_that_is_given_nowhere(model, tokenizer):
    assert generate(model, tokenizer, "a").stats.committed <= 128
    assert generate(model, tokenizer, [5] * 250, eos_token_id=None).stats.committed == 6


def test_bad_input(model, tokenizer):
    before = model.config._attn_implementation, [len(module._forward_pre_hooks) for module in model.modules()]
    for empty in ("", [], ["a", ""], [[]], torch.empty(1, 0, dtype=torch.long)):
        with pytest.raises(BadPrompt, match="empty"):
            generate(model, tokenizer, empty)
    with pytest.raises(PromptTooLong, match="context is 256"):
        generate(model, tokenizer, "a" * 250, max_new_tokens=7)
    with pytest.raises(PromptTooLong, match="context is 256"):
        generate(model, tokenizer, "a" * 256)
    with pytest.raises(BadPrompt, match="another tokenizer"):
        generate(model, tokenizer, [3, 400])
    with pytest.raises(BadPrompt, match="mixes"):
        generate(model, tokenizer, ["a", 3])
    with pytest.raises(BadPrompt, match="tokenizer"):
        generate(model, None, "a")
    with pytest.raises(BadParameter, match="one prompt"):
        generate(model, tokenizer, ["a", "b"], stream=print)
    with pytest.raises(BadParameter, match="stop_strings"):
        generate(model, None, [4, 5], stop_strings="x")
    for empty in ("", ["x", ""]):
        with pytest.raises(BadParameter, match="empty string"):
            generate(model, tokenizer, [4, 5], stop_strings=empty)
    with pytest.raises(MethodNotFound, match="did you mean plain"):
        generate(model, tokenizer, "a", method="plane")
    after = model.config._attn_implementation, [len(module._forward_pre_hooks) for module in model.modules()]
    assert after == before and active_policy(model) is None


@pytest.mark.parametrize("name", METHODS)
def test_no_ids_at_the_native_door(model, name):
    with pytest.raises(BadPrompt, match="prompt is empty"):
        model.generate(torch.empty(1, 0, dtype=torch.long), max_new_tokens=4, custom_generate=method(name))


@pytest.mark.parametrize("name", METHODS)
def test_a_policy_alone_or_with_a_decoder(model, tokenizer, name):
    before = model.config._attn_implementation
    with H2O(budget=24)(model):
        assert active_policy(model) is not None
        wanted = generate(model, tokenizer, "abcdefgh" * 6, method=name, max_new_tokens=20).new_tokens
    for form in (f"{name}+h2o:budget=24", *(["h2o:budget=24"] if name == "plain" else [])):
        result = generate(model, tokenizer, "abcdefgh" * 6, method=method(form), max_new_tokens=20)
        assert result.new_tokens == wanted
        assert active_policy(model) is None and model.config._attn_implementation == before


def test_speculation_with_eviction_equals_eviction_alone(model, tokenizer):
    policy, prompt = "h2o:budget=24;compact_every=8", "abab" * 12
    alone = generate(model, tokenizer, prompt, method=policy, max_new_tokens=40)
    for name in METHODS[1:]:
        both = generate(model, tokenizer, prompt, method=f"{name}+{policy}", max_new_tokens=40)
        assert both.method == str(method(f"{name}+{policy}"))
        assert both.new_tokens == alone.new_tokens
        kept, wanted = both.past_key_values.kept_positions(), alone.past_key_values.kept_positions()
        assert all(map(torch.equal, kept, wanted))


def test_new_tokens_below_one_are_refused(model, tokenizer):
    for options in ({"max_new_tokens": 0}, {"max_new_tokens": -1}, {"max_length": 0}):
        with pytest.raises(BadParameter, match="must be at least 1"):
            generate(model, tokenizer, "a", **options)


def test_a_policy_beside_a_drafter_drops_every_16(model, tokenizer):
    asked = "token-recycling+h2o:budget=24"
    assert str(effective(asked)) == f"{asked};compact_every=16"
    for same in ("plain+h2o:budget=24", "h2o:budget=24", "token-recycling", f"{asked};compact_every=4"):
        assert str(effective(same)) == same
    assert generate(model, tokenizer, "abab" * 12, method=asked, max_new_tokens=4).method == str(effective(asked))
