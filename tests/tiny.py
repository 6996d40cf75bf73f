"""Tiny random models of the architectures that the contracts run over, wide enough in their weights to differ."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
)

VOCABULARY = 97
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
# Freshly initialised weights are so small that attention hardly matters; at this range it decides the output.
_RANGE = 0.35
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

SERVED = ("llama", "gpt2", "qwen3", "mistral", "gemma", "gemma2", "opt", "gpt_neox")
REFUSED = ("bloom", "mamba")


def config(kind: str):
    """The configuration of a tiny model."""
    common = _COMMON | _SPECIAL | {"initializer_range": _RANGE}
    grouped = common | {"num_key_value_heads": 2}
    match kind:
        case "llama":
            return LlamaConfig(**grouped)
        case "gpt2":
            return GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=32,
                n_layer=3,
                n_head=4,
                n_positions=512,
                initializer_range=_RANGE,
                **_SPECIAL,
            )
        case "qwen3":
            return Qwen3Config(**grouped, head_dim=8)
        case "mistral":
            return MistralConfig(**grouped, sliding_window=8)
        case "gemma":
            return GemmaConfig(**common, num_key_value_heads=1, head_dim=8)
        case "gemma2":
            return Gemma2Config(**grouped, head_dim=8, sliding_window=8)
        case "opt":
            return OPTConfig(
                vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
                max_position_embeddings=512, word_embed_proj_dim=32, init_std=_RANGE, **_SPECIAL,
            )  # fmt: skip
        case "gpt_neox":
            return GPTNeoXConfig(**common)
        case "bloom":
            return BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4, **_SPECIAL)
        case "mamba":
            return MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, **_SPECIAL)
    raise ValueError(kind)


def model(kind: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A tiny random model in evaluation mode."""
    torch.manual_seed(seed)
    built = AutoModelForCausalLM.from_config(config(kind)).to(dtype).eval()
    built.generation_config.eos_token_id = None
    return built


def prompts(lengths: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded random prompts of the given lengths: ``input_ids`` and ``attention_mask`` ``[batch, longest]``."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def tokenizer():
    """A tokenizer of the tiny models' ids, some of which spell marks, for methods that read text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = [".", ",", "?", "!", ":", ";", ")"]
    words = ["<pad>", "<bos>", "<eos>", *marks, *(f"w{number}" for number in range(VOCABULARY - 3 - len(marks)))]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
