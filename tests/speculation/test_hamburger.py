"""HAMburger: groups, merging, positions, parity of training and decoding, its two doors, its folder and its trainer."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

from tests import tiny
from tokenry import generate as tokenry_generate
from tokenry.errors import BadParameter, CacheMisuse, ResourceError, UnsupportedModel
from tokenry.generation.engine import Options
from tokenry.generation.result import Source
from tokenry.kvcache import H2O
from tokenry.methods import method
from tokenry.objectives.trainable import run as run_trainer
from tokenry.speculation.hamburger import Hamburger, HamburgerModel, Merger, group_starts
from tokenry.speculation.hamburger.training import HamburgerObjective, HamburgerTrainer, report

NEW = 24
KINDS = tiny.SERVED


def grafted(kind="llama", dtype=torch.float64, seed=0, stop_scale=60.0, **options):
    """A tiny model with random grafts, whose stop head hesitates enough that groups of all sizes occur."""
    base = tiny.model(kind, dtype, seed)
    torch.manual_seed(seed + 1)
    own = HamburgerModel(base, **({"micro_layers": 2} | options))
    with torch.no_grad():
        own.stop[-1].weight.mul_(stop_scale)
    return own.eval()


def generate(own, inputs, confidence=0.5, model=None, seed=None, **options):
    chosen = {key: options.pop(key) for key in ("max_group", "lossless", "groups") if key in options}
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True} | options
    return (own.base if model is None else model).generate(
        **inputs,
        custom_generate=Hamburger(confidence=confidence, **chosen),
        tokenry_options=Options(seed=seed, resources={"weights": own}),
        **settings,
    )


def starts_of(result):
    """Where the groups of a result begin: first tokens of groups come from the base."""
    return result.sources == int(Source.PLAIN)


# --- segmentation ---


def sizes(starts):
    places = [*starts.nonzero()[:, 0].tolist(), len(starts)]
    return [b - a for a, b in itertools.pairwise(places)]


def test_segmentation_of_the_written_example():
    entropies = torch.tensor([[2.0, 0.5, 0.03, 0.7, 0.01, 0.02, 0.04, 0.03, 1.0]])
    assert sizes(group_starts(entropies)[0]) == [3, 4, 1, 1]


def test_segmentation_keeps_its_bounds_on_any_entropies():
    values = torch.rand(7, 50, generator=torch.Generator().manual_seed(0)) ** 4 * 3
    for most in (1, 2, 4):
        found = group_starts(values, most)
        for row, alone in zip(found, values, strict=True):
            assert sum(sizes(row)) == 50 and max(sizes(row)) <= most
            assert torch.equal(group_starts(alone[None], most)[0], row)
    assert sizes(group_starts(torch.zeros(1, 18))[0]) == [4, 4, 4, 4, 2]
    assert sizes(group_starts(torch.full((1, 9), 1.5))[0]) == [1] * 9
    cuts = torch.zeros(1, 18, dtype=torch.bool)
    cuts[0, 6] = True
    assert sizes(group_starts(torch.zeros(1, 18), cuts=cuts)[0]) == [4, 2, 4, 4, 4]


# --- the parts ---


def test_a_group_of_one_is_its_embedding_and_padding_changes_nothing():
    own = grafted()
    tokens = torch.randint(3, 97, (5, 4), generator=torch.Generator().manual_seed(1))
    counts = torch.tensor([1, 2, 3, 4, 1])
    vectors = own.merged(tokens, counts)
    assert torch.equal(vectors[0], own.embed(tokens[0, 0]))
    for row in range(5):
        alone = own.merged(tokens[row : row + 1, : counts[row]], counts[row : row + 1])
        assert torch.allclose(vectors[row], alone[0], atol=1e-12)
    swapped = own.merged(tokens[3:4, [1, 0, 2, 3]], counts[3:4])
    assert not torch.allclose(swapped, vectors[3:4]), "a group's tokens have an order"


def test_the_merger_is_the_written_attention():
    torch.manual_seed(0)
    merger = Merger(64, 4).double()
    x = torch.randn(3, 64, dtype=torch.float64)
    got = merger(x[None], torch.tensor([3]))[0]
    placed = torch.cat([x, merger.places[:3]], -1)
    query, key, value = merger.query(x.mean(0)), merger.key(placed), merger.value(placed)
    parts = []
    for head in range(merger.heads):
        own = slice(head * 64 // merger.heads, (head + 1) * 64 // merger.heads)
        weights = (key[:, own] @ query[own] / math.sqrt(64 / merger.heads)).softmax(0)
        parts.append(weights @ value[:, own])
    assert merger.heads == 2
    assert torch.allclose(got, x.mean(0) + merger.out(torch.cat(parts)), atol=1e-12)


def test_features_are_quarters_of_the_depth_and_the_head_and_embedding_are_shared():
    own = grafted(features=2)
    assert own.feature_layers == (2, 3) and grafted().feature_layers == (1, 2, 3)
    assert own.micro.get_input_embeddings() is own.base.get_input_embeddings()
    assert own.micro.get_output_embeddings() is own.base.get_output_embeddings()
    assert type(own.micro) is type(own.base) and own.micro.config.num_hidden_layers == 2


# --- writing by itself ---


@pytest.mark.parametrize("kind", KINDS)
def test_full_confidence_is_plain_decoding_of_the_base(kind):
    # transformers' own attention gives a padded row of sliding windows no numbers in float64.
    own = grafted(kind, torch.float32)
    inputs = tiny.prompts((24, 13, 6))
    wanted = own.base.generate(**inputs, do_sample=False, max_new_tokens=NEW)
    for options in ({"confidence": 1.0}, {"confidence": 0.0, "max_group": 1}):
        result = generate(own, inputs, **options)
        assert torch.equal(result.sequences, wanted)
        assert result.stats.forwards == NEW and result.stats.extra["groups"][1:] == [0, 0, 0]
    assert own.base.config._attn_implementation in ("sdpa", "eager")


class _Coin(torch.nn.Module):
    """A stop head that ends half of the groups at each token."""

    def forward(self, hidden):
        return torch.sin(50 * hidden[..., :1])


def arranged(own, result, inputs, last=None):
    """What the objective makes of a result's text and groups; left padding is taken off each row."""
    objective = HamburgerObjective(own, copy.deepcopy(own.base))
    begin = inputs["input_ids"].shape[1]
    for row, mask in enumerate(inputs["attention_mask"]):
        lead = int((mask == 0).sum())
        starts = starts_of(result)[row : row + 1, lead:].clone()
        starts[:, : begin - lead] = True
        ids = result.sequences[row : row + 1, lead:]
        yield row, begin - lead, objective, objective.arranged(ids, ids, starts, torch.tensor([begin - lead]))


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_step_by_step_gives_the_teacher_forced_logits(kind):
    """Positions that skip, merging, features, windows in entries, the micro decoder's own cache: all must agree."""
    own = grafted(kind)
    own.stop = _Coin()
    inputs = tiny.prompts((20, 11))
    result = generate(own, inputs, output_logits=True)
    counted = result.stats.extra["groups"]
    assert sum(size * count for size, count in enumerate(counted, 1)) >= 2 * NEW
    assert sum(map(bool, counted)) >= 3, f"the test needs groups of several sizes, not {counted}"
    for row, prompt, objective, batch in arranged(own, result, inputs):
        got = torch.stack([step[row] for step in result.logits])
        with torch.no_grad():
            features, first = objective.read(batch)
            target = torch.arange(batch["sizes"].shape[1]) >= prompt
            rolled = objective.roll_out(features[0, prompt - 1 : -1], batch["tokens"][0, target])[1]
        groups = batch["sizes"][0, target].tolist()
        wanted = []
        for number, size in enumerate(groups):
            wanted += [first[0, prompt - 1 + number], *rolled[number, : size - 1]]
        assert torch.allclose(got, torch.stack(wanted).float(), atol=1e-4)


