"""What follows what in a text: counts of n-grams, looked up for many contexts and tokens at once."""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.errors import BadParameter, ResourceError
from tokenry.objectives import Trainable

FILE = "ngram.safetensors"
_TOGETHER = 64  # texts that are encoded together


class NgramTable:
    """Counts of all n-grams of a text up to a length, as a trie that a tensor operation walks.

    Node 0 is the empty text; every other node is one n-gram: the node of all but its last token, and that token. Nodes
    are numbered by length and, within a length, by these two, so that one sorted array of `parent * vocab + token` is
    the whole trie, and a search in it a step.

    A state `[..., order]` holds the nodes of the last 0, 1, ... `order - 1` tokens of a text, -1 where they were never
    seen in a row; `start` makes it and `advance` takes the next token into account.

    Attributes:
        keys: `parent * vocab + token` of every node but 0, ascending, int64 `[nodes]`.
        counts: How often each stands in the text, int32 `[nodes]`.
        vocab: Ids there are.
        order: Length of the longest n-grams.
        followed: How often each node, 0 included, is followed by any token, `[nodes + 1]`.
    """

    def __init__(self, keys: Tensor, counts: Tensor, vocab: int, order: int) -> None:
        self.keys, self.counts, self.vocab, self.order = keys, counts, vocab, order
        self.followed = torch.zeros(len(keys) + 1, dtype=counts.dtype, device=keys.device)
        self.followed.index_add_(0, keys // vocab, counts)

    @classmethod
    def build(cls, documents: Iterable[Sequence[int] | np.ndarray], vocab: int, order: int = 6) -> NgramTable:
        """Count documents of token ids; no n-gram reaches from one into the next.

        Raises:
            BadParameter: There is nothing to count, or an id that is not below `vocab`.
        """
        if order < 1:
            raise BadParameter(f"order={order} is not allowed; it must be at least 1")
        texts = [np.asarray(document, dtype=np.int64) for document in documents]
        texts = [text for text in texts if len(text)]
        if not texts:
            raise BadParameter("there are no tokens to count n-grams of; give text")
        tokens = np.concatenate(texts)
        if int(tokens.max()) >= vocab or int(tokens.min()) < 0:
            raise BadParameter(f"the documents have ids outside 0..{vocab - 1}; were they made by another tokenizer?")
        place = np.concatenate([np.arange(len(text)) for text in texts])
        context = np.zeros(len(tokens), dtype=np.int64)  # node of the n - 1 tokens before each
        keys, counts, nodes = [], [], 0
        for n in range(order):
            inside = np.flatnonzero(place >= n)
            found, number, count = np.unique(
                context[inside] * vocab + tokens[inside], return_inverse=True, return_counts=True
            )
            keys.append(found)
            counts.append(count.astype(np.int32))
            context.fill(-1)
            last = inside < len(tokens) - 1
            context[inside[last] + 1] = nodes + 1 + number[last]
            nodes += len(found)
        return cls(torch.from_numpy(np.concatenate(keys)), torch.from_numpy(np.concatenate(counts)), vocab, order)

    def __len__(self) -> int:
        """Different n-grams of all lengths."""
        return len(self.keys)

    @property
    def sizes(self) -> list[int]:
        """Different n-grams of length 1, 2, ... `order`."""
        ends, held = [], 1
        for _ in range(self.order):
            # The n-grams of the next length are those whose parents lie among the nodes known so far.
            held = int(torch.searchsorted(self.keys, torch.tensor(held * self.vocab, device=self.keys.device))) + 1
            ends.append(held - 1)
        return [end - before for end, before in zip(ends, [0, *ends[:-1]], strict=True)]

    def to(self, device: torch.device) -> NgramTable:
        """The same table on a device."""
        if self.keys.device == device:
            return self
        return NgramTable(self.keys.to(device), self.counts.to(device), self.vocab, self.order)

    # Looking up ------------------------------------------------------------------------------------
    def child(self, nodes: Tensor, tokens: Tensor) -> Tensor:
        """The node of each n-gram with a token behind it, -1 where there is none; both of one shape, or broadcast."""
        query = (nodes * self.vocab + tokens).contiguous()
        place = torch.searchsorted(self.keys, query).clamp(max=len(self.keys) - 1)
        found = (self.keys[place] == query) & (nodes >= 0) & (tokens >= 0) & (tokens < self.vocab)
        return torch.where(found, place + 1, -1)

    def start(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """The state behind texts `[..., length]`, of which `valid` may leave out padding on the left."""
        state = torch.full((*tokens.shape[:-1], self.order), -1, dtype=torch.long, device=tokens.device)
        state[..., 0] = 0
        for column in range(max(0, tokens.shape[-1] - self.order + 1), tokens.shape[-1]):
            after = self.advance(state, tokens[..., column])
            state = after if valid is None else torch.where(valid[..., column, None], after, state)
        return state

    def advance(self, state: Tensor, tokens: Tensor) -> Tensor:
        """The state `[..., order]` after one more token `[...]`."""
        longer = self.child(state[..., :-1], tokens[..., None])
        return torch.cat([torch.zeros_like(state[..., :1]), longer], -1)

    def probabilities(self, state: Tensor, tokens: Tensor, weights: Sequence[float]) -> Tensor:
        """Weighted sum of relative frequencies of tokens `[..., m]` behind a state, float32 `[..., m]`.

        `weights[i]` goes with the last `i + 1` tokens as context. A context that was never followed by anything adds 0;
        there is no back-off and nothing is normalised.
        """
        if len(weights) >= self.order:
            raise BadParameter(
                f"{len(weights)} weights need n-grams of length {len(weights) + 1}, and the table's go to {self.order}"
            )
        contexts = state[..., 1 : 1 + len(weights), None]
        nodes = self.child(contexts, tokens[..., None, :])
        joint = self.counts[(nodes - 1).clamp(min=0)].masked_fill(nodes < 0, 0)
        whole = self.followed[contexts.clamp(min=0)].clamp(min=1)
        scale = torch.tensor(weights, dtype=torch.float32, device=tokens.device)[:, None]
        return (scale * (joint / whole)).sum(-2)

    def prob(self, context: Tensor, tokens: Tensor, weights: Sequence[float]) -> Tensor:
        """The same behind texts `[..., length]`."""
        return self.probabilities(self.start(context), tokens, weights)

    # Files -----------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> None:
        """Write the table as safetensors."""
        about = {"vocab": self.vocab, "order": self.order}
        # A reader, or another writer, never meets half a file.
        part = Path(f"{path}.{os.getpid()}-{threading.get_ident()}.part")
        tensors = {"keys": self.keys.cpu().contiguous(), "counts": self.counts.cpu().contiguous()}
        save_file(tensors, str(part), metadata={"ngram": json.dumps(about)})
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> NgramTable:
        """Read a table from a file, or from the folder that `tokenry train ngram` wrote.

        Raises:
            ResourceError: There is none.
        """
        path = Path(path).expanduser()
        path = path / FILE if path.is_dir() else path
        try:
            with safe_open(str(path), "pt") as file:
                about = json.loads((file.metadata() or {}).get("ngram", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError, ValueError) as error:
            raise ResourceError(
                f"cannot read an n-gram table from {path}: {error}; `tokenry train ngram` writes one"
            ) from error
        if about is None:
            raise ResourceError(f"{path} is not an n-gram table; `tokenry train ngram` writes one")
        return cls(tensors["keys"], tensors["counts"], about["vocab"], about["order"])


def shared(path: str | Path, device: torch.device) -> NgramTable:
    """The table of a path on a device, read once until the file changes."""
    place = Path(path).expanduser().absolute()
    place = place / FILE if place.is_dir() else place
    stamp = place.stat().st_mtime_ns if place.is_file() else 0
    return _shared(place, stamp, device)


@functools.lru_cache(maxsize=4)
def _shared(path: Path, stamp: int, device: torch.device) -> NgramTable:
    return NgramTable.load(path).to(device)


def width(model: PreTrainedModel) -> int:
    """Ids that a model has."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


# --- training -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NgramTrainer(Trainable):
    """Count the n-grams of texts, each a document of its own, with the tokenizer's first and last token around it.

    Attributes:
        order: Length of the longest n-grams; the paper's is 6, and its gain ends at 4.
        documents: Texts that are counted, the first of them; all if none.
    """

    help: ClassVar[str] = "An n-gram table for superposed-decoding:table=PATH."

    order: int = 6
    documents: int | None = None

    def validate(self) -> None:
        self.check("order", "at least 2", self.order >= 2)
        self.check("documents", "at least 1, or none", self.documents is None or self.documents >= 1)

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
            raise BadParameter(f"{self.slug}: steps={steps} is not allowed; counting has no steps: leave it out")
        from tokenry.decoding.superposed.decoder import Superposed

        encoded = encode(tokenizer, texts[: self.documents])
        table = NgramTable.build(encoded, width(model), self.order)
        table.save(out / FILE)
        return {
            "documents": len(encoded),
            "tokens": sum(map(len, encoded)),
            "ngrams": table.sizes,
            "bytes": (out / FILE).stat().st_size,
            "use": str(Superposed(table=str(out), weights=Superposed.weights[: self.order - 1])),
        }


def encode(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text, between the tokenizer's first and last token where it has them."""
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = []
    for start in range(0, len(texts), _TOGETHER):
        part = list(texts[start : start + _TOGETHER])
        for ids in tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]:
            found.append(np.array([*before, *ids, *after], dtype=np.int64))
    return found
