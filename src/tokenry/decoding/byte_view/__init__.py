"""The byte view of a tokenized model: exact next-byte probabilities.

covers    the token sequences that spell a text, and the forwards that weigh them
view      next-byte distributions and probabilities of texts
ensemble  several models as one, and byte-level generation
decoder   the method that `generate` runs: prompts that end within a token
"""

from tokenry.decoding.byte_view.decoder import ExactByteProbabilities
from tokenry.decoding.byte_view.ensemble import ByteEnsemble, ByteResult, EnsembleState
from tokenry.decoding.byte_view.view import ByteState, ByteView, next_byte_distribution

__all__ = [
    "ByteEnsemble", "ByteResult", "ByteState", "ByteView", "EnsembleState", "ExactByteProbabilities",
    "next_byte_distribution",
]  # fmt: skip
