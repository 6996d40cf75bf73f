"""What the tests of drafters with a second model share."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests import tiny
from tests.speculation.toys import Ended, Scripted
from tokenry.generation import Options
from tokenry.speculation import budget
from tokenry.speculation.companion import Companion


def run(model: Any, inputs: dict[str, torch.Tensor], decoder: Any = None, draft: Any = None, **options: Any) -> Any:
    """Generate 24 tokens greedily, with a decoder and a second model if given."""
    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True} | options
    resources = options.pop("resources", {}) | ({} if draft is None else {"draft": draft})
    seed = options.pop("seed", None)
    if decoder is not None:
        options |= {"custom_generate": decoder, "tokenry_options": Options(seed=seed, resources=resources)}
    return model.generate(**inputs, **options)


def costing(model: PreTrainedModel, slope: float, *batches: int) -> PreTrainedModel:
    """The model, of which a pass over n tokens of each row of a batch is taken to cost `1 + slope * n`."""
    costs = [1.0 + slope * n for n in range(82)]
    budget._costs[model] = {
        (batch, model.device, model.dtype, packed, budget._SIZES): costs
        for batch in batches or (1,)
        for packed in (True, False)
    }
    return model


def near(kind: str = "llama", scale: float = 0.02, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A tiny model that often agrees with `tiny.model(kind)`: the same weights with noise."""
    model = tiny.model(kind, dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn(weight.shape, generator=generator, dtype=dtype) * scale
    return model


def sized(kind: str, dtype: torch.dtype = torch.float64, **changes: int) -> PreTrainedModel:
    """A tiny model with another vocabulary or context."""
    config = tiny.config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.generation_config.eos_token_id = None
    return model


class Toy(Scripted):
    """A scripted session with what drafters ask for besides."""

    device = torch.device("cpu")
    anchor = torch.zeros(1, dtype=torch.long)
    vocab = 4

    def limits(self) -> list[int]:
        return [1000]


class Tabulated:
    """A second model of one row whose logits are tabulated by the drafted tokens."""

    def __init__(self, table: Any) -> None:
        self.table, self.drafts, self.levels = table, [], 0
        self.nodes: torch.Tensor | None = None

    def room(self, session: Any) -> int:
        return 1000

    def catch_up(self, session: Any) -> torch.Tensor:
        self.levels = 1
        return self.table[()].log()[None]

    def feed(self, session: Any, tokens: torch.Tensor, relation: torch.Tensor | None = None) -> torch.Tensor:
        self.levels += 1
        self.drafts += tokens[0].tolist()
        if relation is None:
            return self.table[tuple(self.drafts)].log()[None, None]
        paths = [tuple(self.drafts[i] for i in line.nonzero()[:, 0]) for line in relation[0]]
        return torch.stack([self.table[path].log() for path in paths])[None]


class ScriptedDraws:
    """Draws whose every outcome is enumerated: `decide` is the script's."""

    sampled, coupled = True, False

    def order(self, session: Scripted, probs: torch.Tensor, ahead: int, count: int) -> Any:
        tokens = torch.zeros(*probs.shape[:2], count, dtype=torch.long)
        for node, law in enumerate(probs[0]):
            left = law.clone()
            for place in range(count):
                tokens[0, node, place] = choice = session.decide((left / left.sum()).tolist())
                left[choice] = 0
        return tokens, probs.gather(-1, tokens)


def trees(propose: Any) -> list[Any]:
    """Every tree of `propose(session)` with its probability, over all draws."""
    found, scripts = [], [[]]
    while scripts:
        session = Toy(scripts.pop())
        try:
            tree = propose(session)
        except Ended as ended:
            scripts += [[*session.script, choice] for choice in range(ended.args[0])]
            continue
        if session.probability > 0:
            found.append((tree, session.probability))
    return found


def check_logits(monkeypatch: Any) -> list[int]:
    """Compare everything a companion says with forwards of the whole text; returns a list that counts them."""
    catch_up, feed = Companion.catch_up, Companion.feed
    checked: list[int] = []

    def compare(self: Companion, ids: torch.Tensor, logits: torch.Tensor) -> None:
        wanted = self.model(ids[None], use_cache=False).logits[0, -1].float()
        assert torch.allclose(logits, wanted, atol=1e-4), f"after {len(ids)} tokens"
        checked.append(1)

    def text(session: Any, row: int) -> torch.Tensor:
        return session.ids[row, int(session.first[row]) : session.lengths[row]]

    def checked_catch_up(self: Any, session: Any) -> torch.Tensor:
        logits = catch_up(self, session)
        self.drafts = torch.zeros(session.batch, 0, dtype=torch.long)
        for row in range(session.batch):
            if session.alive[row]:
                compare(self, text(session, row), logits[row])
        return logits

    def checked_feed(self: Any, session: Any, tokens: torch.Tensor, relation: torch.Tensor | None = None) -> Any:
        logits = feed(self, session, tokens, relation)
        self.drafts = torch.cat([self.drafts, tokens], 1)
        for row in range(session.batch):
            for node in range(tokens.shape[1]):
                path = self.drafts[row]
                if relation is not None:
                    path = path[relation.expand(session.batch, -1, -1)[row, node]]
                if session.alive[row]:
                    compare(self, torch.cat([text(session, row), path]), logits[row, node])
        return logits

    monkeypatch.setattr(Companion, "catch_up", checked_catch_up)
    monkeypatch.setattr(Companion, "feed", checked_feed)
    return checked
