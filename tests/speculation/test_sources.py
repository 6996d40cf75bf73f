"""The two sources of training-free drafts: what stood in the text, and what the model wanted."""

import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests import tiny
from tokenry.errors import BadParameter, ResourceError
from tokenry.generation import Options
from tokenry.methods import method
from tokenry.speculation import TokenRecycling
from tokenry.speculation.goose import Goose
from tokenry.speculation.sources import RecyclingTable, Text, _loaded

CPU = torch.device("cpu")


def text(*ids, reach=5):
    made = Text(64, reach)
    made.append(ids)
    return made


def brute_force(ids, reach):
    """Ends and lengths of all earlier occurrences, by comparing slices."""
    found = {}
    for end in range(len(ids) - 1):
        run = 0
        while run < min(reach, end + 1) and ids[end - run] == ids[len(ids) - 1 - run]:
            run += 1
        if run:
            found[end] = run
    longest = max(found.values(), default=0)
    return {end: run for end, run in found.items() if run > 1 or longest == 1}


@pytest.mark.parametrize("reach", [1, 2, 5, 24])
def test_matches_are_those_of_brute_force_however_the_text_came(reach):
    generator = torch.Generator().manual_seed(reach)
    for _ in range(60):
        ids = torch.randint(0, 3, (int(torch.randint(1, 30, (1,), generator=generator)),), generator=generator).tolist()
        made = Text(64, reach)
        for begin in range(0, len(ids), 4):
            made.append(ids[begin : begin + 4])
        ends, runs = made.matches()
        assert dict(zip(ends.tolist(), runs.tolist(), strict=True)) == brute_force(ids, reach)
        assert made.ids.tolist() == ids


def test_the_end_of_the_text_never_matches_itself_and_drafts_are_looked_up_behind_it():
    assert text(1, 2, 3).matches()[0].tolist() == []
    assert Text(4, 3).matches()[0].tolist() == []
    made = text(1, 2, 3, 4, 9, 1)
    assert made.matches()[0].tolist() == [0]
    # 1 2 3 stands at the start; 4 9 1 stands at the end of the text alone, where no token follows.
    ends, runs = made.matches([2, 3])
    assert (ends.tolist(), runs.tolist()) == ([2], [3])
    assert text(4, 9, 1, 4, 9).matches([1])[0].tolist() == [2]
    assert text(7, 4, 9, 1).matches([4, 9, 1])[0].tolist() == []


def test_a_copy_goes_on_with_itself():
    made = text(1, 2, 3, 1, 2)
    assert made.copy(1, 2) == [3, 1]
    assert made.copy(1, 7) == [3, 1, 2, 3, 1, 2, 3]
    assert text(5, 5).copy(0, 3) == [5, 5, 5]


def opened(vocab=10, k=3, **options):
    table = RecyclingTable(k, **options)
    table.open(vocab, CPU)
    return table


def logits(*best, vocab=10):
    """Rows whose best ids are the given ones, in order."""
    rows = torch.zeros(len(best), vocab)
    for row, ids in enumerate(best):
        for place, token in enumerate(ids):
            rows[row, token] = 9.0 - place
    return rows


def test_pairs_are_looked_up_before_tokens():
    table = opened(order=2, contexts=101, scored=True)
    table.learn(torch.tensor([4, 4]), logits([1, 2, 3], [5, 6, 7]), torch.tensor([[8], [-1]]))
    assert [token for token, _ in table.successors((4,))] == [5, 6, 7]
    assert [token for token, _ in table.successors((8, 4))] == [1, 2, 3]
    assert [token for token, _ in table.successors((9, 4))] == [5, 6, 7]
    assert table.successors((3,)) == table.successors((8, 3)) == []
    assert (table.row((4,)), table.row((8, 4))[1], table.row((3,))) == ((4, 1), 2, (-1, 0))


def test_scores_are_the_softmax_over_the_candidates_alone():
    table = opened(order=2, contexts=101, scored=True)
    raw = torch.randn(1, 10, generator=torch.Generator().manual_seed(0))
    table.learn(torch.tensor([4]), raw, torch.tensor([[2]]))
    best = raw[0].topk(3)
    wanted = best.values.softmax(-1)
    for found in (table.successors((4,)), table.successors((2, 4))):
        assert [token for token, _ in found] == best.indices.tolist()
        assert [score for _, score in found] == pytest.approx(wanted.tolist(), abs=1e-3)
    least = float(wanted[1]) + 0.01
    assert len(table.successors((4,), least=least)) == 1


