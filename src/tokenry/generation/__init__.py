"""How do tokens come out of a model? The one loop that every decoder and drafter runs in.

engine      the loop, the base of decoders, and the door that transformers' generate calls
session     one call while it runs
follower    a second model that reads along
native      the same on a model's own attention
plain       one token a step
result      what comes back: ids, sources, counts
full        tokenry.generate: text, chat, streaming, stop strings, seeds
infill      tokenry.fill: masked places anywhere in a text, and the base of methods that fill them
"""

from tokenry.generation.engine import Commit, Decoder, Options, Session
from tokenry.generation.full import generate
from tokenry.generation.infill import Canvas, Infiller, InfillResult, fill
from tokenry.generation.plain import Plain
from tokenry.generation.result import NO_SOURCE, GenerationResult, Source, Stats

__all__ = [
    "NO_SOURCE",
    "Canvas",
    "Commit",
    "Decoder",
    "GenerationResult",
    "InfillResult",
    "Infiller",
    "Options",
    "Plain",
    "Session",
    "Source",
    "Stats",
    "fill",
    "generate",
]
