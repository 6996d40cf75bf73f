"""Where drafts come from when nothing is trained: the text itself, and what the model wanted after each token.

Text              a row's ids on the host, and where its last tokens stood before
RecyclingTable    the best next ids after each token, and after contexts of several tokens
Template          a fixed tree of candidate ranks, laid out for retrieval from a table
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenry.errors import BadParameter, ResourceError
from tokenry.generation.engine import Session
from tokenry.models import bundled
from tokenry.models import path as bundled_path
from tokenry.speculation.engine import TreeShape

TABLE_FILE = "table.safetensors"
"""What `tokenry train token-recycling` writes into its folder."""

Path_ = tuple[int, ...]
Candidates = list[tuple[int, float]]


# --- what stood in the text before ----------------------------------------------------------------


class Text:
    """A row's committed ids on the host; drafting from them needs many small look-ups, which a device is slow at.

    Attributes:
        reach: Most tokens that an occurrence is compared over.
        size: Ids held.
    """

    def __init__(self, capacity: int, reach: int) -> None:
        self.reach = reach
        self.size = 0
        # What stands before the first id agrees with no token.
        self._padded = np.full(reach + capacity, -1, dtype=np.int64)
        self._back = np.arange(reach)

    @property
    def ids(self) -> np.ndarray:
        """The ids, `[size]`."""
        return self._padded[self.reach : self.reach + self.size]

    def append(self, ids: Sequence[int]) -> None:
        """Take in committed ids."""
        end = self.reach + self.size
        self._padded[end : end + len(ids)] = ids
        self.size += len(ids)

    def matches(self, drafted: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Where the last tokens of the text, and of drafts behind it, stood before with a token after them.

        Returns:
            The index of each occurrence's last token, ascending, and over how many tokens it agrees, at most `reach`,
            both `[matches]`. Occurrences of the last token alone are left out where longer ones exist.
        """
        held, reach = self._padded, self.reach
        tail = held[self.size : self.size + reach]
        if drafted:
            tail = np.concatenate([tail, np.asarray(drafted[-reach:])])[-reach:]
        # The last id of the text has no token after it, so the text's end does not match itself.
        ends = np.flatnonzero(held[reach : reach + max(self.size - 1, 0)] == tail[-1])
        if reach > 1 and len(ends) > 1:
            longer = ends[held[ends + (reach - 1)] == tail[-2]]
            ends = longer if len(longer) else ends
        same = held[ends[:, None] + (reach - self._back)] == tail[::-1]
        runs = same.argmin(1)
        runs[same.all(1)] = reach
        return ends, runs

    def longest(self) -> tuple[int, int] | None:
        """The index of the last token of the longest occurrence, and over how many tokens it agrees; of several that
        are as long the newest, among those that go on as most of them do."""
        ends, runs = self.matches()
        if not len(ends):
            return None
        run = int(runs.max())
        ends = ends[runs == run]
        ways = self.ids[ends + 1].tolist()
        votes = Counter(ways)
        # Where all occurrences go one way, or each its own, the newest is the answer.
        most = max(votes.values())
        newest = next(place for place in reversed(range(len(ways))) if votes[ways[place]] == most)
        return int(ends[newest]), run

    def copy(self, end: int, count: int) -> list[int]:
        """The `count` ids that followed index `end`; a copy that reaches the end of the text goes on with what it has
        copied itself, so that short repetitions are drafted in full."""
        period = self.size - 1 - end
        if count <= period:
            return self.ids[end + 1 : end + 1 + count].tolist()
        return self.ids[end + 1 + np.arange(count) % period].tolist()


class Texts:
    """The `Text` of every row of a session, without its padding; `rows[b]` is row `b`'s."""

    def __init__(self, session: Session, reach: int) -> None:
        self.rows = [Text(session.max_length + 1, reach) for _ in range(session.batch)]
        self._read = session.first.tolist()

    def update(self, session: Session) -> None:
        """Take in what the unfinished rows have committed since."""
        alive = [row for row in range(session.batch) if session.alive[row]]
        start = min(self._read[row] for row in alive)
        host = session.ids[:, start : max(session.lengths)].tolist()
        for row in alive:
            self.rows[row].append(host[row][self._read[row] - start : session.lengths[row] - start])
            self._read[row] = session.lengths[row]


# --- what the model wanted before -----------------------------------------------------------------