def test_positions_and_entries():
    own = grafted()
    inputs = tiny.prompts((20,))
    result = generate(own, inputs)
    grouped = sizes(starts_of(result)[0, 20:])
    cache = result.past_key_values
    # The last group has no entry yet.
    assert cache.length == 20 + len(grouped) - 1
    assert cache.tokens.tolist() == [20 + sum(grouped[:-1])]
    assert result.stats.extra == {"lossless": False, "groups": [grouped.count(size) for size in (1, 2, 3, 4)]}
    assert result.stats.forwards == len(grouped)
    assert result.stats.kv_bytes < tiny.model(dtype=torch.float64).generate(
        **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
        custom_generate=method("plain"), tokenry_options=Options(),
    ).stats.kv_bytes  # fmt: skip
    seen = []
    hook = own.base.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
    )
    generate(own, inputs)
    hook.remove()
    assert seen[0] == list(range(20))
    assert [place for (place,) in seen[1:]] == [19 + sum(grouped[: n + 1]) for n in range(len(grouped) - 1)]


def test_rows_of_unequal_progress_equal_each_row_alone():
    own = grafted()
    inputs = tiny.prompts((20, 9, 14))
    together = generate(own, inputs)
    for row in range(3):
        mask = inputs["attention_mask"][row].bool()
        alone = generate(own, {"input_ids": inputs["input_ids"][row : row + 1, mask]})
        assert together.new_tokens[row] == alone.new_tokens[0]
        assert together.new_sources[row] == alone.new_sources[0]


