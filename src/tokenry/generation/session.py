"""One call of generate while it runs: ids, cache, rows of unequal progress, stops, randomness, records.

`Session` runs inside `tokenry.models.attached` and fills a `TokenCache`; `NativeSession` (native.py) runs any causal
model on its own attention. A decoder sees only what is public here.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from tokenry.errors import BadParameter, BadPrompt, CacheMisuse
from tokenry.generation.auxiliary import Auxiliary, listening
from tokenry.generation.result import NO_SOURCE, GenerationResult, Source, Stats, stacked
from tokenry.models import TokenCache
from tokenry.sampling import Noise, is_context_free, is_row_free, likeliest, probabilities, substream

# A batch's cache closes its gaps once they take this share of the longest row, and this many slots.
_GAP_SHARE, _GAP_SLOTS = 0.25, 32
# Raw prompt logits are computed for so many elements at a time (256 MB in float16).
_PROMPT_LOGITS = 2**27
# Ids of a call, those that may still come included (1 GB).
_MOST_IDS = 2**27
# Auxiliary rows behind a prompt need a mask that says who sees whom: it spans so many tokens of the prompt at most.
_PROMPT_BESIDE = 1024


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a call may say beyond transformers' own options; the native door takes it as `tokenry_options`.

    Attributes:
        seed: Sampling depends on it alone; None: on torch's global generator, in transformers' own order.
        stream: Called with each run of new ids as they are committed, then once with None; one row only.
        resources: Second models, tables and the like by name, handed over loaded.
    """

    seed: int | None = None
    stream: Callable[[list[int] | None], None] | None = None
    resources: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not isinstance(self.resources, Mapping):
            raise BadParameter(
                f"resources={self.resources!r} is not allowed; it must be a mapping from names to objects"
            )
        if self.stream is not None and not callable(self.stream):
            raise BadParameter(f"stream={self.stream!r} is not allowed; it must be a function that takes ids")


@dataclass(frozen=True)
class Commit:
    """What a step adds.

    Attributes:
        tokens: `[batch, m]`.
        counts: How many of them each row commits, `[batch]`; what finished rows say is not read.
        sources: `Source` of each, int8 `[batch, m]`, or one for all.
        path: Slots of the open block that hold the tokens' predecessors, `[batch, m]`, the anchor's slot 0 first;
            None: the cache is right already.
        logits: Raw float32 logits that each token was chosen from, `[batch, m, vocab]`; read if `want_logits`.
        scores: Likewise the processed scores; read if `want_scores`.
    """

    tokens: Tensor
    counts: Tensor
    sources: Tensor | Source = Source.PLAIN
    path: Tensor | None = None
    logits: Tensor | None = None
    scores: Tensor | None = None


