"""The one attention function, and how a model is switched to it and back.

A model inside :func:`attached` calls :func:`attention` in every layer. Forwards that fill a :class:`TokenCache` get
masks built per layer from what the cache knows; any other forward of the model runs as if nothing had changed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, PreTrainedModel

from tokenry.errors import CacheMisuse, UnsupportedModel
from tokenry.models import compat
from tokenry.models.anatomy import check_decoder, check_plain
from tokenry.models.cache import TokenCache
from tokenry.models.current import current, set_current
from tokenry.models.entrance import entrance
from tokenry.models.layer import TokenLayer
from tokenry.models.policy import Policy
from tokenry.models.rows import guard
from tokenry.models.slots import Block
from tokenry.models.statistics import AttentionRows


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer over the slots of a :class:`TokenCache`, in the form transformers asks of its registry.

    Args:
        query: ``[batch, heads, new, head_dim]``.
        key: ``[batch, kv_heads, slots, head_dim]``, as the cache returned it.
        value: likewise.
        attention_mask: What :func:`mask` passed on; tells which new tokens are real.

    Returns:
        Output ``[batch, new, heads, head_dim]`` and None.
    """
    layer = getattr(key, "_tokenry_layer", None)
    cache = current()
    if layer is None or cache is None or layer._cache() is not cache:
        original = _original(module)
        return original(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
            **({} if softcap is None else {"softcap": softcap}), **kwargs,
        )  # fmt: skip
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise UnsupportedModel("models with attention sinks or additive position biases are not served")
    block = cache.block(query.shape[2], attention_mask, query.device)
    allowed, causal = layer.mask(block)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer.scaling = scaling
    query, key = layer.roll(block, query, key)
    found = layer.retrieve(block, query, allowed)
    rows = None
    if found is not None:
        slots, counts = found
        output = _chosen(layer, query, slots, counts, scaling, softcap)
    else:
        policy = layer.policy
        watched = policy is not None and policy.needs_attention
        if watched or softcap is not None or (policy is not None and policy.skips):
            rows = AttentionRows(query, key, allowed, causal, scaling, softcap, block.valid)
        # No fused kernel of torch bounds logits. On CPUs products in blocks of rows are faster than the fused kernel
        # and sums over all rows beside it, which would cost one of the products again.
        summed = watched and policy is not None and (policy.sums or block.new == 1 or block.deferred)
        if rows is not None and policy is not None and policy.attends:
            output = policy.attend(layer, rows, value)
        elif rows is not None and (softcap is not None or (summed and query.device.type == "cpu")):
            output = rows.attend(value)
        else:
            output = _fused(block, query, key, value, allowed, causal, scaling)
    layer.attended(block, rows)
    _thread.calls = getattr(_thread, "calls", 0) + 1
    return output.transpose(1, 2).contiguous(), None


