"""Which method helps, on which text, at what cost? Measured side by side, in one run.

comparison   compare: many methods on one model and text; read this first
running      one run of one method, and prompts made ready for it
metrics      bits per byte, agreement, losslessness, medians with quartiles
peers        other libraries' methods, measured in the same run
results      what compare gives back; tables and report show it
bench        figures of a model
speculation  drafters task by task
drafters     trained drafters against what their papers and cards promise, a module for each
decoding     the decoders against the orderings that their papers promise
kvcache      the cache policies at shares of the cache, beside kvpress: quality, bits, time, prefill
kvpress      kvpress as a second process, which kvpress_peer is the script of
choose       which method for a model and text: candidates by the taxonomy, measured, one recommended
checks       what should hold between methods, and whether it did
claims       what the papers claim, on what, and why it can differ here
pages        docs/results: one page a family, from the JSON of compare and bench
"""

from .bench import ModelFigures, bench_model
from .checks import Check
from .choose import GOALS, Allowed, Choice, Chooser, choose
from .comparison import DEFAULT_METHODS, compare, samples
from .decoding import DecodingBench, bench_decoding
from .drafters import DraftersBench, bench_drafters
from .kvcache import KVCacheBench, bench_kvcache
from .metrics import (
    Agreement,
    Lossless,
    Spread,
    agreement,
    bits_per_byte,
    check_lossless,
    compressed_bits_per_byte,
)
from .pages import family_pages, write_pages
from .peers import Peer, TransformersAssisted, TransformersGenerate, TransformersPromptLookup
from .results import Comparison, Row, Sample
from .running import Setting
from .speculation import SpeculationBench, bench_speculation

__all__ = [
    "DEFAULT_METHODS", "GOALS", "Agreement", "Allowed", "Check", "Choice", "Chooser", "Comparison", "DecodingBench",
    "DraftersBench", "KVCacheBench", "Lossless", "ModelFigures", "Peer", "Row", "Sample", "Setting", "SpeculationBench",
    "Spread", "TransformersAssisted", "TransformersGenerate", "TransformersPromptLookup", "agreement", "bench_decoding",
    "bench_drafters", "bench_kvcache", "bench_model", "bench_speculation", "bits_per_byte", "check_lossless", "choose",
    "compare", "compressed_bits_per_byte", "family_pages", "samples", "write_pages",
]  # fmt: skip
