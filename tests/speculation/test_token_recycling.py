"""Token Recycling's own invariants, as on its card."""

import contextlib
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tokenizers import Tokenizer, models

import tokenry
from tests import tiny
from tokenry.errors import BadParameter, ResourceError
from tokenry.generation import Options
from tokenry.methods import method
from tokenry.speculation import RecyclingTable, TokenRecycling
from tokenry.speculation.token_recycling import Template, standard_template

CPU = torch.device("cpu")
CHAIN = tuple((0,) * n for n in range(1, 6))


def run(model, inputs, decoder=None, table=None, **options):
    options = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True} | options
    if decoder is not None:
        options["custom_generate"] = decoder
        options["tokenry_options"] = Options(resources={} if table is None else {"table": table})
    return model.generate(**inputs, **options)


def filled(rows, vocab=10, k=4):
    table = RecyclingTable(k)
    table.open(vocab, CPU)
    for token, candidates in rows.items():
        table.ids[token] = torch.tensor(candidates)
        table.seen[token] = True
    return table


def test_the_standard_template_has_the_papers_widths():
    paths = standard_template()
    assert len(paths) == 80
    assert [sum(len(path) == depth for path in paths) for depth in range(1, 7)] == [8, 21, 25, 15, 8, 3]
    # The children that the card lists, level by level.
    children = [sum(p[:-1] == path for p in paths) for path in [(), *paths] if len(path) < 3]
    assert children == [8, 8, 4, 3, 2, 1, 1, 1, 1, 8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0]


def test_retrieval():
    table = filled({5: [6, 3, 5, 1], 6: [4, 1, 7, 2]})
    tokens, known = table.draft(torch.tensor([5]), Template(((0,), (1,), (2,), (0, 0)), CPU))
    assert tokens.tolist() == [[5, 6, 3, 5, 4]] and known.all()


def test_what_lies_under_unseen_tokens_is_told():
    table = filled({5: [6, 3, 5, 1], 6: [4, 1, 7, 2]})
    template = Template(((0,), (1,), (0, 0), (1, 0), (0, 0, 0)), CPU)
    tokens, known = table.draft(torch.tensor([5, 8]), template)
    assert tokens[0].tolist() == [5, 6, 3, 4, 0, 0]
    # 3 and 4 were never seen; 8 neither.
    assert known.tolist() == [[True, True, True, True, False, False], [True, False, False, False, False, False]]


def test_update_takes_the_last_occurrence_and_leaves_other_rows():
    table = filled({7: [1, 2, 3, 4]})
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 10, generator=generator)
    tokens = torch.tensor([5, 3, 5, 2, 3, 9])
    table.learn(tokens, logits)
    for token, last in ((5, 2), (3, 4), (2, 3), (9, 5)):
        assert table.ids[token].tolist() == logits[last].topk(4).indices.tolist()
    assert table.ids[7].tolist() == [1, 2, 3, 4]
    assert table.seen.tolist() == [False, False, True, True, False, True, False, True, False, True]


@dataclass(frozen=True, kw_only=True)
class Watched(TokenRecycling):
    slug: ClassVar[str] = "watched"

    def observe(self, session, state, tree, logits, walk):
        before = state.table.ids.clone()
        super().observe(session, state, tree, logits, walk)
        real = torch.ones_like(tree.tokens, dtype=torch.bool) if tree.valid is None else tree.valid
        real = real & session.active[:, None]
        last = dict(zip(tree.tokens[real].tolist(), logits[real], strict=True))
        for token in range(tiny.VOCABULARY):
            wanted = last[token].topk(8).indices.int() if token in last else before[token]
            assert torch.equal(state.table.ids[token], wanted)


@pytest.mark.parametrize("batch", [(8,), (8, 3, 6)], ids=str)
def test_one_pass_updates_every_token_of_the_tree_and_no_other(batch):
    options = {"eos_token_id": [5, 9], "pad_token_id": 0}
    assert run(tiny.model(), tiny.prompts(batch), Watched(), **options).stats.steps > 5


@pytest.mark.parametrize("batch", [(8,), (8, 3, 6)], ids=str)
@pytest.mark.parametrize("start", ["cold", "hot", "random", "bare"])
@pytest.mark.parametrize(
    "template", ["2.2.2", "auto", 5, 20, 0, (), CHAIN, ((0,), (1,), (1, 3), (1, 3, 0))], ids=lambda t: str(t)[:12]
)
def test_greedy_is_lossless(template, start, batch):
    model, inputs = tiny.model(dtype=torch.float64), tiny.prompts(batch)
    decoder = TokenRecycling(template=template, harvest_prompt=start != "bare")
    table = decoder.new_table()
    if start == "random":
        table.open(tiny.VOCABULARY, CPU)
        table.ids.random_(0, tiny.VOCABULARY, generator=torch.Generator().manual_seed(3))
        table.seen[:] = True
    if start == "hot":
        run(model, inputs, decoder, table)
    options = {"eos_token_id": [5, 9], "pad_token_id": 0, "max_new_tokens": 30}
    ours = run(model, inputs, decoder, table, **options)
    assert torch.equal(ours.sequences, run(model, inputs, **options).sequences)
    if template in (0, ()):
        assert ours.stats.drafted == 0 and ours.stats.tokens_per_pass == 1


def test_a_hot_table_learns_the_prompts_contexts_where_a_tree_grows():
    model, inputs = tiny.model(), tiny.prompts((8,))
    for template, learns in (("auto", True), ("2.2.2", False)):
        decoder = TokenRecycling(template=template)
        table = decoder.new_table()
        run(model, tiny.prompts((8,), seed=5), decoder, table, max_new_tokens=1)
        before = table.seen.clone()
        run(model, inputs, decoder, table, max_new_tokens=1)
        assert bool((table.seen != before).any()) is learns


