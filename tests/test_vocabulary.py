import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.evaluation import tiny_text
from tokenry.errors import UnsupportedModel
from tokenry.vocabulary import token_bytes


def test_byte_level_ids_spell_the_text():
    tokenizer = tiny_text.tokenizer()
    table = token_bytes(tokenizer)
    text = "def f():\n\treturn 'é→'"
    assert b"".join(table[i] for i in tokenizer(text)["input_ids"]).decode() == text
    assert table[:3] == [b"", b"", b""]
    assert sorted(table[3:]) == [bytes([b]) for b in range(256)]


def test_sentence_pieces_and_their_byte_fallback():
    built = Tokenizer(models.BPE(vocab={"<unk>": 0, "\u2581a": 1, "<0x0A>": 2, "b": 3}, merges=[], byte_fallback=True))
    built.normalizer = normalizers.Replace(" ", "\u2581")
    built.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>")
    assert token_bytes(tokenizer) == [b"", b" a", b"\n", b"b"]


def test_other_tokenizers_are_refused():
    built = Tokenizer(models.WordLevel(vocab={"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(UnsupportedModel, match="byte-level"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=built))
