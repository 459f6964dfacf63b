"""Attention: what a recipe's name for an implementation stands for, and where it can be had.

All compute the same function. sdpa and eager run everywhere. Of packed documents flex and flash read only the pairs of
tokens that may see each other, where sdpa is given a mask of every pair; both train on CUDA cards alone. What was
trained with them is evaluated, asked and exported on a machine without them through sdpa. A family without sdpa takes
eager in its place.
"""

from typing import Literal

import torch
from transformers.utils import is_flash_attn_2_available

from qlora_kit.errors import DeviceError

Attention = Literal["sdpa", "eager", "flex", "flash"]

_IMPLEMENTATIONS = {"eager": "eager", "flex": "flex_attention", "flash": "flash_attention_2"}


def implementation(asked: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What transformers calls it. None is sdpa, or what the family has in its place; so is what cannot be had here.

    Args:
        asked: name in a recipe.
        device: of the model.
        dtype: that it computes in.
    """
    return None if _missing(asked, device, dtype) else _IMPLEMENTATIONS.get(asked)


def check_attention(asked: str, device: torch.device, dtype: torch.dtype) -> None:
    """See that a run can train with it.

    Raises:
        DeviceError: it cannot; says why and what can.
    """
    why = _missing(asked, device, dtype)
    if why is not None:
        raise DeviceError(f"base.attention={asked} {why}; set base.attention=sdpa")


def _missing(asked: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot be had; None where it can."""
    if asked in ("sdpa", "eager"):
        return None
    if device.type != "cuda":
        return f"has a backward pass on CUDA devices only, and this run is on a {device.type}"
    if asked == "flash" and not is_flash_attn_2_available():
        return "needs the package flash-attn, 2.3.3 or newer, which is not installed"
    if asked == "flash" and dtype == torch.float32:
        return "computes in 16 bits only, and base.compute_dtype is float32 here"
    return None
