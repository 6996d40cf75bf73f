"""What every test shares: a clock that stands still where methods choose their size by what they measure, and an output
that is no terminal, in a worker process too."""

import pytest

from tokenry.models import packing
from tokenry.speculation import budget, sizing


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Tables are as wide as the reader's terminal, and a worker process is told one of 80 columns."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    """Automatic sizes follow what forwards take, which on a busy machine is anything. A forward takes a second here and
    each token a hundredth more, and packed weights pay; tests that are about time set their own."""
    measure = budget._seconds

    def seconds(session, cache, cached, size):
        measure(session, cache, cached, size)
        return 1 + size / 100

    monkeypatch.setattr(budget, "_seconds", seconds)
    monkeypatch.setattr(packing, "_pay", lambda maps: True)
    for module in (budget, sizing):
        monkeypatch.setattr(module, "_clock", lambda: 0.0)
