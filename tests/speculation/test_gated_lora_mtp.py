"""The base model is untouched, masks see what they may, drafts follow whatever was accepted, training teaches them."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from tests import tiny
from tokenry.errors import BadParameter, ResourceError, UnsupportedModel
from tokenry.generation import Options, Session
from tokenry.generation.auxiliary import listening
from tokenry.kvcache import H2O
from tokenry.methods import method
from tokenry.models import attached, weights_hash
from tokenry.objectives import fit
from tokenry.objectives.trainable import run as train
from tokenry.speculation.gated_lora_mtp import Adapters, GatedLoRAMTP, drafter, gated
from tokenry.speculation.gated_lora_mtp.drafter import best_plan
from tokenry.speculation.gated_lora_mtp.training import MTPObjective, MTPTrainer, interleaved

K = 3


def random_adapters(model, k=K, seed=0):
    """Adapters that change every mask's row and every draft, without training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Adapters(model, k=k, r=4, alpha=8.0)
        for up in made.up:
            torch.nn.init.normal_(up, std=0.3)
        torch.nn.init.normal_(made.sampler.last_norm.weight)
    return made.to(model.device, model.dtype).eval().requires_grad_(False)


def generate(model, inputs, drafter, adapters, **options):
    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True} | options
    given = Options(resources={"adapter": adapters}, seed=options.pop("seed", None))
    return model.generate(**inputs, custom_generate=drafter, tokenry_options=given, **options)


def plain(model, inputs, **options):
    return model.generate(**inputs, **({"max_new_tokens": 24, "do_sample": False} | options))


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def alone(model, adapters, ids):
    """States of the masks behind the prompt `ids` `[length]`, on the model's own attention."""
    embedded = model.get_input_embeddings()(ids[None])
    inputs = torch.cat([embedded, adapters.masks[None]], 1)
    positions = torch.arange(inputs.shape[1])[None]
    with torch.no_grad(), listening(model, slice(None)) as heard, gated(model, adapters, len(ids), inputs.shape[1]):
        model(inputs_embeds=inputs, position_ids=positions, use_cache=False)
    return heard.hidden[0, len(ids) :]


