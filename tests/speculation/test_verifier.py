"""Corners of the verify step: stop strings, constraints by row, sampled drafts in a ragged batch, half-read scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from transformers.generation import GenerateDecoderOnlyOutput

import tokenry
from tests import tiny
from tests.evaluation import tiny_text
from tests.speculation.test_engine import _law, free_run, run
from tests.speculation.toys import Mixed, Oracle
from tokenry.generation import GenerationResult
from tokenry.speculation import Drafter, DraftTree, TreeShape


def test_a_stop_string_ends_inside_an_accepted_run():
    """At several places of a run of seven; a stop may start in one token and end in another."""
    model, tokenizer = tiny_text.model(), tiny_text.tokenizer()
    text = tokenry.generate(model, tokenizer, "abc", max_new_tokens=40)
    drafter, resources = Oracle(depth=6), {"truth": text.sequences}
    places = set()
    for start in range(1, 20):
        options = {"stop_strings": text.text()[start : start + 2], "max_new_tokens": 24}
        wanted = tokenry.generate(model, tokenizer, "abc", **options).new_tokens
        ours = tokenry.generate(model, tokenizer, "abc", method=drafter, resources=resources, **options)
        assert ours.new_tokens == wanted
        # The prefill gives the first token.
        assert ours.stats.forwards == 1 + -(-(len(wanted[0]) - 1) // 7)
        if len(wanted[0]) < 24:
            places.add((len(wanted[0]) - 2) % 7)
    assert len(places) > 3


def test_constraints_are_those_of_the_row():
    """A constraint is told the number of its prompt, also where rows have progressed unequally."""
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((8, 3, 6))

    def allowed(row, ids):
        return [t for t in range(3, tiny.VOCABULARY) if t % 3 == (row + len(ids)) % 3]

    options = {"prefix_allowed_tokens_fn": allowed, "eos_token_id": None, "pad_token_id": 0}
    plain = run(model, inputs, **options, max_new_tokens=40)
    ours = run(model, inputs, Mixed(), plain.sequences, **options)
    assert torch.equal(ours.sequences, plain.sequences[:, :32]) and ours.stats.accepted > 0


def test_a_processor_that_writes_in_place_is_served_in_a_ragged_batch():
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((20, 13, 8), seed=4)

    def never(ids, scores):
        scores[:, 5] = -float("inf")
        return scores

    options = {"logits_processor": [never], "eos_token_id": None}
    plain = run(model, inputs, **options, max_new_tokens=40)
    ours = run(model, inputs, Mixed(), plain.sequences, **options)
    assert torch.equal(ours.sequences, plain.sequences[:, : ours.sequences.shape[1]]) and ours.stats.accepted > 0


@pytest.mark.parametrize(
    "options",
    [
        {"sequence_bias": {(7,): 3.0, (8, 9): -5.0}},
        {"exponential_decay_length_penalty": (6, 1.5), "eos_token_id": [5, 9, 30]},
        {"encoder_repetition_penalty": 1.4},
        {"begin_suppress_tokens": [3, 4, 5, 6, 7, 8]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_processors(options):
    options = {"eos_token_id": None, "pad_token_id": 0} | options
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts((8, 3, 6))
    truth = free_run(model, inputs, **options | {"eos_token_id": None, "exponential_decay_length_penalty": None})
    ours = run(model, inputs, Mixed(), truth, **options)
    assert torch.equal(ours.sequences, run(model, inputs, **options).sequences) and ours.stats.accepted > 0


def test_return_types_are_generates():
    model, inputs = tiny.model(), tiny.prompts((8, 5))
    truth = free_run(model, inputs)
    bare = run(model, inputs, Mixed(), truth, return_dict_in_generate=False)
    assert type(bare) is torch.Tensor and bare.dtype == inputs["input_ids"].dtype
    result = run(model, inputs, Mixed(), truth)
    assert isinstance(result, GenerationResult) and isinstance(result, GenerateDecoderOnlyOutput)
    assert result.scores is None and result.logits is None and torch.equal(result.sequences, bare)
    kept = run(model, inputs, Mixed(), truth, output_scores=True, eos_token_id=int(truth[0, 12]), pad_token_id=0)
    longest = max(map(len, kept.new_tokens))
    assert len(kept.scores) == longest and kept.scores[0].shape == (2, tiny.VOCABULARY)
    assert bool((kept.scores[-1][[len(new) < longest for new in kept.new_tokens]] == 0).all())


@dataclass(frozen=True, kw_only=True)
class Drawn(Drafter):
    """Drafts drawn from a law of its own, which is wrong: a chain, or two children with one grandchild each."""

    slug: ClassVar[str] = "drawn"
    resources: ClassVar[tuple[str, ...]] = ("truth", "never")
    tree: bool = False

    def propose(self, session: Any, state: Any, room: int) -> DraftTree:
        shape = TreeShape.of((-1, 0, 0, 1, 2)) if self.tree else TreeShape.chain(3)
        law = session.resources["truth"].expand(session.batch, -1)
        q = law[:, None].repeat(1, shape.size, 1)
        if self.tree:
            drafts = torch.cat([torch.multinomial(law, 2), torch.multinomial(law, 2, replacement=True)], 1)
        else:
            drafts = torch.multinomial(law, 2, replacement=True)
        return DraftTree(torch.cat([session.anchor[:, None], drafts], 1), shape, q=q)


@pytest.mark.parametrize("tree", [False, True])
def test_sampled_drafts_of_a_ragged_batch_follow_the_targets_law(tree):
    """Chi-square of the first three tokens of 1,500 rows against the plain loop's exact law over the 2 tokens that
    top-k leaves at each place: 7 degrees of freedom, false alarm below 1e-5, and the seed is fixed. Some rows are
    padded, so the batch is ragged from the start."""
    model = tiny.model()
    short = tiny.prompts((4,))
    rows = 1500
    ids = torch.nn.functional.pad(short["input_ids"], (2, 0)).repeat(rows, 1)
    mask = torch.nn.functional.pad(short["attention_mask"], (2, 0)).repeat(rows, 1)
    other = tiny.prompts((6,), seed=3)
    inputs = {
        "input_ids": torch.cat([ids, other["input_ids"].repeat(20, 1)]),
        "attention_mask": torch.cat([mask, other["attention_mask"].repeat(20, 1)]),
    }
    law = _law(model, short["input_ids"], 3)
    q = torch.full((1, tiny.VOCABULARY), 1e-3)
    for text in law:
        q[0, list(text)] += 1.0
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 2, "temperature": 3.0, "max_new_tokens": 3}
    result = run(model, inputs, Drawn(tree=tree), q / q.sum(), **options)
    assert result.stats.accepted > 0
    seen: dict[tuple[int, ...], int] = {}
    for new in result.new_tokens[:rows]:
        seen[tuple(new)] = seen.get(tuple(new), 0) + 1
    assert set(seen) <= set(law)
    chi = sum((seen.get(text, 0) - rows * p) ** 2 / (rows * p) for text, p in law.items())
    assert chi < 36.8 + 4
