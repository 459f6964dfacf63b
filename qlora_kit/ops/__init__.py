"""Differentiable mathematics on plain tensors; nothing here knows a model, a file or a recipe."""

from qlora_kit.ops.lora_linear import Decode, dora_linear, lora_linear, lora_linear_plain, row_norms
from qlora_kit.ops.slices import sliced_linear
from qlora_kit.ops.workspace import Workspace

__all__ = ["Decode", "Workspace", "dora_linear", "lora_linear", "lora_linear_plain", "row_norms", "sliced_linear"]
