"""Differentiable mathematics on plain tensors; nothing here knows a model, a file or a recipe."""

from qlora_kit.ops.linear_cross_entropy import (
    IGNORED,
    LogitRule,
    head_cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_plain,
)
from qlora_kit.ops.lora_linear import Decode, dora_linear, lora_linear, lora_linear_plain, row_norms
from qlora_kit.ops.sliced_cross_entropy import sliced_cross_entropy
from qlora_kit.ops.slices import sliced_linear
from qlora_kit.ops.workspace import Workspace

__all__ = [
    "IGNORED",
    "Decode",
    "LogitRule",
    "Workspace",
    "dora_linear",
    "head_cross_entropy",
    "linear_cross_entropy",
    "linear_cross_entropy_plain",
    "lora_linear",
    "lora_linear_plain",
    "row_norms",
    "sliced_cross_entropy",
    "sliced_linear",
]
