"""Superposed Decoding: several drafts of a completion from one autoregressive pass, told apart by an n-gram table.

decoder    the drafts, their mixture and their scores
ngram      what follows what in a text: the table, and `tokenry train ngram`
linearity  how far a model's output for a mixture is from the mixture of its outputs
"""

from tokenry.decoding.superposed.decoder import Superposed
from tokenry.decoding.superposed.linearity import linearity
from tokenry.decoding.superposed.ngram import NgramTable

__all__ = ["NgramTable", "Superposed", "linearity"]
