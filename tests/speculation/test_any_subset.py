"""Any-subset speculative decoding: masks, the law of its samples by enumeration, calls, densities, training."""

import itertools
import json
from collections import defaultdict

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaConfig, XLNetConfig, XLNetLMHeadModel

import tokenry
from tests import tiny
from tests.speculation import toys
from tests.speculation.toys import Scripted, outcomes
from tokenry.errors import BadParameter, BadPrompt, UnsupportedModel
from tokenry.generation import Source
from tokenry.generation.infill import Canvas
from tokenry.kvcache import H2O
from tokenry.objectives import Context
from tokenry.speculation.any_subset import AnySubset, AnySubsetSampler, any_subset, report
from tokenry.speculation.any_subset import sampler as steps
from tokenry.speculation.any_subset.scoring import Places, columns_where, levels_of, reader
from tokenry.speculation.any_subset.training import AnyOrder, AnyOrderTrainer, hide

MASK = 3
SMALL = 4  # ids of the enumerated vocabulary; the last is the mask token


def xlnet(vocab=tiny.VOCABULARY):
    torch.manual_seed(1)
    config = XLNetConfig(vocab_size=vocab, d_model=16, n_layer=2, n_head=2, d_inner=32, initializer_range=0.7)
    return XLNetLMHeadModel(config).eval()


def decoder(kind="llama", dtype=torch.float32):
    return any_subset(tiny.model(kind, dtype), MASK)


def small_llama():
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=SMALL, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.7, pad_token_id=None,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return any_subset(AutoModelForCausalLM.from_config(config).double().eval(), MASK)


def small(kind):
    return xlnet(SMALL) if kind == "xlnet" else small_llama()


def sampler(model, **options):
    return AnySubsetSampler(model, mask_id=MASK, **options)


def masked_prompts(lengths=(30, 17, 24), seed=0, share=0.6):
    """Left-padded random ids with places to fill, different in each row."""
    inputs = tiny.prompts(lengths, seed)
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    ids = torch.where(valid & (ids == MASK), 4, ids)
    hidden = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed + 1)) < share) & valid
    hidden[:, -1], hidden[:, -2] = True, False
    return ids.masked_fill(hidden, MASK), inputs["attention_mask"], hidden


@torch.no_grad()
def asked(model, ids, canvas, level=None):
    """Logits of all masked places by one call that reads every column anew, at most at the level of a draft mask."""
    own = levels_of(canvas)
    columns = columns_where(canvas.valid)
    places = columns_where(canvas.masked)
    at = Places(places, places).take(own)
    at = at if level is None else at.clamp(max=level)
    return reader(model, canvas).read(ids, Places(columns, Places(columns, columns).take(own)), Places(places, at))


# --- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "xlnet"])
def test_who_sees_whom(kind):
    """The card's example: five places, of which 1 and 3 are given."""
    model = xlnet() if kind == "xlnet" else decoder(kind)
    ids = torch.tensor([[MASK, 11, MASK, 13, MASK]])
    canvas = Canvas.of(ids, None, MASK, 0)
    text = torch.tensor([[10, 11, 12, 13, 14]])
    oracle = {0: {1, 3}, 2: {0, 1, 3}, 4: {0, 1, 2, 3}}
    drafts = {1: {0: {1, 3}, 2: {1, 3}, 4: {1, 3}}, 2: {0: {1, 3}, 2: {0, 1, 3}, 4: {0, 1, 3}}}
    for level, wanted in ((None, oracle), (1, drafts[1]), (2, drafts[2])):
        before = asked(model, text, canvas, level)
        for column in range(5):
            other = text.clone()
            other[0, column] = 50
            changed = (asked(model, other, canvas, level) - before).abs().amax(-1)[0] > 0
            for place, row in enumerate(wanted):
                assert bool(changed[place]) == (column in wanted[row])


