"""KV Prediction: a small model reads the prompt, and the model decodes on the cache that is predicted from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from tokenry.errors import ResourceError
from tokenry.kvcache.engine import PredictionPolicy
from tokenry.kvcache.kv_prediction.predictor import ABOUT, KVPredictor, Operations, served
from tokenry.models import TokenCache, loaded_name, trained_folder


@dataclass(frozen=True, kw_only=True)
class KVPrediction(PredictionPolicy):
    """Let a small model read the prompt, and predict from its keys and values those of the model (arXiv 2410.08391).

    The auxiliary model reads all but the last token of the prompt; linear maps turn its keys and values into the
    model's, before norms and rotary positions; the model reads the last token against them and goes on by itself
    (section 3). So the first token comes sooner, and decoding costs what it costs without. The output is the model's
    own on an approximate memory of the prompt, not its own text. Both models are held in memory.

    Only the prompt that begins a cache is predicted: further turns, and later chunks where ``prefill_chunk_size``
    splits the prompt, run through the model, as does a prompt of one token. ``operations`` counts what is saved.

    Auxiliary model and maps are made by ``tokenry train kv-prediction`` for one model each.
    ``KVPredictor.serve(model)`` hands them over loaded.

    Args:
        predictor: Folder of the auxiliary model and the maps; None: what was handed over for the model, or the folder
            where ``tokenry train kv-prediction`` puts what it trains for it.
    """

    resources: ClassVar[tuple[str, ...]] = ("predictor",)

    predictor: str | None = None

    def prepare(self, model: PreTrainedModel) -> KVPredictor:
        """The predictor for a model.

        Raises:
            ResourceError: There is none, or it was trained for another model.
        """
        if self.predictor is not None:
            return KVPredictor.load(self.predictor, model)
        handed = served(model)
        if handed is not None:
            return handed
        name = loaded_name(model)
        place = trained_folder(self.slug, name)
        if not name or not (place / ABOUT).is_file():
            where = f" in {str(place)!r}" if name else ""
            raise ResourceError(
                f"{self.slug} needs a predictor trained for {name or type(model).__name__}, and there is none{where}: "
                f"make it by tokenry train {self.slug} --model {name or 'MODEL'}, or name a folder that has one, "
                f"{self.slug}:predictor=FOLDER"
            )
        return KVPredictor.load(place, model)

    def predict(
        self, cache: TokenCache, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        predictor: KVPredictor = cache.prepared
        return predictor.predict(input_ids, mask, position_ids)

    def operations(self, model: PreTrainedModel, length: int) -> Operations:
        """Counted operations before the first token of a prompt of ``length`` tokens, with and without prediction."""
        return self.prepare(model).operations(model, length)