class Template:
    """A tree of candidate ranks, laid out for retrieval: one gather per level.

    Attributes:
        parents, ranks, depths: Of each node, the root first.
        shape: The tree on a device.
        levels: For each level below the root its nodes' parents, numbered within the level above, and ranks.
    """

    def __init__(self, paths: Sequence[Path_], device: torch.device) -> None:
        nodes: list[Path_] = [(), *sorted(paths, key=lambda path: (len(path), path))]
        place = {path: i for i, path in enumerate(nodes)}
        self.parents = [-1] + [place[path[:-1]] for path in nodes[1:]]
        self.ranks = [0] + [path[-1] for path in nodes[1:]]
        self.depths = [len(path) for path in nodes]
        self.shape = TreeShape.of(self.parents, device)
        self.levels: list[tuple[Tensor, Tensor]] = []
        above = 0
        for depth in range(1, max(self.depths) + 1):
            level = [i for i, d in enumerate(self.depths) if d == depth]
            parents = torch.tensor([self.parents[i] - above for i in level], device=device)
            self.levels.append((parents, torch.tensor([self.ranks[i] for i in level], device=device)))
            above = level[0]


# A context's key: a polynomial of its ids, modulo a prime; 64 bits hold the sum for contexts of any use.
_PRIME, _BASE = 2**31 - 1, 1_640_531_527


