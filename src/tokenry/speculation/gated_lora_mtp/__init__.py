"""Mask tokens and gated LoRA make a frozen model draft its own future.

adapters    mask embeddings, LoRA behind a gate, the sampler; what is saved
drafter     drafting with them, in one pass with the verification
training    the objective, and `tokenry train mtp`
"""

from tokenry.speculation.gated_lora_mtp.adapters import Adapters, gated
from tokenry.speculation.gated_lora_mtp.drafter import GatedLoRAMTP

__all__ = ["Adapters", "GatedLoRAMTP", "gated"]
