"""Models by name: what loads, and what is refused with which words."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tokenry.errors import MissingTokenizer, ResourceError
from tokenry.models import anatomy, bundled, load, path, resource, weights_hash


@pytest.fixture
def folder(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_loads_as_it_was_saved(folder):
    model, tokenizer = load(folder, dtype=torch.float32)
    assert not model.training and len(tokenizer) == tiny.VOCABULARY
    assert weights_hash(model) == weights_hash(tiny.model())
    assert weights_hash(model) != weights_hash(tiny.model(seed=1))
    again, _ = load(model)
    assert again is model


@pytest.mark.parametrize("kind", tiny.SERVED)
def test_a_folder_without_tokenizer_or_model_is_refused(tmp_path, kind):
    # For some of them transformers makes up an empty tokenizer.
    tiny.model(kind).save_pretrained(tmp_path / "bare")
    with pytest.raises(MissingTokenizer, match="save_pretrained"):
        load(tmp_path / "bare")
    with pytest.raises(ResourceError, match="no model in"):
        load(tmp_path / "nothing")
    with pytest.raises(ResourceError, match="no bundled model 'tokenry/none'"):
        load("tokenry/none")


@pytest.mark.parametrize("kind", tiny.SERVED)
def test_a_tokenizer_that_transformers_makes_up_is_refused(tmp_path, kind):
    model = tiny.model(kind)
    model.save_pretrained(tmp_path)
    # A file of settings alone passes for a tokenizer.
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(MissingTokenizer, match="save_pretrained"):
        load(tmp_path)
    model.name_or_path = str(tmp_path)
    with pytest.raises(MissingTokenizer, match="save_pretrained"):
        load(model)


def test_a_loaded_model_without_a_folder_has_no_tokenizer():
    with pytest.raises(MissingTokenizer, match=r"was not loaded from a folder.*tokenry\.generate\(model, tokenizer"):
        load(tiny.model())


def test_the_home_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load(f"~/{folder.name}")[0].config.vocab_size == tiny.VOCABULARY
    with pytest.raises(ResourceError, match="no model in"):
        load("~/nothing")


def test_second_models_are_loaded_once(folder):
    beside = tiny.model(dtype=torch.float64)
    one = resource(str(folder), beside)
    assert one.dtype == torch.float64 and resource(str(folder), beside) is one
    assert resource(str(folder), tiny.model()) is not one
    assert resource(beside, beside) is beside


@pytest.mark.parametrize("name", bundled())
def test_bundled_models_load_with_what_their_cards_say(name):
    model, tokenizer = load(name)
    assert model.dtype == torch.bfloat16 and model.config.max_position_embeddings >= 2048
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    card = (path(name) / "README.md").read_text()
    assert "bits per byte" in card and "tokenry bench model" in card
    assert tokenizer("x = 1")["input_ids"][0] == tokenizer.bos_token_id
    assert (path(name) / "tokenizer.json").read_bytes() == (path("tokenry/code") / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", tiny.SERVED)
def test_anatomy_finds_every_part(kind):
    model = tiny.model(kind)
    found = anatomy(model)
    assert len(found.layers) == len(found.attention) == len(found.windows) == 3
    assert found.embedding is model.get_input_embeddings()
    assert found.head is model.get_output_embeddings()
    assert found.heads == 4 and found.heads % found.kv_heads == 0 and found.head_dim == 8
    assert (found.rotary is None) == (kind in ("gpt2", "opt"))
    assert any(found.windows) == (kind in ("mistral", "gemma2"))
    assert found.context == 512 or kind == "gemma2"