class RecyclingTable:
    """What the model last wanted after each token, best first, and after contexts of several tokens if asked for.

    It outlives calls when the caller keeps it (`resources={"table": table}`), and is then shared by threads under its
    lock; `save` and `load` carry it from one process to the next. It takes the width of the logits at first use.

    Contexts of 2 to `order` tokens share a fixed number of rows behind those of single tokens: a context's row follows
    from its ids, and the newest of those that fall on one row holds it. So the table does not grow, however long it is
    used. Contexts are told apart by 31 bits; two that are taken for each other cost a draft, never an output.

    Attributes:
        k: Candidates of each row.
        order: Most tokens of a context, the last one included.
        contexts: Rows for contexts of several tokens; a prime number spreads them best. 0 where `order` is 1.
        scored: Whether the softmax over the `k` best logits is kept beside the ids.
        tokenizer: Name of the tokenizer it was learned with: the caller's, else one made from the vocabulary at first
            use where the call knows its tokenizer; empty if neither is known.
        ids: `[vocab + contexts, k]` int32, None before the first use.
        scores: `[vocab + contexts, k]` float16, None if not `scored`.
        seen: Which rows hold anything, bool `[vocab + contexts]`.
        keys: Which context a context's row holds, int64 `[contexts]`.
        vocab: Width of the logits; 0 before the first use.
        lock: Held while a call reads or writes.
    """

    def __init__(
        self, k: int = 8, tokenizer: str = "", *, order: int = 1, contexts: int = 0, scored: bool = False
    ) -> None:
        if k < 1 or order < 1 or contexts < 0 or (order > 1) != (contexts > 0):
            raise BadParameter(
                f"a recycling table of k={k}, order={order}, contexts={contexts} is not allowed; k and order must be "
                "at least 1, and contexts at least 1 if order is above 1, else 0"
            )
        self.k, self.tokenizer, self.order, self.contexts, self.scored = k, tokenizer, order, contexts, scored
        self.vocab = 0
        self.ids: Tensor | None = None
        self.seen: Tensor | None = None
        self.scores: Tensor | None = None
        self.keys: Tensor | None = None
        self.lock = threading.RLock()

    @property
    def is_cold(self) -> bool:
        """Whether nothing was learned yet."""
        return self.seen is None or not bool(self.seen.any())

    def open(self, vocab: int, device: torch.device) -> None:
        """Make the table fit logits of a width, on a device.

        Raises:
            ResourceError: It was learned with another vocabulary.
            BadParameter: It keeps more candidates than there are ids.
        """
        self.fits(vocab)
        if self.ids is None:
            rows = vocab + self.contexts
            self.vocab = vocab
            # A table that is first used in inference mode is written outside of it later.
            with torch.inference_mode(False):
                self.ids = torch.zeros(rows, self.k, dtype=torch.int32, device=device)
                self.seen = torch.zeros(rows, dtype=torch.bool, device=device)
                if self.scored:
                    self.scores = torch.zeros(rows, self.k, dtype=torch.float16, device=device)
                if self.contexts:
                    self.keys = torch.zeros(self.contexts, dtype=torch.int64, device=device)
        if self.ids.device != device:
            with torch.inference_mode(False):
                self._set({name: tensor.to(device) for name, tensor in self._tensors().items()})

    def fits(self, vocab: int) -> None:
        """Check that the table can be one for logits of a width.

        Raises:
            ResourceError: It was learned with another vocabulary.
            BadParameter: It keeps more candidates than there are ids.
        """
        if self.ids is None:
            if self.k > vocab:
                raise BadParameter(f"k={self.k} is not allowed; k must be at most the model's {vocab} ids")
        elif self.vocab != vocab:
            raise ResourceError(
                f"the recycling table was learned with {self.vocab} ids and the model has {vocab}; "
                "use a table of the same model and tokenizer"
            )

    def draft(self, anchor: Tensor, template: Template) -> tuple[Tensor, Tensor]:
        """Tokens of a tree behind anchors `[batch]`, and which were ever learned, both `[batch, n]`."""
        assert self.ids is not None and self.seen is not None
        flat = self.ids.view(-1)
        tokens = [anchor[:, None]]
        known = [torch.ones_like(tokens[0], dtype=torch.bool)]
        for parents, ranks in template.levels:
            above = tokens[-1].index_select(1, parents)
            known.append(known[-1].index_select(1, parents) & self.seen[above])
            tokens.append(flat[above * self.k + ranks].long())
        return torch.cat(tokens, 1), torch.cat(known, 1)

    def row(self, context: Sequence[int]) -> tuple[int, int]:
        """The row of the longest known context at the end of ids, oldest first, and its length; -1 and 0 where not even
        the last token is known. The table must be on the CPU."""
        _, _, seen, held = self._on_host
        token = context[-1]
        if held is not None:
            own, key = [], 0
            for power, before in zip(self._powers, context[: -self.order - 1 : -1], strict=False):
                own.append(key := key + (before + 1) * power)
            for length in range(len(own), 1, -1):
                key = own[length - 1] % _PRIME
                row = key % self.contexts
                if held.item(row) == key:
                    return self.vocab + row, length
        return (token, 1) if seen.item(token) else (-1, 0)

    def candidates(self, row: int, least: float = 0.0) -> Candidates:
        """Candidates of a row, best first, with scores of at least `least`; none of row -1.

        The table must be scored and on the CPU.
        """
        if row < 0:
            return []
        ids, scores, _, _ = self._on_host
        assert scores is not None
        own = scores[row].tolist()
        # Scores fall, so those that are high enough come first.
        return list(zip(ids[row, : sum(score >= least for score in own)].tolist(), own, strict=False))

    def successors(self, context: Sequence[int], least: float = 0.0) -> Candidates:
        """Candidates behind ids: those of the longest context at their end that is known."""
        return self.candidates(self.row(context)[0], least)

    def learn(self, tokens: Tensor, logits: Tensor, before: Tensor | None = None) -> None:
        """Write the k best ids of raw logits `[n, vocab]` into the rows of tokens `[n]`, and of their contexts; the
        last occurrence wins.

        Args:
            before: The tokens before each, `[n, order - 1]`, the nearest first, -1 where there is none; None: contexts
                are not learned.
        """
        assert self.ids is not None and self.seen is not None
        if self.ids.device.type == "cpu":
            self._learn_on_host(tokens, logits, before)
            return
        if self.contexts:
            raise ResourceError("a recycling table of contexts is looked up on the host: open it there before learning")
        # A stable sort puts a token's occurrences together in order; a scatter would leave the winner to the device.
        ordered, order = tokens.sort(stable=True)
        last = torch.ones_like(ordered, dtype=torch.bool)
        torch.ne(ordered[1:], ordered[:-1], out=last[:-1])
        rows, pick = ordered[last], order[last]
        best = logits[pick].topk(self.k, dim=-1)
        self.ids[rows] = best.indices.to(self.ids)
        if self.scores is not None:
            self.scores[rows] = best.values.float().softmax(-1).to(self.scores)
        self.seen[rows] = True

    def _learn_on_host(self, tokens: Tensor, logits: Tensor, before: Tensor | None) -> None:
        # A step teaches a few rows, for which numpy takes a fraction of the time. Of equal rows it keeps the last.
        table_ids, table_scores, seen, held = self._on_host
        best = logits.topk(self.k, dim=-1)
        rows = own = tokens.cpu().numpy()
        pick: Any = slice(None)
        if held is not None and before is not None:
            line = np.concatenate([own[:, None], before.numpy()], 1)
            known = np.logical_and.accumulate(line >= 0, 1).T
            keys = ((line + 1) @ self._columns % _PRIME).T
            places = keys % self.contexts
            lengths, pick = known.nonzero()
            longer = lengths > 0
            held[places[known][longer]] = keys[known][longer]
            rows = np.where(longer, self.vocab + places[known], own[pick])
        table_ids[rows], seen[rows] = best.indices.cpu().numpy()[pick], True
        if table_scores is not None:
            table_scores[rows] = best.values.float().softmax(-1).cpu().numpy()[pick]

    @functools.cached_property
    def _powers(self) -> list[int]:
        """What each id of a context is multiplied by, the last id first."""
        return [pow(_BASE, place, _PRIME) for place in range(self.order)]

    @functools.cached_property
    def _columns(self) -> np.ndarray:
        """The powers that the contexts of each length take, `[order, order]`."""
        return np.triu(np.array(self._powers, dtype=np.int64)[:, None].repeat(self.order, 1))

    @functools.cached_property
    def _on_host(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray | None]:
        """`ids`, `scores`, `seen` and `keys` as arrays on the same memory, where the table is on the CPU."""
        assert self.ids is not None and self.seen is not None
        scores = None if self.scores is None else self.scores.numpy()
        return self.ids.numpy(), scores, self.seen.numpy(), None if self.keys is None else self.keys.numpy()

    def copy(self) -> RecyclingTable:
        """A table of its own that starts with what this one holds."""
        other = RecyclingTable(self.k, self.tokenizer, order=self.order, contexts=self.contexts, scored=self.scored)
        with self.lock:
            other.vocab = self.vocab
            other._set({name: tensor.clone() for name, tensor in self._tensors().items()})
        return other

    def save(self, path: str | Path) -> None:
        """Write the table as safetensors, with the tokenizer's name and vocabulary size.

        Raises:
            ResourceError: There is nothing to save, or no place to write it to.
        """
        with self.lock:
            tensors = {name: tensor.detach().cpu().clone() for name, tensor in self._tensors().items()}
        if not tensors:
            raise ResourceError("the recycling table is empty; generate with it before saving it")
        about = {name: getattr(self, name) for name in ("k", "tokenizer", "vocab", "order", "contexts")}
        # A reader, or another writer, never meets half a file.
        path = Path(path).expanduser()
        part = Path(f"{path}.{os.getpid()}-{threading.get_ident()}.part")
        try:
            save_file(tensors, str(part), metadata={"recycling": json.dumps(about)})
            part.replace(path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise ResourceError(f"cannot write a recycling table to {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path, tokenizer: str | None = None) -> RecyclingTable:
        """Read a table.

        Args:
            path: What `save` wrote.
            tokenizer: Name that the table must have been learned with; None: any.

        Raises:
            ResourceError: The file is missing, is no recycling table, or is of another tokenizer.
        """
        try:
            with safe_open(str(Path(path).expanduser()), "pt") as file:
                about = json.loads((file.metadata() or {}).get("recycling", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError, ValueError) as error:
            raise ResourceError(f"cannot read a recycling table from {path}: {error}") from error
        if about is None:
            raise ResourceError(f"{path} is not a recycling table; write one with RecyclingTable.save")
        form = {"order": 1, "contexts": 0} | (about if isinstance(about, dict) else {})
        if not _whole(form, tensors):
            raise ResourceError(f"{path} holds a damaged recycling table; write it anew with RecyclingTable.save")
        if tokenizer is not None and about["tokenizer"] != tokenizer:
            raise ResourceError(f"{path} was learned with tokenizer {about['tokenizer']!r}, not {tokenizer!r}")
        table = cls(
            about["k"], about["tokenizer"], order=form["order"], contexts=form["contexts"], scored="scores" in tensors
        )
        table.vocab = about["vocab"]
        table._set(tensors)
        return table

    def _tensors(self) -> dict[str, Tensor]:
        named = {"ids": self.ids, "seen": self.seen, "scores": self.scores, "keys": self.keys}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _set(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        self.__dict__.pop("_on_host", None)


def _whole(about: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
    """Whether a file's tensors are those that it says they are."""
    if not all(isinstance(about.get(name), int) for name in ("k", "vocab", "order", "contexts")):
        return False
    if about["k"] < 1 or about["order"] < 1 or (about["order"] > 1) != (about["contexts"] > 0):
        return False
    kinds = {"ids": torch.int32, "seen": torch.bool, "keys": torch.int64, "scores": torch.float16}
    if any(tensor.dtype != kinds.get(name) for name, tensor in tensors.items()):
        return False
    rows, shapes = about["vocab"] + about["contexts"], {name: tuple(each.shape) for name, each in tensors.items()}
    wanted = {"ids": (rows, about["k"]), "seen": (rows,)}
    if about["contexts"]:
        wanted["keys"] = (about["contexts"],)
    if "scores" in shapes:
        wanted["scores"] = wanted["ids"]
    fits = shapes == wanted and isinstance(about.get("tokenizer"), str)
    return fits and int(tensors["ids"].min()) >= 0 and int(tensors["ids"].max()) < about["vocab"]


def table_of(
    session: Session, slug: str, path: str | None, k: int, *, order: int = 1, contexts: int = 0, scored: bool = False
) -> RecyclingTable:
    """The table of a call: the resource `table`, else what a file holds, else an empty one.

    A file is where each call starts from; what a call learns stays its own. To go on learning from call to call, hand
    over one table as a resource.

    Raises:
        ResourceError: The table is not of the kind that the method uses, or was learned with another tokenizer.
    """
    table = session.resources.get("table")
    if table is None and path is not None:
        place = Path(path).expanduser()
        place = place / TABLE_FILE if place.is_dir() else place
        table = _loaded(os.path.abspath(place), _stamp(place)).copy()
    if table is None:
        table = RecyclingTable(k, order=order, contexts=contexts, scored=scored)
    wanted = {"k": k, "order": order, "contexts": contexts, "scored": scored}
    if not isinstance(table, RecyclingTable):
        raise ResourceError(f"{slug}: the resource 'table' must be a RecyclingTable, not {type(table).__name__}")
    given = {name: getattr(table, name) for name in wanted}
    if given != wanted:
        say = [", ".join(f"{name}={value}" for name, value in each.items()) for each in (wanted, given)]
        raise ResourceError(
            f"{slug}: the table must be a RecyclingTable with {say[0]}; this one has {say[1]}: make one with the "
            "method's new_table(), or save one that the method has learned with these options"
        )
    _agree(table, session.resources.get("tokenizer"), slug)
    if session.vocab_hint():
        table.fits(session.vocab_hint())
    return table


def _agree(table: RecyclingTable, tokenizer: Any, slug: str) -> None:
    """Refuse a table that was learned with another tokenizer; a new one without a name is named after this one."""
    if not hasattr(tokenizer, "get_vocab"):
        return
    with table.lock:
        if not table.tokenizer:
            if table.ids is None:
                table.tokenizer = vocabulary_name(tokenizer)
            return
    # A name that somebody gave is compared with names, one made from a vocabulary with the vocabulary.
    made = table.tokenizer.startswith(_MADE)
    own = vocabulary_name(tokenizer) if made else str(getattr(tokenizer, "name_or_path", "") or "")
    given = next((name for name in bundled() if own == str(bundled_path(name))), own)
    if own and table.tokenizer not in (own, given):
        raise ResourceError(
            f"{slug}: the recycling table was learned with tokenizer {table.tokenizer!r}, and the call's is {given!r}; "
            "use a table of the same tokenizer, or start with an empty one"
        )


_MADE = "vocabulary "
_names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def vocabulary_name(tokenizer: Any) -> str:
    """A name that is the same for all tokenizers with the same ids, wherever they were loaded from."""
    if tokenizer not in _names:
        words = sorted(tokenizer.get_vocab().items())
        _names[tokenizer] = _MADE + hashlib.sha256(repr(words).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return _names[tokenizer]


@functools.lru_cache(maxsize=8)
def _loaded(path: str, stamp: tuple[int, int]) -> RecyclingTable:
    return RecyclingTable.load(path)


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when a file is written anew."""
    try:
        status = path.stat()
    except OSError as error:
        raise ResourceError(f"cannot read a recycling table from {path}: {error}") from error
    return status.st_mtime_ns, status.st_size