@pytest.mark.parametrize("kind", ["llama", "qwen3", "xlnet"])
def test_the_first_draft_has_the_targets_own_law_to_the_bit(kind):
    model = xlnet() if kind == "xlnet" else decoder(kind)
    ids, mask, hidden = masked_prompts()
    canvas = Canvas.of(ids, mask, MASK, 0)
    text = torch.where(hidden, torch.randint(4, tiny.VOCABULARY, ids.shape), ids)
    oracle = asked(model, text, canvas)
    for done in range(int(hidden.sum(1).min())):
        # What stands at the places that are still open must not matter to the draft.
        known = text.masked_fill(levels_of(canvas) > done, MASK) if done % 2 else text
        assert torch.equal(asked(model, known, canvas, done + 1)[:, done], oracle[:, done])


# --- law ----------------------------------------------------------------------------------------


class Decisions:
    """Stands in for a call's noise: every decision is the script's."""

    def __init__(self, script: Scripted) -> None:
        self.script = script

    def sample(self, probs, rows, positions, streams):
        return torch.stack([self.script._token(law.log()) for law in probs])

    def uniform(self, row, position, count, stream=0):
        return self.script.uniform(row, position, count)


class Pruned(Scripted):
    """Follows a script in which decisions with one possible outcome do not stand."""

    def decide(self, chances):
        possible = [choice for choice, chance in enumerate(chances) if chance > 0]
        if len(possible) == 1:
            return possible[0]
        if self.taken == len(self.script):
            raise toys.Ended(len(possible))
        choice = possible[self.script[self.taken]]
        self.taken += 1
        self.probability *= chances[choice]
        return choice


class Remembered:
    """A reader whose answers are computed once for each history of calls."""

    def __init__(self, make, answers):
        self.make, self.answers, self.history, self.key = make, answers, [], ()

    def read(self, ids, content, places):
        ids = ids.clone()
        self.history.append(lambda real: real.read(ids, content, places))
        parts = (content.take(ids), content.columns, content.levels, places.columns, places.levels)
        self.key += tuple(str(part.tolist()) for part in parts)
        if self.key not in self.answers:
            real = self.make()
            for call in self.history:
                logits = call(real)
            self.answers[self.key] = logits
        return self.answers[self.key].clone()

    def forget(self, level):
        self.history.append(lambda real: real.forget(level))
        self.key += (str(level.tolist()),)


def joint(model, ids):
    """The law of the masked places of one row under the sequential order, by one call a token."""
    places = (ids[0] == MASK).nonzero()[:, 0].tolist()
    canvas = Canvas.of(ids, None, MASK, 0)
    found = {}
    for tokens in itertools.product(range(MASK), repeat=len(places)):
        text, chance = ids.clone(), 1.0
        for rank, (place, token) in enumerate(zip(places, tokens, strict=True)):
            logits = asked(model, text, canvas)[0, rank]
            logits[MASK] = -torch.inf
            chance *= float(logits.softmax(-1)[token])
            text[0, place] = token
        found[tokens] = chance
    return found


@pytest.mark.parametrize(("k", "drafter"), [(2, "self"), (3, "self"), (3, "bigram")])
@pytest.mark.parametrize("kind", ["llama", "xlnet"])
def test_samples_have_the_joint_law(monkeypatch, kind, k, drafter):
    model, answers = small(kind), {}
    monkeypatch.setattr(toys, "Scripted", Pruned)
    monkeypatch.setattr(steps, "reader", lambda *given: Remembered(lambda: reader(*given), answers))
    ids = torch.tensor([[MASK, 1, 0, MASK, MASK, 1]])
    wanted = joint(model, ids)
    assert abs(sum(wanted.values()) - 1) < 1e-5
    found = defaultdict(float)
    calls = set()

    def run(script):
        result = AnySubset(k=k, drafter=drafter).fill(
            model, Canvas(ids, ids == MASK, torch.ones_like(ids).bool(), MASK, Decisions(script))
        )
        calls.add(result.stats.forwards)
        return tuple(result.sequences[ids == MASK].tolist())

    for tokens, chance in outcomes(run):
        found[tokens] += chance
    assert max(abs(found[tokens] - chance) for tokens, chance in wanted.items()) < 1e-5
    assert max(calls) <= 3
    # The marginals alone would not do: this joint is far from their product.
    canvas = Canvas.of(ids, None, MASK, 0)
    logits = asked(model, ids, canvas, 1)[0]
    logits[:, MASK] = -torch.inf
    alone = logits.softmax(-1)
    product = {tokens: float(torch.stack([alone[i, t] for i, t in enumerate(tokens)]).prod()) for tokens in wanted}
    assert sum(abs(product[tokens] - chance) for tokens, chance in wanted.items()) / 2 > 0.02


