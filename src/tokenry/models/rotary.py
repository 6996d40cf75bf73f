"""How a decoder turns positions into rotations, and how a rotated query or key is turned to another position."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenry.errors import UnsupportedModel
from tokenry.models.anatomy import anatomy

# Their frequencies depend on how long the sequence has become, so a stored rotation cannot be undone.
_CHANGING = ("dynamic", "longrope")


class Rotary:
    """The rotary positions of a decoder, read from its own tables.

    Attributes:
        layout: Which dimensions make a plane: ``"halves"`` (i and i + width / 2) or ``"adjacent"`` (2i and 2i + 1),
            found from which columns of the model's cosines share a frequency.
        width: Dimensions of a head that are rotated; those behind carry no position.
        frequencies: Radians per position of each plane, float32 ``[width / 2]``.

    Raises:
        UnsupportedModel: The model has no rotary positions, or of a kind that cannot be read or turned.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        name = type(model).__name__
        module = anatomy(model).rotary
        if module is None:
            raise UnsupportedModel(f"{name} has no rotary positions: choose positions=original")
        frequencies = getattr(module, "inv_freq", None)
        kind = getattr(module, "rope_type", "default")
        if kind in _CHANGING or not isinstance(frequencies, Tensor):
            raise UnsupportedModel(
                f"{name} has rotary positions of the kind {kind}, whose frequencies change with the length: rotations "
                "at fixed positions only (default, linear, llama3, yarn)"
            )
        self.frequencies = frequencies.float()
        self.layout = layout(module, name)
        self.width = 2 * self.frequencies.shape[0]

    def turn(self, states: Tensor, by: Tensor) -> Tensor:
        """Queries or keys ``[batch, heads, n, head_dim]`` turned ``by`` further positions ``[batch, 1 or heads, n]``.

        Scalings of the whole rotation (yarn's attention factor) are in ``states`` already and stay as they are.
        """
        angles = by[..., None].to(torch.float32) * self.frequencies.to(states.device)
        wide = torch.promote_types(states.dtype, torch.float32)
        cos, sin = angles.cos().to(wide), angles.sin().to(wide)
        one, two = self._halves(states)
        first, second = one.to(wide), two.to(wide)
        turned = torch.empty_like(states, memory_format=torch.contiguous_format)
        # Each half is taken behind the last change of the whole, as gradients ask.
        self._halves(turned)[0].copy_(first * cos - second * sin)
        self._halves(turned)[1].copy_(second * cos + first * sin)
        turned[..., self.width :] = states[..., self.width :]
        return turned

    def _halves(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Both coordinates of every plane, ``[..., width / 2]`` each."""
        if self.layout == "halves":
            return states[..., : self.width // 2], states[..., self.width // 2 : self.width]
        return states[..., 0 : self.width : 2], states[..., 1 : self.width : 2]


def layout(module: nn.Module, name: str) -> Literal["halves", "adjacent"]:
    """Which columns of a rotary module's cosines share a frequency.

    Raises:
        UnsupportedModel: Neither layout fits, or the module does not give cosines for positions.
    """
    positions = torch.arange(3, device=module.inv_freq.device)[None]  # type: ignore[arg-type]
    try:
        cos, _ = module(torch.zeros(1, 3, 1, device=positions.device), positions)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedModel(f"{name} computes its rotary positions in an unknown way ({error})") from error
    half = cos.shape[-1] // 2
    if torch.equal(cos[..., :half], cos[..., half:]):
        return "halves"
    if torch.equal(cos[..., 0::2], cos[..., 1::2]):
        return "adjacent"
    raise UnsupportedModel(f"{name} pairs the dimensions of its rotary positions in an unknown way")


def planes(model: PreTrainedModel, head_dim: int) -> Tensor:
    """The dimensions of each plane of a head, ``[planes, 2]``; where a model rotates nothing, or only a part of a
    head, neighbouring dimensions of the rest stand together."""
    module = anatomy(model).rotary
    dims = torch.arange(head_dim)
    if module is None or not isinstance(getattr(module, "inv_freq", None), Tensor):
        return dims.view(-1, 2)
    width = 2 * module.inv_freq.shape[0]  # type: ignore[index]
    if layout(module, type(model).__name__) == "halves":
        turned = dims[:width].view(2, -1).T
    else:
        turned = dims[:width].view(-1, 2)
    return torch.cat([turned, dims[width:].view(-1, 2)])
