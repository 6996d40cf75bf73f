"""Per-token losses in float32, taken over a few positions at a time.

Logits `[batch, length, vocabulary]` may be in half precision; what is computed from them in float32 is computed again
in the backward pass instead of being kept, so memory grows by one chunk alone. float64 stays float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenry import sampling

IGNORED = -100
"""The label of a position that is not learned from, as in transformers."""
_CHUNK = 2**22  # values of the vocabulary in float32 at once, 16 MiB


def label_count(labels: Tensor, k: int = 1) -> Tensor:
    """How many labels `[batch, length]` the positions `k` before them learn from."""
    return (labels[:, k:] != IGNORED).sum()


def shifted_ce(
    source: Tensor, labels: Tensor, k: int = 1, *, head: nn.Module | None = None, weights: Tensor | None = None
) -> Tensor:
    """Sum of the cross entropy of each label with the logits `k` positions before it, in nats.

    Args:
        source: Logits `[batch, length, vocabulary]`, or hidden states `[batch, length, hidden]` with `head`.
        labels: `[batch, length]`, ignored where -100.
        k: How far ahead is predicted; 1 is the next token.
        head: Maps hidden states to logits; runs on the learned positions alone.
        weights: Factors of the labels `[batch, length]`; ignored labels have none.
    """
    target = labels[:, k:]
    kept = target != IGNORED
    losses = -log_probs(source[:, : target.shape[1]][kept], target[kept], head=head)
    return (losses if weights is None else losses * weights[:, k:][kept].to(losses.dtype)).sum()


def log_probs(source: Tensor, tokens: Tensor, *, head: nn.Module | None = None) -> Tensor:
    """Log-probabilities `[...]` of tokens `[...]` under logits `[..., vocabulary]` (or hidden states with `head`)."""

    def use(rows: Tensor, chosen: Tensor) -> Tensor:
        logits = _wide(rows if head is None else head(rows))
        return logits.gather(-1, chosen[:, None])[:, 0] - logits.logsumexp(-1)

    width = getattr(head, "out_features", source.shape[-1])
    return _over_positions(use, width, source, tokens)


def kl(teacher: Tensor, student: Tensor, *, reverse: bool = False) -> Tensor:
    """Divergence `[...]` in nats of logits `[..., vocabulary]`: KL(teacher || student), or KL(student || teacher).

    No gradient goes to the teacher.
    """

    def use(p: Tensor, q: Tensor) -> Tensor:
        p, q = _wide(p), _wide(q)
        return sampling.kl(q, p) if reverse else sampling.kl(p, q)

    return _over_positions(use, student.shape[-1], teacher.detach(), student)


def entropy(logits: Tensor) -> Tensor:
    """Entropy `[...]` in nats of logits `[..., vocabulary]`."""
    return _over_positions(lambda rows: sampling.entropy(_wide(rows)), logits.shape[-1], logits)


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """`sum_x min(p(x), q(x))`, `[...]`, of logits `[..., vocabulary]`: how often a token drawn from q is accepted."""

    def use(p: Tensor, q: Tensor) -> Tensor:
        return torch.minimum(_wide(p).softmax(-1), _wide(q).softmax(-1)).sum(-1)

    return _over_positions(use, q.shape[-1], p, q)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _over_positions(use: Callable[..., Tensor], width: int, *given: Tensor) -> Tensor:
    """`use` on all positions `[...]` of the first tensor `[..., x]` and their like in the others, in chunks."""
    shape = given[0].shape[:-1]
    flat = [t.reshape(math.prod(shape), *t.shape[len(shape) :]) for t in given]
    size = max(1, _CHUNK // max(width, 1))
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        use = functools.partial(checkpoint, use, use_reentrant=False, preserve_rng_state=False)
    # An empty selection gives an empty result that still belongs to the graph.
    pieces = [use(*part) for part in zip(*(t.split(size) for t in flat), strict=True)]
    return torch.cat(pieces).view(shape)
