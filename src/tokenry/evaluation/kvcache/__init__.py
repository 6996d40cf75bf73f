"""What do the cache policies keep, cost and save, beside each other and beside kvpress?

bench       the parts together; read this first
engine      what the parts share: methods at their budgets, figures, and what could not be measured
results     what comes back: it prints itself and writes itself as JSON
page        the same on a page of docs/results
checks      what the papers promise, and whether it held

quality     scores on recall and the RULER-style tasks, the question seen before or after the compression
bits        bits per byte of long code, read token by token
timing      time of a decode step and bytes held by length of the context; time and operations of reading a prompt
"""

from .bench import PARTS, bench_kvcache
from .results import Figure, KVCacheBench, pivots

__all__ = ["PARTS", "Figure", "KVCacheBench", "bench_kvcache", "pivots"]
