"""Which past tokens stay? One budgeted cache, many policies.

h2o     the newest tokens and those that collected the most attention
sinks   the first tokens and the newest (baseline)
random  the newest tokens and a random sample of the others (baseline)
"""

from .engine import CachePolicy
from .h2o import H2O
from .random import Random
from .sinks import Sinks

__all__ = ["H2O", "CachePolicy", "Random", "Sinks"]