# --- the gate and what is seen --------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.SERVED)
def test_the_interleaved_pass_leaks_nothing_and_equals_a_pass_for_every_prefix(kind):
    """Tokens say what they say without masks; masks say what they say behind their prefix alone."""
    model = tiny.model(kind, torch.float64)
    adapters = random_adapters(model)
    ids = tiny.prompts((20, 20))["input_ids"]
    blocks = torch.tensor([0, 4, 5, 11, 19])
    with torch.no_grad(), attached(model):
        found = interleaved(model, adapters, ids, blocks)
    with torch.no_grad(), listening(model, slice(None)) as heard:
        model(ids, use_cache=False)
    # Some models round to float32 on their way (norms, rotary tables), whatever they run in.
    close = {"rtol": 0, "atol": 1e-12 if kind in ("gpt2", "opt") else 1e-5}
    assert torch.allclose(found.anchors, heard.hidden, **close)
    for row in range(2):
        for number, block in enumerate(blocks.tolist()):
            wanted = alone(model, adapters, ids[row, : block + 1])
            assert torch.allclose(found.states[row, number], wanted, **close)
    # The check can fail: masks do differ by block and by LoRA.
    closed = Adapters(model, k=K, r=4, alpha=8.0).double()
    closed.masks.data = adapters.masks.data
    assert not torch.allclose(alone(model, closed, ids[0, :5]), found.states[0, 1], atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_rows_before_the_gate_are_the_bases_to_the_bit(kind):
    model = tiny.model(kind)
    adapters = random_adapters(model)
    ids = tiny.prompts((12, 12))["input_ids"]
    with torch.no_grad():
        wanted = model(ids).logits
        with gated(model, adapters, 8, 12):
            part = model(ids).logits
        with gated(model, adapters, 12, 12):
            closed = model(ids).logits
        after = model(ids).logits
    assert torch.equal(part[:, :8], wanted[:, :8]) and not torch.allclose(part[:, 8:], wanted[:, 8:])
    assert torch.equal(closed, wanted) and torch.equal(after, wanted) and hooks(model) == 0


@pytest.mark.parametrize("mode", ["quadratic", "linear"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma2"])
def test_what_drafts_come_from_is_what_the_masks_say_behind_the_text(kind, mode, monkeypatch):
    """In a padded batch, after prefill and after every step, however many drafts each row accepted."""
    model = tiny.model(kind, torch.float64)
    adapters = random_adapters(model)
    lengths = (9, 14)
    inputs = tiny.prompts(lengths)
    # Row by row: transformers' own loop goes wrong where padding is wider than a window.
    alike = [plain(model, {"input_ids": inputs["input_ids"][row : row + 1, 14 - n :]}) for row, n in enumerate(lengths)]
    truth = torch.cat([torch.nn.functional.pad(ids, (14 - n, K)) for ids, n in zip(alike, lengths, strict=True)])
    seen, now = [], {}
    propose = GatedLoRAMTP.propose

    def watched(self, session, state, room):
        now.update(session=session, step=state.steps)
        states = session.hidden[:, 1:] if state.steps == 0 else state.states
        ready = [True, True] if state.ready is None else state.ready.tolist()
        for row in range(2):
            if ready[row] and session.alive[row]:
                # The masks stand behind the token before the anchor.
                prefix = session.ids[row, int(session.first[row]) : session.lengths[row] - 1].clone()
                seen.append((row, prefix, states[row]))
        return propose(self, session, state, room)

    def right_up_to_a_place(self, model, anchor, states):
        columns = now["session"].length[:, None] + torch.arange(states.shape[1])
        drafts = truth.gather(1, columns.clamp(max=truth.shape[1] - 1))
        wrong = (now["step"] + torch.arange(2)[:, None]) % (K + 1) <= torch.arange(states.shape[1])
        return drafts.masked_fill(wrong, 0)

    monkeypatch.setattr(GatedLoRAMTP, "propose", watched)
    monkeypatch.setattr(Adapters, "draft", right_up_to_a_place)
    result = generate(model, inputs, GatedLoRAMTP(mode=mode), adapters)
    assert torch.equal(result.sequences, truth[:, : 14 + 24])
    assert 0 < result.stats.accepted < result.stats.drafted and len(seen) > 8
    for row, prefix, states in seen:
        # At the very end masks beyond the last token that can come stand elsewhere.
        if len(prefix) + K < lengths[row] + 24:
            assert torch.allclose(states, alone(model, adapters, prefix), rtol=0, atol=1e-5)


def test_two_threads_on_one_model_do_not_disturb_each_other():
    model = tiny.model()
    sets = [random_adapters(model, seed=seed) for seed in (1, 2)]
    inputs = [tiny.prompts((n,), seed=n) for n in (7, 11)]
    texts = [plain(model, given) for given in inputs]
    drafts = [generate(model, i, GatedLoRAMTP(), a).stats.accepted for i, a in zip(inputs, sets, strict=True)]
    wrong = []

    def work(number):
        for _ in range(4):
            result = generate(model, inputs[number], GatedLoRAMTP(), sets[number])
            same = torch.equal(result.sequences, texts[number]) and result.stats.accepted == drafts[number]
            bare = torch.equal(model(inputs[number]["input_ids"]).logits, base[number])
            if not (same and bare):
                wrong.append(number)

    with torch.no_grad():
        base = [model(given["input_ids"]).logits for given in inputs]
    threads = [threading.Thread(target=torch.no_grad()(work), args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and hooks(model) == 0


def test_an_exception_leaves_the_model_as_it_was():
    model = tiny.model()
    adapters = random_adapters(model)
    ids = tiny.prompts((8,))["input_ids"]
    with torch.no_grad():
        wanted = model(ids).logits

    def fail(*_):
        raise KeyboardInterrupt

    hook = model.get_submodule(adapters.targets[-1]).register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        generate(model, {"input_ids": ids}, GatedLoRAMTP(), adapters)
    hook.remove()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)
    assert hooks(model) == 0 and model.config._attn_implementation == "sdpa"


# --- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize(
    "options", [{"mode": "linear"}, {"mode": "auto"}, {"k": 1}, {"k": 2, "mode": "linear"}], ids=str
)
def test_greedy_is_plain_whatever_mode_and_width(kind, options):
    model = tiny.model(kind, torch.float64)
    inputs = tiny.prompts((9, 4, 14))
    result = generate(model, inputs, GatedLoRAMTP(**options), random_adapters(model))
    assert torch.equal(result.sequences, plain(model, inputs)) and result.stats.drafted > 0


@pytest.mark.parametrize("mode", ["quadratic", "linear"])
def test_inside_a_policy_it_is_the_policy_alone(mode):
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((40, 29))
    with H2O(budget=24, compact_every=8)(model):
        wanted = plain(model, inputs)
        ours = generate(model, inputs, GatedLoRAMTP(mode=mode), random_adapters(model))
    assert torch.equal(ours.sequences, wanted) and not torch.equal(plain(model, inputs), wanted)
    assert ours.stats.drafted > 0


class Told:
    """In place of the sampler: what it is told to draft."""

    def __init__(self, truth):
        self.truth, self.column = truth, None

    def __call__(self, adapters, model, anchor, states):
        batch, width = states.shape[:2]
        if self.truth is None:
            return torch.full((batch, width), tiny.VOCABULARY - 1)
        columns = self.session.length[:, None] + torch.arange(width)
        return self.truth.gather(1, columns.clamp(max=self.truth.shape[1] - 1))


@pytest.mark.parametrize("mode", ["quadratic", "linear"])
@pytest.mark.parametrize("right", [True, False])
def test_an_oracle_gives_k_plus_one_tokens_a_step_and_a_useless_sampler_one(monkeypatch, mode, right):
    model, inputs = tiny.model(), tiny.prompts((8,))
    truth = plain(model, inputs, max_new_tokens=40)
    told = Told(truth if right else None)
    rows = []
    propose, verify = GatedLoRAMTP.propose, Session.verify

    def watched(self, session, state, room):
        told.session = session
        return propose(self, session, state, room)

    def counted(self, tokens, relation, depth, valid=None, auxiliary=None):
        rows.append(tokens.shape[1] + auxiliary.count)
        return verify(self, tokens, relation, depth, valid, auxiliary)

    monkeypatch.setattr(GatedLoRAMTP, "propose", watched)
    monkeypatch.setattr(Session, "verify", counted)
    monkeypatch.setattr(Adapters, "draft", lambda *given: told(*given))
    result = generate(model, inputs, GatedLoRAMTP(mode=mode), random_adapters(model), max_new_tokens=1 + 4 * (K + 1))
    assert torch.equal(result.sequences, truth[:, : 8 + 1 + 4 * (K + 1)])
    wide = (K + 1) ** 2 if mode == "quadratic" else 2 * K + 1
    if right:
        assert result.stats.tokens_per_step == K + 1 and result.stats.forwards == 1 + 4
        assert rows == [wide] * 4
    else:
        assert result.stats.tokens_per_step == 1 and result.stats.accepted == 0
        assert result.stats.forwards == 1 + 4 * (K + 1)
        # After a rejection linear decoding has nothing to verify, once.
        inner = rows[: -(K + 1)]
        assert inner == ([wide] * len(inner) if mode == "quadratic" else [wide, K + 1] * (len(inner) // 2))


def test_sampling_draws_what_plain_draws():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.prompts((12, 7))
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 3}
    texts = [
        generate(model, inputs, GatedLoRAMTP(mode=mode, k=k), random_adapters(model), **options).sequences
        for mode, k in (("quadratic", None), ("linear", None), ("quadratic", 1))
    ]
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_the_plan_takes_what_pays():
    free = [1.0] * 82
    assert best_plan([0.9] * 8, free, 8) == (8, True)
    assert best_plan([0.9] * 8, free, 3) == (3, True)
    dear = [float(max(n, 1)) for n in range(82)]  # every row costs
    assert best_plan([0.1] * 8, dear, 8)[0] == 0
    assert best_plan([0.3] * 8, [20 + cost / 2 for cost in dear], 8)[0] == 1
    # Certain drafts are worth rows beside a fixed cost, but masks behind each of them are not.
    assert best_plan([1.0] * 8, [20 + cost for cost in dear], 8) == (8, False)


@pytest.mark.parametrize("lengths", [(8,), (8, 5)], ids=str)
def test_where_no_draft_pays_the_rest_is_plain(monkeypatch, lengths):
    model, inputs = tiny.model(), tiny.prompts(lengths)
    rows = []
    verify = Session.verify

    def counted(self, tokens, relation, depth, valid=None, auxiliary=None):
        rows.append(tokens.shape[1] + (auxiliary.count if auxiliary else 0))
        return verify(self, tokens, relation, depth, valid, auxiliary)

    monkeypatch.setattr(Session, "verify", counted)
    monkeypatch.setattr(drafter, "forward_costs", lambda session, sizes: [float(max(n, 1)) for n in range(82)])
    result = generate(model, inputs, GatedLoRAMTP(mode="auto"), random_adapters(model), max_new_tokens=40)
    assert torch.equal(result.sequences, plain(model, inputs, max_new_tokens=40))
    # It tries at first, and then gives up.
    assert rows[0] > 1 and set(rows[-20:]) == {1}


# --- what is saved and refused --------------------------------------------------------------------


def test_saved_adapters_draft_as_before_and_only_for_their_base(tmp_path):
    model = tiny.model()
    adapters = random_adapters(model)
    adapters.save(tmp_path, model, training={"loss": 1.0})
    note = json.loads((tmp_path / "adapter.json").read_text())
    assert note["k"] == K and note["base"]["class"] == "LlamaForCausalLM" and note["training"] == {"loss": 1.0}
    inputs = tiny.prompts((8,))
    drafter = method(str(GatedLoRAMTP(adapter=str(tmp_path))))
    assert drafter == GatedLoRAMTP(adapter=str(tmp_path))
    loaded = Adapters.load(tmp_path, model)
    assert all(torch.equal(a, b) for a, b in zip(adapters.parameters(), loaded.parameters(), strict=True))
    assert Adapters.load(tmp_path, model) is loaded
    ours = generate(model, inputs, drafter, None)
    assert torch.equal(ours.sequences, plain(model, inputs))
    # Wider weights of the same values are the same base; other values are not.
    assert Adapters.load(tmp_path, tiny.model().to(torch.bfloat16)).masks.dtype == torch.bfloat16
    with pytest.raises(ResourceError, match="trained for"):
        Adapters.load(tmp_path, tiny.model(seed=1))
    with torch.no_grad():
        model.model.norm.weight += 1
    with pytest.raises(ResourceError, match="other weights"):
        Adapters.load(tmp_path, model)
    with pytest.raises(ResourceError, match="no gated-LoRA adapters"):
        Adapters.load(tmp_path / "nothing", model)


def test_missing_adapters_are_told_how_to_be_made(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ResourceError, match=r"tokenry train mtp --model .*gated-lora-mtp:adapter=FOLDER"):
        generate(tiny.model(), tiny.prompts((5,)), GatedLoRAMTP(), None)


def test_what_cannot_be_served_is_refused():
    model = tiny.model()
    with pytest.raises(BadParameter, match="at most 3"):
        generate(model, tiny.prompts((5,)), GatedLoRAMTP(k=K + 1), random_adapters(model))
    with pytest.raises(BadParameter, match="at least 1"):
        GatedLoRAMTP(k=0)
    with pytest.raises(ResourceError, match="trained for another model"):
        generate(model, tiny.prompts((5,)), GatedLoRAMTP(), random_adapters(tiny.model("gpt2")))
    with pytest.raises(ResourceError, match="must be Adapters or their folder, not int"):
        generate(model, tiny.prompts((5,)), GatedLoRAMTP(), 1)
    adapters = random_adapters(model)
    adapters.targets.append("model.layers.9.mlp.up_proj")
    with pytest.raises(AttributeError), gated(model, adapters, 0, 1):
        pass
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(UnsupportedModel, match="Mamba"):
        Adapters(tiny.model("mamba"), k=2, r=2, alpha=4.0)
    with pytest.raises(BadParameter, match="length"):
        MTPTrainer(length=8)


# --- training -------------------------------------------------------------------------------------


def successor():
    """A model that says of every token which one comes next, in one long cycle, and looks at nothing before."""
    model = tiny.model()
    cycle = torch.randperm(tiny.VOCABULARY - 3, generator=torch.Generator().manual_seed(1)) + 3
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        known = torch.nn.functional.normalize(model.get_input_embeddings().weight, dim=1)
        model.lm_head.weight[cycle.roll(-1)] = 4 * known[cycle]
    return model


def test_training_teaches_drafts_and_leaves_the_base_alone(tmp_path):
    """One run of the trainer, from text to decoding."""
    model, tokenizer = successor(), tiny.tokenizer()
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(10, tiny.VOCABULARY - 10, (40, 60), generator=generator)
    texts = [" ".join(f"w{word}" for word in row) for row in words.tolist()]
    before = weights_hash(model)
    trainer = MTPTrainer(k=K, r=8, length=48, batch=8, rows=48, blocks=12, steps=80, lr=1e-2, precision="float32")
    note = train(trainer, model, tokenizer, texts, tmp_path, seed=0)
    assert weights_hash(model) == before
    assert len(note["accuracy_by_mask"]) == len(note["loss_by_mask"]) == K
    assert json.loads((tmp_path / "adapter.json").read_text())["training"]["loss"] == note["loss"]
    log = tmp_path / "run"
    assert not log.exists()
    assert note["tokens_per_step"] > 2.5 and max(note["loss_by_mask"]) < 2

    inputs = tiny.prompts((12,), seed=5)
    wanted = plain(model, inputs, max_new_tokens=60)
    found = {}
    for mode in ("quadratic", "linear"):
        drafter = GatedLoRAMTP(adapter=str(tmp_path), mode=mode)
        result = generate(model, inputs, drafter, None, max_new_tokens=60)
        assert torch.equal(result.sequences, wanted)
        found[mode] = result.stats.tokens_per_pass
    useless = generate(model, inputs, GatedLoRAMTP(), random_adapters(model), max_new_tokens=60).stats.tokens_per_pass
    assert found["quadratic"] > 1.5 and found["quadratic"] >= found["linear"] > useless


def test_terms_are_those_of_the_paper(tmp_path):
    """Against losses written out prefix by prefix."""
    model = tiny.model(dtype=torch.float64)
    objective = MTPObjective(k=2, r=2, alpha=4.0, blocks=3)
    extra = torch.nn.ModuleDict(objective.modules(model)).double()
    for up in extra["adapters"].up:
        torch.nn.init.normal_(up, std=0.3)
    torch.nn.init.normal_(extra["adapters"].sampler.last_norm.weight)
    ids = tiny.prompts((7, 7))["input_ids"]
    labels = ids.clone()
    labels[1, 4] = -100
    batch = {"input_ids": ids, "labels": labels, "blocks": torch.tensor([0, 3, 4])}
    targets = [[[2, 3], [5, 6], [6, None]], [[2, 3], [5, 6], [6, None]]]
    batch["targets"] = torch.tensor(
        [[[-100 if c is None else int(labels[r, c]) for c in pair] for pair in row] for r, row in enumerate(targets)]
    )
    terms, _ = objective.terms(model, extra, batch, None)
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    wanted = {"base": 0.0, "sampler": 0.0, "consistency": 0.0}
    with torch.no_grad(), listening(model, slice(None)) as heard:
        model(ids, use_cache=False)
    for row in range(2):
        for number, i in enumerate([0, 3, 4]):
            states = alone(model, extra["adapters"], ids[row, : i + 1])
            for j in (1, 2):
                target = int(batch["targets"][row, number, j - 1])
                if target == -100:
                    continue
                z = states[j - 1]
                s = extra["adapters"].sampler(embed(ids[row, i + j]), z)
                wanted["base"] -= float(head(z).log_softmax(-1)[target])
                wanted["sampler"] -= float(head(s).log_softmax(-1)[target].detach())
                anchor = heard.hidden[row, i + j]
                wanted["consistency"] += float((z - anchor).square().sum() / anchor.square().sum())
    counts = objective.counts(batch)
    assert int(counts["base"]) == 10 and set(terms) == set(wanted)
    for name, value in wanted.items():
        assert abs(float(terms[name].detach()) - value) < 1e-3 * max(1.0, abs(value)), name


def test_prefixes_have_targets_and_a_batch_without_any_counts_nothing(tmp_path):
    model = tiny.model()
    ids = tiny.prompts((12, 12))["input_ids"]
    empty = {"input_ids": ids[0], "labels": torch.full((12,), -100), "written": torch.tensor(0)}
    full = {"input_ids": ids[1], "labels": ids[1], "written": torch.tensor(0)}
    objective = MTPObjective(k=2, r=2, alpha=4.0, blocks=4)
    bundle = fit(model, objective, [empty, full], tmp_path, steps=2, lr=1e-3, batch=1, progress=False)
    assert all(torch.isfinite(p).all() for p in bundle.extra.parameters())
    assert not any(p.requires_grad for p in model.parameters())
