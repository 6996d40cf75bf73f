"""How do several tokens come out of one pass? One lossless verifier, many drafters.

engine            trees, the verify step, the base of drafters; read it first
budget            how many nodes pay, from measured costs and counted acceptance
prompt_lookup     copy what followed the last n-gram before
token_recycling   what the model last wanted after each token, as a tree
"""

from tokenry.speculation.engine import Drafter, DraftTree, TreeShape, Walk, rejection
from tokenry.speculation.prompt_lookup import PromptLookup
from tokenry.speculation.token_recycling import RecyclingTable, TokenRecycling

__all__ = [
    "DraftTree",
    "Drafter",
    "PromptLookup",
    "RecyclingTable",
    "TokenRecycling",
    "TreeShape",
    "Walk",
    "rejection",
]