def test_an_end_token_inside_a_group_ends_the_row_there():
    own = grafted()
    inputs = tiny.prompts((20, 9))
    free = generate(own, inputs)
    starts = starts_of(free)[0, 20:].tolist()
    tokens = free.new_tokens[0]
    # A token in the middle of a group that has not occurred before.
    place = next(
        i for i in range(4, NEW - 1) if not starts[i] and not starts[i + 1] and tokens[i] not in tokens[:i]
    )  # fmt: skip
    cut = generate(own, inputs, eos_token_id=tokens[place], pad_token_id=0)
    assert cut.new_tokens[0] == tokens[: place + 1]
    other = free.new_tokens[1]
    end = other.index(tokens[place]) + 1 if tokens[place] in other else NEW
    assert cut.new_tokens[1] == other[:end]


def test_a_length_limit_counts_tokens_not_steps():
    own = grafted()
    whole = generate(own, tiny.prompts((20,)))
    for limit in (1, 2, 3, 7):
        assert generate(own, tiny.prompts((20,)), max_new_tokens=limit).new_tokens[0] == whole.new_tokens[0][:limit]


def test_a_lower_confidence_never_shortens_the_group_that_is_next():
    own = grafted()
    for seed in range(6):
        inputs = tiny.prompts((12,), seed=seed)
        first = [
            sizes(starts_of(generate(own, inputs, confidence))[0, 12:])[0] for confidence in (1.0, 0.8, 0.5, 0.2, 0.0)
        ]
        assert first == sorted(first) and first[0] == 1 and first[-1] == 4


