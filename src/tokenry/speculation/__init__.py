"""How do several tokens come out of one pass? One lossless verifier, many drafters.

engine                    trees, the verify step, the base of drafters; read it first
budget, sizing            how many nodes pay, from measured costs and counted acceptance
sources, copying          the text itself and the table of what the model wanted, as sources of drafts
companion                 a second model beside the target

prompt_lookup             copy what followed the last n-gram before
suffix                    copy what followed the longest run of last tokens before
token_recycling           what the model last wanted after each token, as a tree
goose                     a copied spine with branches from the table
draft_model               a chain from a small model
self_draft                a chain from the model itself behind a cache of few tokens
dyspec                    the likeliest tree of a small model
gated_lora_mtp            the model's own masks, seen by LoRA weights alone
future_token_prediction   a small decoder on one state of the model
hamburger                 groups of tokens in one cache entry, trusted or verified
any_subset                places anywhere in a text, drafted and verified by one any-order model
hot_start                 the table of token_recycling and goose, made from texts
adaspec                   distils a draft model on the tokens it can still learn
"""

from tokenry.speculation.any_subset import AnySubset
from tokenry.speculation.draft_model import DraftModel
from tokenry.speculation.dyspec import DySpec
from tokenry.speculation.engine import Auxiliary, Drafter, DraftTree, TreeShape, Walk, rejection
from tokenry.speculation.future_token_prediction import FutureTokenPrediction
from tokenry.speculation.gated_lora_mtp import GatedLoRAMTP
from tokenry.speculation.goose import Goose
from tokenry.speculation.hamburger import Hamburger
from tokenry.speculation.prompt_lookup import PromptLookup
from tokenry.speculation.self_draft import SelfDraft
from tokenry.speculation.sources import RecyclingTable
from tokenry.speculation.suffix import Suffix
from tokenry.speculation.token_recycling import TokenRecycling

__all__ = [
    "AnySubset", "Auxiliary", "DraftModel", "DraftTree", "Drafter", "DySpec", "FutureTokenPrediction", "GatedLoRAMTP",
    "Goose", "Hamburger", "PromptLookup", "RecyclingTable", "SelfDraft", "Suffix", "TokenRecycling", "TreeShape",
    "Walk", "rejection",
]  # fmt: skip
