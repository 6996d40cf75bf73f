"""Byte by byte through the token loop: prompts may end within a token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from tokenry.decoding.byte_view.covers import Covers, Row
from tokenry.errors import BadParameter, CacheMisuse, ResourceError
from tokenry.generation.engine import Commit, Decoder, Options, Session
from tokenry.generation.result import GenerationResult, Source
from tokenry.models import compat
from tokenry.sampling import Noise
from tokenry.vocabulary import ByteVocabulary

_KEEPS = "exact-byte-probabilities: the caller keeps the cache"


@dataclass(frozen=True, kw_only=True)
class ExactByteProbabilities(Decoder):
    """Generate from the model's exact next-byte probabilities, so that a prompt may end within a token.

    Exact Byte-Level Probabilities from Tokenized Language Models, arXiv 2410.09303. The last tokens of a prompt are
    taken for the bytes they spell, and all token sequences that begin with these bytes are weighed. Temperature, top-p
    and other processors act on the tokens that begin behind the prompt, whose byte view is then exact; a token that
    begins within it has the model's own probability. The authors apply temperature and top-p to bytes, as
    `ByteEnsemble` does.

    The new ids of a result spell the new text; where a token reaches back into the prompt, ids that spell its rest
    stand for it, `stats.extra["healed"]` names the row, and the result has no `past_key_values`, because the model read
    other ids. `stats.extra["bytes"]` counts the new bytes that were chosen, all rows.

    Args:
        unit: What is chosen at a time. ``"byte"``: one byte, a forward for each. ``"token"``: one of the covers of the
            prompt, by its probability, and tokens from there on: a forward for each token. Sampling gives both the same
            distribution of texts, but for sequences that no tokenizer makes, of which ``"byte"`` follows one alone.
        paths: ``"fast"``, the authors' choice: the prompt's covers are canonical, and no token is checked afterwards.
            ``"canonical"``: the model's probabilities are renormalised over canonical sequences at every token.
        prune: Covers whose share of probability falls below this are dropped, and their forwards saved; 0: none.
    """

    inner: ClassVar[tuple[str, ...]] = (_KEEPS,)

    unit: Literal["byte", "token"] = "byte"
    paths: Literal["fast", "canonical"] = "fast"
    prune: float = 0.0

    def validate(self) -> None:
        self.check("prune", "at least 0 and below 1", 0 <= self.prune < 1)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        tokenry_options: Options | None = None,
        **model_kwargs: Any,
    ) -> GenerationResult | Tensor:
        options = Options() if tokenry_options is None else tokenry_options
        if isinstance(options, Options) and compat.is_callers(model_kwargs.get("past_key_values")):
            options = dataclasses.replace(options, resources={**options.resources, _KEEPS: True})
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config, options)
        result = super().__call__(model, *arguments, **model_kwargs)
        if isinstance(result, GenerationResult) and result.stats is not None and result.stats.extra["healed"]:
            result.past_key_values = None
        return result

    def start(self, session: Session) -> _State:
        session.stats.extra.update(bytes=0, healed=[])
        vocabulary = ByteVocabulary.of(_tokenizer(session))
        vocabulary.check_canonical()
        return _State(vocabulary)

    def step(self, session: Session, state: _State) -> Commit:
        if state.covers is None:
            self._begin(session, state)
        found: list[list[tuple[int, Any]]] = [[] for _ in range(session.batch)]
        while not any(found):
            self._round(session, state, found)
        longest = max(map(len, found))
        tokens = torch.tensor([[n for n, _ in own] + [0] * (longest - len(own)) for own in found])
        counts = torch.tensor([len(own) for own in found])
        logits, scores = (_stacked(found, longest, session, which) for which in (0, 1))
        return Commit(
            tokens.to(session.device),
            counts.to(session.device),
            Source.PLAIN,
            logits=logits if session.want_logits else None,
            scores=scores if session.want_scores else None,
        )

    def _begin(self, session: Session, state: _State) -> None:
        """Take back the ends of the prompts that are not settled, and weigh what else spells them."""
        vocabulary = state.vocabulary
        starts = session.first.tolist()
        prompts = [session.ids[r, starts[r] : session.prompt_length].tolist() for r in range(session.batch)]
        settled = [vocabulary.settled(prompt) for prompt in prompts]
        back = max(len(prompt) - count for prompt, (count, _) in zip(prompts, settled, strict=True))
        # The last settled token is taken back too: its logits tell what comes next.
        back += bool(back)
        rows = []
        for prompt, (count, window) in zip(prompts, settled, strict=True):
            rows.append(Row(vocabulary, prompt[:count], count - max(len(prompt) - back, 0), window, self.paths))
            rows[-1].active = session.alive[len(rows) - 1]
        state.prompts = prompts
        state.given = [len(vocabulary.spelled(p[count:])) for p, (count, _) in zip(prompts, settled, strict=True)]
        state.reported = [count for count, _ in settled]
        state.queues = [[] for _ in rows]
        state.chosen = [0] * len(rows)
        if session.noise is not None:
            # Bytes are counted otherwise than the session counts tokens.
            state.noise = Noise(session.noise.seed, session.device)
        pads = [session.ids[r, : starts[r]].tolist() for r in range(session.batch)]
        process = _processing(session, pads) if session.processors else None
        covers = Covers(session.model, vocabulary, rows, session.cache, prune=self.prune, process=process)
        covers.want_raw = session.want_logits or session.want_scores
        state.covers = covers
        if not back:
            for number, logits in enumerate(session.next_logits()):
                covers.give(number, rows[number].covers[0].prefix, logits)
            return
        if session.resources.get(_KEEPS):
            raise BadParameter(
                f"{self.slug}: past_key_values is not allowed with a prompt that may end within a token, because the "
                "model reads other ids than the result has; leave it out"
            )
        session.next_logits()
        try:
            session.cache.crop(-back)
        except CacheMisuse as error:
            raise BadParameter(
                f"{self.slug} takes back the end of a prompt that may end within a token, and {session.policy} has "
                "dropped tokens already: give the policy a budget above the whole text, or end the prompt on a whole "
                "word"
            ) from error
        wanted = []
        for row, given in zip(rows, state.given, strict=True):
            row.given = given
        for row, prompt, (count, _) in zip(rows, prompts, settled, strict=True):
            own, _ = row.feed(vocabulary.spelled(prompt[count:]))
            wanted.append(own + [prefix for prefix in row.unasked() if prefix not in own])
        self._ask(session, covers, wanted)
        for number in range(session.batch):
            covers.drop(number)

    def _ask(self, session: Session, covers: Covers, wanted: Sequence[Any] | None = None) -> None:
        before = covers.asked
        covers.ask(wanted)
        if covers.asked > before:
            session.stats.forwards += 1
            session.stats.passes += sum(session.alive)

    def _round(self, session: Session, state: _State, found: list[list[tuple[int, Any]]]) -> None:
        """Choose once in every unfinished row, and find out which tokens that settles."""
        covers = state.covers
        assert covers is not None
        for number, row in enumerate(covers.rows):
            if row.active and not session.alive[number]:
                # A finished row's last token is cached with the next forward, and nothing behind it.
                row.active = False
                row.read = row.read[: state.reported[number]]
                row.uncached = min(row.uncached, 1)
        self._ask(session, covers)
        most = [1] * len(covers.rows)
        for number, row in enumerate(covers.rows):
            if not row.active:
                continue
            self._choose(session, state, number)
            state.queues[number] += row.settle()
            cached = len(row.read) - row.uncached
            most[number] = state.reported[number] + state.until_seen(number) - 1 - cached
        covers.close(most)
        for number, row in enumerate(covers.rows):
            if row.active:
                target = len(row.read) - row.uncached + bool(row.uncached)
                while state.reported[number] < target and not found[number]:
                    found[number] = state.report(session, number)

    def _choose(self, session: Session, state: _State, number: int) -> None:
        covers = state.covers
        assert covers is not None
        row = covers.rows[number]
        before = len(row.text)
        if self.unit == "byte":
            outcome = self._pick(session, state, number, covers.outcome(number))
            if outcome < 256:
                row.append(outcome)
            else:
                column = len(covers.vocabulary) + outcome - 256
                ends = [cover for cover in row.covers if row.is_end(cover)]
                logs = torch.stack([log[column] for log in covers.weights(number, ends)])
                row.take(ends[int(logs.argmax())], column, covers.vocabulary.symbols[outcome - 256])
        else:
            weights = covers.weights(number)
            place = self._pick(session, state, number, torch.cat(weights))
            which = 0
            while place >= len(weights[which]):
                place -= len(weights[which])
                which += 1
            cover = row.covers[which]
            column = place if row.is_end(cover) else cover.low + place
            row.take(cover, column, covers.number(column))
        covers.drop(number)
        session.stats.extra["bytes"] += len(row.text) - before

    def _pick(self, session: Session, state: _State, number: int, logs: Tensor) -> int:
        if not session.do_sample:
            return int(logs.argmax())
        probs = logs.softmax(-1)
        if state.noise is None:
            return int(torch.multinomial(probs, 1))
        state.chosen[number] += 1
        return int(state.noise.sample(probs[None], [number], [state.chosen[number]], [0]))


class _State:
    """The covers of one call, and what of their settled tokens the session was told.

    Attributes:
        given: For each row the bytes of its prompt that are still to be spelled.
        reported: For each row how many of its settled tokens were reported, or are the prompt's own.
        queues: The others.
    """

    def __init__(self, vocabulary: ByteVocabulary) -> None:
        self.vocabulary = vocabulary
        self.covers: Covers | None = None
        self.noise: Noise | None = None
        self.prompts: list[list[int]] = []
        self.given: list[int] = []
        self.reported: list[int] = []
        self.queues: list[list[tuple[int, Any]]] = []
        self.chosen: list[int] = []

    def until_seen(self, number: int) -> int:
        """How many settled tokens it takes until one of them shows in the result; all, if none does."""
        given = self.given[number]
        for count, (token, _) in enumerate(self.queues[number], 1):
            given -= len(self.vocabulary.bytes_of[token])
            if given < 0 or token not in self.vocabulary.place_of:
                return count
        return len(self.queues[number])

    def report(self, session: Session, number: int) -> list[tuple[int, Any]]:
        """The ids that stand in the result for a row's next settled token: none where it spells the prompt's end."""
        token, raw = self.queues[number].pop(0)
        self.reported[number] += 1
        spelled = self.vocabulary.bytes_of[token]
        given = self.given[number]
        if given:
            self.given[number] = max(0, given - len(spelled))
            healed = session.stats.extra["healed"]
            own = self.prompts[number]
            place = self.reported[number] - 1
            if number not in healed and (place >= len(own) or own[place] != token):
                healed.append(number)
            return [(part, raw) for part in self.vocabulary.spell(spelled[given:])]
        return [(token, raw)]


def _stacked(found: list[list[tuple[int, Any]]], longest: int, session: Session, which: int) -> Tensor | None:
    """Logits or scores of the tokens of each row, float32 `[batch, longest, vocab]`."""
    if not (session.want_logits or session.want_scores):
        return None
    stacked = torch.zeros(len(found), longest, session.vocab, device=session.device)
    for number, own in enumerate(found):
        for place, (_, raw) in enumerate(own):
            stacked[number, place] = raw[which].float()
    return stacked


def _processing(session: Session, pads: list[list[int]]) -> Any:
    def process(number: int, ids: Sequence[int], logits: Tensor) -> Tensor:
        if session.context_free:
            return session.processors(session.ids[:1, :1], logits[None].clone())[0]
        # A processor may know rows by number: give it a batch of the usual size, all of it this row.
        whole = torch.tensor([[*pads[number], *ids]], device=session.device).expand(session.batch, -1).contiguous()
        return session.processors(whole, logits[None].repeat(session.batch, 1))[number]

    return process


def _tokenizer(session: Session) -> Any:
    given = session.resources.get("tokenizer")
    if given is not None:
        return given
    from transformers import AutoTokenizer

    name = session.model.name_or_path or ""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ResourceError(
            f"exact-byte-probabilities reads bytes from the tokenizer, and none loads from {name!r}: use "
            'tokenry.generate, or pass tokenry_options=Options(resources={"tokenizer": tokenizer})'
        ) from error
