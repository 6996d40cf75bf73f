"""The model: a causal encoder whose one state vector at each position must decode the next N tokens."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from tokenry.errors import BadParameter, UnsupportedModel

IGNORED = -100
# Positions whose memories are held at a time.
_ROWS = 4096

Pair = tuple[Tensor, Tensor]
Past = tuple[int, list[Pair]]


class FTPConfig(PreTrainedConfig):
    """Configuration of a future token prediction model, or of its decoder alone. Source: arXiv 2410.18160.

    Attributes:
        encoder_config: The causal body that makes the state vectors: any decoder that `AutoModel` builds.
        num_future_tokens: Tokens that one state vector must decode, N.
        pseudo_len: Pseudo-positions that a state vector is expanded to, P.
        decoder_layers: Layers of the decoder. With 0 it is bypassed: the j-th pseudo-position is the state of offset j.
        decoder_heads: Its attention heads; None: as many as the encoder has.
        gamma: Weight of an offset's loss relative to the offset before it.
        positions_per_sequence: Positions drawn from each row at a training step; None: all.
        start: First input of the decoder: a learned vector (`bos`), so that the state is all it knows of the past, or
            the embedding of the position's own token (`token`).
        initializer_range: Standard deviation of new weights.
        tie_word_embeddings: Whether the head is the encoder's input embedding.
    """

    model_type = "future-token-prediction"

    encoder_config: dict[str, Any] | PreTrainedConfig | None = None
    num_future_tokens: int = 8
    pseudo_len: int = 12
    decoder_layers: int = 3
    decoder_heads: int | None = None
    gamma: float = 0.8
    positions_per_sequence: int | None = 128
    start: str = "bos"
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.encoder_config
        if isinstance(given, dict):
            self.encoder_config = AutoConfig.for_model(**given)
        elif given is not None:
            # The attention that a loaded model runs on is switched in its configuration, which must stay its own.
            self.encoder_config = copy.deepcopy(given)
        for name, allowed, ok in (
            ("num_future_tokens", "at least 1", self.num_future_tokens >= 1),
            ("pseudo_len", "at least 1", self.pseudo_len >= 1),
            ("decoder_layers", "0 or more", self.decoder_layers >= 0),
            ("gamma", "from 0 to 1", 0 <= self.gamma <= 1),
            (
                "positions_per_sequence",
                "none or at least 1",
                self.positions_per_sequence is None or self.positions_per_sequence >= 1,
            ),
            ("start", "bos or token", self.start in ("bos", "token")),
        ):
            if not ok:
                raise BadParameter(f"FTPConfig: {name}={getattr(self, name)!r} is not allowed; it must be {allowed}")
        if self.decoder_layers == 0 and self.pseudo_len != self.num_future_tokens:
            raise BadParameter(
                f"FTPConfig: pseudo_len={self.pseudo_len} is not allowed; without decoder layers it must be "
                f"num_future_tokens={self.num_future_tokens}, because each offset is read from a position of its own"
            )
        super().__post_init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The encoder's configuration: the one whose layers fill the key-value cache."""
        encoder: Any = self.encoder_config
        return self if encoder is None else encoder.get_text_config(decoder=True)

    @property
    def width(self) -> int:
        """Size of the token embeddings and so of the state vectors."""
        text: Any = self.get_text_config()
        return getattr(text, "word_embed_proj_dim", None) or text.hidden_size


