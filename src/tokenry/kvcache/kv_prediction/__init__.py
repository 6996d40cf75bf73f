"""A small model reads the prompt in the model's place, and the model's cache is predicted from what it remembers.

policy       the policy `kv-prediction`
predictor    the auxiliary model and the linear maps; their folder
projections  keys and values read from a forward, replaced in it, rotated as the model rotates them
training     `tokenry train kv-prediction`
"""

from tokenry.kvcache.kv_prediction.policy import KVPrediction
from tokenry.kvcache.kv_prediction.predictor import KVPredictor

__all__ = ["KVPrediction", "KVPredictor"]
