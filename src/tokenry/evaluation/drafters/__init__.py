"""What do the trained drafters reach, and does what their papers and cards promise hold?

Each part measures what one trainer made: interleaved runs beside plain decoding where it drafts, tables of what such
runs do not say, and checks. What mathematics promises is a test; here stands what training must bring about.

engine      what all parts share; read it first
bench       the parts in turn
results     what comes back: it prints itself and writes itself as JSON

mtp         gated-LoRA multi-token prediction
ftp         future token prediction
hamburger   groups of tokens, by confidence
any_subset  any-subset speculative decoding
adaspec     distillation with and without selection
"""

from .bench import PARTS, bench_drafters
from .results import DraftersBench, Table, cell, headers

__all__ = ["PARTS", "DraftersBench", "Table", "bench_drafters", "cell", "headers"]