class FTPDecoderLayer(nn.Module):
    """Causal attention over the future tokens, attention over the memory, feed-forward; normalised before each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.own_norm, self.own = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.own_out = nn.Linear(width, width)
        self.memory_norm, self.query = nn.LayerNorm(width), nn.Linear(width, width)
        self.key_value, self.memory_out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.feed_norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def remember(self, slots: Tensor) -> Pair:
        """Keys and values of a memory `[rows, P, width]`."""
        keys, values = self.key_value(slots).chunk(2, -1)
        return self._split(keys), self._split(values)

    def forward(self, hidden: Tensor, memory: Pair, past: Pair | None) -> tuple[Tensor, Pair]:
        query, key, value = (self._split(part) for part in self.own(self.own_norm(hidden)).chunk(3, -1))
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=past is None)
        hidden = hidden + self.own_out(self._join(seen))
        query = self._split(self.query(self.memory_norm(hidden)))
        hidden = hidden + self.memory_out(self._join(F.scaled_dot_product_attention(query, *memory)))
        return hidden + self.down(F.gelu(self.up(self.feed_norm(hidden)))), (key, value)

    def _split(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _join(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).flatten(2)


class FTPDecoder(PreTrainedModel):
    """Decodes the next N tokens from one state vector, which is the only past that it sees.

    A state vector is expanded linearly to P pseudo-positions; the decoder generates from that memory alone. Token
    embeddings and head are the language model's. Saved alone, it drafts for the model whose states it was trained on.
    """

    config_class = FTPConfig
    base_model_prefix = "future"
    main_input_name = "inputs"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: FTPConfig) -> None:
        super().__init__(config)
        width, text = config.width, config.get_text_config()
        heads = config.decoder_heads or text.num_attention_heads
        if width % heads:
            raise BadParameter(
                f"FTPConfig: {heads} decoder heads do not divide the width {width}; set decoder_heads to one that does"
            )
        self.expand = nn.Linear(width, config.pseudo_len * width)
        self.slots = nn.Parameter(torch.empty(config.pseudo_len, width))
        self.start = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(config.num_future_tokens, width))
        self.layers = nn.ModuleList(FTPDecoderLayer(width, heads) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width) if config.decoder_layers else nn.Identity()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FTPDecoder):
            for table in (module.slots, module.start, module.positions):
                nn.init.normal_(table, std=self.config.initializer_range)

    def first(self, tokens: Tensor) -> Tensor:
        """First input of the decoder at positions whose tokens are embedded as `[rows, width]`, `[rows, 1, width]`."""
        given = tokens if self.config.start == "token" else self.start.expand_as(tokens)
        return given[:, None]

    def remember(self, states: Tensor) -> list[Pair]:
        """The memory of state vectors `[rows, width]`: for each layer keys and values `[rows, heads, P, head_dim]`;
        without layers the pseudo-positions `[rows, P, width]` twice."""
        slots = self.expand(states).unflatten(-1, self.slots.shape) + self.slots
        return [layer.remember(slots) for layer in self.layers] or [(slots, slots)]  # type: ignore[operator]

    def forward(self, inputs: Tensor, memory: list[Pair], past: Past | None = None) -> tuple[Tensor, Past]:
        """Decode `m` offsets after those in `past`.

        Args:
            inputs: `[rows, m, width]`: what `first` gives for offset 1, the embedding of the token at offset j - 1 for
                offset j.
            memory: What `remember` gives.
            past: What the call before returned.

        Returns:
            States for the head `[rows, m, width]`, and the past of the next call.
        """
        begin, kept = past or (0, [])
        end = begin + inputs.shape[1]
        if not self.layers:
            return memory[0][0][:, begin:end], (end, [])
        hidden = inputs + self.positions[begin:end]
        new: list[Pair] = []
        for number, layer in enumerate(self.layers):
            hidden, pair = layer(hidden, memory[number], kept[number] if kept else None)
            new.append(pair)
        return self.norm(hidden), (end, new)


class FTPHead(nn.Linear):
    """The head: from state vectors to logits of offset 1, through the decoder and one matrix `[vocab, width]`.

    What it reads are state vectors `[..., width]`, followed by the embedding of the position's token where that starts
    the decoder. A model's head is where Tokenry's loop reads states, so the drafter finds them there.
    """

    def __init__(self, decoder: FTPDecoder, vocab: int) -> None:
        super().__init__(decoder.config.width, vocab, bias=False)
        self.decoder = decoder

    def matrix(self) -> nn.Linear:
        """The matrix alone, for the decoder's own states."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = self.weight
        return plain

    def reads(self, states: Tensor, tokens: Tensor) -> Tensor:
        """What it is called with, of state vectors and token embeddings `[..., width]`."""
        return torch.cat([states, tokens], -1) if self.decoder.config.start == "token" else states

    def forward(self, read: Tensor) -> Tensor:
        states, tokens = read[..., : self.in_features], read[..., -self.in_features :]
        parts = [
            self.decoder(self.decoder.first(own), self.decoder.remember(part))[0][:, 0]
            for part, own in zip(*(some.flatten(0, -2).split(_ROWS) for some in (states, tokens)), strict=True)
        ]
        return F.linear(torch.cat(parts).view(states.shape), self.weight)


