"""LazyLLM's own invariants, as on its card, against a reference that keeps every token by itself."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests import tiny
from tests.kvcache import test_engine as engine
from tokenry.errors import BadParameter, BudgetTooSmall, CacheMisuse
from tokenry.kvcache import LazyLLM

GREEDY = {"do_sample": False, "max_new_tokens": 12}
SERVED = [kind for kind in tiny.SERVED if kind != "mistral"]
SMALL = LazyLLM(layers=(0, 1), budget=0.3)


class Reference:
    """LazyLLM on a Llama, one token at a time: keys, values and hidden states in dictionaries by position."""

    def __init__(self, model, policy) -> None:
        self.model, self.policy = model, policy
        self.keys = [{} for _ in model.model.layers]
        self.values = [{} for _ in model.model.layers]
        self.waiting = {number: {} for number in policy.layers}
        self.prompt, self.seen = set(), 0
        self.runs = []

    def forward(self, ids):
        """Logits of the newest token, and the tokens alive behind each layer of the policy."""
        new = range(self.seen, self.seen + len(ids))
        self.seen += len(ids)
        if len(ids) > 1:
            self.prompt |= set(new)
        hidden = {place: self.model.model.embed_tokens(ids[place - new[0]])[None, None] for place in new}
        alive, rows, trace = set(range(self.seen)), list(new), []
        for number, layer in enumerate(self.model.model.layers):
            inputs = {place: layer.input_layernorm(hidden[place]) for place in rows}
            queries = {}
            for place in rows:
                self.runs.append((number, place))
                queries[place] = self._project(layer.self_attn, inputs[place], number, place)
            for place in rows:
                visible = sorted(p for p in self.keys[number] if p in alive and p <= place)
                weights = self._weights(queries[place], number, visible)
                values = torch.stack([self.values[number][p] for p in visible], 1).repeat_interleave(2, 0)
                output = layer.self_attn.o_proj((weights[:, None] @ values)[:, 0].reshape(1, 1, -1))
                hidden[place] = hidden[place] + output
                hidden[place] = hidden[place] + layer.mlp(layer.post_attention_layernorm(hidden[place]))
                if place == new[-1]:
                    score = dict(zip(visible, weights.mean(0).tolist(), strict=True))
            if number in self.waiting:
                judged = (alive & self.prompt) - {new[-1]}
                stage = self.policy.layers.index(number)
                keep = self.policy.counts(len(self.prompt), len(self.policy.layers))[stage]
                keep -= new[-1] in self.prompt
                chosen = sorted(judged, key=lambda place: (-score[place], -place))[:keep]
                alive = (alive - judged) | set(chosen)
                trace.append(alive)
                self.waiting[number] |= {place: hidden[place] for place in rows if place not in alive}
                hidden |= {p: self.waiting[number].pop(p) for p in alive if p in self.waiting[number]}
                rows = sorted(place for place in alive if place not in self.keys[number + 1])
        return self.model.lm_head(self.model.model.norm(hidden[new[-1]]))[0, 0], trace

    def _project(self, attention, x, number, place):
        heads = [
            part(x).view(1, 1, -1, attention.head_dim).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        angles = self.model.model.rotary_emb(x, torch.tensor([[place]]))
        query, key = apply_rotary_pos_emb(heads[0], heads[1], *angles)
        self.keys[number][place], self.values[number][place] = key[0, :, 0], heads[2][0, :, 0]
        return query[0, :, 0]

    def _weights(self, query, number, visible):
        keys = torch.stack([self.keys[number][p] for p in visible], 1).repeat_interleave(2, 0)
        return ((keys @ query[..., None])[..., 0] * query.shape[-1] ** -0.5).softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("policy", (SMALL, LazyLLM(layers=(0, 1), rates=(0.6, 0.5)), LazyLLM(layers=(1,), budget=7)))
def test_every_step_equals_the_reference(policy):
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((40,))["input_ids"]
    reference = Reference(model, policy)
    with policy(model):
        out = model(ids)
        cache = out.past_key_values
        wanted, trace = reference.forward(ids[0])
        went = (~out.logits[0].isnan().any(-1)).nonzero()[:, 0].tolist()
        assert went == sorted(trace[-1]) and len(went) == policy.counts(40, len(policy.layers))[-1]
        revived = 0
        for _ in range(12):
            assert torch.allclose(out.logits[0, -1], wanted, atol=1e-9)
            token = wanted.argmax().view(1, 1)
            before = [layer.ran for layer in cache.layers]
            # Twice the same token, so that attention has reason to go elsewhere.
            out = model(token, past_key_values=cache)
            wanted, trace = reference.forward(token[0])
            for number, alive in zip(policy.layers, trace, strict=True):
                dead = cache.layers[number].beside["dead"][0]
                assert set((~dead).nonzero()[:, 0].tolist()) == alive
            assert all(behind <= ahead for ahead, behind in itertools.pairwise(trace)), "sets are nested"
            revived += cache.layers[-1].ran - before[-1] - 1
    assert revived > 0, "tokens must come back in this test"
    assert len(reference.runs) == len(set(reference.runs))
    for number, layer in enumerate(cache.layers):
        positions = layer.slots.places(1, layer.device)[0, 0]
        assert sorted(positions.tolist()) == sorted(reference.keys[number]), "no token runs twice"
        assert layer.ran == layer.size
        keys = torch.stack([reference.keys[number][place] for place in positions.tolist()], 1)
        assert torch.allclose(layer.keys[0], keys, atol=1e-9)
    waiting = [set(cache.layers[number].beside["waiting"][0].tolist()) - {-1} for number in policy.layers]
    assert waiting == [set(reference.waiting[number]) for number in policy.layers]
    shares = [1 - len(found) / 40 for found in waiting]
    assert torch.allclose(policy.reached(cache)[:, 0], torch.tensor(shares), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", SERVED)
def test_all_tokens_going_on_is_the_plain_model(kind):
    model = tiny.model(kind)
    inputs = tiny.prompts((40, 29))
    stages = len(LazyLLM().prepare(model))
    layers = LazyLLM().prepare(model)
    options = GREEDY | {"return_dict_in_generate": True}
    wanted = model.generate(**inputs, **GREEDY)
    for policy in (LazyLLM(layers=layers, rates=(1.0,) * stages), LazyLLM(budget=64)):
        for chunk in ({}, {"prefill_chunk_size": 16}):
            with policy(model):
                got = model.generate(**inputs, **options, **chunk)
            assert torch.equal(got.sequences, wanted)
            assert not any("waiting" in layer.beside for layer in got.past_key_values.layers)
            assert got.past_key_values.computed_share() == 1


@torch.no_grad()
def test_the_first_token_needs_no_revival_and_the_later_do():
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((40,))["input_ids"]
    once = dataclasses.replace(SMALL, revive=False)
    logits = []
    for policy in (SMALL, once):
        with policy(model):
            result = model.generate(ids, **GREEDY, return_dict_in_generate=True, output_logits=True)
        logits.append(result.logits)
    assert torch.equal(logits[0][0], logits[1][0])
    assert not torch.allclose(torch.stack(logits[0]), torch.stack(logits[1]), atol=1e-6)
    cache = result.past_key_values
    counts = once.counts(40, 2)
    assert [layer.ran for layer in cache.layers] == [51, counts[0] + 11, counts[1] + 11]
    assert torch.allclose(once.reached(cache)[:, 0] * 40, torch.tensor(counts).float(), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", SERVED)
def test_a_row_of_a_padded_batch_equals_the_row_alone(kind):
    model = tiny.model(kind)
    for policy in (LazyLLM(budget=0.3), LazyLLM(budget=9, compact_every=4), LazyLLM(budget=9, prune_generated=True)):
        for lengths in ((40, 29), (29, 40), (5, 40)):
            inputs = tiny.prompts(lengths)
            with policy(model):
                both = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
                for row, length in enumerate(lengths):
                    ids = inputs["input_ids"][row : row + 1, -length:]
                    alone = model.generate(ids, **GREEDY, return_dict_in_generate=True)
                    assert torch.equal(both.sequences[row, -12:], alone.sequences[0, -12:])
                    held = zip(
                        both.past_key_values.layers, both.past_key_values.kept_positions(),
                        alone.past_key_values.kept_positions(), strict=True,
                    )  # fmt: skip
                    for layer, one, two in held:
                        if layer.window is None:
                            assert one[row, 0][one[row, 0] >= 0].tolist() == two[0, 0].tolist()


@torch.no_grad()
def test_between_choices_nothing_comes_back():
    model = tiny.model()
    with LazyLLM(budget=9, compact_every=5)(model):
        cache = model(tiny.prompts((41,))["input_ids"]).past_key_values
        for step in range(20):
            before = cache.layers[-1].ran
            cache = model(torch.tensor([[3 + 7 * step % 90]]), past_key_values=cache).past_key_values
            assert cache.layers[-1].ran - before >= 1
            if (41 + step) % 5:
                assert cache.layers[-1].ran - before == 1
        assert cache.layers[-1].ran > 29


@torch.no_grad()
def test_generated_tokens_are_left_out_where_asked():
    model = tiny.model()
    for prune, least in ((False, 30), (True, 0)):
        with LazyLLM(budget=6, prune_generated=prune)(model):
            result = model.generate(
                tiny.prompts((20,))["input_ids"], do_sample=False, max_new_tokens=31, return_dict_in_generate=True
            )
        dead = result.past_key_values.layers[1].beside["dead"][0]
        alive = (~dead[: result.past_key_values.total]).sum()
        assert int(alive) == (6 + 30 if not prune else 7)
        assert bool(dead[20:].any()) == prune and least <= 30


@torch.no_grad()
def test_a_further_turn_and_chunks_are_prompts():
    model = tiny.model()
    ids = tiny.prompts((60,))["input_ids"]
    with SMALL(model):
        cache = model(ids[:, :40]).past_key_values
        turn = model(ids[:, 40:], past_key_values=cache)
    assert bool(turn.logits[0, -1].isfinite().all()) and bool(turn.logits[0].isnan().any())
    assert cache.get_seq_length() == 60 and cache.layers[0].ran == 60 and cache.layers[2].ran < 60
    alive = ~cache.layers[1].beside["dead"][0]
    assert int(alive.sum()) == int(0.3 * 60)
    kept = [layer.slots.places(1, layer.device)[0, 0].tolist() for layer in cache.layers]
    assert all(len(set(positions)) == len(positions) for positions in kept)


def test_the_papers_schedule_and_share_of_the_work():
    """Layers 1 to 9, 10 to 19, 20 to 28 and 29 to 32 of a Llama 2 7B; in linear operations 69.1 % of the prompt's."""
    config = tiny.config("llama")
    config.num_hidden_layers = 32
    assert LazyLLM().prepare(AutoModelForCausalLM.from_config(config)) == (8, 18, 27)
    assert LazyLLM().counts(1000, 3) == [700, 490, 343]
    assert LazyLLM(layers=(0, 1), rates=(0.75, 0.25)).counts(41, 2) == [31, 8]
    config.num_hidden_layers = 10
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad(), LazyLLM()(model):
        cache = model(tiny.prompts((200,))["input_ids"]).past_key_values
    assert [layer.ran for layer in cache.layers] == [200] * 3 + [140] * 3 + [98] * 3 + [68]
    assert cache.computed_share() == pytest.approx(0.3 + 0.3 * 0.7 + 0.3 * 0.49 + 0.1 * 0.343, abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_and_bytes(dtype):
    model = tiny.model(dtype=dtype)
    with SMALL(model):
        out = model.generate(**tiny.prompts((40, 29)), **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert all(bool(logits.isfinite().all()) for logits in out.logits)
    cache = out.past_key_values
    assert cache.layers[0].beside["waiting0"].dtype == dtype
    parts = [part for layer in cache.layers for part in (*layer.held(), *layer.beside.values())]
    assert cache.nbytes() == sum(part.numel() * part.element_size() for part in parts)


def test_beams_and_what_moves_with_rows():
    model = tiny.model()
    with SMALL(model):
        model.generate(**tiny.prompts((40, 31)), **GREEDY, num_beams=3)
    engine.test_fork_reorder_and_select_carry_the_state(partial(LazyLLM, layers=(0, 1)))


def test_misuse_is_refused():
    model = tiny.model()
    ids = tiny.prompts((40,))["input_ids"]
    with torch.no_grad(), SMALL(model):
        cache = model(ids).past_key_values
        with pytest.raises(CacheMisuse, match="cannot go back"):
            cache.crop(-1)
    with torch.no_grad():
        cache = model(ids[:, :2], past_key_values=LazyLLM(budget=30).cache(model)).past_key_values
        cache.crop(-1)
        assert cache.get_seq_length() == 1
    for layers in ((2,), (0, 7)):
        with pytest.raises(BadParameter, match="attend in full"), LazyLLM(layers=layers)(model):
            model(ids)
    with pytest.raises(BadParameter, match="rates take its place"):
        LazyLLM(budget=0.5, rates=(0.5, 0.5, 0.5))
    for options in (
        {"layers": (1, 0)},
        {"rates": (0.5,)},
        {"rates": (0.5, 0.0, 0.5)},
        {"bits": 4},
        {"compact_every": 0},
    ):
        with pytest.raises(BadParameter, match=next(iter(options))):
            LazyLLM(**options)
    with pytest.raises(BudgetTooSmall):
        LazyLLM(budget=0)
