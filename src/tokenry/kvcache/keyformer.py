"""Keyformer: the newest tokens and the key tokens of a noised, annealed score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenry.kvcache.engine import AttentionRows, CachePolicy, TokenLayer, age_first, part

_ROWS = 256
_WORD = 0xFFFF_FFFF
_EULER = 0.5772156649015329  # mean of the standard Gumbel distribution


@dataclass(frozen=True, kw_only=True)
class Keyformer(CachePolicy):
    """Keep the newest tokens and those with the largest accumulated noisy score (arXiv 2403.09054, section 3).

    Each query adds ``softmax((x + noise) / temperature)`` of its logits ``x`` over the slots it sees; the noise never
    reaches the attention output. The query heads of a KV head share one draw, on the logarithm of the sum of their
    probabilities, and their score counts as many times as they are: with one query head a KV head, as in the paper's
    models, this is its formula; for more of them it is Tokenry's own, since rows of drafts that are committed have that
    sum alone. The noise is a function of ``seed``, layer, KV head and the positions of query and
    slot, so runs repeat and rows do not depend on their batch.

    Args:
        budget: Slots a layer and KV head after every forward, the newest included; 256 is the family's common default,
            the paper's is 60 % of the prompt, ``budget=0.6``.
        recent: Share of the budget that the newest tokens hold, at least 4 of them (the official runs: 0.3).
        noise: ``"gumbel"`` is the paper's; ``"gaussian"`` has its mean and variance; with ``"none"`` and a temperature
            of 1 the score is H2O's.
        temperature: Divisor of the logits while the prompt is read, and after ``rise`` generated tokens.
        rise: Generated tokens over which the temperature rises evenly; a forward of one token, or a verified one,
            counts as generated (the official step of 0.01 is 100).
        seed: Seed of the noise, apart from that of sampling.
    """

    needs_attention: ClassVar[bool] = True
    ordered: ClassVar[bool] = False

    recent: float = 0.3
    noise: Literal["gumbel", "gaussian", "none"] = "gumbel"
    temperature: tuple[float, float] = (1.0, 2.0)
    rise: int = 100
    seed: int = 0

    def validate(self) -> None:
        self.check("recent", "between 0 and 1", 0 <= self.recent <= 1)
        self.check("temperature", "two finite numbers above 0", all(0 < t < math.inf for t in self.temperature))
        self.check("rise", "at least 1", self.rise >= 1)
        super().validate()

    def protected(self) -> int:
        return max(4, part(self.recent, int(self.budget)))

    def least(self) -> int:
        return 5

    def fresh(self, positions: Tensor, heads: int) -> dict[str, Tensor]:
        zeros = torch.zeros(positions.shape[0], heads, positions.shape[1], device=positions.device)
        # "step" holds how many tokens had been generated with each; the newest token, which always stays, has the most.
        return {"mass": zeros, "step": zeros, "word": words(positions, self._salts(0, heads, positions.device))}

    def observe(self, layer: TokenLayer, rows: AttentionRows) -> None:
        step = layer.state["step"]
        old = step.shape[-1] - rows.count
        reached = F.pad(step[:, 0, :old], (1, 0)).amax(-1, keepdim=True)
        if rows.count == 1 or layer.pending is not None:
            ages, counts = rows.ages()
            reached = reached + counts[:, None] - ages
        reached = reached.expand(-1, rows.count)
        layer.state["step"] = torch.cat([step[..., :old], reached[:, None].expand(-1, step.shape[1], -1)], -1)

        first, last = self.temperature
        sharpness = 1 / (first + (last - first) * (reached / self.rise).clamp(max=1))
        columns = layer.state["word"]
        positions = layer.slots.places(layer.cache.batch, layer.device)[:, 0, old:]
        if layer.slots.positions is None:
            # All rows of the batch stand at the same positions and draw the same.
            columns, positions = columns[:1], positions[:1]
        queries = words(positions, self._salts(1 + layer.number, step.shape[1], layer.device))
        mass = layer.state["mass"]
        for start in range(0, rows.count, _ROWS):
            stop = min(start + _ROWS, rows.count)
            # No row of the block sees a slot behind the last of them.
            seen = old + stop
            logits = rows.rows(start, stop)[..., :seen].log()
            if self.noise != "none":
                uniform = pair_noise(queries[..., start:stop], columns[..., :seen])
                logits = logits + (-(-uniform.log()).log() if self.noise == "gumbel" else _gaussian(uniform))
            # Rows of padding see nothing: all their logits are -inf.
            weights = (logits * sharpness[:, None, start:stop, None]).softmax(-1).nan_to_num(0)
            mass = mass + F.pad(weights.sum(2) * rows.groups, (0, mass.shape[-1] - seen))
        layer.state["mass"] = mass

    def _salts(self, side: int, heads: int, device: torch.device) -> Tensor:
        """A number for each KV head ``[kv_heads]``: of the slots of any layer, ``side`` 0, or of a layer's queries."""
        return torch.arange(heads, device=device) * 40_503 + side * 2_654_435 + (self.seed * 1_013_904_223 & _WORD)

    def score(self, layer: TokenLayer) -> Tensor:
        return layer.state["mass"].masked_fill(age_first(layer, self.protected()), float("inf"))


def words(positions: Tensor, salts: Tensor) -> Tensor:
    """A 32-bit word ``[batch, heads, count]`` of each position ``[batch, count]`` and salt ``[heads]``."""
    return _mixed(positions[:, None] * 2_654_435_761 + _mixed(salts)[:, None])


def pair_noise(queries: Tensor, slots: Tensor) -> Tensor:
    """A number in (0, 1) for each pair of a query and a slot, ``[batch, heads, rows, slots]``, from their words
    ``[batch, heads, rows]`` and ``[batch, heads, slots]``."""
    # 23 bits and a half, so that neither 0 nor 1 comes out of float32.
    return ((_mixed(queries[..., None] ^ slots[..., None, :]) >> 9).float() + 0.5) / 2**23


def _mixed(words: Tensor) -> Tensor:
    """32-bit words with every bit of the outcome a function of all bits."""
    words = words & _WORD
    for shift in (16, 15):
        words = ((words ^ (words >> shift)) * 73_244_475) & _WORD
    return words ^ (words >> 16)


def _gaussian(uniform: Tensor) -> Tensor:
    """Normal noise of the standard Gumbel distribution's mean and variance."""
    return _EULER + math.pi / math.sqrt(3) * torch.erfinv(2 * uniform - 1)
