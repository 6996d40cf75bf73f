"""What do all trainings share? One interface of objectives, one trainer, one way to start it by name.

engine      an objective, the trainer that runs it, `fit`; read it first
losses      per-token losses that never hold the vocabulary in float32 for all positions at once
data        texts to packed rows of tokens
precision   bfloat16 where the device multiplies in it
trainable   what `tokenry train NAME` runs
"""

from tokenry.objectives.data import TokenRows, token_rows, training_texts
from tokenry.objectives.engine import Bundle, Context, Objective, ObjectiveTrainer, TrainingDiverged, fit
from tokenry.objectives.losses import entropy, kl, label_count, log_probs, shifted_ce
from tokenry.objectives.precision import Precision, mixed
from tokenry.objectives.trainable import Trainable

__all__ = [
    "Bundle",
    "Context",
    "Objective",
    "ObjectiveTrainer",
    "Precision",
    "TokenRows",
    "Trainable",
    "TrainingDiverged",
    "entropy",
    "fit",
    "kl",
    "label_count",
    "log_probs",
    "mixed",
    "shifted_ce",
    "token_rows",
    "training_texts",
]
