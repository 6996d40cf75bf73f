"""Which token is next? The papers' ways to choose it.

byte_view              the model as one of bytes: prompts that end within a token, ensembles of several vocabularies
cntp                   where the model hesitates, try several clauses and keep the one it is surest of
in_context_navigation  many answers: those found are listed in the prompt, so that it reaches new ones
r2r                    a small model writes, and a router asks the model for the tokens that change the path
skipdecode             later tokens run through fewer layers
superposed             several drafts from one pass, told apart by an n-gram table
"""

from tokenry.decoding.byte_view import (
    ByteEnsemble,
    ByteResult,
    ByteState,
    ByteView,
    ExactByteProbabilities,
    next_byte_distribution,
)
from tokenry.decoding.cntp import CNTP
from tokenry.decoding.in_context_navigation import InContextNavigation, navigate
from tokenry.decoding.r2r import R2R
from tokenry.decoding.skipdecode import SkipDecode
from tokenry.decoding.superposed import NgramTable, Superposed

__all__ = [
    "CNTP", "R2R", "ByteEnsemble", "ByteResult", "ByteState", "ByteView", "ExactByteProbabilities",
    "InContextNavigation", "NgramTable", "SkipDecode", "Superposed", "navigate", "next_byte_distribution",
]  # fmt: skip
