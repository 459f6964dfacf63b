"""Attention: what a recipe's name for an implementation stands for, and where it can be had.

All compute the same function. sdpa and eager run everywhere. Of packed documents flex and flash read only the pairs of
tokens that may see each other, and so does sdpa in most families (`documents.py`), where eager is given a mask of every
pair. flex and flash train on CUDA cards alone; what was trained with them is evaluated, asked and exported on a machine
without them through sdpa. A family without sdpa takes eager in its place.

Where several heads share keys and values, a card's flash kernel takes them so; those that it has for fp32, and for any
dtype before Ampere, do not. transformers asks for it all the same, and torch then writes out the scores of every pair
of tokens: on a T4 2 GiB in fp32 for 32 heads of 4,096 tokens, several times. There each head gets a copy, as it does
where there is a mask.
"""

from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import use_gqa_in_sdpa
from transformers.utils import is_flash_attn_2_available

from qlora_kit.base.documents import is_listed
from qlora_kit.errors import DeviceError
from qlora_kit.ops.stand_in import stands_for_card

Attention = Literal["sdpa", "eager", "flex", "flash"]

_IMPLEMENTATIONS = {"eager": "eager", "flex": "flex_attention", "flash": "flash_attention_2"}
_AMPERE = 8
"""The first compute capability with bf16 and a flash kernel."""


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


def reads_apart(asked: str, config: PretrainedConfig) -> bool:
    """Whether attention, by its name in a recipe, computes of packed documents no pair of tokens from two of them."""
    return asked in ("sdpa", "flex", "flash") and is_listed(config)


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


def may_share_heads(attention_mask: Tensor | None, key: Tensor, value: Tensor) -> bool:
    """Whether sdpa is given keys and values that several heads share, and not a copy for each head.

    Args:
        attention_mask: as sdpa is given it.
        key: (batch, heads, tokens, width).
        value: as key.
    """
    return _kernel_shares(key) and use_gqa_in_sdpa(attention_mask, key, value)


def _kernel_shares(key: Tensor) -> bool:
    if not key.is_cuda:
        return not stands_for_card() or key.dtype == torch.bfloat16
    return key.dtype != torch.float32 and torch.cuda.get_device_capability(key.device)[0] >= _AMPERE


sdpa_attention.use_gqa_in_sdpa = may_share_heads
