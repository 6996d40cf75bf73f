"""The drafter: the next tokens from the state of the last token but one, for the target to verify or to believe."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenry.errors import BadParameter, ResourceError
from tokenry.generation.engine import Commit, Session
from tokenry.generation.result import Source
from tokenry.models import loaded_name, trained_folder
from tokenry.sampling import probabilities
from tokenry.speculation.companion import Draws
from tokenry.speculation.engine import Drafter, DraftTree, TreeShape, Walk
from tokenry.speculation.future_token_prediction.model import FTPConfig, FTPDecoder, FTPForCausalLM, FTPHead


@functools.lru_cache(maxsize=4)
def _loaded(folder: Path, stamp: int, dtype: torch.dtype, device: torch.device) -> FTPDecoder:
    config = FTPConfig.from_pretrained(folder)
    if "FTPDecoder" not in (config.architectures or ()):
        raise ResourceError(
            f"{str(folder)!r} holds a {', '.join(config.architectures or ['model'])} and no future decoder alone; a "
            "whole FTPForCausalLM is loaded as the model, and drafts for itself without weights"
        )
    decoder: Any = FTPDecoder.from_pretrained(folder, dtype=dtype)
    return decoder.to(device).eval()


def load_decoder(place: str, dtype: torch.dtype, device: torch.device) -> FTPDecoder:
    """The decoder in a folder, read once as long as its files stay.

    Raises:
        ResourceError: The folder holds none, or a whole model.
    """
    folder = Path(place).expanduser().absolute()
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ResourceError(f"no future decoder in {place!r}: train one with tokenry train ftp --out FOLDER")
    try:
        return _loaded(folder, weights.stat().st_mtime_ns, dtype, device)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, ResourceError):
            raise
        first = str(error).strip().split("\n")[0]
        raise ResourceError(f"cannot load a future decoder from {place!r}: {first}") from error


@dataclass
class _State:
    decoder: FTPDecoder
    embed: nn.Module
    head: nn.Module
    size: int
    draws: Draws
    hidden: Tensor | None = None
    logits: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class FutureTokenPrediction(Drafter):
    """Draft with a small decoder that sees one state vector of the target, and nothing else of the past.

    The target is an `FTPForCausalLM`, whose own decoder drafts for it, or any model with a decoder that was trained on
    its states (`tokenry train ftp`). The state is the last layer's, after the final norm, of the token before the
    anchor; the anchor is its offset 1, known already, so a decoder of N tokens drafts N - 1. The target verifies them:
    its output is plain's. Source: Future Token Prediction, arXiv 2410.18160; drafting is an addition, and so is a
    decoder for a pre-trained model.

    Attributes:
        weights: Folder of a trained `FTPDecoder`; None: the resource `weights`, the target's own, or the folder where
            `tokenry train ftp` puts what it trains for the model.
        tokens_per_step: Most tokens that a step commits, drafts and the target's own; None: N.
        choice: How drafts are chosen when the call samples, from the decoder's distribution under the call's own
            processors. `auto`: drawn from it and verified by the ratio test, or with a seed, drawn with the target's
            own noise, so that the seed gives plain's tokens. `sampled`: always the first. `top`: its likeliest tokens.
            Greedy decoding always drafts the likeliest.
        lossless: False commits the drafts unverified, chosen as the call chooses tokens. This is another model, with
            p(next tokens | state) for each block, whose quality must be measured as such; it costs one pass of the
            target for each `tokens_per_step` tokens. Results say so in `stats.extra["lossless"]`; the decoder's tokens
            have the source `router`, as nothing verified them.
    """

    resources: ClassVar[tuple[str, ...]] = ("weights",)

    weights: str | None = None
    tokens_per_step: int | None = None
    choice: Literal["auto", "sampled", "top"] = "auto"
    lossless: bool = True

    def validate(self) -> None:
        self.check("tokens_per_step", "none or at least 1", self.tokens_per_step is None or self.tokens_per_step >= 1)
        usual = self.lossless or self.choice == "auto"
        self.check("choice", "auto", usual, why="tokens that are not verified are chosen as the call chooses them")

    def start(self, session: Session) -> _State:
        session.want_hidden = True
        session.stats.extra["lossless"] = self.lossless
        decoder = self._decoder(session)
        most = decoder.config.num_future_tokens
        size = most if self.tokens_per_step is None else self.tokens_per_step
        if size > most:
            raise BadParameter(
                f"{self.slug}: tokens_per_step={size} is not allowed; this decoder knows {most} future tokens"
            )
        return _State(decoder, *_ends(session.model), size, Draws(session, self.choice))

    def _decoder(self, session: Session) -> FTPDecoder:
        model: PreTrainedModel = session.model
        decoder = session.resources.get("weights")
        if decoder is None and self.weights is not None:
            decoder = load_decoder(self.weights, model.dtype, model.device)
        if decoder is None and isinstance(model, FTPForCausalLM):
            decoder = model.future
        place = trained_folder("ftp", loaded_name(model))
        if decoder is None and place.is_dir():
            decoder = load_decoder(str(place), model.dtype, model.device)
        if not isinstance(decoder, FTPDecoder):
            raise ResourceError(
                f"{self.slug} needs a decoder trained on the states of {type(model).__name__}: train one with tokenry "
                f"train ftp and name its folder, {self.slug}:weights=FOLDER, or hand it over as the resource 'weights'"
            )
        if (decoder.dtype, decoder.device) != (model.dtype, model.device):
            raise ResourceError(
                f"{self.slug}: the decoder is in {decoder.dtype} on {decoder.device} and the model in {model.dtype} on "
                f"{model.device}; move it with .to(model.device, model.dtype)"
            )
        embed, head = _ends(model)
        shape, trained = tuple(head.weight.shape), (_vocab(decoder), decoder.config.width)
        if shape != trained or embed.embedding_dim != shape[1]:
            raise ResourceError(
                f"{self.slug}: the decoder was trained for a model of {trained[0]} tokens and width {trained[1]}, and "
                f"{type(model).__name__} has {shape[0]} and {shape[1]}; use one that was trained on this model"
            )
        return decoder

    def propose(self, session: Session, state: _State, room: int) -> DraftTree:
        count = min(state.size - 1, room)
        state.logits, state.scores = [], []
        if count == 0 or state.hidden is None:
            return DraftTree.root(session.anchor)
        decoder, embed = state.decoder, state.embed
        before = session.ids.gather(1, session.length[:, None] - 2)[:, 0]
        inputs = torch.cat([decoder.first(embed(before)), embed(session.anchor)[:, None]], 1)
        memory, past = decoder.remember(state.hidden), None
        tokens, q = [session.anchor], []
        for ahead in range(count):
            hidden, past = decoder(inputs, memory, past)
            logits = state.head(hidden[:, -1])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            scores = _processed(session, logits, ahead)
            if self.lossless:
                q.append(probabilities(scores))
                token = state.draws.order(session, q[-1][:, None], ahead, 1)[0][:, 0, 0]
            else:
                token = session.choose(scores, ahead)
                state.logits.append(logits)
                state.scores.append(scores)
            if not session.context_free:
                session.look_ahead(token, ahead)
            tokens.append(token)
            inputs = embed(token)[:, None]
        shape = TreeShape.chain(count + 1, session.device)
        if not (self.lossless and state.draws.sampled):
            return DraftTree(torch.stack(tokens, 1), shape)
        # The last draft has no children.
        return DraftTree(torch.stack(tokens, 1), shape, q=torch.stack([*q, torch.zeros_like(q[0])], 1))

    def observe(self, session: Session, state: _State, tree: DraftTree, logits: Tensor, walk: Walk) -> None:
        self._look(session, state, walk.path.gather(1, walk.counts[:, None] - 1))

    def step(self, session: Session, state: _State) -> Commit:
        if session.has_pending:
            self._look(session, state, torch.zeros_like(session.anchor)[:, None])
        if self.lossless or session.has_pending:
            return super().step(session, state)
        return self._believe(session, state)

    @staticmethod
    def _look(session: Session, state: _State, node: Tensor) -> None:
        """Keep the states of nodes `[batch, 1]` of the last forward."""
        assert session.hidden is not None
        width = state.decoder.config.width
        state.hidden = session.hidden[..., :width].gather(1, node[..., None].expand(-1, -1, width))[:, 0]

    def _believe(self, session: Session, state: _State) -> Commit:
        """Commit a block of drafts as they are, and the target's token behind them."""
        room = min(limit for limit, alive in zip(session.limits(), session.alive, strict=True) if alive) - 1
        tree = self.propose(session, state, room)
        size = tree.shape.size
        logits = session.verify(tree.tokens, None, tree.shape.depth)[:, -1]
        scores = session.process(logits, size - 1)
        last = session.choose(scores, size - 1)
        self._look(session, state, torch.full_like(last, size - 1)[:, None])
        sources = torch.full_like(tree.tokens, int(Source.ROUTER), dtype=torch.int8)
        sources[:, -1] = int(Source.PLAIN)
        return Commit(
            torch.cat([tree.tokens[:, 1:], last[:, None]], 1),
            torch.full_like(last, size),
            sources,
            path=torch.arange(size, device=session.device).expand(session.batch, -1),
            logits=torch.stack([*state.logits, logits], 1) if session.want_logits else None,
            scores=torch.stack([*state.scores, scores], 1) if session.want_scores else None,
        )


def _ends(model: PreTrainedModel) -> tuple[Any, Any]:
    """Token embedding, and the matrix from states to logits."""
    head: Any = model.get_output_embeddings()
    return model.get_input_embeddings(), head.matrix() if isinstance(head, FTPHead) else head


def _vocab(decoder: FTPDecoder) -> int:
    text: Any = decoder.config.get_text_config()
    return text.vocab_size


def _processed(session: Session, logits: Tensor, ahead: int) -> Tensor:
    """Scores `[batch, vocab]` of drafts, as the target's are processed."""
    if session.processors and session.context_free:
        # They read no ids, so rows of unequal length go in one call.
        return session.processors(session.anchor[:, None], logits)
    return session.process(logits, ahead)
