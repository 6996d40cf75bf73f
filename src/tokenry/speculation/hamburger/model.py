"""The model: a base, and the three parts that are grafted onto it. And the rule that cuts text into groups."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from tokenry.errors import BadParameter, ResourceError, UnsupportedModel
from tokenry.generation.session import keeps_logits
from tokenry.models import anatomy, resource
from tokenry.models.anatomy import text_config
from tokenry.speculation.hamburger.cache import MacroCache

WEIGHTS, SETTINGS = "hamburger.safetensors", "hamburger.json"
_HEAD_DIM = 32  # of the merger: 64 heads at the paper's width of 2048

Choose = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""From logits `[batch, vocab]` and how many tokens of the group are before: tokens `[batch]` and scores."""


def group_starts(
    entropies: Tensor, max_group: int = 4, low: float = 0.05, ratio: float = 0.3, cuts: Tensor | None = None
) -> Tensor:
    """Where the rule `decreasing_v2` begins a new group, bool `[batch, length]`.

    From left to right a token joins the group before it if that has room and the token's entropy is below `low`, or
    below `ratio` times the largest of the group: a group begins with its hardest token.

    Args:
        entropies: In nats, of the base model's prediction of each token, `[batch, length]`.
        max_group: Most tokens of a group.
        cuts: Tokens that begin a group whatever their entropy, bool `[batch, length]`.
    """
    values = entropies.detach().float().cpu()
    forced = torch.zeros_like(values, dtype=torch.bool) if cuts is None else cuts.cpu()
    starts = torch.ones_like(forced)
    size = torch.ones(values.shape[0], dtype=torch.long)
    largest = values[:, :1].amax(1) if values.shape[1] else values.new_zeros(values.shape[0])
    for column in range(1, values.shape[1]):
        now = values[:, column]
        joins = ((now < low) | (now < ratio * largest)) & (size < max_group) & ~forced[:, column]
        starts[:, column] = ~joins
        size = torch.where(joins, size + 1, 1)
        largest = torch.where(joins, torch.maximum(largest, now), now)
    return starts.to(entropies.device)