class Session:
    """The state of one call.

    A row ends where its own end token, length or criterion says, and is padded from there on. transformers' own loop
    pads rows only where the call has an end-of-text id: without one, it lets a row that another criterion has ended run
    on until all rows are done, and what it writes behind that point differs from here.

    Attributes:
        model: The target model.
        config: The call's GenerationConfig.
        cache: Keys and values of everything committed but each row's anchor, its last token.
        batch: Rows.
        vocab: Width of the logits; 0 before the prefill.
        do_sample: Whether tokens are sampled.
        ids: Committed ids, left padding included, `[batch, capacity]`; read columns below `length` only.
        length: Columns that each row has committed, `[batch]`; `lengths` is the same on the host.
        first: Column of each row's first real token, `[batch]`.
        active: Rows that are not finished, bool `[batch]`; `alive` is the same on the host.
        anchor: Each row's last committed token, `[batch]`; not in the cache, except right after the prefill.
        stats: Counts and times so far.
        noise: Randomness by row, position and trial where the call has a seed; None: torch's global generator.
        resources: What the caller handed over, by name.
        want_logits: Whether commits must carry raw logits; `want_scores` likewise for scores.
        on_prompt: Set by a decoder's `start`: called in the prefill with ids `[batch, n]`, validity `[batch, n]` or
            None, and raw logits `[batch, n, vocab]` of consecutive pieces of the prompt.
        beside_prompt: Set by a decoder's `start`: auxiliary rows for the prefill, whose tree is the prompt's last token
            alone. They are left out inside a cache policy, which would take them for tokens.
        want_hidden: Set by a decoder's `start`: whether every forward is to leave its `hidden`.
        hidden: What the head read, or would have read, in the last forward that had auxiliary rows or was to leave
            it: `[batch, n + m, hidden]`, auxiliary rows last; after the prefill n is 1. None before.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        cache: Any,
        mask: Tensor | None,
        covered: int,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        options: Options,
    ) -> None:
        """`mask` is the attention mask `[batch, covered]` or None where nothing is padded; it covers the cached tokens
        too, `input_ids` `[batch, prompt]` may hold all of them or the new ones only."""
        self.model = model
        self.config = config
        self.cache = cache
        self.device = model.device
        self.batch, self.prompt_length = input_ids.shape
        self.vocab = 0
        self.do_sample = bool(config.do_sample)
        self.resources = options.resources
        self.stats = Stats()
        keep = bool(config.return_dict_in_generate)
        self.want_logits = keep and bool(config.output_logits)
        self.want_scores = keep and bool(config.output_scores)
        self.on_prompt: Callable[[Tensor, Tensor | None, Tensor], None] | None = None
        self.beside_prompt: Auxiliary | None = None
        self.want_hidden = False
        self.hidden: Tensor | None = None

        lengths = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
        self.max_length = min([*lengths, config.max_length] if config.max_length else lengths)
        if self.batch * self.max_length > _MOST_IDS:
            raise BadParameter(
                f"{self.batch} rows of up to {self.max_length} tokens are not allowed, because all ids of a call are "
                f"held; lower max_new_tokens or max_length, to at most {_MOST_IDS // self.batch} tokens in all"
            )
        self._eos = {i for c in criteria if type(c) is EosTokenCriteria for i in c.eos_token_id.tolist()}
        known = (EosTokenCriteria, MaxLengthCriteria)
        self._criteria: Any = StoppingCriteriaList(c for c in criteria if type(c) not in known)
        # transformers annotates ids as LongTensor, which no tensor expression is to a type checker.
        self.processors: Any = processors
        self.context_free = all(map(is_context_free, processors))
        self._row_free = all(map(is_row_free, processors))

        self.pad = _pad(config)
        # One column more than can be committed takes what finished rows and cut runs would write.
        self.ids = torch.full((self.batch, self.max_length + 1), self.pad, device=self.device)
        self.ids[:, : self.prompt_length] = input_ids
        self.length = torch.full((self.batch,), self.prompt_length, device=self.device)
        self.lengths = [self.prompt_length] * self.batch
        self.active = torch.ones(self.batch, dtype=torch.bool, device=self.device)
        self.alive = [True] * self.batch
        self.anchor = self.ids[:, self.prompt_length - 1]
        if mask is None:
            self.first = torch.zeros_like(self.length)
        else:
            self.first = mask[:, -self.prompt_length :].int().argmax(1)
        self._mask = mask
        self._covered = covered
        # Rows whose anchor the next forward must cache: the unfinished ones, and once more a row just finished.
        self._carry = self.active
        self._carry_all = True
        self._pending: Tensor | None = None
        # What of the prompt the first verify step reads before its tree, `[1, n]`.
        self._unread: Tensor | None = None
        self._branch = False
        self._aligned = 0

        self.noise = None if options.seed is None else Noise(options.seed, self.device)
        self._rows = list(range(self.batch))
        self._streams = [0] * self.batch
        self._processor_batch = self.batch
        self._stream = options.stream
        if self._stream is not None and self.batch > 1:
            raise BadParameter(f"streaming serves one row, not {self.batch}: stream a single prompt")
        self._sources = torch.full_like(self.ids, NO_SOURCE, dtype=torch.int8) if keep else None
        self._logits: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._counts: list[list[int]] = []

    @property
    def policy(self) -> Any:
        """The cache policy of the call, or None."""
        return getattr(self.cache, "policy", None)

    # What a decoder asks ---------------------------------------------------------------------------
    @property
    def running(self) -> bool:
        """Whether any row is unfinished."""
        return any(self.alive)

    @property
    def has_pending(self) -> bool:
        """Whether logits are at hand without a forward, as right after the prefill."""
        return self._pending is not None

    @property
    def remaining(self) -> Tensor:
        """Tokens that each row may still commit, `[batch]`."""
        return self.max_length - self.length

    def limits(self) -> list[int]:
        """Tokens that each row may commit in the next verify step: what is left of its length, and of the cache's
        room before the next eviction; 0 for finished rows."""
        room = self.cache.room() if isinstance(self.cache, TokenCache) else None
        rooms = [self.max_length] * self.batch if room is None else room.tolist()
        rows = zip(self.alive, self.lengths, rooms, strict=True)
        return [min(self.max_length - length, room) if alive else 0 for alive, length, room in rows]

    def next_logits(self) -> Tensor:
        """Float32 logits `[batch, vocab]` for each row's next token: the pending ones, else of a forward on the anchor,
        which the cache then holds."""
        if self._pending is not None:
            logits, self._pending = self._pending, None
            return logits
        self._count_forward()
        return self._forward_anchor().to(torch.float32, copy=True)

    def verify(
        self,
        tokens: Tensor,
        relation: Tensor | None,
        depth: Tensor,
        valid: Tensor | None = None,
        auxiliary: Auxiliary | None = None,
    ) -> Tensor:
        """Forward a tree whose node 0 is the anchor, and leave its slots open for the next `accept`.

        Args:
            tokens: `[batch, n]`.
            relation: Which node sees which, bool `[1 or batch, n, n]`; None: causal, a chain.
            depth: Depth of each node, `[1 or batch, n]`.
            valid: Which nodes are real, bool `[batch, n]`; None: all.
            auxiliary: Rows beside the tree, whose hidden states come into `hidden`.

        Returns:
            Float32 logits `[batch, n, vocab]`.
        """
        if not self._carry_all:
            real = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
            valid = real & self.active[:, None]
            valid[:, 0] = self._carry
        self._count_forward()
        if self._unread is not None:
            return self._verify_behind_prompt(self._unread, tokens, relation, depth)
        if auxiliary is not None:
            relation = auxiliary.relation(_causal(tokens) if relation is None else relation)
            depth = torch.cat(_alike(depth, auxiliary.depth), 1)
            valid = None if valid is None else torch.nn.functional.pad(valid, (0, auxiliary.count), value=True)
        self.cache.stage(valid, relation, deferred=True)
        if self.batch > 1 or auxiliary is not None:
            # Nodes that a row has no length left for are not accepted; their positions must be ones the model has. So
            # must those of auxiliary rows, of which nothing will come.
            depth = torch.minimum(depth, (self.remaining[:, None] - 1).clamp(min=0))
        logits = self._forward(tokens, self._anchor_positions() + depth, auxiliary)
        return logits.to(torch.float32)

    def _verify_behind_prompt(self, prompt: Tensor, tokens: Tensor, relation: Tensor | None, depth: Tensor) -> Tensor:
        """The same where the prompt `[1, m]` before the anchor is still to be read."""
        start = time.perf_counter()
        length, n = prompt.shape[1], tokens.shape[1]
        if relation is not None:
            seen = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
            seen = torch.nn.functional.pad(seen, (0, n))[None]
            relation = torch.cat([seen, torch.nn.functional.pad(relation, (length, 0), value=True)], 1)
        self.cache.stage(None, relation, deferred=True)
        before = torch.arange(length, device=self.device)[None]
        short = self.on_prompt is None and keeps_logits(self.model)
        options: dict[str, Any] = {"logits_to_keep": n} if short else {}
        logits = self._forward(torch.cat([prompt, tokens], 1), torch.cat([before, length + depth], 1), **options)
        if self.on_prompt is not None:
            # The anchor ends the prompt.
            self.on_prompt(torch.cat([prompt, tokens[:, :1]], 1), None, logits[:, : length + 1])
        logits = logits[:, -n:].to(torch.float32)
        self.vocab = logits.shape[-1]
        self.stats.prefill_seconds = time.perf_counter() - start
        return logits

    def process(self, logits: Tensor, ahead: int = 0) -> Tensor:
        """Scores `[batch, vocab]` of logits `[batch, vocab]`: all processors of the call, in order, over each row's
        committed ids and `ahead` columns more that `look_ahead` wrote."""
        if not self.processors:
            return logits
        first = self._common_length()
        if first is not None and (self._row_free or self._rows == list(range(self._processor_batch))):
            return self.processors(self.ids[:, : first + ahead].contiguous(), logits)
        scores = logits.clone()
        for row in range(self.batch):
            if not self.alive[row]:
                continue
            ids, own = self.ids[row : row + 1, : self.lengths[row] + ahead], logits[row : row + 1]
            if self._row_free:
                scores[row] = self.processors(ids, own)[0]
            else:
                # A processor may know rows by number (left padding, a constraint for each prompt): give it a batch of
                # the usual size, all of it this row, and read the row's own place.
                many = self._processor_batch
                scores[row] = self.processors(ids.repeat(many, 1), own.repeat(many, 1))[self._rows[row]]
        return scores

    def look_ahead(self, tokens: Tensor, column: int) -> None:
        """Write tentative tokens `[batch]` into column `length + column` of every unfinished row, for `process`."""
        place = (self.length + column).clamp(max=self.max_length).masked_fill(~self.active, self.max_length)
        self.ids.scatter_(1, place[:, None], tokens[:, None])

    def choose(self, scores: Tensor, ahead: int = 0) -> Tensor:
        """A token for each row of scores `[batch, vocab]`, `[batch]`: the argmax, or a sample; `ahead` is how many
        tokens lie between the committed ids and this token."""
        if not self.do_sample:
            return likeliest(scores)
        probs = probabilities(scores)
        if self.noise is None:
            return torch.multinomial(probs, num_samples=1).squeeze(1)
        return self.noise.sample(probs, self._rows, self._positions(ahead), self._streams)

    def choose_nodes(self, scores: Tensor, depth: Tensor) -> Tensor:
        """A token for each node of a tree, `[batch, n]`, from scores `[batch, n, vocab]`; depth `[1 or batch, n]`."""
        if not self.do_sample:
            return likeliest(scores)
        probs = probabilities(scores)
        batch, n = scores.shape[:2]
        if self.noise is None:
            return torch.multinomial(probs.flatten(0, 1), num_samples=1).view(batch, n)
        # Nodes of one depth stand for one position, so they share its noise.
        depths = depth.expand(batch, n).flatten().tolist()
        rows = [row for row in range(batch) for _ in range(n)]
        base, row_keys, streams = self._positions(0), self._rows, self._streams
        chosen = self.noise.sample(
            probs.flatten(0, 1),
            [row_keys[row] for row in rows],
            [base[row] + d for row, d in zip(rows, depths, strict=True)],
            [streams[row] for row in rows],
        )
        return chosen.view(batch, n)

    def uniform(self, row: int, ahead: int, count: int) -> list[float]:
        """`count` random numbers in [0, 1) for the decisions at one row's position."""
        if self.noise is None:
            return torch.rand(count, dtype=torch.float64).tolist()
        position = self._positions(ahead)[row]
        return self.noise.uniform(self._rows[row], position, count, self._streams[row])

    # Loop ------------------------------------------------------------------------------------------
    def prefill(self, later: bool = False) -> None:
        """Forward the prompt; its last logits are pending afterwards.

        Args:
            later: Leave a single prompt to the first verify step where that can read it: nothing is pending then.
        """
        start = time.perf_counter()
        if later and self._can_read_later():
            self._unread = self.ids[:, : self.prompt_length - 1]
            self.vocab = self.vocab_hint()
            return
        ids = self.ids[:, : self.prompt_length]
        mask = self._mask
        past = self.cache.get_seq_length()
        if past and self._covered == self.prompt_length:
            # The ids are the whole sequence; otherwise they are only what the cache does not hold.
            ids = ids[:, past:]
        width = ids.shape[1]
        if self.prompt_length == 0:
            raise BadPrompt("the prompt is empty; give at least one token")
        if width == 0:
            raise CacheMisuse("past_key_values holds the whole prompt already: drop its last token with cache.crop(-1)")
        valid = None if mask is None else mask[:, self._covered - width : self._covered].bool()
        chunk = self.config.prefill_chunk_size or width
        learned = width
        if self.on_prompt is not None and self.vocab_hint():
            learned = self._learned()
            # A policy reads the prompt as it comes: of a long one, only the end is learned from.
            if self.policy is None:
                chunk = min(chunk, learned)
        starts = list(range(0, width, chunk))
        beside = self.beside_prompt if self.policy is None else None
        if beside is not None and width - starts[-1] > _PROMPT_BESIDE:
            starts.append(width - _PROMPT_BESIDE)
        for begin, end in zip(starts, [*starts[1:], width], strict=True):
            piece = ids[:, begin:end]
            real = None if valid is None else valid[:, begin:end]
            if real is not None and bool(real.all()):
                real = None
            self._count_forward()
            if beside is not None and end == width:
                logits = self._forward_prompt_beside(piece, real, beside, whole=self.on_prompt is not None)
            else:
                logits = self._forward_prompt(piece, real, 1 if self.on_prompt is None else min(learned, end - begin))
            if self.on_prompt is not None:
                heard = logits.shape[1]
                self.on_prompt(piece[:, -heard:], None if real is None else real[:, -heard:], logits)
        self.vocab = logits.shape[-1]
        self._pending = logits[:, -1].to(torch.float32, copy=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.stats.prefill_seconds = time.perf_counter() - start

    def _can_read_later(self) -> bool:
        """Whether the first verify step can read the prompt: one row, no cache policy, and nobody who waits for it."""
        whole = self.batch == 1 and self._mask is None and self.policy is None and self.cache.get_seq_length() == 0
        waiting = self.beside_prompt is not None or self.want_hidden
        if not whole or waiting or not self.vocab_hint():
            return False
        chunk = self.config.prefill_chunk_size or self.max_length
        return 1 < self.prompt_length <= (chunk if self.on_prompt is None else min(chunk, self._learned()))

    def _learned(self) -> int:
        """Tokens of a prompt whose logits are held at once, to be learned from."""
        return max(64, _PROMPT_LOGITS // (self.batch * self.vocab_hint()))

    def accept(self, commit: Commit) -> None:
        """Commit a step: cut at stops, write ids and records, close the cache's block, stream, count."""
        tokens = commit.tokens
        counts = [
            min(count, self.max_length - length) if alive else 0
            for count, length, alive in zip(commit.counts.tolist(), self.lengths, self.alive, strict=True)
        ]
        host = tokens.tolist()
        ended = [False] * self.batch
        if self._eos:
            for row, count in enumerate(counts):
                for column in range(count):
                    if host[row][column] in self._eos:
                        counts[row], ended[row] = column + 1, True
                        break
        self._write(self.ids, tokens, counts)
        if self._criteria:
            self._check_criteria(commit, counts, ended)
        self._record(commit, counts)
        kept = torch.tensor(counts, device=self.device)
        if commit.path is not None:
            path, slots = commit.path, kept
            if not all(self.alive):
                # A row just finished caches its anchor once more.
                slots = torch.where(self._carry & ~self.active, 1, kept)
            if self._unread is not None:
                read = self._unread.shape[1]
                before = torch.arange(read, device=self.device).expand(self.batch, -1)
                path, slots, self._unread = torch.cat([before, path + read], 1), slots + read, None
            self.cache.commit(path, slots)
        self.length = self.length + kept
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self._carry, self._carry_all = self.active, all(self.alive)
        for row, stop in enumerate(ended):
            if stop or self.lengths[row] >= self.max_length:
                self.alive[row] = False
        if not all(self.alive):
            self.active = torch.tensor(self.alive, device=self.device)
        if self.batch == 1:
            self.anchor = self.ids[:, self.lengths[0] - 1]
        else:
            self.anchor = self.ids.gather(1, self.length[:, None] - 1)[:, 0]
        self._close_gaps()
        if not self._branch:
            self.stats.committed += sum(counts)
            if self._stream is not None and counts[0]:
                self._stream(host[0][: counts[0]])

    def finish(self) -> None:
        """Close the stream and count the cache and the walks."""
        if self._stream is not None:
            self._stream(None)
        self.stats.settle()
        self.stats.kv_bytes = self._kv_bytes()
        self.stats.kv_peak_bytes = max(self.stats.kv_bytes, getattr(self.cache, "peak_nbytes", 0))

    def result(self, cache: Cache | None) -> GenerationResult:
        """The call's result so far, with the given cache in it."""
        width = max(self.lengths)
        sequences = self.ids[:, :width].clone()
        if self.batch > 1:
            behind = torch.arange(width, device=self.device) >= self.length[:, None]
            sequences = sequences.masked_fill(behind, self.pad)
        return GenerationResult(
            sequences=sequences,  # type: ignore[arg-type]
            scores=stacked(self._scores, self._counts, self.batch) if self.want_scores else None,  # type: ignore[arg-type]
            logits=stacked(self._logits, self._counts, self.batch) if self.want_logits else None,  # type: ignore[arg-type]
            past_key_values=cache,
            sources=None if self._sources is None else self._sources[:, :width],
            stats=self.stats,
            prompt_length=self.prompt_length,
        )

    def final_cache(self, given: Cache | None) -> Cache:
        """The cache as plain `generate` leaves it, `length - 1` long; a policy's own cache as it is. What it holds
        also goes into the empty cache that the caller passed, if any."""
        if not isinstance(self.cache, TokenCache) or self.policy is not None or self.cache is given:
            return self.cache
        # Ids may be the new ones alone; the mask covers what was cached before them too.
        columns = self._covered - self.prompt_length + max(self.lengths) - 1
        dynamic = self.cache.to_dynamic(columns, None if self._mask is None else self._mask.bool())
        if type(given) is DynamicCache:
            given.layers = dynamic.layers
            return given
        return dynamic

    # Branches --------------------------------------------------------------------------------------
    def branch(self, rows: Tensor) -> Session:
        """A session of its own that starts from copies of the rows `rows` `[branches]`: for decoders that try several
        continuations. Its commits change nothing here until `adopt`; forwards count here. Branches of one row sample
        independently of each other, of the row itself and of branches that left it at another length.
        """
        child = copy.copy(self)
        child._branch, child._stream, child._sources = True, None, None
        child.want_logits = child.want_scores = False
        child._logits, child._scores, child._counts = [], [], []
        child.cache = self.cache.fork()
        child.cache.select(rows)
        child.batch = rows.shape[0]
        child.ids = self.ids.index_select(0, rows)
        child.first = self.first[rows]
        child.length, child.active = self.length[rows], self.active[rows]
        child.anchor = self.anchor[rows]
        picked = rows.tolist()
        child.lengths, child.alive = [self.lengths[r] for r in picked], [self.alive[r] for r in picked]
        child._carry, child._carry_all = child.active, all(child.alive)
        child._rows = [self._rows[r] for r in picked]
        starts = self._positions(0)
        child._streams = [substream(self._streams[r], starts[r], picked[:i].count(r)) for i, r in enumerate(picked)]
        child._pending = None if self._pending is None else self._pending[rows]
        return child

    def halt(self, rows: Tensor) -> None:
        """Finish rows, bool `[batch]`, without caching their anchor: for branches that have reached their end."""
        self.active = self.active & ~rows
        self.alive = self.active.tolist()
        self._carry, self._carry_all = self._carry & ~rows, False

    def adopt(self, branch: Session, rows: Tensor) -> None:
        """Take over the cache of a branch, row `b` from its row `rows[b]`; commit what those rows gained next."""
        self.cache = branch.cache
        self.cache.select(rows)
        self._pending = None

    # Inside ----------------------------------------------------------------------------------------
    def _common_length(self) -> int | None:
        """The length that all unfinished rows share, or None."""
        lengths = {length for length, alive in zip(self.lengths, self.alive, strict=True) if alive}
        return lengths.pop() if len(lengths) == 1 else None

    def _positions(self, ahead: int) -> list[int]:
        return [length - self.prompt_length + ahead for length in self.lengths]

    def _close_gaps(self) -> None:
        """Realign the cache if rows of unequal progress have left it much longer than the longest of them."""
        if self.batch == 1 or self.policy is not None or not isinstance(self.cache, TokenCache):
            return
        # Padding and what the cache held before count as the row's own.
        longest = max(max(self.lengths) + self._covered - self.prompt_length, self._aligned)
        excess = self.cache.slots.size - longest
        if excess >= _GAP_SLOTS and excess > _GAP_SHARE * longest:
            self.cache.realign()
            self._aligned = self.cache.slots.size

    def _write(self, buffer: Tensor, values: Tensor, counts: list[int]) -> None:
        """Put the first `counts[b]` of values `[batch, m]` behind each row's committed columns of a buffer."""
        if self.batch == 1:
            start = self.lengths[0]
            buffer[0, start : start + counts[0]] = values[0, : counts[0]]
            return
        column = torch.arange(values.shape[1], device=self.device)
        kept = column < torch.tensor(counts, device=self.device)[:, None]
        place = torch.where(kept, self.length[:, None] + column, self.max_length)
        buffer.scatter_(1, place, values)

    def _check_criteria(self, commit: Commit, counts: list[int], ended: list[bool]) -> None:
        """Cut each row at the first prefix where a criterion holds; the ids are written already."""
        common = self._common_length()
        scores: tuple[Tensor, ...] | None = None
        if common is not None and max(counts) <= 1 and all(step.shape[1] == 1 for step in self._scores):
            if self.want_scores:
                scores = tuple(step[:, 0] for step in (*self._scores, _needed(commit.scores, "scores")))
            done = self._criteria(self.ids[:, : common + 1], scores)
            for row, stop in enumerate(done.tolist()):
                ended[row] |= stop and counts[row] > 0
            return
        for row, count in enumerate(counts):
            if self.want_scores and count:
                steps = (*self._scores, _needed(commit.scores, "scores"))
                gained = (*(step[row] for step in self._counts), count)
                scores = tuple(s[row : row + 1, i] for s, n in zip(steps, gained, strict=True) for i in range(n))
            for column in range(count):
                ids = self.ids[row : row + 1, : self.lengths[row] + column + 1]
                past = None if scores is None else scores[: len(scores) - count + column + 1]
                if bool(self._criteria(ids, past).any()):
                    counts[row], ended[row] = column + 1, True
                    break

    def _record(self, commit: Commit, counts: list[int]) -> None:
        stats = self.stats
        if commit.path is not None:
            stats.steps += sum(self.alive)
            stats.verified += sum(counts)
        sources = commit.sources
        if isinstance(sources, Tensor):
            rows = zip(sources.tolist(), counts, strict=True)
            stats.accepted += sum(row[:count].count(Source.DRAFT) for row, count in rows)
        if self._sources is not None:
            if not isinstance(sources, Tensor):
                sources = torch.full_like(commit.tokens, sources)
            self._write(self._sources, sources.to(torch.int8), counts)
        if self.want_logits or self.want_scores:
            self._counts.append(list(counts))
        if self.want_logits:
            self._logits.append(_needed(commit.logits, "logits"))
        if self.want_scores:
            self._scores.append(_needed(commit.scores, "scores"))

    def _count_forward(self) -> None:
        self.stats.forwards += 1
        self.stats.passes += sum(self.alive)

    def vocab_hint(self) -> int:
        """The width that the model's configuration promises for its logits; 0 if it does not say."""
        return int(getattr(self.model.config.get_text_config(decoder=True), "vocab_size", 0) or 0)

    def _kv_bytes(self) -> int:
        return self.cache.nbytes()

    def _forward(
        self, tokens: Tensor, positions: Tensor, auxiliary: Auxiliary | None = None, last: bool = False, **options: Any
    ) -> Tensor:
        """Logits of tokens, of the last of them alone if `last`."""
        inputs: dict[str, Any] = {
            "position_ids": positions, "past_key_values": self.cache, "use_cache": True, "return_dict": True, **options
        }  # fmt: skip
        if auxiliary is None and not self.want_hidden:
            return self.model(input_ids=tokens, **inputs).logits
        n = tokens.shape[1]
        kept = slice(n - 1, n) if last else slice(0, n)
        if auxiliary is None:
            with listening(self.model, kept) as heard:
                logits = self.model(input_ids=tokens, **inputs).logits
        else:
            model: Any = self.model
            embedded = model.get_input_embeddings()(tokens)
            rows = auxiliary.embeddings.to(embedded.dtype).expand(self.batch, -1, -1)
            inputs["inputs_embeds"] = torch.cat([embedded, rows], 1)
            with listening(self.model, kept) as heard, auxiliary.around(n, n + auxiliary.count):
                logits = self.model(**inputs).logits
        assert heard.hidden is not None
        self.hidden = heard.hidden[:, n - 1 :] if last else heard.hidden
        return logits

    def _forward_anchor(self) -> Tensor:
        self.cache.stage(None if self._carry_all else self._carry[:, None])
        return self._forward(self.anchor[:, None], self._anchor_positions())[:, -1]

    def _anchor_positions(self) -> Tensor:
        """Position of each row's anchor, `[batch, 1]`; rows that have cached it may have no position left after it."""
        seen = self.cache.seen[:, None]
        return seen if self._carry_all else seen - (~self._carry[:, None]).long()

    def _forward_prompt(self, ids: Tensor, valid: Tensor | None, count: int) -> Tensor:
        """Logits of at least the last `count` tokens of a piece of the prompt."""
        positions = self._prompt_positions(ids, valid)
        self.cache.stage(valid)
        short = count < ids.shape[1] and not self.want_hidden and keeps_logits(self.model)
        options: dict[str, Any] = {"logits_to_keep": count} if short else {}
        return self._forward(ids, positions, last=self.want_hidden and count == 1, **options)

    def _forward_prompt_beside(self, ids: Tensor, valid: Tensor | None, beside: Auxiliary, whole: bool) -> Tensor:
        """The end of a prompt with auxiliary rows behind its last token, which the cache gives up again."""
        real = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        among = _causal(ids) & real[:, None, :]
        rows = replace(beside, nodes=beside.nodes & real[:, None, :])
        positions = self._prompt_positions(ids, valid)
        after = (positions[:, -1:] + beside.depth).clamp(max=self.max_length - 1)
        # Validity is spelled out so that the cache keeps account of it when the rows go.
        self.cache.stage(torch.nn.functional.pad(real, (0, beside.count), value=True), rows.relation(among))
        logits = self._forward(ids, torch.cat([positions, after], 1), rows, last=not whole)
        if whole:
            assert self.hidden is not None
            self.hidden = self.hidden[:, ids.shape[1] - 1 :]
        self.cache.crop(-beside.count)
        self.cache.compact()
        return logits

    def _prompt_positions(self, ids: Tensor, valid: Tensor | None) -> Tensor:
        start = self.cache.seen[:, None] if self.cache.batch else 0
        if valid is None:
            positions = torch.arange(ids.shape[1], device=self.device)[None] + start
        else:
            positions = (valid.long().cumsum(-1) - 1).clamp(min=0) + start
        return positions.expand(self.batch, -1)


def is_integer(given: Any) -> bool:
    """Whether it is a whole number, and no truth value."""
    return isinstance(given, Integral) and not isinstance(given, bool)


def check_seed(seed: Any) -> None:
    """Refuse a seed that is neither an integer nor None."""
    if seed is not None and not is_integer(seed):
        raise BadParameter(f"seed={seed!r} is not allowed; it must be an integer or None")


def keeps_logits(model: PreTrainedModel) -> bool:
    """Whether the model's forward can leave out logits that are not needed."""
    return "logits_to_keep" in _forward_parameters(type(model))


def _causal(tokens: Tensor) -> Tensor:
    n = tokens.shape[1]
    return torch.ones(1, n, n, dtype=torch.bool, device=tokens.device).tril()


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both `[batch, ...]`, where each is `[1 or batch, ...]`."""
    batch = max(one.shape[0], other.shape[0])
    return one.expand(batch, -1), other.expand(batch, -1)


def _forward_parameters(cls: type[PreTrainedModel]) -> frozenset[str]:
    import inspect

    return frozenset(inspect.signature(cls.forward).parameters)


def _pad(config: GenerationConfig) -> int:
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    eos = config.eos_token_id
    if eos is None:
        return 0
    return int(eos[0] if isinstance(eos, list) else eos)


def _needed(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise BadParameter(f"the decoder does not give {name}: call generate without output_{name}")
    return tensor
