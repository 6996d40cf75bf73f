"""Rows that ride along in a forward, and the hidden states that the head reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenry.errors import UnsupportedModel


@dataclass(frozen=True)
class Auxiliary:
    """Rows beside a tree in the same forward: never accepted, never cached, seen by no node.

    They stand behind the tree's nodes; `Session.hidden` holds what the head would have read of them. Every one sees
    itself and all that is committed.

    Attributes:
        embeddings: Input embeddings `[1 or batch, m, embedding]`.
        depth: Position of each beyond the anchor's, `[1 or batch, m]`.
        nodes: Which of the tree's nodes each sees, bool `[1 or batch, m, n]`.
        among: Which auxiliary rows each sees, bool `[1 or batch, m, m]`.
        around: Entered around the forward, with the number of rows before the auxiliary ones and of all rows.
    """

    embeddings: Tensor
    depth: Tensor
    nodes: Tensor
    among: Tensor
    around: Callable[[int, int], AbstractContextManager[Any]] = lambda before, rows: contextlib.nullcontext()

    @property
    def count(self) -> int:
        """m."""
        return self.depth.shape[1]

    def relation(self, tree: Tensor) -> Tensor:
        """Who sees whom, bool `[1 or batch, n + m, n + m]`, where `tree` `[1 or batch, n, n]` tells it of the nodes."""
        batch = max(tree.shape[0], self.nodes.shape[0], self.among.shape[0])
        blind = tree.new_zeros(batch, tree.shape[1], self.count)
        above = torch.cat([tree.expand(batch, -1, -1), blind], 2)
        below = torch.cat([self.nodes.expand(batch, -1, -1), self.among.expand(batch, -1, -1)], 2)
        return torch.cat([above, below], 1)


class Heard:
    """What a model's head was to read in a forward: `hidden` `[batch, rows, hidden]`, None before it is called."""

    def __init__(self, rows: slice) -> None:
        self.rows = rows
        self.hidden: Tensor | None = None


_heard: ContextVar[Heard | None] = ContextVar("tokenry_heard", default=None)


@contextlib.contextmanager
def listening(model: PreTrainedModel, rows: slice) -> Iterator[Heard]:
    """In the next forward of `model` in this thread, keep all that its head was to read and let it read `rows` alone.

    Raises:
        UnsupportedModel: The model has no head, or its forward does not call it as a module.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise UnsupportedModel(f"{type(model).__name__} has no head whose input could be read")
    heard = Heard(rows)
    token = _heard.set(heard)
    hook = head.register_forward_pre_hook(_hear)
    try:
        yield heard
    finally:
        hook.remove()
        _heard.reset(token)
    if heard.hidden is None:
        raise UnsupportedModel(f"{type(model).__name__} does not call its head as a module, so its input is not known")


def _hear(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    # Threads that share a model each add this hook, and all of them run in every thread: the first one does the work.
    heard = _heard.get()
    if heard is None or heard.hidden is not None:
        return None
    heard.hidden = args[0]
    return (args[0][:, heard.rows], *args[1:])
