import math

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

from tokenry.sampling import (
    Noise,
    entropy,
    is_context_free,
    is_row_free,
    is_stateful,
    kl,
    likeliest,
    margin,
    probabilities,
)

CPU = torch.device("cpu")


def test_entropy_margin_and_divergence_by_hand():
    scores = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64).log()
    assert math.isclose(float(entropy(scores)), 1.5 * math.log(2), rel_tol=1e-12)
    assert math.isclose(float(margin(scores)), math.log(2), rel_tol=1e-12)
    other = torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=torch.float64).log()
    assert math.isclose(float(kl(scores, other)), 0.5 * math.log(2), rel_tol=1e-12)
    assert float(kl(scores, scores)) == 0.0


def test_no_float64_is_narrowed():
    scores = torch.randn(3, 7, dtype=torch.float64)
    assert all(f(scores).dtype == torch.float64 for f in (probabilities, entropy, margin))
    assert kl(scores, scores).dtype == torch.float64
    assert Noise(1, CPU).exponential(0, 0, scores[0]).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_likeliest_is_the_first_of_the_largest(dtype):
    torch.manual_seed(0)
    scores = torch.randint(0, 9, (3, 5, 40)).to(dtype)  # many ties
    scores[0, 0] = -torch.inf
    scores[1, 1, 7] = torch.inf
    scores[2, 2, 3] = torch.nan
    got = likeliest(scores)
    assert got.dtype == torch.long
    assert torch.equal(got, scores.argmax(-1))
    assert (got == (scores == scores.amax(-1, keepdim=True)).int().argmax(-1))[~scores.isnan().any(-1)].all()
    assert torch.equal(likeliest(scores[:, 2, ::2]), scores[:, 2, ::2].argmax(-1))
    assert torch.equal(likeliest(scores.float().requires_grad_()), got)


def test_processors_are_told_apart_by_what_they_read():
    class Own(LogitsProcessor):
        pass

    class Warmer(TemperatureLogitsWarper):
        pass

    assert is_context_free(TemperatureLogitsWarper(0.5))
    assert not is_context_free(Warmer(0.5)) and not is_row_free(Warmer(0.5))
    assert not is_context_free(NoRepeatNGramLogitsProcessor(3)) and is_row_free(NoRepeatNGramLogitsProcessor(3))
    assert not is_row_free(RepetitionPenaltyLogitsProcessor(1.3)) and not is_row_free(Own())
    assert not is_stateful(Own())


def test_noise_depends_on_seed_row_position_and_stream_only():
    like = torch.empty(50)
    noise = Noise(3, CPU)
    first = noise.exponential(1, 7, like)
    noise.exponential(0, 2, like)
    assert torch.equal(noise.exponential(1, 7, like), first)
    for other in (Noise(4, CPU).exponential(1, 7, like), noise.exponential(0, 7, like),
                  noise.exponential(1, 8, like), noise.exponential(1, 7, like, stream=1)):  # fmt: skip
        assert not torch.equal(other, first)
    assert noise.uniform(1, 7, 3) == noise.uniform(1, 7, 5)[:3]


def test_seeded_samples_follow_the_distribution():
    """Chi-square with 4 degrees of freedom over 20,000 positions; false alarm below 1e-5, and the seed is fixed."""
    probs = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03])
    count = 20_000
    tokens = Noise(0, CPU).sample(probs.expand(count, -1), [0] * count, list(range(count)), [0] * count)
    seen = tokens.bincount(minlength=5)
    expected = probs * count
    assert float(((seen - expected) ** 2 / expected).sum()) < 28.5