@dataclass
class FTPOutput(CausalLMOutputWithPast):
    """What `FTPForCausalLM` returns beyond a causal model's output.

    Attributes:
        offset_losses: Mean cross-entropy of each offset `[N]` in nats; NaN where no position has such a target.
        future_logits: `[batch, positions, N, vocab]`, if asked for.
    """

    offset_losses: Tensor | None = None
    future_logits: Tensor | None = None


class FTPForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model whose head is a decoder of the next N tokens from one state vector.

    `logits` are those of offset 1, so `generate`, evaluation and every method of Tokenry take it as a causal model.
    `loss` is the paper's: cross-entropy at all offsets, offset j weighted by gamma^(j-1), over the positions drawn in
    training and over all of them otherwise. Targets behind the end of a document or of the row are dropped; the end is
    the encoder's `eos_token_id`. Source: arXiv 2410.18160.
    """

    config_class = FTPConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: FTPConfig) -> None:
        super().__init__(config)
        if config.encoder_config is None:
            raise BadParameter("FTPForCausalLM needs encoder_config: the configuration of a decoder model")
        self.encoder = AutoModel.from_config(
            config.encoder_config, attn_implementation=config._attn_implementation, dtype=torch.get_default_dtype()
        )
        text: Any = config.get_text_config()
        self.lm_head = FTPHead(FTPDecoder(config), text.vocab_size)
        embedding = self.encoder.get_input_embeddings()
        name = next(name for name, module in self.encoder.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"encoder.{name}.weight"}
        self.post_init()

    @classmethod
    def around(cls, model: PreTrainedModel, decoder: FTPDecoder | None = None, **settings: Any) -> FTPForCausalLM:
        """Put a future decoder onto a loaded causal model, whose body and head it shares without a copy.

        Args:
            model: The causal model.
            decoder: A trained decoder of it; None: a new one, in the model's dtype and on its device.
            **settings: Of `FTPConfig`, for a new one.

        Raises:
            UnsupportedModel: The model's head has a bias, or its states have another width than its embeddings.
        """
        head: Any = model.get_output_embeddings()
        config: Any = decoder.config if decoder is not None else config_for(model, **settings)
        future: Any = FTPDecoder(config) if decoder is None else decoder
        if decoder is None:
            future.to(dtype=model.dtype, device=model.device)
            if config.decoder_layers and head is not None:
                # A trained head has large entries: logits of about unit size let the loss begin at the uniform one.
                scale = 1 / (float(head.weight.detach().float().std()) * config.width**0.5)
                nn.init.constant_(future.norm.weight, min(1.0, scale))
        if head is None or getattr(head, "bias", None) is not None or head.weight.shape[1] != config.width:
            raise UnsupportedModel(
                f"{type(model).__name__} has no head that is one matrix over its state vectors: future token "
                "prediction needs a decoder model whose head has no bias"
            )
        try:
            with torch.device("meta"):
                built = cls(config)
        except ValueError as error:
            # As where its attention has one implementation alone, which a configuration does not tell.
            raise UnsupportedModel(f"{type(model).__name__} cannot be built from its configuration: {error}") from error
        built.encoder, built.lm_head.decoder, built.lm_head.weight = model.base_model, future, head.weight
        built.generation_config = copy.deepcopy(model.generation_config)
        return built.train(model.training)

    @property
    def future(self) -> FTPDecoder:
        """The decoder of the next tokens."""
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Take a head's matrix, as after resizing the vocabulary."""
        weight: Any = new_embeddings.weight
        self.lm_head.weight, self.lm_head.out_features = weight, weight.shape[0]

    def train(self, mode: bool = True) -> FTPForCausalLM:
        """Set the mode; an encoder that is not trained runs without dropout in either."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.encoder.parameters()):
            self.encoder.eval()
        return self

    def state_vectors(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """State vectors `[batch, length, width]` of ids, padded on either side."""
        return self._encode(input_ids, attention_mask).last_hidden_state

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        positions: Tensor | None = None,
        output_future_logits: bool = False,
        **kwargs: Any,
    ) -> FTPOutput:
        """Run the encoder, and the decoder where its output is asked for.

        Args:
            input_ids: `[batch, length]`.
            attention_mask: `[batch, length]`.
            labels: As `input_ids`, not shifted; -100 is no target.
            logits_to_keep: As in other causal models.
            positions: Columns `[batch, chosen]` at which `future_logits` stand; None: all.
            output_future_logits: Whether to return them, with the true tokens as the decoder's inputs.

        Returns:
            `loss` with labels; `logits` of offset 1 `[batch, kept, vocab]`, left out in training, where they would cost
            more than the loss; `hidden_states`, of which the last are the state vectors, with `output_hidden_states`.
        """
        output = self._encode(
            input_ids, attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        states = output.last_hidden_state
        loss = losses = logits = future = None
        if (labels is not None or output_future_logits) and input_ids is None:
            raise BadParameter("labels and future_logits need input_ids, because the decoder reads the tokens")
        if labels is not None:
            assert input_ids is not None
            targets = self.targets(input_ids, labels, attention_mask)
            drawn, scale = self.draw(targets, self.config.positions_per_sequence if self.training else None)
            sums = self.offset_sums(states, input_ids, targets, drawn, scale)
            counts = (targets != IGNORED).sum((0, 1))
            weights = self.offset_weights(sums)
            loss = (weights * sums).sum() / (weights * counts).sum().clamp(min=torch.finfo(sums.dtype).tiny)
            losses = (sums / counts).detach()
        if labels is None or not self.training:
            embedded = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(self.lm_head.reads(states[:, kept], embedded[:, kept]))
        if output_future_logits:
            assert input_ids is not None
            everywhere = torch.arange(input_ids.shape[1], device=states.device).expand(input_ids.shape)
            future = self.future_logits(states, input_ids, everywhere if positions is None else positions)
        hidden = output.hidden_states
        return FTPOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=None if hidden is None else (*hidden[:-1], states),
            attentions=output.attentions,
            offset_losses=losses,
            future_logits=future,
        )

    # The decoder over state vectors ----------------------------------------------------------------
    def future_logits(self, states: Tensor, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Logits `[batch, chosen, N, vocab]` at columns `[batch, chosen]`, given the true tokens; offsets whose inputs
        lie behind the row's end mean nothing."""
        parts = self._decoded(states, input_ids, positions)
        return self.lm_head.matrix()(torch.cat(parts)).unflatten(0, positions.shape)

    def targets(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The tokens that each position must decode, `[batch, length, N]`; -100 where there is none."""
        ends: Any = getattr(self.config.get_text_config(), "eos_token_id", None)
        if attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, IGNORED)
        targets = self._ahead(labels, IGNORED)
        if ends is not None:
            ended = torch.isin(input_ids, torch.as_tensor(ends, device=input_ids.device)).long()
            document = ended.cumsum(1) - ended
            same = self._ahead(document, -1) == document[..., None]
            targets = targets.masked_fill(~same, IGNORED)
        if attention_mask is not None:
            targets = targets.masked_fill(attention_mask[..., None] == 0, IGNORED)
        return targets

    def draw(
        self, targets: Tensor, count: int | None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw positions of each row evenly among those with a target.

        Args:
            targets: `[batch, length, N]`.
            count: How many of a row; None: all of its positions.
            generator: On the CPU; None: torch's global one.

        Returns:
            Columns `[batch, drawn]`, and what each one's loss counts `[batch, drawn]`: the row's positions over those
            drawn, so that the sum over the drawn has the sum over all as its expectation; 0 where none was left.
        """
        real = (targets != IGNORED).any(-1)
        batch, length = real.shape
        if count is None or count >= length:
            return torch.arange(length, device=real.device).expand(batch, -1), real.double()
        order = torch.rand(batch, length, generator=generator, device=None if generator is None else "cpu")
        columns = order.to(real.device).masked_fill(~real, -1).topk(count, 1).indices
        chosen = real.gather(1, columns)
        share = real.sum(1, keepdim=True) / chosen.sum(1, keepdim=True).clamp(min=1)
        return columns, share.double() * chosen

    def offset_weights(self, like: Tensor) -> Tensor:
        """gamma^(j-1) for each offset, `[N]`; 0^0 is 1."""
        offsets = torch.arange(self.config.num_future_tokens, device=like.device)
        return torch.tensor(self.config.gamma, dtype=like.dtype, device=like.device) ** offsets

    def offset_sums(
        self, states: Tensor, input_ids: Tensor, targets: Tensor, positions: Tensor, scale: Tensor
    ) -> Tensor:
        """Cross-entropy of each offset in nats, summed over drawn positions as `scale` counts them, `[N]`.

        Args:
            states: `[batch, length, width]`.
            input_ids: `[batch, length]`.
            targets: `[batch, length, N]`.
            positions: Columns `[batch, drawn]`.
            scale: `[batch, drawn]`.
        """
        # The package below holds the trainer too, which generation has no use for.
        from tokenry.objectives.losses import log_probs

        wanted = _at(targets, positions).flatten(0, 1)
        decoded = torch.cat(self._decoded(states, input_ids, positions))
        kept = (wanted != IGNORED) & (scale.flatten() > 0)[:, None]
        losses = -log_probs(decoded[kept], wanted[kept], head=self.lm_head.matrix())
        share = scale.flatten()[:, None].expand_as(wanted)[kept].to(losses.dtype)
        offset = kept.nonzero()[:, 1]
        return losses.new_zeros(wanted.shape[1]).index_add(0, offset, losses * share)

    # Inside ----------------------------------------------------------------------------------------
    def _decoded(self, states: Tensor, input_ids: Tensor, positions: Tensor) -> list[Tensor]:
        """The decoder's states, given the true tokens, at columns `[batch, chosen]` folded into rows: pieces
        `[rows, N, width]`."""
        embed = self.get_input_embeddings()
        own = torch.cat([input_ids[..., None], self._ahead(input_ids, 0)[..., :-1]], -1)
        tokens, folded = _at(own, positions).flatten(0, 1), _at(states, positions).flatten(0, 1)
        parts = []
        for some, part in zip(tokens.split(_ROWS), folded.split(_ROWS), strict=True):
            embedded = embed(some)
            inputs = torch.cat([self.future.first(embedded[:, 0]), embedded[:, 1:]], 1)
            parts.append(self.future(inputs, self.future.remember(part))[0])
        return parts

    def _ahead(self, values: Tensor, fill: int) -> Tensor:
        """The N values after each column of `[batch, length]`, `[batch, length, N]`."""
        count = self.config.num_future_tokens
        return F.pad(values, (0, count), value=fill).unfold(1, count, 1)[:, 1:]

    def _encode(self, input_ids: Tensor | None, attention_mask: Tensor | None, **options: Any) -> Any:
        known = (options.get("past_key_values"), options.get("position_ids"))
        if attention_mask is not None and attention_mask.ndim == 2 and known == (None, None):
            options["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask, **{**options, "return_dict": True})


def config_for(model: PreTrainedModel, **settings: Any) -> FTPConfig:
    """The configuration of a future decoder for a causal model."""
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return FTPConfig(encoder_config=model.config, **{"tie_word_embeddings": tied, **settings})


def _at(values: Tensor, columns: Tensor) -> Tensor:
    """Values `[batch, length, n]` at columns `[batch, chosen]`, `[batch, chosen, n]`."""
    return values.gather(1, columns[..., None].expand(-1, -1, values.shape[-1]))


AutoConfig.register(FTPConfig.model_type, FTPConfig, exist_ok=True)
AutoModelForCausalLM.register(FTPConfig, FTPForCausalLM, exist_ok=True)
