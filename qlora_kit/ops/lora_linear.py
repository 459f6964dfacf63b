"""y = x W^T + bias + scale (x A^T) B^T, with a frozen W that exists only while it is multiplied.

W is decoded in the forward pass, used and forgotten, and decoded again in the backward pass, which needs it for
dx = g W. So autograd keeps no dense weight: only x, the small x A^T, and the adapter itself.

    dx = g W + scale (g B) A        dA = scale (g B)^T x        dB = scale g^T (x A^T)

Axes: T tokens (all leading axes flattened), I in, O out, R rank. The adapter is cast to the dtype of x, where it meets
the decoded weight; its gradients come back in its own dtype.

Source: LoRA, arXiv 2106.09685, equation 3; QLoRA, arXiv 2305.14314, equation 5.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Decode = Callable[[torch.dtype], Tensor]
"""Gives the frozen weight, (out, in), in the dtype asked for."""


def lora_linear(
    x: Tensor,
    decode: Decode,
    bias: Tensor | None = None,
    a_RI: Tensor | None = None,
    b_OR: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """A frozen linear layer and, where `a_RI` and `b_OR` are given, its low-rank update, in one autograd node.

    Args:
        x: input, (..., in), the compute dtype; under autocast it is cast to the autocast dtype first.
        decode: makes the frozen weight, (out, in); it must return the same values at every call.
        bias: frozen, (out,), or None.
        a_RI: (rank, in), any floating dtype.
        b_OR: (out, rank), any floating dtype.
        scale: factor of the update, alpha / rank.

    Returns:
        (..., out) in the dtype of x.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _LoraLinear.apply(x, decode, bias, a_RI, b_OR, scale)


def lora_linear_plain(
    x: Tensor,
    decode: Decode,
    bias: Tensor | None = None,
    a_RI: Tensor | None = None,
    b_OR: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The same function in plain torch: the oracle of the tests. It keeps the dense weight until backward."""
    y = F.linear(x, decode(x.dtype), None if bias is None else bias.to(x.dtype))
    if a_RI is None or b_OR is None:
        return y
    return y + scale * F.linear(F.linear(x, a_RI.to(x.dtype)), b_OR.to(x.dtype))


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, decode: Decode, bias: Tensor | None, a_RI: Tensor | None, b_OR: Tensor | None, scale: float
    ) -> Tensor:
        ctx.decode, ctx.scale = decode, scale
        x_TI = x.reshape(-1, x.shape[-1])
        w_OI = decode(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        y_TO = F.linear(x_TI, w_OI, bias)
        if a_RI is None or b_OR is None:
            ctx.save_for_backward(None, None, None, None)
        else:
            h_TR = x_TI @ a_RI.to(x.dtype).t()
            y_TO.addmm_(h_TR, b_OR.to(x.dtype).t(), alpha=scale)
            ctx.save_for_backward(x_TI if a_RI.requires_grad else None, h_TR, a_RI, b_OR)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, h_TR, a_RI, b_OR = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        g_TO = grad.reshape(-1, grad.shape[-1])
        dx = da = db = g_TR = None
        if b_OR is not None and (needs_x or needs_a):
            g_TR = (g_TO @ b_OR.to(grad.dtype)).mul_(ctx.scale)
        if needs_x:
            dx = g_TO @ ctx.decode(grad.dtype)
            if g_TR is not None:
                dx.addmm_(g_TR, a_RI.to(grad.dtype))
            dx = dx.view(*grad.shape[:-1], dx.shape[-1])
        if needs_a and g_TR is not None:
            da = (g_TR.t() @ x_TI).to(a_RI.dtype)
        if needs_b:
            db = (g_TO.t() @ h_TR).mul_(ctx.scale).to(b_OR.dtype)
        return dx, None, None, da, db, None