@pytest.mark.parametrize("kind", ["llama", "xlnet"])
def test_density_is_a_density_and_the_sum_of_sequential_calls(kind):
    model = small(kind)
    ids = torch.tensor([[MASK, 1, 0, MASK, MASK, 1]])
    wanted = joint(model, ids)
    texts = ids.repeat(len(wanted), 1)
    texts[texts == MASK] = torch.tensor(list(wanted)).flatten()
    found = sampler(model).log_prob(texts, (ids != MASK).expand_as(texts))
    assert abs(float(found.exp().sum()) - 1) < 1e-5
    assert torch.allclose(found.exp().double(), torch.tensor(list(wanted.values())).double(), atol=1e-6)


def test_density_of_a_batch_is_that_of_its_rows():
    model = decoder(dtype=torch.float64)
    ids, mask, hidden = masked_prompts()
    text = torch.where(hidden, 7, ids)
    found = sampler(model).log_prob(text, ~hidden, mask)
    for row, valid in enumerate(mask.bool()):
        alone = sampler(model).log_prob(text[row, valid][None], ~hidden[row, valid][None])
        assert torch.allclose(found[row], alone[0], atol=1e-5)


def test_a_decoder_can_be_given_nothing():
    model = small_llama()
    ids = torch.full((1, 3), MASK)
    texts = torch.tensor(list(itertools.product(range(MASK), repeat=3)))
    total = sampler(model).log_prob(texts, torch.zeros_like(texts).bool()).exp().sum()
    assert abs(float(total) - 1) < 1e-5
    filled, stats = sampler(model).fill(ids, seed=0)
    assert bool((filled != MASK).all()) and stats.committed == 3


# --- calls --------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["self", "bigram"])
@pytest.mark.parametrize("kind", ["llama", "xlnet"])
def test_calls_never_exceed_tokens(kind, drafter):
    model = xlnet() if kind == "xlnet" else decoder()
    for seed, k in itertools.product(range(3), (2, 3, 5, 40)):
        ids, mask, hidden = masked_prompts(seed=seed)
        filled, stats = sampler(model, k=k, drafter=drafter, temperature=0.7).fill(ids, mask, seed)
        assert all(calls <= count for calls, count in zip(stats.extra["calls"], hidden.sum(1).tolist(), strict=True))
        assert sum(stats.extra["calls"]) == stats.passes <= stats.committed == int(hidden.sum())
        assert stats.forwards == max(stats.extra["calls"]) or stats.forwards <= sum(stats.extra["calls"])
        assert torch.equal(filled[~hidden], ids[~hidden]) and not bool((filled[hidden] == MASK).any())


def test_one_place_a_round_asks_once():
    ids, mask, hidden = masked_prompts()
    for model in (decoder(), xlnet()):
        _, stats = sampler(model, k=1).fill(ids, mask, 0)
        assert stats.extra["calls"] == hidden.sum(1).tolist() and stats.drafted == stats.steps == 0


def test_an_independent_model_needs_one_round():
    """Without attention a token depends on its position alone, if that: drafts are never rejected."""
    model = decoder()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    ids, mask, hidden = masked_prompts()
    _, stats = sampler(model, k=64).fill(ids, mask, 0)
    assert stats.extra["calls"] == [2, 2, 2] and stats.accepted == stats.drafted == int(hidden.sum())
    assert stats.acceptance == [1.0] * len(stats.acceptance)


# --- greedy, batches, precision -----------------------------------------------------------------


def by_hand(model, ids):
    """Greedy filling of one row, left to right, one call that reads all anew for each token."""
    canvas = Canvas.of(ids, None, MASK, 0)
    ids = ids.clone()
    for rank, place in enumerate((ids[0] == MASK).nonzero()[:, 0].tolist()):
        logits = asked(model, ids, canvas)[0, rank]
        logits[MASK] = -torch.inf
        ids[0, place] = logits.argmax()
    return ids


