"""Drafting by a model's own mask tokens, in the pass that verifies the drafts before."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenry.errors import ResourceError
from tokenry.generation.engine import Session
from tokenry.models import loaded_name, trained_folder
from tokenry.speculation.budget import forward_costs
from tokenry.speculation.engine import Auxiliary, Drafter, DraftTree, TreeShape, Walk
from tokenry.speculation.gated_lora_mtp.adapters import ABOUT, Adapters, gated

# For `mode="auto"`: chance that a draft is accepted where those before it were, before a call has counted its own; how
# many steps it weighs; steps between two choices.
_PRIOR, _WEIGHT, _PATIENCE = 0.6, 8.0, 8


@dataclass
class _State:
    """Of one call.

    Attributes:
        adapters: What drafts.
        width: Drafts a step.
        quadratic: Whether every node has masks behind it.
        states: Hidden states of the masks to draft from `[batch, width, hidden]`; None: none yet, or the prefill's.
        ready: Rows whose states can be drafted from, bool `[batch]`; None: all.
        costs: Seconds of a forward by its tokens, where width and mode are chosen.
        accepted: How often the draft of each depth was accepted; `tried`: how often those before it were.
        steps: Verify steps so far.
    """

    adapters: Adapters
    width: int
    quadratic: bool
    states: Tensor | None = None
    ready: Tensor | None = None
    costs: list[float] | None = None
    accepted: list[float] = field(default_factory=list)
    tried: list[float] = field(default_factory=list)
    steps: int = 0


@dataclass(frozen=True, kw_only=True)
class GatedLoRAMTP(Drafter):
    """Let the frozen model itself draft the next k tokens, through masks that only trained LoRA weights see.

    Behind a token stand k mask embeddings at the positions of the k tokens that follow the next one. LoRA acts on the
    masks' rows alone and no token sees a mask, so what the model says of tokens is what it said before training. A
    small sampler reads the masks' hidden states one after the other and drafts k tokens, each knowing the one before.
    The pass that verifies them carries the masks of the next drafts. Source: Your LLM Knows the Future, arXiv
    2507.11851, sections 3.1 to 3.4; 8 masks are the paper's.

    Quadratic decoding puts masks behind every draft, `(k + 1) ** 2` rows a pass, so that k drafts follow whatever is
    accepted. Linear decoding puts them behind the last draft alone, `2 k + 1` rows, and drafts nothing after a draft is
    rejected. Drafts are the sampler's best tokens, under sampling too.

    The weights are made by `tokenry train mtp` for one base model each. `resources={"adapter": adapters}` hands them
    over loaded.

    Attributes:
        adapter: Folder of the adapters; None: where `tokenry train mtp` puts them for the model.
        k: Drafts a step, at most as many as the adapters were trained for; None: as many. With `mode="auto"` the most.
        mode: `"quadratic"`, `"linear"`, or `"auto"`: every few steps the mode and width with the most expected tokens
            per second, from forward costs measured once per process and counted acceptance (an addition); where none
            beats plain decoding the rest of the call is plain.
    """

    resources: ClassVar[tuple[str, ...]] = ("adapter",)
    adapter: str | None = None
    k: int | None = None
    mode: Literal["quadratic", "linear", "auto"] = "quadratic"

    def validate(self) -> None:
        self.check("k", "none or at least 1", self.k is None or self.k >= 1)

    def adapters(self, model: PreTrainedModel, given: Any = None) -> Adapters:
        """The adapters for a model: those that were given, loaded or as a folder, else those of `adapter`.

        Raises:
            ResourceError: There are none, or they were trained for another model.
        """
        if isinstance(given, Adapters):
            given.check(model)
            return given
        if given is not None and not isinstance(given, str | Path):
            raise ResourceError(
                f"{self.slug}: the resource 'adapter' must be Adapters or their folder, not {type(given).__name__}"
            )
        place = given or self.adapter
        if place is None:
            name = loaded_name(model)
            place = trained_folder("mtp", name)
            if not (place / ABOUT).is_file():
                raise ResourceError(
                    f"{self.slug} needs adapters trained for {name or type(model).__name__}, and there are none in "
                    f"{str(place)!r}: make them by tokenry train mtp --model {name or 'MODEL'}, or name a folder that "
                    f"has them, {self.slug}:adapter=FOLDER"
                )
        return Adapters.load(place, model)

    def start(self, session: Session) -> _State:
        adapters = self.adapters(session.model, session.resources.get("adapter"))
        k = adapters.k if self.k is None else self.k
        self.check("k", f"at most {adapters.k}", k <= adapters.k, why="the adapters were trained for that many masks")
        state = _State(adapters, k, self.mode != "linear")
        if self.mode == "auto":
            state.costs = forward_costs(session, _sizes(k))
            state.accepted, state.tried = [_PRIOR * _WEIGHT] * k, [_WEIGHT] * k
            self._plan(state, k)
            state.width = max(state.width, 1)  # what was never tried is not given up
        session.beside_prompt = self._masks(session, state, *_blocks(TreeShape.chain(1, session.device), state.width))
        return state

    def propose(self, session: Session, state: _State, room: int) -> DraftTree:
        states = state.states
        if states is None and state.steps == 0 and session.hidden is not None:
            states = session.hidden[:, 1:]
        if states is None or (state.ready is not None and not bool((state.ready & session.active).any())):
            return DraftTree.root(session.anchor)
        width = min(state.width, states.shape[1], room)
        if width == 0:
            return DraftTree.root(session.anchor)
        drafts = state.adapters.draft(session.model, session.anchor, states[:, :width])
        valid = None
        if state.ready is not None and not bool(state.ready.all()):
            valid = state.ready[:, None].repeat(1, width + 1)
            valid[:, 0] = True
        tokens = torch.cat([session.anchor[:, None], drafts], 1)
        return DraftTree(tokens, TreeShape.chain(width + 1, session.device), valid)

    def beside(self, session: Session, state: _State, tree: DraftTree) -> Auxiliary | None:
        if state.costs is not None and state.steps % _PATIENCE == 0:
            self._plan(state, len(state.tried))
        state.steps += 1
        width = state.width
        if width == 0:
            return None
        if state.quadratic:
            return self._masks(session, state, *_blocks(tree.shape, width))
        # One block, behind each row's last real node.
        valid = torch.ones_like(tree.tokens[:1], dtype=torch.bool) if tree.valid is None else tree.valid
        ahead = torch.arange(width, device=session.device)
        among = torch.ones(1, width, width, dtype=torch.bool, device=session.device).tril()
        return self._masks(
            session, state, valid.sum(1, keepdim=True) + ahead, valid[:, None, :].expand(-1, width, -1), among
        )

    def observe(self, session: Session, state: _State, tree: DraftTree, logits: Tensor, walk: Walk) -> None:
        if state.width == 0:
            state.states = state.ready = None
            return
        assert session.hidden is not None
        n = tree.shape.size
        masks = session.hidden[:, n:]
        last = walk.path.gather(1, walk.counts[:, None] - 1)[:, 0]
        if state.quadratic:
            rows = torch.arange(session.batch, device=masks.device)
            state.states, state.ready = masks.view(session.batch, n, state.width, -1)[rows, last], None
        else:
            end = n if tree.valid is None else tree.valid.sum(1)
            state.states, state.ready = masks, last == end - 1
        if state.costs is not None:
            self._count(session, state, tree, walk)

    def _masks(self, session: Session, state: _State, depth: Tensor, nodes: Tensor, among: Tensor) -> Auxiliary:
        masks = state.adapters.masks[: state.width]
        around = functools.partial(gated, session.model, state.adapters)
        return Auxiliary(masks.repeat(depth.shape[1] // state.width, 1)[None], depth, nodes, among, around)

    def _count(self, session: Session, state: _State, tree: DraftTree, walk: Walk) -> None:
        drafted = torch.full_like(walk.counts, tree.shape.size) if tree.valid is None else tree.valid.sum(1)
        for count, drafts, alive in zip(walk.counts.tolist(), drafted.tolist(), session.alive, strict=True):
            for depth in range(min(count, drafts - 1) if alive else 0):
                state.tried[depth] += 1
                state.accepted[depth] += depth < count - 1

    def _plan(self, state: _State, most: int) -> None:
        assert state.costs is not None
        chances = [accepted / tried for accepted, tried in zip(state.accepted, state.tried, strict=True)]
        state.width, state.quadratic = best_plan(chances, state.costs, most)


def best_plan(chances: Sequence[float], costs: Sequence[float], most: int) -> tuple[int, bool]:
    """The number of drafts, and whether quadratically, that give the most tokens a second; no drafts where none pay.

    Args:
        chances: Chance that the draft of each depth is accepted where those before it were.
        costs: Seconds of a forward by its tokens.
        most: Most drafts.
    """
    best, rate = (0, False), 1 / costs[1]
    tokens, reach = 1.0, 1.0
    for width in range(1, most + 1):
        reach *= chances[width - 1]
        tokens += reach
        # Linearly, a step that does not accept all is followed by one that has nothing to verify.
        missed = 1 - reach
        plans = {True: tokens / costs[(width + 1) ** 2]}
        plans[False] = (tokens + missed) / (costs[2 * width + 1] + missed * costs[width + 1])
        for quadratic, found in plans.items():
            if found > rate:
                best, rate = (width, quadratic), found
    return best


def _sizes(k: int) -> tuple[int, ...]:
    """Numbers of tokens whose forward is measured: up to those of the widest quadratic pass."""
    return tuple(sorted({1, 2, 4, 8, *((width + 1) ** 2 for width in range(1, k + 1))}))


@functools.lru_cache(maxsize=64)
def _blocks(shape: TreeShape, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Depth `[1, n * width]` of masks behind every node, which nodes they see, and which masks."""
    device = shape.depth.device
    depth = shape.depth[:, :, None] + torch.arange(1, width + 1, device=device)
    nodes = shape.ancestors.repeat_interleave(width, 1)
    return depth.flatten(1), nodes, own_block(shape.size, width, device)


def own_block(blocks: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Which masks of blocks in a row see which: themselves and those before them in their block, bool `[1, m, m]`."""
    block = torch.arange(blocks, device=device).repeat_interleave(width)
    return (block[:, None] == block).tril()[None]
