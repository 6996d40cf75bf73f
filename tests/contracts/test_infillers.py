"""What every infiller promises: it fills every masked place and nothing else, the same for a seed, and counts."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.contracts.registered import registered
from tokenry.generation.infill import Canvas
from tokenry.speculation.any_subset import any_subset

MASK = 3
CLASSES = registered("infiller")


def canvas(side: str, seed: int) -> Canvas:
    inputs = tiny.prompts((22, 13))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ids = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.5, MASK, ids)
    ids[:, -1] = MASK
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    return Canvas.of(ids * mask, mask, MASK, seed)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.slug)
def test_fills_what_is_masked_and_nothing_else(cls, side):
    model = any_subset(tiny.model("llama", torch.float64), MASK)
    given = canvas(side, 0)
    result = cls().fill(model, given)
    filled = result.sequences
    assert torch.equal(filled[~given.masked], given.ids[~given.masked])
    assert not bool((filled[given.masked] == MASK).any())
    assert torch.equal(result.sources >= 0, given.masked)
    assert result.stats.committed == int(given.masked.sum())
    assert sum(result.stats.extra["calls"]) == result.stats.passes >= len(filled)
    assert torch.equal(cls().fill(model, canvas(side, 0)).sequences, filled)
