"""What each block keeps for its backward pass: everything, or only its input, from which it runs forward once more."""

from functools import partial
from typing import Literal

import torch.utils.checkpoint
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_kit.errors import ModelError

_recompute = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)

Policy = Literal["keep", "recompute"]


def set_activation_policy(model: nn.Module, policy: Policy) -> int:
    """Give every block of the model the same policy; it holds in training mode only.

    Checkpointing is the non-reentrant kind: the reentrant one cuts the graph of a model whose inputs need no gradient.

    Args:
        model: a transformers model.
        policy: keep or recompute.

    Returns:
        The number of blocks.

    Raises:
        ModelError: recomputation is asked for and the model has no blocks that can do it.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if policy == "recompute" and not blocks:
        raise ModelError(f"{type(model).__name__} has no blocks that can be recomputed; set memory.activations=keep")
    for block in blocks:
        block.gradient_checkpointing = policy == "recompute"
        block._gradient_checkpointing_func = _recompute  # type: ignore[assignment]
    return len(blocks)
