"""The methods that the contracts run: every one that is registered, those of other packages too."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from tests import tiny
from tokenry.methods import Method, load_class, rows


def registered(role: str) -> list[type[Method]]:
    """Classes of the available methods of a role: ``"decoder"`` or ``"policy"``."""
    classes = [load_class(row.slug) for row in rows()]
    return [cls for cls in classes if cls.role == role]


def drafters() -> list[type[Method]]:
    """Decoders that promise the output of plain decoding by verifying drafts."""
    return [cls for cls in registered("decoder") if getattr(cls, "drafts", False)]


def made(cls: type[Method]) -> Method:
    """A method as the contracts run it: with its defaults, or where those promise nothing, the promise asked for."""
    return cls(**_PROMISES.get(cls.slug, {}))


_PROMISES: dict[str, dict[str, Any]] = {
    "hamburger": {"lossless": True},
    # One answer without texts around it is plain decoding.
    "in-context-navigation": {"rounds": 1, "per_round": 1, "header": "", "item": "", "cue": "", "end": ""},
    "self-draft": {"policy": "sinks", "budget": 8},  # fewer tokens than a tiny prompt has, so that drafts are rejected
    "r2r": {"rule": "random", "threshold": 0.0},  # every token is the model's own
    "skipdecode": {"last": 3},  # all layers of a tiny model
    # One draft without a table is greedy search; two tokens are sampled before it where a call samples.
    "superposed-decoding": {"k": 1, "alpha": 0.0, "prefix": 2},
}


def resources(method: Method, model: PreTrainedModel) -> dict[str, Any]:
    """What a method needs beside a model, with random weights of the model's shape."""
    make = _RESOURCES.get(method.slug)
    return {} if make is None else make(model)


def at_hand(cls: type[Method], model: PreTrainedModel, kind: str = "llama", exact: bool = False) -> None:
    """Hand over what a policy needs beside a model; ``exact``: so that it changes nothing."""
    if cls.slug == "kv-prediction":
        from tests.kvcache.predictors import identical, strange

        (identical(model) if exact else strange(model, kind)).serve(model)


def _future_decoder(model: PreTrainedModel) -> dict[str, Any]:
    from tokenry.speculation.future_token_prediction.model import FTPDecoder, config_for

    settings = {"num_future_tokens": 4, "pseudo_len": 2, "decoder_layers": 1, "decoder_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder: Any = FTPDecoder(config_for(model, **settings, initializer_range=0.3))
    return {"weights": decoder.to(dtype=model.dtype, device=model.device).eval()}


def _mask_adapters(model: PreTrainedModel) -> dict[str, Any]:
    from tests.speculation.test_gated_lora_mtp import random_adapters

    return {"adapter": random_adapters(model)}


def _draft_model(model: PreTrainedModel) -> dict[str, Any]:
    """A model that agrees with a tiny target now and then."""
    with torch.random.fork_rng():
        return {"draft": tiny.model(dtype=model.dtype, seed=1)}


def _small_model(model: PreTrainedModel) -> dict[str, Any]:
    return {"small": _draft_model(model)["draft"]}


def _grafts(model: PreTrainedModel) -> dict[str, Any]:
    """Random grafts on a model that the tiny Llama is, and the others are not."""
    from tokenry.speculation.hamburger import HamburgerModel

    with torch.random.fork_rng():
        own = HamburgerModel(tiny.model(dtype=model.dtype), micro_layers=1)
        # A stop head that hesitates: groups of all sizes are drafted.
        own.stop[-1].weight.data.mul_(60)
        own.stop[-1].bias.data.sub_(3)
    return {"weights": own.to(model.device)}


def _letters(model: PreTrainedModel) -> dict[str, Any]:
    """A tokenizer of one byte an id: the byte view of a model is then the model itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "<bos>", "<eos>", *map(chr, range(0x21, 0x7F))]
    built = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return {"tokenizer": PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<bos>", eos_token="<eos>",
                                                 pad_token="<pad>", padding_side="left")}  # fmt: skip


_RESOURCES = {
    "draft-model": _draft_model,
    "draft-tree": _draft_model,
    "dyspec": _draft_model,
    "exact-byte-probabilities": _letters,
    "future-token-prediction": _future_decoder,
    "gated-lora-mtp": _mask_adapters,
    "hamburger": _grafts,
    "r2r": _small_model,
}
