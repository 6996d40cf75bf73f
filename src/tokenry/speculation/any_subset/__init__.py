"""How are masked places filled in parallel, exactly? By an any-subset model that drafts for itself.

scoring    levels, the two streams on a decoder, XLNet: how a model is asked
sampler    drafts, verification, densities
training   the joint loss and `tokenry train any-order`
bench      calls a token and exact matches beside sequential filling
"""

from tokenry.speculation.any_subset.bench import report
from tokenry.speculation.any_subset.sampler import AnySubset, AnySubsetSampler
from tokenry.speculation.any_subset.scoring import any_subset

__all__ = ["AnySubset", "AnySubsetSampler", "any_subset", "report"]
