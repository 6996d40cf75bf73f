"""What does a model look like from outside? Loading, anatomy, the one cache, the one attention function.

load        bundled names, folders, hub ids
anatomy     layers, attention, embeddings, head, rotary of any decoder
policy      what the cache asks of a policy
layer       keys, values, positions and policy state of one layer
cache       those of all layers, moved together
attention   the function every layer calls inside a block, and the block
packing     linear maps that are faster over a few rows on CPUs
"""

from tokenry.models.anatomy import Anatomy, anatomy, context_length
from tokenry.models.attention import PolicyBlock, active_policy, attach, attached, detach
from tokenry.models.cache import TokenCache
from tokenry.models.layer import TokenLayer
from tokenry.models.load import bundled, load, loaded_name, own_tokenizer, path, resource, trained_folder, weights_hash
from tokenry.models.packing import is_packed, packed
from tokenry.models.policy import Policy
from tokenry.models.rotary import Rotary, planes
from tokenry.models.rows import Rows
from tokenry.models.slots import Block, Slots
from tokenry.models.statistics import AttentionRows

__all__ = [
    "Anatomy", "AttentionRows", "Block", "Policy", "PolicyBlock", "Rotary", "Rows", "Slots", "TokenCache",
    "TokenLayer", "active_policy", "anatomy", "attach", "attached", "bundled", "context_length", "detach",
    "is_packed", "load", "loaded_name", "own_tokenizer", "packed", "path", "planes", "resource", "trained_folder",
    "weights_hash",
]  # fmt: skip