def test_sampling_follows_its_seed_and_processors_see_every_token():
    own = grafted()
    inputs = tiny.prompts((20, 9))
    options = {"do_sample": True, "temperature": 0.9, "top_p": 0.9}
    one, two, other = (generate(own, inputs, seed=seed, **options).sequences for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    plain = own.base.generate(
        **inputs, custom_generate=method("plain"), tokenry_options=Options(seed=1), max_new_tokens=NEW, **options
    )
    assert torch.equal(generate(own, inputs, 1.0, seed=1, **options).sequences, plain)
    banned = generate(own, inputs, no_repeat_ngram_size=2)
    for row in banned.new_tokens:
        pairs = list(itertools.pairwise(row))
        assert len(pairs) == len(set(pairs)), "a pair within a group or across groups came twice"


@pytest.mark.parametrize("lengths", ((20,), (20, 12)))
def test_a_chat_goes_on_from_the_merged_cache(lengths):
    own = grafted()
    inputs = tiny.prompts(lengths)
    turn = generate(own, inputs)
    width = turn.sequences.shape[1]
    more = torch.cat([turn.sequences, tiny.prompts((6,) * len(lengths), seed=5)["input_ids"]], 1)
    mask = torch.ones_like(more)
    mask[:, : lengths[0]] = inputs["attention_mask"]
    asked = {"input_ids": more, "attention_mask": mask}
    cache = turn.past_key_values
    entries = cache.length
    went = generate(own, asked, past_key_values=cache, output_logits=True)
    assert went.past_key_values is cache and cache.length > entries
    before = starts_of(turn)
    for row, prompt, objective, _ in arranged(own, went, asked):
        lead = int((mask[row] == 0).sum())
        # What the first turn's cache held stays merged; its last group and the new text are read token by token.
        starts = starts_of(went)[row, lead:].clone()
        starts[:prompt] = True
        held = int(before[row].nonzero()[-1])
        first = lengths[0]
        starts[first - lead : held - lead] = before[row, first:held]
        ids = went.sequences[row : row + 1, lead:]
        batch = objective.arranged(ids, ids, starts[None], torch.tensor([prompt]))
        with torch.no_grad():
            _, logits = objective.read(batch)
        begin = batch["sizes"].cumsum(1) - batch["sizes"]
        wanted = logits[0, :-1][begin[0, 1:] >= prompt]
        places = starts_of(went)[row, width + 6 :].nonzero()[:, 0].tolist()
        got = torch.stack([went.logits[place][row] for place in places])
        assert torch.allclose(got, wanted.float(), atol=1e-4)


def test_caches_of_others_are_refused():
    own = grafted()
    inputs = tiny.prompts((12,))
    plain = own.base.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    more = {"input_ids": torch.cat([plain.sequences, inputs["input_ids"]], 1)}
    with pytest.raises(CacheMisuse, match="leave past_key_values out"):
        generate(own, more, past_key_values=plain.past_key_values)
    mine = generate(own, inputs, max_new_tokens=4)
    with pytest.raises(CacheMisuse, match="HAMburger"):
        own.base.generate(**more, past_key_values=mine.past_key_values, max_new_tokens=4)
    mine = generate(own, inputs, max_new_tokens=4)
    with pytest.raises(CacheMisuse, match="whole conversation"):
        generate(own, {"input_ids": inputs["input_ids"][:, :4]}, past_key_values=mine.past_key_values)
    with pytest.raises(CacheMisuse, match="several tokens"):
        mine.past_key_values.crop(-1)


def test_a_cache_policy_counts_entries():
    own = grafted()
    with H2O(budget=24)(own.base):
        result = generate(own, tiny.prompts((40, 31)))
    assert all(layer.size == 24 for layer in result.past_key_values.layers)
    assert result.method.endswith("+h2o:budget=24")
    free = generate(own, tiny.prompts((40, 31)))
    with H2O(budget=256)(own.base):
        assert torch.equal(generate(own, tiny.prompts((40, 31))).sequences, free.sequences)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_runs(dtype):
    result = generate(grafted(dtype=dtype), tiny.prompts((12, 7)))
    assert result.sequences.shape == (2, 12 + NEW) and len(result.new_tokens[0]) == NEW


# --- drafting for another ---


def test_drafts_of_its_own_base_one_by_one_are_all_accepted():
    """Groups of one are read as the target reads them, so every draft is the target's next token."""
    own = grafted()
    for lengths in ((20,), (20, 11)):
        inputs = tiny.prompts(lengths)
        wanted = own.base.generate(**inputs, do_sample=False, max_new_tokens=NEW + 1)
        result = generate(own, inputs, lossless=True, max_group=1, groups=3, max_new_tokens=NEW + 1)
        assert torch.equal(result.sequences, wanted)
        assert result.stats.forwards == 1 + NEW // 4
        assert result.stats.accepted == result.stats.drafted


@pytest.mark.parametrize("confidence", (0.0, 0.5))
def test_a_bigger_model_verifies_groups_of_any_size(confidence):
    own, target = grafted(), tiny.model("qwen3", torch.float64, seed=3)
    inputs = tiny.prompts((20, 11, 15))
    wanted = target.generate(**inputs, do_sample=False, max_new_tokens=NEW)
    result = generate(own, inputs, confidence, model=target, lossless=True, groups=3)
    assert torch.equal(result.sequences, wanted)
    assert result.stats.drafted > 0 and "lossless" not in result.stats.extra
    assert not target._forward_pre_hooks and own.base.config._attn_implementation == "sdpa"


def test_what_the_drafter_has_read_is_the_accepted_groups_merged_and_the_rest_single(monkeypatch):
    """By the entries that it reads: of a group the accepted tokens as one, the target's own token as another."""
    own = grafted()
    target = tiny.model(dtype=torch.float64)  # the same base, whose first drafts it accepts
    reads, walks = [], []
    catch_up, observe = Hamburger._catch_up, Hamburger.observe

    def counted(self, session, state):
        found = catch_up(self, session, state)
        reads.append((int(state.cache.tokens[0]), session.lengths[0], state.cache.length))
        return found

    def seen(self, session, state, tree, logits, walk):
        drafted = torch.zeros(1, 0) if state.drafted is None else state.drafted
        walks.append((drafted.clone(), int(walk.counts[0])))
        return observe(self, session, state, tree, logits, walk)

    monkeypatch.setattr(Hamburger, "_catch_up", counted)
    monkeypatch.setattr(Hamburger, "observe", seen)
    generate(own, tiny.prompts((20,)), model=target, lossless=True)
    entries = 21
    assert reads[0] == (21, 21, 21)
    for (drafted, count), (tokens, length, held) in zip(walks, reads[1:], strict=False):
        left = count - 1
        for size in drafted[0].tolist():
            entries += left > 0
            left = max(0, left - size)
        entries += 1
        assert tokens == length and held == entries
    assert any(count > 1 for _, count in walks)


# --- resources, folders, refusals ---


def test_the_folder_holds_all_of_it(tmp_path):
    own = grafted(dtype=torch.float32)
    own.save(tmp_path, tiny.tokenizer())
    inputs = tiny.prompts((12,))
    wanted = generate(own, inputs)
    base = tiny.model(seed=9)
    state = torch.get_rng_state()
    read = base.generate(
        **inputs, custom_generate=method(f'hamburger:weights="{tmp_path}";confidence=0.5'), max_new_tokens=NEW,
        do_sample=False, return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(read.sequences, wanted.sequences), "the folder's model writes, not the one that is passed"
    assert read.sources.tolist() == wanted.sources.tolist()
    assert torch.equal(torch.get_rng_state(), state)
    text = tokenry_generate(
        base, tiny.tokenizer(), "w5 w6", method=Hamburger(weights=str(tmp_path)), max_new_tokens=5, do_sample=False
    )
    assert len(text.new_tokens[0]) == 5 and "hamburger" in str(text)


def test_missing_and_misfitting_weights_say_what_to_do(tmp_path, monkeypatch):
    model, inputs = tiny.model(), tiny.prompts((8,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for weights in (None, str(tmp_path / "nothing")):
        with pytest.raises(ResourceError, match="tokenry train hamburger"):
            model.generate(**inputs, custom_generate=Hamburger(weights=weights), max_new_tokens=4)
    own = grafted(dtype=torch.float32)
    with pytest.raises(ResourceError, match="lossless=true"):
        generate(own, inputs, model=tiny.model("qwen3"))
    with pytest.raises(BadParameter, match="at most 4"):
        generate(own, inputs, max_group=5)
    with pytest.raises(BadParameter, match="from 0 to 1"):
        Hamburger(confidence=1.5)
    own.save(tmp_path, tiny.tokenizer())
    (tmp_path / "hamburger.json").write_text('{"max_group": 4, "features": 4, "micro_layers": 1}')
    with pytest.raises(ResourceError, match="does not fit"):
        HamburgerModel.load(tmp_path, model)


def test_models_it_cannot_be_grafted_onto_are_refused_by_name():
    with pytest.raises(UnsupportedModel, match="Mamba"):
        HamburgerModel(tiny.model("mamba"))
    narrow = OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16
    )
    with pytest.raises(UnsupportedModel, match="width 16"):
        HamburgerModel(OPTForCausalLM(narrow))


def test_it_promises_plains_output_only_where_it_is_verified():
    assert not Hamburger().drafts and Hamburger(lossless=True).drafts
    assert str(Hamburger(confidence=0.7, lossless=True)) == "hamburger:confidence=0.7;lossless=true"
    assert pickle.loads(pickle.dumps(Hamburger())) == method("hamburger")


# --- training ---


def objective_on(model):
    torch.manual_seed(1)
    return HamburgerObjective(HamburgerModel(model, micro_layers=1), copy.deepcopy(model), end=2)


def test_every_response_token_but_the_last_groups_is_learned_once():
    objective = objective_on(tiny.model())
    ids = torch.randint(3, 97, (3, 40), generator=torch.Generator().manual_seed(0))
    ids[0, 25] = 2
    prompt = torch.tensor([5, 12, 20])
    batch = objective.grouped(ids, ids.masked_fill(ids == 7, -100), prompt)
    for row in range(3):
        counted = batch["sizes"][row]
        counted = counted[counted > 0]
        assert int(counted.sum()) == 40 and (counted[: prompt[row]] == 1).all() and int(counted.max()) <= 4
        text = [t for n, group in enumerate(batch["tokens"][row]) for t in group[: batch["sizes"][row, n]].tolist()]
        assert text == ids[row].tolist()
        learned = batch["sizes"][row][batch["target"][row]]
        assert int(learned.sum()) == 40 - int(prompt[row]) - int(counted[-1])
    ends = (batch["sizes"].cumsum(1) - 1)[0].tolist()
    assert 25 in ends, "a group ends behind an end token"
    counts = objective.counts(batch)
    real = batch["labels"][batch["target"]]
    assert int(counts["stop"]) == int(batch["sizes"][batch["target"]].sum())
    assert int(counts["ce"]) == int((real >= 0).sum())


def test_terms_are_the_losses_of_the_step_by_step_model():
    model = tiny.model(dtype=torch.float64)
    objective = objective_on(model)
    own = objective.model
    ids = torch.randint(3, 97, (1, 30), generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(1, 30, dtype=torch.bool)
    starts[0, [*range(8), 8, 10, 11, 15, 18, 22, 26]] = True
    batch = objective.arranged(ids, ids, starts, torch.tensor([8]))
    terms, _ = objective.terms(model, torch.nn.ModuleDict(), batch)
    features, first = objective.read(batch)
    ce = stop = 0.0
    for entry in range(8, 14):
        size = int(batch["sizes"][0, entry])
        tokens = batch["tokens"][0, entry, :size]
        hidden, logits = [features[0, entry - 1, -1]], [first[0, entry - 1]]
        for ahead in range(1, size):
            rows = torch.cat([features[0, entry - 1], own.embed(tokens[:ahead])])[None]
            h, score = own.micro_step(rows, 1)
            hidden.append(h[0, 0])
            logits.append(score[0, 0])
        for place, (h, score) in enumerate(zip(hidden, logits, strict=True)):
            ce -= score.log_softmax(-1)[tokens[place]]
            p = own.stop(h).sigmoid()[0]
            stop -= (p if place == size - 1 else 1 - p).log()
    assert torch.allclose(terms["ce"], ce, atol=1e-4) and torch.allclose(terms["stop"].double(), stop, atol=1e-4)
    (terms["ce"] + terms["stop"]).backward()
    # A bias of all keys changes no attention.
    trained = [p for p in own.parameters() if p is not own.merger.key.bias]
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trained)


def test_training_learns_a_deterministic_text_and_its_folder_is_loaded_by_path(tmp_path):
    pytest.importorskip("accelerate")
    tokenizer = tiny.tokenizer()
    config = tiny.config("llama")
    config.initializer_range = 0.02
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    # Words that repeat with period 11; the text's base knows nothing of it yet.
    texts = [" ".join(f"w{(start + step) % 11}" for step in range(400)) for start in range(3)]
    note = run_trainer(
        HamburgerTrainer(micro_layers=1, length=48, batch=8, lr=5e-3, base_lr=1.0, entropy_ratio=1.0, entropy_low=9.0),
        model, tokenizer, texts, tmp_path / "out", steps=120, seed=0,
    )  # fmt: skip
    # It begins at log(97) = 4.6 nats.
    assert note["ce"] < 1 and note["tokens_per_group"] > 3
    found = report(
        tiny.model(seed=2), tokenizer, [_Example("w1 w2 w3 w4 w5 w6", "w7")], weights=str(tmp_path / "out"),
        confidences=(1.0, 0.5), max_new_tokens=20,
    )  # fmt: skip
    assert found[0]["tokens_per_macro_step"] == 1 and found[0]["kv_entries_per_token"] == 1
    assert found[1]["tokens_per_macro_step"] > 1.5 and found[1]["agreement"] > 0.5
    assert found[1]["score"] == 1.0
    again = HamburgerModel.load(tmp_path / "out", tiny.model())
    assert sum(found[1]["groups"]) < 20 and again.max_group == 4


class _Example:
    def __init__(self, prompt, answer):
        self.prompt, self.answer = prompt, answer

    def check(self, output):
        return float(output.split()[:1] == [self.answer])
