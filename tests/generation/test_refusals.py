"""What no decoder serves is refused by name, before anything runs."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, T5Config, T5ForConditionalGeneration

from tests import tiny
from tokenry.errors import BadParameter, BadPrompt, CacheMisuse, UnsupportedModel
from tokenry.generation import Options, Plain
from tokenry.kvcache import H2O
from tokenry.speculation import PromptLookup


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "static"),
        ({"cache_implementation": "offloaded"}, "offloaded"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"tokenry_options": {"seed": 1}}, "tokenry_options"),
        ({"tokenry_options": Options(resources={"tabel": 1})}, "'tabel' is no resource of"),
        ({"max_new_tokens": 10**11}, "lower max_new_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("method", [Plain(), PromptLookup()], ids=str)
def test_options_that_cannot_be_honoured(options, word, method):
    model = tiny.model()
    before = model.config._attn_implementation
    with pytest.raises(BadParameter, match=word):
        model.generate(**tiny.prompts((5,)), custom_generate=method, **{"max_new_tokens": 3, **options})
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"seed": "x"}, "seed='x' is not allowed"),
        ({"seed": 1.5}, "seed=1.5 is not allowed"),
        ({"resources": None}, "resources=None is not allowed"),
        ({"stream": 3}, "stream=3 is not allowed"),
    ],
    ids=str,
)
def test_options_of_this_door_that_are_of_no_use(given, words):
    with pytest.raises(BadParameter, match=words):
        Options(**given)


@pytest.mark.parametrize("cls", [Plain, PromptLookup, H2O])
def test_a_class_instead_of_a_method(cls):
    with pytest.raises(BadParameter, match=rf"{cls.__name__} takes its parameters by name, not a LlamaForCausalLM"):
        tiny.model().generate(**tiny.prompts((5,)), custom_generate=cls, max_new_tokens=3)
    assert copy.deepcopy(cls()) == pickle.loads(pickle.dumps(cls())) == cls()


def test_a_policy_around_what_is_no_model():
    with pytest.raises(BadParameter, match=r"H2O takes its parameters by name.*with H2O\(budget=\.\.\.\)\(model\)"):
        H2O(tiny.model())
    with pytest.raises(BadParameter, match=r"'tokenry/code'.*tokenry\.load"), H2O(budget=64)("tokenry/code"):
        pass


def test_embeddings_without_ids():
    model = tiny.model()
    with pytest.raises(BadParameter, match="inputs_embeds"):
        model.generate(inputs_embeds=torch.randn(1, 4, 32), custom_generate=PromptLookup(), max_new_tokens=3)


def test_models_that_do_not_fit():
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(UnsupportedModel, match="encoder"):
        t5.generate(torch.tensor([[3, 4]]), custom_generate=Plain(), max_new_tokens=3)
    with pytest.raises(UnsupportedModel, match="without one"):
        tiny.model("mamba").generate(**tiny.prompts((5,)), custom_generate=Plain(), max_new_tokens=3)
    with pytest.raises(UnsupportedModel, match="Bloom"):
        tiny.model("bloom").generate(**tiny.prompts((5,)), custom_generate=PromptLookup(), max_new_tokens=3)


def test_caches_that_do_not_fit():
    model, inputs = tiny.model(), tiny.prompts((5,))

    class Other(QuantizedCache):
        def __init__(self):
            self.layers = []

    with pytest.raises(BadParameter, match="Other"):
        model.generate(**inputs, custom_generate=Plain(), max_new_tokens=3, past_key_values=Other())
    full = model.generate(**inputs, custom_generate=Plain(), max_new_tokens=3, return_dict_in_generate=True)
    cache = full.past_key_values
    with H2O(budget=16)(model), pytest.raises(CacheMisuse, match="already holds"):
        model.generate(full.sequences, custom_generate=Plain(), max_new_tokens=3, past_key_values=cache)
    with pytest.raises(CacheMisuse, match="whole prompt"):
        model.generate(
            full.sequences[:, :7], custom_generate=PromptLookup(), max_new_tokens=3, past_key_values=DynamicCache(
                [(layer.keys, layer.values) for layer in cache.layers]
            ),
        )  # fmt: skip


def test_right_padding_and_own_positions():
    model = tiny.model()
    ids = torch.tensor([[4, 5, 6], [7, 8, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(BadPrompt, match="left"):
        model.generate(ids, attention_mask=mask, custom_generate=PromptLookup(), max_new_tokens=3)
    with pytest.raises(BadPrompt, match="row 1 of the batch is empty"):
        mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
        model.generate(ids, attention_mask=mask, custom_generate=PromptLookup(), max_new_tokens=3)
    with pytest.raises(BadParameter, match="position_ids"):
        model.generate(
            ids[:1], position_ids=torch.tensor([[3, 4, 5]]), custom_generate=PromptLookup(), max_new_tokens=3
        )
