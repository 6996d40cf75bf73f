"""What the model wants after each token of a kind of text, written down before the first prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel

from tokenry.errors import BadParameter
from tokenry.methods import method
from tokenry.models import context_length
from tokenry.objectives import Trainable, token_rows
from tokenry.speculation.recycling import Recycler
from tokenry.speculation.sources import TABLE_FILE, RecyclingTable, vocabulary_name


@dataclass(frozen=True, kw_only=True)
class HotStart(Trainable):
    """Make the table with which Token Recycling or Goose starts hot, from what the model wants in texts that it reads.

    The papers' tables grow hot from prompt to prompt. Texts do the same before the first one, at a forward each and
    without training: an addition. What a row of the table held gives way to what was read later.

    Attributes:
        drafter: Text form of the drafter that will use it, which says what the table keeps.
        tokens: How many tokens are read.
        length: Tokens that are read together, as one text; the model's context if that is shorter.
    """

    help: ClassVar[str] = "A table with which token-recycling or goose knows a kind of text before the first prompt."
    drafter: str = "token-recycling:template=auto"
    tokens: int = 50_000
    length: int = 512

    def validate(self) -> None:
        self.check("tokens", "at least 1", self.tokens >= 1)
        self.check("length", "at least 2", self.length >= 2, why="what follows a token is learned behind others")
        keeps = hasattr(method(self.drafter), "new_table")
        self.check("drafter", "token-recycling or goose", keeps, why="it must keep a table")

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
        if steps is not None:
            raise BadParameter(f"{self.slug}: steps={steps} is not allowed; reading has no steps: say tokens={steps}")
        model.eval()
        chosen: Any = method(self.drafter)
        table: RecyclingTable = chosen.new_table()
        table.tokenizer = vocabulary_name(tokenizer)
        length = min(self.length, context_length(model) or self.length)
        rows = token_rows(texts, tokenizer, length, seed, rows=max(1, self.tokens // length)).ids
        with Progress(console=Console(stderr=True), transient=True) as bar, torch.inference_mode():
            for ids in bar.track(rows.split(1), description="the model reads"):
                logits = model(input_ids=ids.to(model.device), use_cache=False).logits
                Recycler(1, table).harvest(ids, None, logits)
        table.save(out / TABLE_FILE)
        return {
            "tokens": rows.numel(),
            "bytes": (out / TABLE_FILE).stat().st_size,
            "use": str(replace(chosen, table=str(out))),
        }