def _chosen(
    layer: TokenLayer, query: Tensor, slots: Tensor, counts: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """Attention of each row over slots of its own, ``[batch, kv_heads or heads, rows, chosen]``."""
    batch, heads, new, dim = query.shape
    sets = slots.shape[1]
    keys, values = (part.flatten(1, 2) for part in layer.fetch(slots))
    # Every row of every set becomes a head with keys of its own, and the query heads that share the set its rows.
    packed = query.view(batch, sets, heads // sets, new, dim).transpose(2, 3).reshape(batch, sets * new, -1, dim)
    allowed = None if counts is None else counts.flatten(1, 2)[:, :, None]
    if softcap is None:
        output = F.scaled_dot_product_attention(packed, keys, values, attn_mask=allowed, scale=scaling)
    else:
        output = AttentionRows(packed, keys, allowed, False, scaling, softcap).attend(values)
    return output.view(batch, sets, new, heads // sets, -1).transpose(2, 3).reshape(batch, heads, new, -1)


def _fused(
    block: Block, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, causal: bool, scaling: float
) -> Tensor:
    batch, heads, new, dim = query.shape
    groups = heads // key.shape[1]
    if allowed is None and (causal or groups == 1):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling, enable_gqa=groups > 1)
    # On a CPU keys and values are repeated where they are smaller than the mask; elsewhere that is another kernel.
    smaller = groups > 1 and new > 2 * dim * key.shape[1] and query.device.type == "cpu"
    if allowed is not None and allowed.shape[1] == 1 and smaller:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=block.packed(allowed, 1, query.dtype), scale=scaling, enable_gqa=True
        )
    # The query heads of a group attend to the same keys: as further rows of one head they need no repeated keys.
    packed = query.reshape(batch, heads // groups, groups * new, dim)
    mask = None if allowed is None else block.packed(allowed, groups, query.dtype)
    output = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return output.view(batch, heads, new, -1)


def mask(*, attention_mask: Tensor | None = None, config: Any = None, **kwargs: Any) -> Tensor | None:
    """The mask function beside :func:`attention`: hands on the 2-D mask, from which the cache reads what is real."""
    if current() is not None:
        return attention_mask
    original = compat.mask_function(_own_name(config)) or compat.mask_function("sdpa")
    assert original is not None
    return original(attention_mask=attention_mask, config=config, **kwargs)


compat.register(attention, mask)

_thread = threading.local()
_lock = threading.RLock()
_attachments: weakref.WeakKeyDictionary[PreTrainedModel, _Attachment] = weakref.WeakKeyDictionary()
# What each configuration named before its first switch. It is never taken out while the configuration lives: another
# thread may stand between two layers when a block ends.
_own: dict[int, tuple[weakref.ref[Any], str]] = {}
_probed: weakref.WeakKeyDictionary[PreTrainedModel, str | None] = weakref.WeakKeyDictionary()
_policy: ContextVar[_Activation | None] = ContextVar("tokenry_policy", default=None)


class _Attachment:
    """One model's switch to the attention function, undone when its last user leaves."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.count = 0
        # Blocks whose policy does not pass all tokens on, and the hooks that they need.
        self.skipping = 0
        self.guards: list[RemovableHandle] = []
        self.settings = compat.settings(model)
        # The decoder below the head is called alone at times, and some heads call past it: both carry the hooks, and
        # whichever leaves first closes the forward.
        self.hooks = [
            hook
            for module in dict.fromkeys((model, model.base_model))
            for hook in (
                module.register_forward_pre_hook(_before, with_kwargs=True),
                module.register_forward_hook(_after, with_kwargs=True, always_call=True),
            )
        ]
        for config, name in self.settings:
            _own[id(config)] = (weakref.ref(config, functools.partial(_forget, id(config))), name)
        model.set_attn_implementation(compat.NAME)

    def undo(self) -> None:
        for hook in self.hooks:
            hook.remove()
        compat.restore(self.settings)


class _Activation:
    """The policy of a block, and the caches that stand in for the ones callers pass inside it."""

    def __init__(self, model: PreTrainedModel, policy: Policy) -> None:
        self.model = weakref.ref(model)
        self.policy = policy
        self.caches: weakref.WeakKeyDictionary[Cache, TokenCache] = weakref.WeakKeyDictionary()


def _forget(key: int, _: object) -> None:
    _own.pop(key, None)


def _own_name(config: Any) -> str:
    reference, name = _own.get(id(config), (None, "sdpa"))
    return name if reference is not None and reference() is config else "sdpa"


def _original(module: torch.nn.Module) -> Callable[..., Any]:
    """The attention function the model ran on before; eager attention is a function of the model's own file."""
    function = compat.attention_function(_own_name(getattr(module, "config", None)))
    if function is not None:
        return function
    import sys

    return sys.modules[type(module).__module__].eager_attention_forward


def _before(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) > 1:
        named = inspect.signature(module.forward).bind_partial(*args).arguments
        if "past_key_values" in named:
            args, kwargs = (), {**named, **kwargs}
    given: Cache | None = kwargs.get("past_key_values")
    active = _policy.get()
    if active is not None:
        model = active.model()
        if isinstance(given, TokenCache):
            other = given.policy is not None and given.policy != active.policy
            if other and not given.beside and model is not None and module in (model, model.base_model):
                raise CacheMisuse(
                    f"past_key_values keeps another policy than the block of {active.policy} it came into: leave the "
                    "block"
                )
        elif model is not None and module in (model, model.base_model):
            given = _budgeted(active, model, given, kwargs.get("use_cache"))
            kwargs = {**kwargs, "past_key_values": given}
    if isinstance(given, TokenCache) and current() is not given:
        given.ready()
        if given.policy is not None and given.total == 0:
            names = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            given.policy.before(module, given, names | names.get("kwargs", {}))  # type: ignore[arg-type]
    set_current(given if isinstance(given, TokenCache) else None)
    return args, kwargs


def _budgeted(active: _Activation, model: PreTrainedModel, given: Cache | None, use_cache: bool | None) -> TokenCache:
    name = str(active.policy)
    if use_cache is False:
        raise CacheMisuse(
            f"{name} keeps a cache, and this forward asks for none: drop use_cache=False or leave the block"
        )
    if given is None:
        return TokenCache(model, active.policy)
    if given in active.caches:
        # A caller that goes on with the cache it passed goes on with the one that was filled in its place.
        return active.caches[given]
    if type(given) is not DynamicCache or given.offloading:
        kind = type(given).__name__ if type(given) is not DynamicCache else "cache that is offloaded"
        raise CacheMisuse(f"{name} cannot stand in for a {kind}: use the default cache implementation")
    if given.get_seq_length() > 0:
        raise CacheMisuse(
            f"a cache that already holds {given.get_seq_length()} tokens came into the block of {name}: start from the "
            "whole prompt inside the block"
        )
    cache = active.caches[given] = TokenCache(model, active.policy)
    return cache


def _after(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = current()
    set_current(None)
    if cache is None:
        return
    if output is None:
        cache.abandon()
        return
    before = cache.total
    cache.finish()
    if cache.policy is not None and cache.total > before + 1:
        cache.policy.after(module, cache, kwargs.get("input_ids", args[0] if args else None))  # type: ignore[arg-type]


@contextlib.contextmanager
def attached(model: PreTrainedModel, policy: Policy | None = None) -> Iterator[None]:
    """Run ``model`` on the one attention function inside the block; blocks may nest and run in several threads.

    Args:
        model: A decoder.
        policy: The policy of the caches that it fills, if it has one.

    Raises:
        UnsupportedModel: The model is not a decoder that the cache serves, its code ignores the switch, or its
            outputs inside the block differ from those outside (tried once on four tokens, as a chain and as a tree).
    """
    attach(model, policy)
    try:
        yield
    finally:
        detach(model, policy)


def attach(model: PreTrainedModel, policy: Policy | None = None) -> None:
    """Enter what :func:`attached` leaves; every call needs a :func:`detach` with the same policy."""
    check_plain(model)
    check_decoder(model)
    with _lock:
        attachment = _attachments.get(model)
        if attachment is None:
            if any(name == compat.NAME for _, name in compat.settings(model)):
                if _before in model._forward_pre_hooks.values():
                    raise UnsupportedModel(
                        f"this {type(model).__name__} is a copy of a model that was inside a block when it was copied, "
                        "and carries the block's switch without the way back: copy the model outside the block"
                    )
                raise UnsupportedModel(
                    f"{type(model).__name__} shares its configuration with another model that is inside a block: give "
                    "each model a copy of the configuration"
                )
            _check(model)
            attachment = _attachments[model] = _Attachment(model)
        attachment.count += 1
        if policy is not None and policy.skips:
            attachment.skipping += 1
            if attachment.skipping == 1:
                try:
                    attachment.guards = [*guard(model), entrance(model)]
                except UnsupportedModel:
                    detach(model, policy)
                    raise


def detach(model: PreTrainedModel, policy: Policy | None = None) -> None:
    """Leave what :func:`attach` entered; the last one to leave restores the model's own setting."""
    with _lock:
        attachment = _attachments.get(model)
        if attachment is None:  # the model went before a cache that held it switched
            return
        if policy is not None and policy.skips:
            attachment.skipping -= 1
            if attachment.skipping == 0:
                for hook in attachment.guards:
                    hook.remove()
                attachment.guards = []
        attachment.count -= 1
        if attachment.count == 0:
            _attachments.pop(model).undo()


class PolicyBlock(contextlib.AbstractContextManager[PreTrainedModel]):
    """Every forward of ``model`` in this thread fills a cache that ``policy`` keeps.

    A block may be entered again once it was left, and by several threads at the same time.

    Raises:
        CacheMisuse: A policy is active in this thread already, the same one or another.
    """

    def __init__(self, model: PreTrainedModel, policy: Policy) -> None:
        self.model, self.policy = model, policy

    def __enter__(self) -> PreTrainedModel:
        active = _policy.get()
        if active is not None:
            raise CacheMisuse(
                f"{self.policy} was entered inside the block of {active.policy}: cache policies do not nest, whatever "
                "their models; leave the first block before entering another"
            )
        attach(self.model, self.policy)
        _policy.set(_Activation(self.model, self.policy))
        return self.model

    def __exit__(self, *error: object) -> None:
        _policy.set(None)  # blocks do not nest, so nothing was active before
        detach(self.model, self.policy)


def active_policy(model: PreTrainedModel) -> Policy | None:
    """The policy of the block that this thread is in, if it is a block of ``model``."""
    active = _policy.get()
    return active.policy if active is not None and active.model() is model else None


def _check(model: PreTrainedModel) -> None:
    """Refuse a model that does not run right on the attention function; the verdict is remembered."""
    if model not in _probed:
        _probed[model] = _probe(model)
    verdict = _probed[model]
    if verdict is not None:
        raise UnsupportedModel(f"{type(model).__name__} {verdict}")


def _probe(model: PreTrainedModel) -> str | None:
    """What is wrong with the model inside a block, or None."""
    if not compat.can_switch(model):
        return "does not take its attention from transformers' registry, so it cannot be switched to Tokenry's"
    device = model.device
    tokens = torch.tensor([[3, 5, 7, 11]], device=device) % model.config.get_text_config(decoder=True).vocab_size
    training = [module for module in model.modules() if module.training]
    model.eval()
    attachment = None
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            wanted = model(tokens, use_cache=False).logits[0].float().cpu()
            branch = model(tokens[:, [0, 1, 3]], use_cache=False).logits[0, -1].float().cpu()
            attachment = _Attachment(model)
            if compat.implementation(model) != compat.NAME:
                return "ignores the switch of its attention"
            cache = TokenCache(model)
            _thread.calls = 0
            first = model(tokens[:, :2], past_key_values=cache, use_cache=True).logits[0].float().cpu()
            if _thread.calls != len(cache.layers) or cache.total != 2:
                return f"calls Tokenry's attention in {_thread.calls} of {len(cache.layers)} layers"
            # Two siblings behind the second token: both stand at position 2, and neither sees the other.
            relation = torch.eye(2, dtype=torch.bool, device=device)[None]
            cache.stage(relation=relation, deferred=True)
            positions = torch.tensor([[2, 2]], device=device)
            output = model(tokens[:, 2:], past_key_values=cache, position_ids=positions, use_cache=True)
            second = output.logits[0].float().cpu()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        # Not remembered: it may be the machine's fault.
        raise UnsupportedModel(
            f"{type(model).__name__} fails on Tokenry's attention ({type(error).__name__}: {error})"
        ) from error
    finally:
        set_current(None)
        if attachment is not None:
            attachment.undo()
        for module in training:
            module.training = True
    got = torch.cat([first, second])
    expected = torch.cat([wanted[:3], branch[None]])
    # Some models take their softmax in float32 whatever they run in.
    noise = {torch.float64: 1e-4, torch.float32: 1e-3}.get(model.dtype, 0.1) * max(1.0, float(expected.abs().max()))
    if not bool(torch.isfinite(got).all()) or float((got - expected).abs().max()) > noise:
        return "gives other outputs on Tokenry's attention than on its own (an attention bias of its own, perhaps)"
    return None
