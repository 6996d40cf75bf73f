"""Models by name: what loads, and what is refused with which words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError

from tests import tiny
from tokenry.errors import MissingTokenizer, ResourceError
from tokenry.models import anatomy, bundled, load, path, resource, weights_hash

load_module = sys.modules["tokenry.models.load"]  # the package gives the function that name


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


def test_what_is_no_model_folder_is_refused_before_the_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(load_module, "_ask_hub", lambda *args: pytest.fail("the hub was asked"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "file.gguf").write_text("")
    monkeypatch.chdir(tmp_path)
    for name, words in (
        ("sub", "no config.json"), ("./nope", "no such folder"), (tmp_path / "nope", "no such folder"),
        (Path("nope/model"), "no such folder"), ("", "no such folder"), ("file.gguf", "is a file: give the folder"),
        ("x" * 5000, "cannot be read: File name too long"),
    ):  # fmt: skip
        with pytest.raises(ResourceError, match=words):
            load(name)

    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", denied)
    with pytest.raises(ResourceError, match=r"'\./locked' cannot be read: Permission denied"):
        load("./locked")


class _Hub:
    """A hub that gives one answer, and notes what it was asked."""

    def __init__(self, monkeypatch, answer):
        self.answer, self.asked = answer, []
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", self._model_info)
        self.loaded = []
        monkeypatch.setattr(load_module.AutoTokenizer, "from_pretrained", self._load)

    def _model_info(self, name, **options):
        assert options["timeout"] <= 10
        self.asked.append(name)
        if self.answer is not None:
            raise self.answer

    def _load(self, name, **options):
        self.loaded.append((name, options.get("local_files_only", False)))
        raise OSError("stop here")


def _response(status):
    from types import SimpleNamespace

    return SimpleNamespace(status_code=status, headers={}, request=None, url="")


def test_the_hub_is_asked_once_and_briefly(monkeypatch, tmp_path):
    """Ids without a slash, such as gpt2, are real ones too."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub = _Hub(monkeypatch, ConnectionError("no network"))
    for name, guess in (
        ("cod", r"did you mean tokenry/code\?"), ("code-drafd", r"did you mean tokenry/code-draft\?"),
        ("zzz", "'zzz':"), ("own/zzz", "'own/zzz':"),
    ):  # fmt: skip
        with pytest.raises(ResourceError, match=rf"no model .*{guess}.*the hub does not answer \(no network\)"):
            load(name)
    assert len(hub.asked) == 4 and hub.loaded == []
    with pytest.raises(ResourceError, match=r"nor can it be a hub id; give a bundled name.*\./my-model.*owner/name"):
        load("no such model!")
    hub.answer = RepositoryNotFoundError("404", response=_response(404))
    with pytest.raises(ResourceError, match="the hub has none of that name"):
        load("gpt3")
    assert hub.loaded == []
    hub.answer = None
    with pytest.raises(ResourceError, match="cannot load 'gpt2': stop here"):
        load("gpt2")
    assert hub.loaded == [("gpt2", False)]


def test_a_copy_serves_where_the_hub_does_not_answer(monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **options: "config.json")
    hub = _Hub(monkeypatch, ConnectionError("no network"))
    with pytest.raises(ResourceError, match="stop here"):
        load("gpt2")
    assert hub.loaded == [("gpt2", True)]


def test_broken_files_are_named(folder):
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ResourceError, match="cannot load a causal model from"):
        load(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(MissingTokenizer, match="no tokenizer that loads"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ResourceError, match=r"the config\.json of .* is not JSON"):
        load(folder)


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
