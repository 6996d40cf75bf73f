"""The methods that the contracts run: every one that is registered, those of other packages too."""

from __future__ import annotations

from tokenry.methods import Method, load_class, rows


def registered(role: str) -> list[type[Method]]:
    """Classes of the available methods of a role: ``"decoder"`` or ``"policy"``."""
    classes = [load_class(row.slug) for row in rows()]
    return [cls for cls in classes if cls.role == role]


def drafters() -> list[type[Method]]:
    """Decoders that promise the output of plain decoding by verifying drafts."""
    return [cls for cls in registered("decoder") if getattr(cls, "drafts", False)]