def test_the_last_occurrence_of_a_token_and_of_a_pair_wins():
    table = opened(order=2, contexts=101, scored=True)
    tokens, previous = torch.tensor([4, 4, 5, 4]), torch.tensor([[8], [8], [8], [7]])
    table.learn(tokens, logits([1, 2, 3], [2, 3, 1], [3, 1, 2], [9, 8, 7]), previous)
    assert [token for token, _ in table.successors((4,))] == [9, 8, 7]
    assert [token for token, _ in table.successors((8, 4))] == [2, 3, 1]
    assert [token for token, _ in table.successors((7, 4))] == [9, 8, 7]


def _key(*ids):
    from tokenry.speculation.sources import _BASE, _PRIME

    return sum((token + 1) * pow(_BASE, place, _PRIME) for place, token in enumerate(reversed(ids))) % _PRIME


def test_the_longest_known_context_is_looked_up_and_the_newest_of_equal_ones():
    table = opened(order=4, contexts=997, scored=True)
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 4, (60,), generator=generator).tolist()
    raw = torch.randn(60, 10, generator=generator)
    before = torch.tensor([[text[place - back] if place >= back else -1 for back in (1, 2, 3)] for place in range(60)])
    for begin in range(0, 60, 7):
        part = slice(begin, begin + 7)
        table.learn(torch.tensor(text[part]), raw[part], before[part])
    newest = {}
    for place in range(60):
        for length in range(1, 5):
            if length <= place + 1:
                newest[tuple(text[place + 1 - length : place + 1])] = raw[place].topk(3).indices.tolist()
    for _ in range(200):
        context = tuple(torch.randint(0, 5, (4,), generator=generator).tolist())
        known = next((length for length in (4, 3, 2, 1) if context[-length:] in newest), 0)
        assert table.row(context)[1] == known
        assert [token for token, _ in table.successors(context)] == newest.get(context[4 - known :], [])


def test_pairs_that_share_a_row_do_not_pass_for_each_other_and_the_table_does_not_grow():
    table = opened(order=2, contexts=2, scored=True)
    generator = torch.Generator().manual_seed(0)
    newest = {}
    for _ in range(40):
        tokens, previous = torch.randint(0, 10, (2, 6), generator=generator)
        raw = torch.randn(6, 10, generator=generator)
        table.learn(tokens, raw, previous[:, None])
        for token, before, row in zip(tokens.tolist(), previous.tolist(), raw, strict=True):
            newest[_key(before, token) % 2] = (before, token, row.topk(3).indices.tolist())
    assert table.ids.shape == (12, 3)
    known = [(b, t) for b in range(10) for t in range(10) if table.row((b, t))[1] == 2]
    assert sorted(known) == sorted((b, t) for b, t, _ in newest.values())
    for before, token, best in newest.values():
        assert [found for found, _ in table.successors((before, token))] == best


def test_a_table_of_pairs_comes_back_as_it_was_saved(tmp_path):
    table = opened(order=2, contexts=101, scored=True)
    table.learn(torch.tensor([4, 5]), logits([1, 2, 3], [5, 6, 7]), torch.tensor([[8], [-1]]))
    table.save(tmp_path / "pairs.safetensors")
    again = RecyclingTable.load(tmp_path / "pairs.safetensors")
    for token in range(10):
        for before in range(10):
            assert again.successors((before, token)) == table.successors((before, token))
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.safetensors"]


def test_sizes_that_make_no_table():
    for bad in ({"k": 0}, {"contexts": -1}, {"order": 2}, {"contexts": 9}, {"order": 0}):
        with pytest.raises(BadParameter):
            RecyclingTable(**bad)
    with pytest.raises(BadParameter, match="10 ids"):
        opened(k=11)


# --- tables that outlive a call -------------------------------------------------------------------


def run(model, inputs, decoder, table=None, **options):
    resources = {} if table is None else {"table": table}
    return model.generate(
        **inputs, custom_generate=decoder, tokenry_options=Options(resources=resources), do_sample=False,
        **{"max_new_tokens": 40, "return_dict_in_generate": True} | options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "decoder", [TokenRecycling(), TokenRecycling(template="auto"), Goose(sources="branches", bigrams=997)], ids=str
)
def test_a_call_starts_from_a_file_and_leaves_it_as_it_is(decoder, tmp_path):
    model, inputs = tiny.model(), tiny.prompts((8,))
    table = decoder.new_table()
    cold = run(model, inputs, decoder, table)
    path = tmp_path / "my.safetensors"
    table.save(path)
    before = path.read_bytes()
    text = f"{decoder}{';' if ':' in str(decoder) else ':'}table={path}"
    named = method(text)
    assert named.table == str(path) and str(named) == text
    counts = [run(model, inputs, named).stats for _ in range(2)]
    handed = run(model, inputs, decoder, table.copy())
    # Each call starts from the file alone, as from a copy of the table; a hot start saves passes here.
    assert counts[0].forwards == counts[1].forwards == handed.stats.forwards < cold.stats.forwards
    assert path.read_bytes() == before
    # A resource wins over the file, and learns.
    held = table.copy()
    run(model, tiny.prompts((8,), seed=5), named, held)
    assert not torch.equal(held.ids, table.ids)


