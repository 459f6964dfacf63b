"""Differentiable mathematics on plain tensors; nothing here knows a model, a file or a recipe."""

from qlora_kit.ops.lora_linear import lora_linear, lora_linear_plain

__all__ = ["lora_linear", "lora_linear_plain"]
