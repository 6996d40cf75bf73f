"""The models beside the one that is measured: what was named is loaded, or refused, before anything is measured."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tokenry.decoding import ByteView, SkipDecode
from tokenry.decoding.skipdecode import SkipSchedule
from tokenry.decoding.skipdecode.schedule import Exit
from tokenry.errors import BadParameter, ResourceError, TokenryError
from tokenry.generation.follower import second_model
from tokenry.methods import method as read_method
from tokenry.models import anatomy, load, loaded_name, trained_folder

_Loaded = TypeVar("_Loaded")

SMALL = "tokenry/code-draft"
"""R2R's small model, unless another is named."""


@dataclass(frozen=True)
class Tuned:
    """A model that was fine-tuned under a schedule, and the decoder that its `training.json` says to use it with."""

    model: Any
    method: SkipDecode

    @property
    def schedule(self) -> SkipSchedule:
        """What it was trained under."""
        return schedule_of(self.model, self.method)


@dataclass(frozen=True)
class Named:
    """The models beside; `small` and `partner` as `bench_decoding` says.

    Attributes:
        tuned, tuned_early: Fine-tuned for SkipDecode, and for early exit.
        missing: Why the former is not there, where its place was left to the default.
    """

    small: str
    tuned: Tuned | None
    tuned_early: Tuned | None
    partner: ByteView | None
    missing: str


def resolve(
    model: Any, tokenizer: Any, *, small: str | None, tuned: str | None, tuned_early: str | None, partner: str | None
) -> Named:
    """Load what was named; only what was left to its default may be missing.

    Raises:
        BadParameter: A name is empty, or a folder holds no model that was fine-tuned as it has to be.
        ResourceError: A model does not load, or has another tokenizer.
    """
    named = {"small": small, "tuned": tuned, "tuned_early": tuned_early, "partner": partner}
    for what, name in named.items():
        if name is not None and not name.strip():
            raise BadParameter(f"{what}={name!r} is not allowed; give a folder or a name, or leave it out")
    if small is not None:
        _loading("small", lambda: second_model("r2r", "small", small, model, {}))
    missing, skip = "", None
    if tuned is not None:
        skip = _loading("tuned", lambda: tuned_model(tuned, "skip", model, tokenizer))
    else:
        try:
            skip = tuned_model(str(trained_folder("skipdecode", loaded_name(model))), "skip", model, tokenizer)
        except TokenryError as error:
            missing = f"{error}; make it by tokenry train skipdecode, or name the folder of one (tuned)"
    early = None
    if tuned_early is not None:
        early = _loading("tuned_early", lambda: tuned_model(tuned_early, "early", model, tokenizer))
        if skip is not None and _budgets(skip.schedule) != _budgets(early.schedule):
            raise BadParameter(
                f"tuned_early={tuned_early!r} is not allowed; it was trained under {early.method}, of "
                f"{early.schedule.average():.2f} layers a token, and what it is compared with under {skip.method}, of "
                f"{skip.schedule.average():.2f}: train both with the same first, last, shape and horizon"
            )
    view = None
    if partner is not None:
        # In another precision the comparison would be another one.
        view = _loading(
            "partner", lambda: ByteView(*load(partner, dtype=model.dtype, device=model.device), paths="fast")
        )
    return Named(small or SMALL, skip, early, view, missing)


def tuned_model(folder: str, exit: Exit, model: Any, tokenizer: Any) -> Tuned:
    """What `tokenry train skipdecode` wrote into a folder for a model.

    Raises:
        BadParameter: It does not say for which schedule it was trained, for another exit, or one that skips nothing.
        ResourceError: It does not load, or is no copy of the model.
    """
    loaded, its = load(folder, dtype=model.dtype, device=model.device)
    layers = len(anatomy(loaded).layers)
    if its.get_vocab() != tokenizer.get_vocab() or layers != len(anatomy(model).layers):
        raise ResourceError(
            f"{folder!r} has another tokenizer or number of layers than the model that is measured; name a folder that "
            "was fine-tuned from it"
        )
    known = Path(folder) / "training.json"
    try:
        use = json.loads(known.read_text(encoding="utf-8"))["use"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadParameter(
            f"{folder!r} has no training.json that says the schedule to use it with ({type(error).__name__}); name a "
            "folder that tokenry train skipdecode wrote"
        ) from error
    method: Any = read_method(str(use))
    if not isinstance(method, SkipDecode) or method.exit != exit or method.horizon is None:
        raise BadParameter(
            f"{folder!r} was trained for {use}, which is not allowed here; name what "
            f"tokenry train skipdecode --exit {exit} wrote"
        )
    found = Tuned(loaded, method)
    if found.schedule.average() >= layers:
        raise BadParameter(f"{folder!r} was trained for {use}, which skips none of {layers} layers; lower last")
    return found


def schedule_of(model: Any, method: SkipDecode) -> SkipSchedule:
    """A decoder's schedule for a model, over a horizon that it names."""
    assert method.horizon is not None
    return method.schedule(len(anatomy(model).layers), method.horizon)


def early_as(method: SkipDecode, model: Any) -> SkipDecode:
    """Early exit with the layers of a decoder at every token, though its own defaults would be others."""
    schedule = schedule_of(model, method)
    return replace(method, exit="early", first=schedule.first, last=schedule.last)


def _budgets(schedule: SkipSchedule) -> list[int]:
    return [schedule.budget(index) for index in range(schedule.horizon + 1)]


def _loading(what: str, attempt: Callable[[], _Loaded]) -> _Loaded:
    """The same error, which says what was named."""
    try:
        return attempt()
    except TokenryError as error:
        raise type(error)(f"{what}: {error}") from error