class Merger(nn.Module):
    """The compositional embedder: the embeddings of a group of 2 or more tokens become one vector.

    The mean asks, the embeddings with their places answer: `mean + out(attention(mean, [embeddings; places]))`.
    """

    def __init__(self, width: int, max_group: int) -> None:
        super().__init__()
        self.heads = next(heads for heads in range(max(1, width // _HEAD_DIM), 0, -1) if width % heads == 0)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width + width // 2, width)
        self.value = nn.Linear(width + width // 2, width)
        self.out = nn.Linear(width, width)
        self.places = nn.Parameter(nn.init.xavier_normal_(torch.empty(max_group, width // 2)))

    def forward(self, embeddings: Tensor, sizes: Tensor) -> Tensor:
        """Vectors `[groups, width]` of embeddings `[groups, longest, width]`, of which the first `sizes` `[groups]`
        of each group are real."""
        count, longest, width = embeddings.shape
        real = torch.arange(longest, device=embeddings.device) < sizes[:, None]
        mean = (embeddings * real[..., None]).sum(1) / sizes[:, None].to(embeddings.dtype)
        placed = torch.cat([embeddings, self.places[:longest].to(embeddings.dtype).expand(count, -1, -1)], -1)
        query, key, value = (
            projected.view(count, -1, self.heads, width // self.heads).transpose(1, 2)
            for projected in (self.query(mean), self.key(placed), self.value(placed))
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=real[:, None, None])
        return mean + self.out(attended.transpose(1, 2).reshape(count, width))


class HamburgerModel(nn.Module):
    """A causal model that reads a group of tokens as one vector and writes the next group from one hidden state.

    Attributes:
        base: The causal model; it is trained with the grafts.
        merger: Group of embeddings -> one vector.
        micro: The micro-step decoder, a model of the base's own class with few layers, which shares its embedding and
            head. It reads the features of one macro position and then the group's tokens, at positions 0, 1, ...
        stop: Hidden state of a token -> logit of the chance that the token ends its group.
        max_group: Most tokens of a group.
        feature_layers: Layers, counted from 1, whose output at the macro position the micro decoder reads; the last
            one is taken behind the final norm.

    Args:
        base: Any decoder of transformers whose parts `anatomy` finds.
        max_group: As above; 4 in the paper.
        features: Into how many equal parts the features divide the base's depth; 4 in the paper.
        micro_layers: Layers of the micro decoder; 4 of the base's 16 in the paper.

    Raises:
        UnsupportedModel: A part is missing, the base reads more than text, or embeddings and hidden states differ in
            width.
    """

    def __init__(self, base: PreTrainedModel, *, max_group: int = 4, features: int = 4, micro_layers: int = 4) -> None:
        super().__init__()
        for name, value in (("max_group", max_group), ("features", features), ("micro_layers", micro_layers)):
            if value < 1:
                raise BadParameter(f"{name}={value} is not allowed; {name} must be at least 1")
        parts = anatomy(base)
        config, name = base.config, type(base).__name__
        if text_config(base) is not config:
            raise UnsupportedModel(f"{name} reads more than text: HAMburger grafts onto decoders of text alone")
        width, depth = config.hidden_size, len(parts.layers)
        embedding: Any = parts.embedding
        if embedding.weight.shape[1] != width:
            raise UnsupportedModel(
                f"{name} has embeddings of width {embedding.weight.shape[1]} and hidden states of width {width}: "
                "HAMburger feeds both to one decoder, so they must be equal"
            )
        self.base = base
        self.max_group, self.features, self.micro_layers = max_group, features, micro_layers
        self.feature_layers = tuple(sorted({-(-depth * part // features) for part in range(1, features + 1)}))
        self.micro = _shallow(base, micro_layers)
        self.merger = Merger(width, max_group)
        self.stop = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )
        self.to(base.device, base.dtype)
        self.train(base.training)
        base.register_forward_pre_hook(self._before, with_kwargs=True)
        base.register_forward_hook(self._after, with_kwargs=True)

    # Reading ---------------------------------------------------------------------------------------
    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings `[..., width]` of tokens `[...]`."""
        return self.base.get_input_embeddings()(tokens)

    def merged(self, tokens: Tensor, sizes: Tensor) -> Tensor:
        """One vector for each group, `[..., width]`, from tokens `[..., longest]` of which the first `sizes` `[...]`
        are real; a group of one is its token's embedding."""
        vectors = self.embed(tokens[..., 0])
        many = sizes > 1
        if bool(many.any()):
            vectors = vectors.clone()
            vectors[many] = self.merger(self.embed(tokens[many]), sizes[many]).to(vectors.dtype)
        return vectors

    def read(self, cache: MacroCache, tokens: Tensor, sizes: Tensor) -> Tensor:
        """Feed groups `[batch, m, longest]`, an entry of the cache each, and return the float32 logits `[batch, vocab]`
        behind the last; groups of size 0 are padding. The features behind it are `cache.features` then."""
        valid = sizes > 0
        cache.stage(None if bool(valid.all()) else valid, sizes=sizes)
        output = self.base(
            inputs_embeds=self.merged(tokens, sizes),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **({"logits_to_keep": 1} if keeps_logits(self.base) else {}),
        )
        return output.logits[:, -1].to(torch.float32)

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, MacroCache) or cache.model is not self:
            return None
        given = kwargs.get("inputs_embeds")
        given = kwargs["input_ids"] if given is None else given
        positions = cache.place(given.shape[0], given.shape[1], given.device)
        return args, {**kwargs, "position_ids": positions, "output_hidden_states": True}

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, MacroCache) and cache.model is self:
            cache.placed(torch.stack([output.hidden_states[layer][:, -1] for layer in self.feature_layers], 1))

    # Writing ---------------------------------------------------------------------------------------
    def write(
        self, features: Tensor, logits: Tensor, choose: Choose, active: Tensor, confidence: float, most: int
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Write the next group of each row.

        Args:
            features: `[batch, features, width]` at the macro position.
            logits: Float32, behind it, `[batch, vocab]`: the first token never sees the micro decoder.
            choose: Picks a token for each row.
            active: Rows that write, bool `[batch]`.
            confidence: Least chance of going on at which a group goes on.
            most: Most tokens of a group.

        Returns:
            Tokens `[batch, longest]`, sizes `[batch]` (0 for rows that do not write), and for each column of tokens
            the logits and the scores that they were chosen from.
        """
        most = 1 if confidence >= 1 else min(most, self.max_group)
        hidden, past = features[:, -1], DynamicCache(config=self.micro.config)
        sizes, going = torch.zeros_like(active, dtype=torch.long), active
        tokens: list[Tensor] = []
        raw, processed = [], []
        for ahead in range(most):
            if ahead:
                latest = self.embed(tokens[-1])[:, None]
                rows = torch.cat([features, latest], 1) if ahead == 1 else latest
                hidden, logits = (rows[:, -1] for rows in self.micro_step(rows, 1, past))
                logits = logits.to(torch.float32)
            chosen, scores = choose(logits, ahead)
            tokens.append(chosen)
            raw.append(logits)
            processed.append(scores)
            sizes = sizes + going
            if ahead + 1 < most:
                going = going & (torch.sigmoid(-self.stop(hidden)[:, 0].float()) >= confidence)
                if not bool(going.any()):
                    break
        return torch.stack(tokens, 1), sizes, raw, processed

    def micro_step(self, rows: Tensor, keep: int, past: DynamicCache | None = None) -> tuple[Tensor, Tensor]:
        """Run the micro decoder over `[batch, n, width]`; hidden states behind its norm `[batch, keep, width]` and
        logits `[batch, keep, vocab]` of the last `keep` rows."""
        output = self.micro(
            inputs_embeds=rows,
            past_key_values=past,
            use_cache=past is not None,
            output_hidden_states=True,
            return_dict=True,
            **({"logits_to_keep": keep} if keeps_logits(self.micro) else {}),
        )
        return output.hidden_states[-1][:, -keep:], output.logits[:, -keep:]

    # Folders ---------------------------------------------------------------------------------------
    def _graft_names(self) -> set[str]:
        """Names in the state of what is neither the base's nor shared with it."""
        shared = {id(parameter) for parameter in self.base.parameters()}
        named = dict(self.named_parameters(remove_duplicate=False))
        return {
            name for name in self.state_dict()
            if not name.startswith("base.") and not (name in named and id(named[name]) in shared)
        }  # fmt: skip

    def save(self, folder: Path, tokenizer: Any = None) -> None:
        """Write the base as an ordinary model folder, and the grafts beside it."""
        self.base.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        state, names = self.state_dict(), self._graft_names()
        save_file({name: state[name].contiguous() for name in sorted(names)}, folder / WEIGHTS)
        settings = {"max_group": self.max_group, "features": self.features, "micro_layers": self.micro_layers}
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, beside: PreTrainedModel) -> HamburgerModel:
        """The model in a folder, in the dtype and on the device of `beside`, loaded once for each of these.

        Raises:
            ResourceError: The folder holds none, or not all of one.
        """
        place = Path(folder).expanduser()
        if not (place / SETTINGS).is_file() or not (place / WEIGHTS).is_file():
            raise ResourceError(
                f"no HAMburger weights in {str(folder)!r}: train them with `tokenry train hamburger`, or name their "
                "folder, as in hamburger:weights=FOLDER"
            )
        return _grafted(resource(str(place.resolve()), beside), place)


@functools.lru_cache(maxsize=4)
def _grafted(base: PreTrainedModel, place: Path) -> HamburgerModel:
    settings = json.loads((place / SETTINGS).read_text(encoding="utf-8"))
    with torch.random.fork_rng():  # first weights are drawn and then replaced; the caller's samples must not move
        model = HamburgerModel(base, **settings)
    state, names = load_file(place / WEIGHTS), model._graft_names()
    if set(state) != names:
        raise ResourceError(
            f"{place / WEIGHTS} does not fit the base model beside it ({len(names ^ set(state))} tensors differ): "
            "train both together with `tokenry train hamburger`"
        )
    model.load_state_dict(state, strict=False)
    return model.eval()


def _shallow(base: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A model of the base's class, its last layers with full attention, which shares its embedding and head."""
    config = base.config
    told = config.to_dict()
    told[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = layers
    if told.get("layer_types") is not None:
        told["layer_types"] = ["full_attention"] * layers
    elif "sliding_window" in told:
        told["sliding_window"] = None
    micro = type(base)(type(config).from_dict(told))
    # It begins with the base's last layers and final norm, whose scale the shared head expects.
    deep, shallow = anatomy(base).layers, anatomy(micro).layers
    inner = {id(tensor) for layer in shallow for tensor in layer.parameters()}
    outer = [name for name, tensor in micro.named_parameters() if id(tensor) not in inner]
    micro.load_state_dict({name: base.state_dict()[name] for name in outer}, strict=False)
    for layer, last in zip(shallow, deep[-layers:], strict=False):
        layer.load_state_dict(last.state_dict())
    micro.set_input_embeddings(base.get_input_embeddings())
    micro.set_output_embeddings(base.get_output_embeddings())
    return micro
