"""Differentiable mathematics on plain tensors; nothing here knows a model, a file or a recipe."""

from qlora_kit.ops.attention import attend, attend_plain, can_attend
from qlora_kit.ops.frozen import Decode, Stored
from qlora_kit.ops.gated import Gate, gated, gated_plain
from qlora_kit.ops.linear_cross_entropy import (
    head_cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_plain,
)
from qlora_kit.ops.lora_linear import (
    Shared,
    Update,
    compute_dtype,
    dora_linear,
    lora_linear,
    lora_linear_plain,
    row_norms,
    share_input,
)
from qlora_kit.ops.products import KeptProducts
from qlora_kit.ops.rms_norm import Form, rms_norm, rms_norm_plain
from qlora_kit.ops.rotary import rotary, rotary_plain
from qlora_kit.ops.sliced_cross_entropy import sliced_cross_entropy
from qlora_kit.ops.slices import sliced_linear
from qlora_kit.ops.softmax_gradient import IGNORED, LogitRule
from qlora_kit.ops.workspace import Workspace

__all__ = [
    "IGNORED",
    "Decode",
    "Form",
    "Gate",
    "KeptProducts",
    "LogitRule",
    "Shared",
    "Stored",
    "Update",
    "Workspace",
    "attend",
    "attend_plain",
    "can_attend",
    "compute_dtype",
    "dora_linear",
    "gated",
    "gated_plain",
    "head_cross_entropy",
    "linear_cross_entropy",
    "linear_cross_entropy_plain",
    "lora_linear",
    "lora_linear_plain",
    "rms_norm",
    "rms_norm_plain",
    "rotary",
    "rotary_plain",
    "row_norms",
    "share_input",
    "sliced_cross_entropy",
    "sliced_linear",
]
