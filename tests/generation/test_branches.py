"""Branches: a decoder may try continuations on copies of its rows and take over the ones it likes."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from tests import tiny
from tokenry.errors import CacheMisuse
from tokenry.generation import Commit, Decoder, Options, Plain, Source
from tokenry.generation.plain import plain_step


@dataclass(frozen=True, kw_only=True)
class Scout(Decoder):
    """Runs `copies` branches of every row for up to `reach` tokens, row `b` a token less than row `b + 1`, and commits
    what the last copy found: plain decoding in a roundabout way."""

    slug: ClassVar[str] = "scout"
    copies: int = 2
    reach: int = 4

    def step(self, session, state):
        rows = torch.arange(session.batch).repeat_interleave(self.copies)
        branch = session.branch(rows)
        start = branch.length
        goal = start + 1 + (rows + self.reach) % self.reach
        while branch.running:
            branch.accept(plain_step(branch))
            branch.halt(branch.length >= goal)
        last = torch.arange(session.batch) * self.copies + self.copies - 1
        gained = (branch.length - start)[last]
        columns = start[last][:, None] + torch.arange(max(int(gained.max()), 1))
        tokens = branch.ids[last].gather(1, columns.clamp(max=branch.ids.shape[1] - 1))
        session.adopt(branch, last)
        return Commit(tokens, gained, Source.TRIAL)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 3}, {"eos_token_id": [5, 9, 30, 31], "pad_token_id": 0}],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(8,), (8, 3, 6)], ids=str)
def test_greedy_branches_equal_plain(copies, options, lengths):
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts(lengths)
    options = {"max_new_tokens": 21, "do_sample": False, "return_dict_in_generate": True} | options
    plain = model.generate(**inputs, **options)
    ours = model.generate(**inputs, custom_generate=Scout(copies=copies), **options)
    assert torch.equal(ours.sequences, plain.sequences)
    assert set(ours.new_sources[0]) == {Source.TRIAL}
    assert ours.stats.committed == sum(map(len, ours.new_tokens))
    if lengths == (8,) and "eos_token_id" not in options:
        assert ours.past_key_values.get_seq_length() == ours.sequences.shape[1] - 1


def test_branches_of_a_row_sample_on_their_own():
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Watch(Scout):
        slug: ClassVar[str] = "watch"

        def step(self, session, state):
            branch = session.branch(torch.zeros(6, dtype=torch.long))
            seen.append(branch.choose(branch.process(branch.next_logits())).tolist())
            return plain_step(session)

    model, inputs = tiny.model(), tiny.prompts((8,))
    options = {"max_new_tokens": 3, "do_sample": True, "temperature": 3.0, "tokenry_options": Options(seed=1)}
    first = model.generate(**inputs, custom_generate=Watch(), **options)
    assert all(len(set(draws)) > 1 for draws in seen)
    assert torch.equal(model.generate(**inputs, custom_generate=Watch(), **options), first)
    assert seen[:3] == seen[3:]
    assert torch.equal(model.generate(**inputs, custom_generate=Plain(), **options), first)


def test_the_models_own_attention_has_no_branches():
    @dataclass(frozen=True, kw_only=True)
    class Native(Scout):
        slug: ClassVar[str] = "native-scout"
        native: ClassVar[bool] = True

    with pytest.raises(CacheMisuse, match="no branches"):
        tiny.model().generate(**tiny.prompts((4,)), custom_generate=Native(), max_new_tokens=3)
