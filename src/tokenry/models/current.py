"""Which cache the attached forward that runs in a thread fills."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenry.models.cache import TokenCache

_thread = threading.local()


def current() -> TokenCache | None:
    """The cache of the attached forward that runs in this thread."""
    return getattr(_thread, "cache", None)


def set_current(cache: TokenCache | None) -> None:
    """Note which cache the attached forward of this thread fills."""
    _thread.cache = cache
