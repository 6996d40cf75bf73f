"""Which past tokens stay? One budgeted cache, many policies.

h2o        the newest tokens and those that collected the most attention
keyformer  likewise, by a noised score whose temperature rises
treekv     fewer the further back: of two neighbours the less attended goes
dapq       the prompt's tokens that queries at the coming positions attend to
sinks      the first tokens and the newest (baseline)
random     the newest tokens and a random sample of the others (baseline)
snapkv     the newest tokens and those that the newest queries attend to (baseline)
keydiff    the tokens whose keys are unlike the others (baseline)
fastkv     those that the newest queries attend to, and the later layers read the salient part of a prompt alone
spatten    those with the most attention in all layers so far; fewer tokens, and heads, from layer to layer

And which of them does a step attend to, where all stay?

fasa       those that a few rotary frequency planes of each head select
sentencekv those of the sentences whose mean keys the running sentence's queries ask for
icecache   those on pages of similar tokens, found by an index
oracle     those that get the most attention (the ceiling)

And which tokens do the later layers run for, at each step anew?

lazyllm    those of the prompt that the newest token attends to; the others wait until one does

And what is in the cache of a prompt that the model has not read?

kv-prediction  what a small model's keys and values predict
"""

from tokenry.kvcache.dapq import DapQ
from tokenry.kvcache.engine import CachePolicy, RetrievalPolicy
from tokenry.kvcache.fasa import FASA, FASAPlan
from tokenry.kvcache.fastkv import FastKV
from tokenry.kvcache.h2o import H2O
from tokenry.kvcache.icecache import IceCache
from tokenry.kvcache.keydiff import KeyDiff
from tokenry.kvcache.keyformer import Keyformer
from tokenry.kvcache.kv_prediction import KVPrediction
from tokenry.kvcache.lazyllm import LazyLLM
from tokenry.kvcache.oracle import Oracle
from tokenry.kvcache.random import Random
from tokenry.kvcache.sentencekv import SentenceKV
from tokenry.kvcache.sinks import Sinks
from tokenry.kvcache.snapkv import SnapKV
from tokenry.kvcache.spatten import SpAtten
from tokenry.kvcache.treekv import TreeKV

__all__ = [
    "FASA", "H2O", "CachePolicy", "DapQ", "FASAPlan", "FastKV", "IceCache", "KVPrediction", "KeyDiff", "Keyformer",
    "LazyLLM", "Oracle", "Random", "RetrievalPolicy", "SentenceKV", "Sinks", "SnapKV", "SpAtten", "TreeKV",
]  # fmt: skip
