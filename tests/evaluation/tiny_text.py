"""A byte-level tokenizer and tiny random models that go with it, built without any download."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def model(seed: int = 0, layers: int = 2, dtype: torch.dtype = torch.float32, context: int = 256) -> LlamaForCausalLM:
    """A random Llama with grouped-query attention whose weights are large enough to make outputs differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def folder(path: Path, *, with_tokenizer: bool = True, seed: int = 0, layers: int = 2) -> Path:
    """A model folder as `save_pretrained` writes it."""
    model(seed, layers).save_pretrained(path)
    if with_tokenizer:
        tokenizer().save_pretrained(path)
    return path
