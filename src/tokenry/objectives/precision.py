"""In which type the matrix products of a training run are computed."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "bfloat16", "float32"]


def mixed(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The type of a run's matrix products, None for that of its weights, which is float32.

    `auto` takes bfloat16 where the device multiplies in it. A processor without such instructions computes it in
    software, several times slower than float32.
    """
    if precision == "auto":
        return torch.bfloat16 if _multiplies(device) else None
    return torch.bfloat16 if precision == "bfloat16" else None


def _multiplies(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # Releases of torch that cannot tell keep to float32.
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(there is True for name, there in found.items() if "bf16" in name)