def test_a_table_of_inference_mode_is_written_outside_of_it():
    with torch.inference_mode():
        table = opened(order=2, contexts=11, scored=True)
    assert not any(tensor.is_inference() for tensor in (table.ids, table.seen, table.scores, table.keys))


def test_the_home_folder_may_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    opened(order=2, contexts=11, scored=True).save("~/t.safetensors")
    assert RecyclingTable.load("~/t.safetensors").order == 2


def test_a_damaged_file_is_refused_and_a_place_that_is_not_there(tmp_path):
    table = opened(order=2, contexts=11, scored=True)
    table.learn(torch.tensor([4, 5]), logits([1, 2, 3], [5, 6, 7]), torch.tensor([[8], [-1]]))
    path = tmp_path / "t.safetensors"
    table.save(path)
    with safe_open(str(path), "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    damaged = [
        (about, {**tensors, "ids": tensors["ids"] + 500}),
        (about, {**tensors, "ids": tensors["ids"][:5].clone()}),
        (about, {name: each for name, each in tensors.items() if name != "seen"}),
        (about, {**tensors, "ids": tensors["ids"].float()}),
        (about, {**tensors, "seen": tensors["seen"].long()}),
        ({"recycling": about["recycling"].replace('"contexts": 11', '"contexts": 0')}, tensors),
        ({"recycling": "{}"}, tensors),
        ({"recycling": "[1]"}, tensors),
    ]
    for metadata, parts in damaged:
        save_file(parts, str(path), metadata=metadata)
        with pytest.raises(ResourceError, match="damaged"):
            RecyclingTable.load(path)
    with pytest.raises(ResourceError, match="cannot write"):
        table.save(tmp_path / "none" / "t.safetensors")
    assert [each.name for each in tmp_path.iterdir()] == ["t.safetensors"]


def test_a_file_that_was_written_anew_is_read_anew(tmp_path):
    path = tmp_path / "t.safetensors"
    model, inputs = tiny.model(), tiny.prompts((8,))
    first, second = RecyclingTable(), RecyclingTable()
    run(model, inputs, TokenRecycling(), first)
    first.save(path)
    decoder = TokenRecycling(table=str(path))
    hot = run(model, inputs, decoder).stats.forwards
    run(model, tiny.prompts((30,), seed=3), TokenRecycling(), second, max_new_tokens=1)
    second.save(path)
    assert run(model, inputs, decoder).stats.forwards > hot
    _loaded.cache_clear()


def test_tables_that_do_not_fit_are_refused(tmp_path):
    model, inputs = tiny.model(), tiny.prompts((8,))
    with pytest.raises(ResourceError, match="cannot read"):
        run(model, inputs, TokenRecycling(table=str(tmp_path / "none")))
    with pytest.raises(ResourceError, match="not dict"):
        run(model, inputs, TokenRecycling(), {})
    with pytest.raises(ResourceError, match=r"k=10, order=2, contexts=65537, scored=True; this one has k=8"):
        run(model, inputs, Goose(), RecyclingTable())
    opened(vocab=50, k=8).save(tmp_path / "small")
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ResourceError, match="50 ids"):
        run(model, inputs, TokenRecycling(table=str(tmp_path / "small")))
    assert not calls  # before anything is computed


@pytest.mark.parametrize(
    "decoder", [TokenRecycling(template=20), TokenRecycling(template="auto"), Goose(size=20)], ids=str
)
def test_threads_share_a_table(decoder):
    """Every thread's text is plain's, whatever the others write in between, and all of them teach the table."""
    model = tiny.model(dtype=torch.float64)
    prompts = [tiny.prompts((8, 5), seed) for seed in range(4)]
    wanted = [model.generate(**inputs, max_new_tokens=30, do_sample=False) for inputs in prompts]
    table = decoder.new_table()
    got: list = [None] * 4
    stop = threading.Event()
    copies = []

    def generate(number):
        for _ in range(2):
            got[number] = run(model, prompts[number], decoder, table, max_new_tokens=30).sequences

    def watch():
        while not stop.is_set():
            copies.append(table.copy())

    threads = [threading.Thread(target=generate, args=(number,)) for number in range(4)]
    watcher = threading.Thread(target=watch)
    for thread in (*threads, watcher):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    watcher.join()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, wanted, strict=True))
    assert all(bool(table.seen[text[:, 8:-1]].all()) for text in wanted)
    # A copy taken in between holds whole rows: candidates of one row never repeat.
    for copy in copies[:: max(1, len(copies) // 20)]:
        rows = copy.ids[copy.seen].sort(-1).values if copy.ids is not None else torch.zeros(0, 2)
        assert bool((rows[:, 1:] != rows[:, :-1]).all())