def test_hot_is_at_least_as_good_as_cold_and_a_chain_worse_than_the_tree():
    model, inputs = tiny.model(), tiny.prompts((8,))
    table = RecyclingTable()
    cold = run(model, inputs, TokenRecycling(), table)
    hot = run(model, inputs, TokenRecycling(), table)
    assert hot.stats.tokens_per_step >= cold.stats.tokens_per_step > 1
    chain = run(model, inputs, TokenRecycling(template=CHAIN), table)
    assert chain.stats.tokens_per_step <= hot.stats.tokens_per_step
    assert torch.equal(hot.sequences, chain.sequences) and torch.equal(hot.sequences, cold.sequences)


def test_the_prompt_is_harvested_once_and_equal_to_its_forward():
    model, inputs = tiny.model(), tiny.prompts((9, 5))
    table = RecyclingTable()
    run(model, inputs, TokenRecycling(template=0), table, max_new_tokens=1)
    with torch.no_grad():
        logits = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    wanted = RecyclingTable()
    wanted.open(tiny.VOCABULARY, CPU)
    wanted.learn(inputs["input_ids"][real], logits[real])
    assert torch.equal(table.seen, wanted.seen) and torch.equal(table.ids, wanted.ids)
    none = RecyclingTable()
    run(model, inputs, TokenRecycling(template=0, harvest_prompt=False), none, max_new_tokens=1)
    assert none.is_cold


def test_inside_a_policy_a_long_prompt_teaches_its_end(monkeypatch):
    """A policy reads the prompt at once, and logits of all of it may not fit."""
    from tokenry.generation import session
    from tokenry.kvcache import Sinks

    monkeypatch.setattr(session, "_PROMPT_LOGITS", 1)
    model, inputs = tiny.model(), tiny.prompts((100,))
    widths = []
    model.register_forward_hook(lambda module, given, out: widths.append(out.logits.shape[1]))
    tables = []
    for block in (Sinks(budget=200)(model), contextlib.nullcontext()):
        table = RecyclingTable()
        with block:
            run(model, inputs, TokenRecycling(template=0), table, max_new_tokens=1)
        tables.append(table)
    assert max(widths) == 64
    taught = set(inputs["input_ids"][0, -64:].tolist())
    assert set(tables[0].seen.nonzero()[:, 0].tolist()) == taught
    assert all(torch.equal(tables[0].ids[token], tables[1].ids[token]) for token in taught)


def test_tables_are_saved_with_what_they_fit(tmp_path):
    model, inputs = tiny.model(), tiny.prompts((8,))
    table = RecyclingTable(tokenizer="toy")
    with pytest.raises(ResourceError, match="empty"):
        table.save(tmp_path / "t.safetensors")
    run(model, inputs, TokenRecycling(), table)
    table.save(tmp_path / "t.safetensors")
    again = RecyclingTable.load(tmp_path / "t.safetensors", tokenizer="toy")
    assert torch.equal(again.ids, table.ids) and torch.equal(again.seen, table.seen) and not again.is_cold
    with pytest.raises(ResourceError, match="'toy', not 'other'"):
        RecyclingTable.load(tmp_path / "t.safetensors", tokenizer="other")
    (tmp_path / "junk").write_bytes(b"junk")
    for bad in ("junk", "missing"):
        with pytest.raises(ResourceError, match="cannot read"):
            RecyclingTable.load(tmp_path / bad)
    with pytest.raises(ResourceError, match="10 ids"):
        run(model, inputs, TokenRecycling(k=4, template=4), filled({}))
    with pytest.raises(ResourceError, match="k=8"):
        run(model, inputs, TokenRecycling(), filled({}))


def test_a_table_of_another_tokenizer_is_refused(tmp_path):
    """Of equal vocabularies too: what tells them apart is the name, or which words the ids spell."""
    model, path = tiny.model(), tmp_path / "t.safetensors"
    ours, same, other = tiny.tokenizer(), tiny.tokenizer(), tiny.tokenizer()
    words = other.get_vocab()
    words["w1"], words["w2"] = words["w2"], words["w1"]
    other = type(other)(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    assert len(other) == len(ours)

    def go(tokenizer, **options):
        return tokenry.generate(model, tokenizer, [5, 6, 7], max_new_tokens=4, **options)

    table = RecyclingTable()
    go(ours, method="token-recycling", resources={"table": table})
    table.save(path)
    hot = TokenRecycling(table=str(path))
    for fitting in (ours, same, None):
        go(fitting, method=hot)
    for options in ({"method": hot}, {"method": "token-recycling", "resources": {"table": table}}):
        with pytest.raises(ResourceError, match="learned with tokenizer"):
            go(other, **options)
    # A name that the caller gave is compared with the tokenizer's own.
    named = RecyclingTable(tokenizer="toy")
    ours.name_or_path, same.name_or_path = "toy", "another"
    go(ours, method="token-recycling", resources={"table": named})
    with pytest.raises(ResourceError, match="'toy', and the call's is 'another'"):
        go(same, method="token-recycling", resources={"table": named})


def test_text_form_and_values():
    for text in ("token-recycling", "token-recycling:template=auto", "token-recycling:k=4;template=((0,),(1,),(0,3))",
                 "token-recycling:template=30;harvest_prompt=false"):  # fmt: skip
        assert str(method(text)) == text.replace(",)", ")") or method(str(method(text))) == method(text)
    for bad in (
        {"template": "2.2"},
        {"template": 81},
        {"template": ((0, 1),)},
        {"template": ((-1,),)},
        {"k": 0},
        {"k": 4},
    ):
        with pytest.raises(BadParameter):
            TokenRecycling(**bad)
