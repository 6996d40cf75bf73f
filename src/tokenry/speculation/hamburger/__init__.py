"""HAMburger: several tokens in one cache entry, several tokens from one step of the base (arXiv 2505.20438).

model      the grafts on a base model, and the rule that cuts text into groups; read it first
cache      one entry for each group, at the position of its last token
decoding   the method: writing by itself, or drafting for a model that verifies
training   `tokenry train hamburger`, and what the trained model does at each confidence
"""

from tokenry.speculation.hamburger.cache import MacroCache
from tokenry.speculation.hamburger.decoding import Hamburger
from tokenry.speculation.hamburger.model import HamburgerModel, Merger, group_starts

__all__ = ["Hamburger", "HamburgerModel", "MacroCache", "Merger", "group_starts"]
