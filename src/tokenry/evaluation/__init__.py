"""Which method helps, on which text, at what cost? Measured side by side, in one run.

comparison   compare: many methods on one model and text; read this first
running      one run of one method, and prompts made ready for it
metrics      bits per byte, agreement, losslessness, medians with quartiles
peers        other libraries' methods, measured in the same run
results      what compare gives back; tables and report show it
bench        figures of a model, and of a family against its targets
"""

from .bench import SPECULATION_METHODS, ModelFigures, bench_model, bench_speculation
from .comparison import DEFAULT_METHODS, compare, samples
from .metrics import (
    Agreement,
    Lossless,
    Spread,
    agreement,
    bits_per_byte,
    check_lossless,
    compressed_bits_per_byte,
)
from .peers import Peer, TransformersAssisted, TransformersGenerate, TransformersPromptLookup
from .results import Comparison, Row, Sample
from .running import Setting

__all__ = [
    "DEFAULT_METHODS", "SPECULATION_METHODS", "Agreement", "Comparison", "Lossless", "ModelFigures", "Peer", "Row",
    "Sample", "Setting", "Spread", "TransformersAssisted", "TransformersGenerate", "TransformersPromptLookup",
    "agreement", "bench_model", "bench_speculation", "bits_per_byte", "check_lossless", "compare",
    "compressed_bits_per_byte", "samples",
]  # fmt: skip
