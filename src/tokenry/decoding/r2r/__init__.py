"""R2R: a small model writes, a router sends the tokens that change the path to the large one (arXiv 2505.21600).

router    the network that predicts divergence, and how its threshold is chosen
decoder   the decoder, and the rules it is compared with
labels    which tokens of the small model change the path of the large one
training  from labels to a router: `tokenry train router`
"""

from tokenry.decoding.r2r.decoder import R2R, Signals
from tokenry.decoding.r2r.router import Router, auc, threshold_for_recall

__all__ = ["R2R", "Router", "Signals", "auc", "threshold_for_recall"]
