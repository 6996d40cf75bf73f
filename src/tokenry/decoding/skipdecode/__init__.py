"""SkipDecode: fewer layers for later tokens, by a schedule that batches and caches can follow (arXiv 2307.02628).

schedule  which layers run at which index
layers    a model of which some layers run for some tokens, and its cache
decoder   the decoder
training  fine-tuning under a schedule (`tokenry train skipdecode`), and losses by index
"""

from tokenry.decoding.skipdecode.decoder import SkipDecode
from tokenry.decoding.skipdecode.layers import JaggedCache, skipping
from tokenry.decoding.skipdecode.schedule import SkipSchedule

__all__ = ["JaggedCache", "SkipDecode", "SkipSchedule", "skipping"]
