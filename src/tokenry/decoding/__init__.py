"""Which token is next? The papers' ways to choose it.

cntp  where the model hesitates, try several clauses and keep the one it is surest of
"""

from tokenry.decoding.cntp import CNTP

__all__ = ["CNTP"]
