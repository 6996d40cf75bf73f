"""Rotations read from a model's own tables, and states turned to other positions."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests import tiny
from tokenry.errors import UnsupportedModel
from tokenry.models import Rotary, planes
from tokenry.models.rotary import layout


def _rotated(model, states, positions):
    cos, sin = model.model.rotary_emb(states, positions)
    return apply_rotary_pos_emb(states, states, cos, sin)[0]


def test_turned_states_equal_states_rotated_afresh():
    model = tiny.model()
    rotary = Rotary(model)
    assert rotary.layout == "halves" and rotary.width == 8
    states = torch.randn(2, 2, 30, 8, generator=torch.Generator().manual_seed(0))
    old, new = torch.arange(30)[None], (torch.arange(30) * 7 % 30)[None]
    turned = rotary.turn(_rotated(model, states, old), (new - old)[:, None])
    assert torch.allclose(turned, _rotated(model, states, new), atol=2e-6)
    assert torch.allclose(rotary.turn(turned, -new[:, None]), states, atol=2e-6)


@pytest.mark.parametrize(("kind", "rotated"), (("llama", 4), ("gpt_neox", 1), ("gpt2", 0)))
def test_planes_are_every_dimension_once_and_depend_on_the_offset_alone(kind, rotated):
    model = tiny.model(kind)
    dims = planes(model, 8)
    assert sorted(dims.flatten().tolist()) == list(range(8))
    if not rotated:
        with pytest.raises(UnsupportedModel, match="no rotary positions"):
            Rotary(model)
        return
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    rotary = Rotary(model)

    def products(dims, start):
        one, two = (rotary.turn(x, torch.tensor([[[start + p]]])) for x, p in ((query, 5), (key, 2)))
        return (one[..., dims] * two[..., dims]).sum(-1).flatten()

    assert torch.allclose(products(dims, 0), products(dims, 100), atol=1e-4)
    assert torch.allclose(products(dims, 0).sum(), products(dims.flatten()[None], 0).sum(), atol=1e-5)
    if kind == "llama":
        wrong = torch.arange(8).view(-1, 2)
        assert not torch.allclose(products(wrong, 0), products(wrong, 100), atol=1e-2)


def test_layout_is_read_from_the_cosines():
    class Adjacent(torch.nn.Module):
        inv_freq = torch.tensor([1.0, 0.1])

        def forward(self, states, positions):
            angles = (positions[..., None] * self.inv_freq).repeat_interleave(2, -1)
            return angles.cos(), angles.sin()

    assert layout(Adjacent(), "X") == "adjacent"

    class Neither(Adjacent):
        inv_freq = torch.tensor([1.0, 0.1, 0.01, 0.001])

        def forward(self, states, positions):
            angles = positions[..., None] * self.inv_freq
            return angles.cos(), angles.sin()

    with pytest.raises(UnsupportedModel, match="unknown way"):
        layout(Neither(), "X")


def test_positions_that_change_with_the_length_are_refused():
    config = tiny.config("llama")
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    with pytest.raises(UnsupportedModel, match="dynamic"):
        Rotary(type(tiny.model())(config))
