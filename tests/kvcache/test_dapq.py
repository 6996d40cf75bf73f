"""DapQ's own invariants, as on its card."""

from __future__ import annotations

import pytest
import torch

import tokenry
from tests import tiny
from tests.kvcache.test_h2o import _eager
from tokenry.errors import BadParameter, BudgetTooSmall, CacheMisuse
from tokenry.kvcache import DapQ
from tokenry.kvcache.dapq import pseudo_tokens
from tokenry.models import TokenCache, attached
from tokenry.workloads import library_files


class Unjudged(DapQ):
    """Leaves it to the test to judge."""

    def after(self, model, cache, input_ids):
        pass


@torch.no_grad()
@pytest.mark.parametrize("kind", ("llama", "gpt2", "gemma2"))
def test_nothing_of_the_pseudo_tokens_stays(kind):
    model = tiny.model(kind, torch.float64)
    inputs = tiny.prompts((40, 29))
    with attached(model):
        plain = TokenCache(model)
        wanted = model(**inputs, past_key_values=plain).logits
    with DapQ(budget=64)(model):
        out = model(**inputs)
    assert torch.allclose(out.logits, wanted, atol=1e-9)
    cache = out.past_key_values
    assert cache.total == 40 and cache.seen.tolist() == [40, 29]
    for one, two, kept in zip(cache.layers, plain.layers, cache.kept_positions(), strict=True):
        assert one.size == two.size == 40
        assert torch.allclose(one.keys, two.keys, atol=1e-9) and torch.allclose(one.values, two.values, atol=1e-9)
        assert kept.amax(-1).flatten(1).tolist() == [[39], [28]]


@torch.no_grad()
def test_scores_of_the_true_continuation_are_those_of_decoding():
    """With the tokens that are really generated as pseudo tokens, the scores are the attention of these steps."""
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((40,))["input_ids"]
    whole = model.generate(ids, do_sample=False, max_new_tokens=6)
    attentions = _eager(model, whole)
    for budget in (64, 18):
        policy = Unjudged(budget=budget, recent=4)
        with attached(model):
            cache = TokenCache(model, policy)
            model(ids, past_key_values=cache)
            policy.judge(model, cache, whole[:, 40:])
        for layer, kept, probabilities in zip(cache.layers, cache.kept_positions(), attentions, strict=True):
            # Slots stand in order right after a prompt. Eager attention takes its softmax in float32.
            wanted = probabilities[0].view(2, 2, 46, 46)[:, :, 40:, :40].sum((1, 2))
            kept = kept[0].expand(2, -1)
            assert torch.allclose(layer.state["score"][0], wanted.gather(-1, kept), atol=1e-6)
            if budget == 18:
                for head in range(2):
                    best = wanted[head, :36].topk(14).indices.sort().values.tolist()
                    assert kept[head].tolist() == [*best, *range(36, 40)]


@torch.no_grad()
def test_the_prompts_own_tokens_stand_at_the_coming_positions():
    model = tiny.model(dtype=torch.float64)
    ids = tiny.prompts((40,))["input_ids"]
    pseudo = torch.cat([ids[:, :3], ids[:, -4:]], 1)
    attentions = _eager(model, torch.cat([ids, pseudo], 1))
    with DapQ(budget=64, pseudo=7)(model):
        cache = model(ids).past_key_values
    for layer, probabilities in zip(cache.layers, attentions, strict=True):
        wanted = probabilities[0].view(2, 2, 47, 47)[:, :, 40:, :40].sum((1, 2))
        assert torch.allclose(layer.state["score"][0], wanted, atol=1e-6)


@torch.no_grad()
def test_a_padded_row_is_judged_as_it_would_be_alone():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((40, 9))
    places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with DapQ(budget=64, pseudo=12)(model):
        both = model(**inputs, position_ids=places).past_key_values
        for row, length in enumerate((40, 9)):
            ids = inputs["input_ids"][row : row + 1, -length:]
            alone = model(ids).past_key_values
            assert torch.equal(pseudo_tokens(both, inputs["input_ids"], 12)[row], pseudo_tokens(alone, ids, 12)[0])
            for one, two in zip(both.layers, alone.layers, strict=True):
                assert torch.allclose(one.state["score"][row, :, -length:], two.state["score"][0], atol=1e-9)
    assert pseudo_tokens(alone, ids, 4)[0].tolist() == ids[0, [0, 1, 7, 8]].tolist()
    assert set(pseudo_tokens(alone, ids, 20)[0].tolist()) == set(ids[0].tolist())


@torch.no_grad()
def test_generated_tokens_take_the_place_of_the_least_prompt_tokens():
    model = tiny.model()
    ids = tiny.prompts((40,))["input_ids"]
    with DapQ(budget=12, recent=4)(model):
        cache = model(ids).past_key_values
        layer = cache.layers[0]
        held, score = cache.kept_positions()[0][0], layer.state["score"][0]
        # The four that were the newest when the prompt ended are protected no more once four tokens have come.
        order = [held[head][score[head].argsort()].tolist() for head in range(2)]
        for step in range(14):
            model(torch.tensor([[5 + step]]), past_key_values=cache)
            kept = cache.kept_positions()[0][0]
            for head in range(2):
                generated = range(max(40, 40 + step + 1 - 12), 40 + step + 1)
                assert kept[head, -len(generated) :].tolist() == list(generated)
                if 4 <= step + 1 <= 12:
                    spare = [p for p in order[head] if p in kept[head]]
                    lost = [p for p in order[head] if p not in spare]
                    assert len(lost) == step + 1
                    if not any(p >= 36 for p in order[head][: step + 5]):
                        assert set(lost) == set(order[head][: step + 1])


