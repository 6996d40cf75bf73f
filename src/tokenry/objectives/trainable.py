"""What `tokenry train NAME` runs: hyperparameters that know how to train something from a model and texts."""

from __future__ import annotations

import abc
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from tokenry.catalogue import TRAINERS
from tokenry.methods import Method
from tokenry.models import weights_hash

RUN = "run"
"""The folder in a trainer's output that holds checkpoints until the training is complete."""


@dataclass(frozen=True, kw_only=True)
class Trainable(Method, abc.ABC):
    """Base of trainers: hyperparameters as a method's, checked on construction, and `train`.

    A trainer's name is its line in the catalogue's `TRAINERS`; `help` says in one sentence what it makes.
    """

    role: ClassVar[str] = "trainer"
    help: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        target = f"{cls.__module__}:{cls.__qualname__}"
        name = next((name for name, known in TRAINERS.items() if known == target), None)
        if name and "slug" not in cls.__dict__:
            cls.slug = name
        super().__init_subclass__(**kwargs)

    @abc.abstractmethod
    def train(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        texts: Sequence[str],
        out: Path,
        *,
        steps: int | None,
        seed: int,
    ) -> dict[str, Any]:
        """Train, write to `out` what the method loads by that path, and return what is to be reported, as JSON.

        Checkpoints go below `out / RUN` (one folder for each `fit`), which is removed when this has returned; until
        then a second call goes on where the first was stopped.

        Args:
            model: The model that is served or trained; it may be changed.
            tokenizer: Its tokenizer.
            texts: Documents to train on.
            out: An existing folder.
            steps: Steps of the optimizer, None for the trainer's own number.
            seed: Seed of everything random.
        """


def run(
    trainer: Trainable,
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    out: Path,
    *,
    steps: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train into the folder `out`, note there how (`training.json`), and return that note."""
    out.mkdir(parents=True, exist_ok=True)
    weights = weights_hash(model)  # before it may be changed
    found = trainer.train(model, tokenizer, texts, out, steps=steps, seed=seed)
    note = {
        "schema_version": 1,
        "trainer": str(trainer),
        "model": str(model.name_or_path),
        "weights": weights,
        "steps": steps,
        "seed": seed,
        "out": str(out),
        **found,
    }
    (out / "training.json").write_text(json.dumps(note, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(out / RUN, ignore_errors=True)
    return note
