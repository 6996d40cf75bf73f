"""The decoders against the orderings that their papers promise: what `tokenry bench decoding` prints.

bench       the parts together; read this first
engine      what the parts share: runs that are counted, and what could not be measured
results     figures with their costs, and whether the orderings held
page        the same on a page of docs/results
cntp, r2r, skipdecode, superposed, navigation, byte_view
            a part each: what is promised, and how it is measured

Every figure is measured once a seed; an ordering is a check over the seeds, with its spread, and beside each figure
stand the forward passes and the time that it took. What mathematics promises is tested instead.
"""

from .bench import PARTS, PROMISES, bench_decoding, chosen_parts
from .results import SEEDS, DecodingBench, Figure, Ordered, Promise, judged, ordered

__all__ = [
    "PARTS", "PROMISES", "SEEDS", "DecodingBench", "Figure", "Ordered", "Promise", "bench_decoding", "chosen_parts",
    "judged", "ordered",
]  # fmt: skip