@pytest.mark.parametrize("drafter", ["self", "bigram"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma", "gpt_neox", "xlnet"])
def test_greedy_is_greedy_one_by_one_in_any_batch(kind, drafter):
    model = xlnet() if kind == "xlnet" else decoder(kind, torch.float64)
    ids, mask, _ = masked_prompts((20, 9, 14))
    rows = [by_hand(model, ids[row, valid][None])[0] for row, valid in enumerate(mask.bool())]
    for k in (1, 4):
        filled, _ = sampler(model, k=k, temperature=0, drafter=drafter).fill(ids, mask)
        for row, valid in enumerate(mask.bool()):
            assert torch.equal(filled[row, valid], rows[row])


def test_padding_on_the_right_and_neighbours_change_nothing():
    model = decoder(dtype=torch.float64)
    ids, mask, _ = masked_prompts()
    alone, _ = sampler(model).fill(ids[:1], mask[:1], 5)
    assert torch.equal(sampler(model).fill(ids, mask, 5)[0][:1], alone)
    wide = torch.nn.functional.pad(ids, (0, 4))
    filled, _ = sampler(model).fill(wide, torch.nn.functional.pad(mask, (0, 4)), 5)
    assert torch.equal(filled[:1, :-4], alone)
    assert bool((filled[:, -4:] == 0).all())


def test_seeds():
    model = decoder()
    ids, mask, _ = masked_prompts()
    once = sampler(model).fill(ids, mask, 1)[0]
    assert torch.equal(once, sampler(model).fill(ids, mask, 1)[0])
    assert not torch.equal(once, sampler(model).fill(ids, mask, 2)[0])
    drawn = [sampler(model).fill(ids, mask, torch.Generator().manual_seed(7))[0] for _ in range(2)]
    assert torch.equal(*drawn)
    torch.manual_seed(3)
    free = sampler(model).fill(ids, mask)[0]
    torch.manual_seed(3)
    assert torch.equal(free, sampler(model).fill(ids, mask)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    model = decoder(dtype=dtype)
    ids, mask, hidden = masked_prompts()
    filled, stats = sampler(model).fill(ids, mask, 0)
    assert torch.equal(filled[~hidden], ids[~hidden]) and not bool((filled[hidden] == MASK).any())
    assert stats.passes <= stats.committed


def test_what_is_kept_is_what_is_read_anew(monkeypatch):
    """The cache changes no logits, after rejections too."""
    model = decoder(dtype=torch.float64)
    ids, mask, _ = masked_prompts()
    canvas = Canvas.of(ids, mask, MASK, 0)
    seen = []
    keeper = type(reader(model, canvas))
    read = keeper.read

    def both(self, ids, content, places):
        logits = read(self, ids, content, places)
        if not seen or not seen[-1]:
            seen.append(True)  # the fresh reader's own call is not compared
            columns = columns_where(canvas.valid)
            everything = Places(columns, Places(columns, columns).take(levels_of(canvas)))
            fresh = read(keeper(model, canvas), ids, everything, places)
            assert torch.allclose(fresh[places.real], logits[places.real], atol=1e-5)
            seen.append(False)
        return logits

    monkeypatch.setattr(keeper, "read", both)
    _, stats = sampler(model).fill(ids, mask, 3)
    assert len(seen) == 2 * stats.forwards and stats.accepted < stats.drafted


# --- the door -----------------------------------------------------------------------------------


def tokenizer():
    built = tiny.tokenizer()
    built.mask_token = "w0"
    assert built.mask_token_id == 10
    return built


def test_fill_takes_text():
    model, words = any_subset(tiny.model("llama"), 10), tokenizer()
    result = tokenry.fill(model, words, ["w5 w0 w0 w7 w0", "w8 w0"], seed=0)
    assert result.method == "any-subset-speculative-decoding"
    assert [len(holes) for holes in result.holes()] == [2, 1]
    for text, holes, wanted in zip(result.texts(), result.holes(), ("w5 {} w7 {}", "w8 {}"), strict=True):
        assert [word for word in text.split() if word != "<pad>"] == wanted.format(*holes).split()
    assert set(itertools.chain(*result.new_sources)) <= {Source.DRAFT, Source.BONUS, Source.PLAIN}
    assert [len(row) for row in result.new_tokens] == [3, 1] and result.stats.committed == 4
    assert "any-subset-speculative-decoding" in str(result)
    text = "any-subset-speculative-decoding:k=2;temperature=0.0"
    assert tokenry.fill(model, None, [5, 10, 10], method=text).method == text


def test_fill_says_what_it_cannot():
    model, words = any_subset(tiny.model("llama"), 10), tokenizer()
    with pytest.raises(BadPrompt, match="nothing to fill"):
        tokenry.fill(model, words, "w5 w6")
    with pytest.raises(BadParameter, match="plain does not fill masked places"):
        tokenry.fill(model, words, "w5 w0", method="plain")
    with pytest.raises(BadParameter, match="does not generate"):
        tokenry.generate(model, words, "w5", method="any-subset-speculative-decoding")
    with pytest.raises(BadParameter, match="names a mask token"):
        tokenry.fill(tiny.model("llama"), tiny.tokenizer(), "w5 w0")
    for seed in ("x", 1.5):
        with pytest.raises(BadParameter, match=f"seed={seed!r} is not allowed"):
            tokenry.fill(model, words, "w5 w0", seed=seed)
    with pytest.raises(BadParameter, match="'draft' is no resource of any-subset-speculative-decoding"):
        tokenry.fill(model, words, "w5 w0", resources={"draft": 1})
    with pytest.raises(BadParameter, match="is not a model; load one first"):
        tokenry.fill("tokenry/code", words, "w5 w0")
    with pytest.raises(BadPrompt, match="cannot be filled"):
        AnySubsetSampler(model).fill(torch.empty(0, 3, dtype=torch.long))
    with pytest.raises(tokenry.TokenryError, match="context is 512"):
        tokenry.fill(model, words, [5, 10] * 300)


def test_models_that_cannot_be_asked_are_refused():
    ids = torch.tensor([[5, MASK, 6]])
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM was not trained .* any-order"):
        sampler(tiny.model("llama")).fill(ids)
    bert = BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(UnsupportedModel, match="cannot score the tokens it sees"):
        sampler(bert.eval()).fill(ids)
    for kind, message in (("mistral", "sliding-window"), ("bloom", "position_ids")):
        with pytest.raises(UnsupportedModel, match=message):
            decoder(kind)
    with pytest.raises(UnsupportedModel, match="eval"):
        sampler(decoder().train()).fill(ids)
    with pytest.raises(UnsupportedModel, match="float32 alone"):
        sampler(xlnet().double()).fill(ids)
    with pytest.raises(BadPrompt, match="no given token"):
        sampler(xlnet()).fill(torch.full((1, 2), MASK))
    with pytest.raises(BadParameter, match=r"XLNet's is 6"):
        AnySubsetSampler(xlnet())
    model = decoder()
    with H2O(budget=64)(model), pytest.raises(UnsupportedModel, match="outside of a cache policy"):
        sampler(model).fill(ids)
    with pytest.raises(BadPrompt, match="hide by"):
        sampler(model).log_prob(ids, ids != MASK)
    for options in ({"k": 0}, {"temperature": -1.0}, {"drafter": "trigram"}):
        with pytest.raises(BadParameter):
            AnySubset(**options)


# --- training -----------------------------------------------------------------------------------


def test_what_is_hidden():
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.001, 0.25, 0.5, 0.25])
    hidden = hide(shares, torch.tensor([1, 1, 8, 8]), 64, generator)
    assert hidden.sum(1).tolist() == [1, 16, 32, 16]
    edges = (hidden[:, 1:] != hidden[:, :-1]).sum(1)
    assert edges[1] > 12 and edges[3] <= 8
    # Rows take one part of the range each.
    objective = AnyOrder((0.2, 0.6), 0.2, 0, 0.5, 8)
    ctx = Context(step=3, max_steps=9, seed=1, rank=0, processes=1, bundle=None)
    window = [{"input_ids": torch.zeros(4, 100, dtype=torch.long)} for _ in range(2)]
    counts = torch.cat([batch["hidden"].sum(1) for batch in objective.prepare(window, ctx)])
    assert bool((counts >= 20 + 5 * torch.arange(8)).all()) and bool((counts <= 20 + 5 * torch.arange(1, 9)).all())
    again = objective.prepare(window, ctx)
    assert torch.equal(again[1]["hidden"].sum(1), counts[4:])
    early = AnyOrder((0.2, 0.6), 0.1, 10, 0.5, 8).prepare(window, Context(**{**vars(ctx), "step": 0}))
    assert {int(count) for batch in early for count in batch["hidden"].sum(1)} == {10}


def test_the_loss_is_the_density():
    model = decoder(dtype=torch.float64)
    ids, mask, hidden = masked_prompts((24, 24))
    text = torch.where(hidden, torch.randint(4, tiny.VOCABULARY, ids.shape), ids)
    objective = AnyOrder((0.1, 0.2), 0.1, 0, 0, 1)
    batch = {"input_ids": text, "hidden": hidden}
    with torch.no_grad():
        (loss,) = objective.terms(model, None, batch, None)[0].values()
    # The density leaves the mask token out of the vocabulary.
    canvas = Canvas.of(ids, mask, MASK, 0)
    logits = asked(model, text, canvas)
    columns = columns_where(hidden)
    rest = torch.log1p(-logits.softmax(-1)[..., MASK])[columns >= 0].sum()
    found = sampler(model).log_prob(text, ~hidden).sum()
    assert abs(float(loss + found + rest)) < 1e-3
    assert objective.counts(batch)["joint"] == hidden.sum()


def test_training_makes_a_model_that_fills(tmp_path):
    """Cyclic text, cut at any phase: what is hidden follows from any token that is given."""
    words = tokenizer()
    model = tiny.model("llama")
    cycle = " ".join(f"w{number}" for number in range(20, 23))
    trainer = AnyOrderTrainer(length=10, batch=24, lr=1e-2, low=0.2, high=0.6, run=4)
    found = trainer.train(model, words, [" ".join([cycle] * 300)] * 4, tmp_path, steps=100, seed=0)
    assert json.dumps(found) and found["rows"] == 360
    log = [json.loads(line) for line in next(tmp_path.rglob("log.jsonl")).read_text().splitlines()]
    losses = [line["term/joint"] for line in log if "term/joint" in line]
    assert losses[0] > 1 and losses[-1] < 0.3
    loaded, words = tokenry.load(str(tmp_path))
    assert loaded.config.any_subset and loaded.config.mask_token_id == 10
    text = "w21 w0 w0 w21 w0 w20 w0 w22 w0"
    result = tokenry.fill(loaded, words, text, method="any-subset-speculative-decoding:temperature=0.0")
    assert result.text() == "w21 w22 w20 w21 w22 w20 w21 w22 w20"
    with pytest.raises(BadParameter, match="no mask token"):
        trainer.train(model, tiny.tokenizer(), [cycle], tmp_path, steps=1, seed=0)
    with pytest.raises(BadParameter, match="length=1024"):
        AnyOrderTrainer(length=1024).train(model, words, [cycle], tmp_path, steps=1, seed=0)


def test_report_on_the_bundled_tokenizer():
    """Greedy: all methods fill in the same; sequential filling takes a call a token, the others no more."""
    _, words = tokenry.load("tokenry/code-draft")
    torch.manual_seed(0)
    config = tiny.config("llama")
    config.vocab_size, config.max_position_embeddings = len(words), 1024
    model = any_subset(AutoModelForCausalLM.from_config(config).eval(), words.mask_token_id)
    one, own, bigram = report(model, words, count=2)
    assert one["texts"] == 2 and one["calls_per_token"] == 1 and one["tokens_per_round"] is None
    for other in (own, bigram):
        assert other["calls_per_token"] <= 1 and other["tokens_per_round"] >= 1
        assert (other["tokens"], other["exact_match"]) == (one["tokens"], one["exact_match"])
    assert json.dumps([one, own, bigram])
