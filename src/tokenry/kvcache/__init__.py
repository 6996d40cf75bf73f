"""Which past tokens stay? One budgeted cache, many policies.

h2o     the newest tokens and those that collected the most attention
sinks   the first tokens and the newest (baseline)
random  the newest tokens and a random sample of the others (baseline)
"""

from tokenry.kvcache.engine import CachePolicy
from tokenry.kvcache.h2o import H2O
from tokenry.kvcache.random import Random
from tokenry.kvcache.sinks import Sinks

__all__ = ["H2O", "CachePolicy", "Random", "Sinks"]
