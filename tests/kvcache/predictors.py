"""Predictors of KV Prediction that nobody trained: the one that changes nothing, and one that predicts nonsense."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from tests import tiny
from tokenry.kvcache.kv_prediction import KVPredictor
from tokenry.kvcache.kv_prediction.predictor import CacheMaps
from tokenry.models import anatomy


def identical(model: PreTrainedModel) -> KVPredictor:
    """The auxiliary model is a copy of the base, and the maps are the identity."""
    auxiliary = copy.deepcopy(model)
    numbers = range(len(anatomy(model).layers))
    maps = CacheMaps(model, auxiliary, numbers, same=numbers).to(model.dtype)
    return KVPredictor(model, auxiliary, numbers, maps)


def strange(model: PreTrainedModel, kind: str = "llama", layers: int = 2) -> KVPredictor:
    """Random weights: an auxiliary model of the kind with so many layers, and random maps."""
    settings = tiny.config(kind)
    if getattr(settings, "layer_types", None) is not None:
        settings.layer_types = settings.layer_types[:layers]
    settings.num_hidden_layers = layers
    with torch.random.fork_rng():
        torch.manual_seed(7)
        auxiliary = type(model)._from_config(settings).to(model.dtype).eval()
        return KVPredictor(model, auxiliary)