@torch.no_grad()
def test_every_turn_is_judged_anew():
    model = tiny.model()
    ids = tiny.prompts((60,))["input_ids"]
    with DapQ(budget=16, recent=2)(model):
        cache = model(ids[:, :40]).past_key_values
        first = cache.layers[0].state["score"]
        for token in ids[:, 40:44].split(1, 1):
            model(token, past_key_values=cache)
        assert float(cache.layers[0].state["score"].max()) > 1000, "generated tokens carry their rank"
        model(ids[:, 44:], past_key_values=cache)
    assert cache.total == 60 and cache.layers[0].size == 16
    assert first.max() <= 32 * 2 and cache.layers[0].state["score"].max() <= 32 * 2


@torch.no_grad()
def test_fewer_pseudo_tokens_where_the_context_ends():
    model = tiny.model("gpt2")
    with DapQ(budget=64)(model):
        cache = model(tiny.prompts((508,))["input_ids"]).past_key_values
        assert torch.allclose(cache.layers[0].state["score"].sum(-1) > 0, torch.tensor(True))
        assert float(cache.layers[0].state["score"].max()) <= 4
        with pytest.raises(CacheMisuse, match="512 tokens"):
            model(tiny.prompts((512,))["input_ids"])


def test_the_explicit_cache_judges_as_the_block_and_lets_go():
    model = tiny.model()
    ids = tiny.prompts((40,))["input_ids"]
    policy = DapQ(budget=16)
    with policy(model):
        wanted = model.generate(ids, do_sample=False, max_new_tokens=12)
    assert not model._forward_hooks and not model.base_model._forward_hooks
    cache = policy.cache(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=12), wanted)
    assert cache.length == 16
    del cache
    assert not model._forward_hooks and not model.base_model._forward_hooks
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_misuse_is_refused():
    model = tiny.model()
    ids = tiny.prompts((20,))["input_ids"]
    cache = DapQ(budget=16).cache(model)
    with pytest.raises(CacheMisuse, match="give input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
    with pytest.raises(CacheMisuse, match="could not judge the prompt"):
        model(ids[:, :1], past_key_values=cache)
    with DapQ(budget=16)(model):
        with pytest.raises(CacheMisuse, match="give input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(ids))
        assert model.generate(ids, do_sample=False, max_new_tokens=4).shape == (1, 24), "the block goes on"
    with pytest.raises(BudgetTooSmall, match="at least 9"):
        DapQ(budget=8)
    for options in ({"pseudo": 0}, {"recent": -1}):
        with pytest.raises(BadParameter, match=next(iter(options))):
            DapQ(**options)


@torch.no_grad()
def test_positions_of_the_pseudo_queries_count_more_than_their_content():
    """The card's comparison on real text: how many of the tokens that decoding will look at most are found."""
    model, tokenizer = tokenry.load("tokenry/code", dtype="float32", attn_implementation="eager")
    length, count, most = 300, 32, 30

    def looked_at(ids, behind, shift=0, window=False):
        places = torch.cat([torch.arange(length), torch.arange(length + shift, length + shift + count)])[None]
        both = torch.cat([ids, behind], 1)
        out = model(both, attention_mask=torch.ones_like(both), position_ids=places, output_attentions=True)
        rows = slice(length - count, length) if window else slice(length, None)
        sums = [part[0, :, rows, :length].sum(1).view(2, 3, length).sum(1) for part in out.attentions]
        return torch.stack(sums).topk(most, -1).indices

    found = {name: 0.0 for name in ("own", "random", "window", "own, shifted", "random, shifted")}
    files = [file.read_text() for file in library_files()[5:400:60]]
    texts = [tokenizer(text[:6000], return_tensors="pt").input_ids[:, :length] for text in files]
    texts = [ids for ids in texts if ids.shape[1] == length][:4]
    for ids in texts:
        answer = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)[:, length:]
        own = torch.cat([ids[:, : count // 2], ids[:, -count // 2 :]], 1)
        random = torch.randint(300, 4000, (1, count), generator=torch.Generator().manual_seed(0))
        wanted = looked_at(ids, answer)
        for name, chosen in (
            ("own", looked_at(ids, own)),
            ("random", looked_at(ids, random)),
            ("window", looked_at(ids, own, window=True)),
            ("own, shifted", looked_at(ids, own, 100)),
            ("random, shifted", looked_at(ids, random, 100)),
        ):
            hits = (chosen[..., None] == wanted[..., None, :]).any(-1).float().mean()
            found[name] += float(hits) / len(texts)
    assert min(found["own"], found["random"]) > max(found["window"], found["own, shifted"], found["random, shifted"])
    assert abs(found["own"] - found["random"]) < found["own"] - found["own, shifted"]
