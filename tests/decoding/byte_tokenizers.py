"""Small tokenizers of every kind that the byte view meets."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>"]
TEXT = [
    "def returns(value):\n    return value  # the returned value\n\nclass Returning:\n    pass\n",
    "for index, value in enumerate(values):\n    if value == index:\n        print(value, 'été', \"naïve\")\n",
] * 4
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def fast(built: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def byte_level(merges: list[tuple[str, str]], letters: str = "abc") -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few letters, with no look at words."""
    pieces = [*SPECIAL, *letters, *(one + two for one, two in merges)]
    built = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    return fast(built)


def trained(pattern: str | None = _GPT2, size: int = 320) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's cut into words, which looks ahead behind blanks."""
    built = Tokenizer(models.BPE())
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    built.train_from_iterator(TEXT, trainer)
    return fast(built)


def sentence_piece(merges: list[tuple[str, str]], letters: str = "abc") -> PreTrainedTokenizerFast:
    """SentencePiece BPE as Llama 2 has it: a blank in front of every text, bytes for what has no piece."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", *SPECIAL, *fallback, "\u2581", *letters, *(one + two for one, two in merges)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    built.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = fast(built)
    wrapped.add_special_tokens({"unk_token": "<unk>"})
    return wrapped


def unigram(scores: dict[str, float]) -> PreTrainedTokenizerFast:
    """SentencePiece's unigram model with bytes for what has no piece, and no blank in front."""
    special, fallback = ["<unk>", *SPECIAL], [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [(piece, 0.0) for piece in special] + [(piece, -1000.0) for piece in fallback] + list(scores.items())
    built = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    built.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    wrapped = fast(built)
    wrapped.add_special_tokens({"unk_token": "<unk>"})
    return wrapped


def word_piece() -> PreTrainedTokenizerFast:
    pieces = ["[UNK]", *SPECIAL, "a", "##b", "##a"]
    built = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.decoder = decoders.WordPiece()
    return fast(built)


def model(tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype = torch.float64, seed: int = 0, more: int = 0):
    """A random Llama with grouped-query attention over a tokenizer's ids, and `more` logits that belong to none."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + more, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.4,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()
