import math

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.decoding import byte_tokenizers as kinds
from tests.evaluation import tiny_text
from tokenry.decoding import ByteView
from tokenry.errors import UnsupportedModel
from tokenry.vocabulary import ByteVocabulary, token_bytes


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


@pytest.mark.parametrize("lead", ("", " "))
def test_added_pieces_of_blanks_spell_blanks(lead):
    """As in Gemma's tokenizers, pieces of the vocabulary that are added tokens too and not special; and matched behind
    the normalizer, where no blank is put in front."""
    tokenizer = kinds.sentence_piece([("\u2581", "\u2581"), ("\u2581", "a")])
    if not lead:
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.add_tokens([AddedToken("\u2581\u2581", normalized=not lead, special=False)])
    number = tokenizer.convert_tokens_to_ids("\u2581\u2581")
    vocabulary = ByteVocabulary(tokenizer)
    assert vocabulary.bytes_of[number] == b"  " and vocabulary.lead == lead.encode()
    text = "a   a"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert number in ids and vocabulary.spelled(ids) == f"{lead}{text}".encode()
    assert tokenizer.decode(ids) == text
    view = ByteView(kinds.model(tokenizer), tokenizer)
    assert view.vocabulary.encode(f"{lead}{text}".encode()) == ids
    assert math.exp(view.log_prob(text)) > 0


def test_added_tokens_of_byte_level_tokenizers_are_text_as_it_stands():
    other = tiny_text.tokenizer()
    other.add_tokens([AddedToken("é  \u2581", special=False)])
    assert token_bytes(other)[-1] == "é  \u2581".encode()


def test_other_tokenizers_are_refused():
    built = Tokenizer(models.WordLevel(vocab={"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(UnsupportedModel, match="byte-level"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=built))
