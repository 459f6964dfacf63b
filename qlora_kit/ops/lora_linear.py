"""y = x W^T + bias + scale (x A^T) B^T, with a frozen W that exists only while it is multiplied.

W is decoded in the forward pass, used and forgotten, and decoded again in the backward pass, which needs it for
dx = g W. So autograd keeps no dense weight: only x, the small x A^T, and the adapter itself. x is kept as it came, so
that layers with one input (query, key and value; gate and up) keep one tensor between them, under autocast as well.

    dx = g W + scale (g B) A        dA = scale (g B)^T x        dB = scale g^T (x A^T)

What is kept is kept by a node that stands before the product and not around it. A block that runs again for its
backward pass ends where all that it kept is there once more, so the product of its last layer, which nothing waits
for, is not taken again: that of down_proj is 22 % of a Llama block's work.

DoRA gives every row of the merged weight a norm of its own, m:

    y = m / n * (x W^T + scale (x A^T) B^T) + bias        n_o = ||W_o + scale B_o A||, a constant in the backward pass

The norms cost no decoding of their own: n_o^2 = ||W_o||^2 + 2 scale B_o (A W^T)_o + scale^2 B_o A A^T B_o^T, the first
term never changes, and A W^T is taken while W stands decoded for the product with x.

In 16 bits the small products x A^T and g B are taken as two matrices, the second with what rounding has cut off the
first: so the update joins the sum with W as if it had been formed in fp32, and is rounded with it. With one matrix
the error of y and dx is half as large again (benchmarks/LOG.md).

Axes: T tokens (all leading axes flattened), I in, O out, R rank. The adapter is cast to the compute dtype, where it
meets the decoded weight; its gradients come back in its own dtype.

Sources: LoRA, arXiv 2106.09685, equation 3; QLoRA, arXiv 2305.14314, equation 5; DoRA, arXiv 2402.09353, equations 5
and 11.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny

Decode = Callable[[torch.dtype], Tensor]
"""Gives the frozen weight, (out, in), in the dtype asked for."""


def lora_linear(
    x: Tensor,
    decode: Decode,
    bias: Tensor | None = None,
    a_RI: Tensor | None = None,
    b_OR: Tensor | None = None,
    scale: float = 1.0,
    x_adapter: Tensor | None = None,
) -> Tensor:
    """A frozen linear layer and, where `a_RI` and `b_OR` are given, its low-rank update.

    Args:
        x: input, (..., in), in the compute dtype; under autocast that is autocast's, whatever x has.
        decode: makes the frozen weight, (out, in); it must return the same values at every call.
        bias: frozen, (out,), or None.
        a_RI: (rank, in), any floating dtype.
        b_OR: (out, rank), any floating dtype.
        scale: factor of the update, alpha / rank.
        x_adapter: what the update sees in place of x (x with dropout), or None.

    Returns:
        (..., out) in the compute dtype.
    """
    if a_RI is None or b_OR is None:
        return _FrozenLinear.apply(x, decode, bias)
    slot, *h = _Kept.apply(x, _own(x_adapter), decode, a_RI, b_OR, scale)
    return _Product.apply(slot, x, tuple(h), decode, bias, None, b_OR, scale)


def dora_linear(
    x: Tensor,
    decode: Decode,
    bias: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    scale: float,
    magnitude_O: Tensor,
    square_O: Tensor,
    x_adapter: Tensor | None = None,
) -> Tensor:
    """The same with the rows of the merged weight scaled to the norms `magnitude_O` (DoRA).

    Args:
        x: as for `lora_linear`, like those that are not named here.
        magnitude_O: trained norms, (out,), fp32.
        square_O: the squared norms of the frozen weight's rows, (out,), fp32.

    Returns:
        (..., out) in the compute dtype.
    """
    slot, *h = _Kept.apply(x, _own(x_adapter), decode, a_RI, b_OR, scale)
    y, aw_RO = _Product.apply(slot, x, tuple(h), decode, None, a_RI, b_OR, scale)
    y = y * (magnitude_O / row_norms(square_O, aw_RO, a_RI, b_OR, scale)).to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


@torch.no_grad()
def row_norms(square_O: Tensor, aw_RO: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """||W_o + scale B_o A|| of every row, (out,), fp32, without the dense sum.

    Args:
        square_O: ||W_o||^2, fp32.
        aw_RO: A W^T, any floating dtype.
        a_RI: A.
        b_OR: B.
        scale: factor of the update.
    """
    a, b = a_RI.float(), b_OR.float()
    crossed = (b * aw_RO.t().float()).sum(1)
    own = ((b @ (a @ a.t())) * b).sum(1)
    # Not zero: a row of zeros has no direction, and its factor 0 / tiny is 0, where 0 / 0 would be NaN.
    return square_O.add(crossed, alpha=2 * scale).add_(own, alpha=scale**2).clamp_min_(_TINY).sqrt_()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an operator on x computes: its own, under autocast autocast's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _own(x_adapter: Tensor | None) -> Tensor | None:
    """The update's own input, which no other layer keeps: cast before, it is kept in the compute dtype."""
    return None if x_adapter is None else x_adapter.to(compute_dtype(x_adapter))


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., in) -> (T, in), in `dtype`."""
    return x.reshape(-1, x.shape[-1]).to(dtype)


def _product(left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
    """left @ right: in fp32 one matrix; in 16 bits a second one with what rounding has cut off the first.

    For the small products with A or B only: the second costs as much again, and leaves the sum with W the one rounding
    that is seen in the result.
    """
    product = left @ right
    if product.dtype.itemsize > 2:
        return (product,)
    return product, torch.addmm(product, left, right, beta=-1)


def _add_product(sum_TN: Tensor, parts: tuple[Tensor, ...], right_RN: Tensor, scale: float) -> None:
    """sum += scale (all parts) @ right, in place and rounded once."""
    if len(parts) == 1:
        sum_TN.addmm_(parts[0], right_RN, alpha=scale)
    else:
        sum_TN.addmm_(torch.cat(parts, 1), torch.cat([right_RN] * len(parts)), alpha=scale)


def lora_linear_plain(
    x: Tensor,
    decode: Decode,
    bias: Tensor | None = None,
    a_RI: Tensor | None = None,
    b_OR: Tensor | None = None,
    scale: float = 1.0,
    x_adapter: Tensor | None = None,
) -> Tensor:
    """The same function in plain torch: the oracle of the tests. It keeps the dense weight until backward."""
    y = F.linear(x, decode(x.dtype), None if bias is None else bias.to(x.dtype))
    if a_RI is None or b_OR is None:
        return y
    x = x if x_adapter is None else x_adapter
    return y + scale * F.linear(F.linear(x, a_RI.to(x.dtype)), b_OR.to(x.dtype))


def _shaped(y_TO: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same memory in another shape, and to autograd no view: models add to the output of a linear layer in place,
    which autograd does not allow on a view that a function of ours returns."""
    return torch.ops.aten._unsafe_view(y_TO, shape)


class _FrozenLinear(torch.autograd.Function):
    """x W^T + bias; nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, decode: Decode, bias: Tensor | None) -> Tensor:
        ctx.decode, ctx.shape, ctx.dtype = decode, x.shape, x.dtype
        y_TO = _base_product(x, decode(compute_dtype(x)), bias)
        return _shaped(y_TO, (*x.shape[:-1], y_TO.shape[-1]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        dx = grad.reshape(-1, grad.shape[-1]) @ ctx.decode(grad.dtype)
        return dx.view(ctx.shape).to(ctx.dtype), None, None


class _Kept(torch.autograd.Function):
    """x A^T, and all that the backward pass of the layer wants. The gradient of the layer's result, which is
    `_Product`'s, comes in through `slot`, which has its shape and no memory."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_adapter: Tensor | None, decode: Decode, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        ctx.decode, ctx.scale, ctx.has_own = decode, scale, x_adapter is not None
        ctx.shape, ctx.dtype = x.shape, x.dtype
        dtype = compute_dtype(x)
        seen = x if x_adapter is None else x_adapter
        h = _product(_rows(seen, dtype), a_RI.to(dtype).t())
        ctx.save_for_backward(seen if a_RI.requires_grad else None, h[0], a_RI, b_OR)
        ctx.mark_non_differentiable(*h)
        shape = (*x.shape[:-1], len(b_OR))
        slot = x.new_empty_strided(shape, [0] * len(shape), dtype=dtype)
        return slot, *h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        seen, h_TR, a_RI, b_OR = ctx.saved_tensors
        needs_x, needs_own, _, needs_a, needs_b, _ = ctx.needs_input_grad
        g_TO = grad.reshape(-1, grad.shape[-1])
        dx = dx_adapter = da = db = None
        gb: tuple[Tensor, ...] = ()
        if needs_x or needs_own or needs_a:
            gb = _product(g_TO, b_OR.to(grad.dtype))
        if needs_x:
            dx = g_TO @ ctx.decode(grad.dtype)
            if not ctx.has_own:
                _add_product(dx, gb, a_RI.to(grad.dtype), ctx.scale)
            dx = dx.view(ctx.shape).to(ctx.dtype)
        if needs_own:
            dx_adapter = (gb[0] @ a_RI.to(grad.dtype)).mul_(ctx.scale).view(ctx.shape)
        if needs_a:
            da = (gb[0].t() @ _rows(seen, grad.dtype)).mul_(ctx.scale).to(a_RI.dtype)
        if needs_b:
            db = (g_TO.t() @ h_TR).mul_(ctx.scale).to(b_OR.dtype)
        return dx, dx_adapter, None, da, db, None


class _Product(torch.autograd.Function):
    """x W^T + bias + scale h B^T, and A W^T where it is asked for; nothing is kept, and `slot` has the one gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        slot: Tensor,
        x: Tensor,
        h: tuple[Tensor, ...],
        decode: Decode,
        bias: Tensor | None,
        a_RI: Tensor | None,
        b_OR: Tensor,
        scale: float,
    ) -> Tensor | tuple[Tensor, Tensor]:
        w_OI = decode(slot.dtype)
        y_TO = _base_product(x, w_OI, bias)
        _add_product(y_TO, h, b_OR.to(slot.dtype).t(), scale)
        y = _shaped(y_TO, tuple(slot.shape))
        if a_RI is None:
            return y
        aw_RO = F.linear(a_RI.to(slot.dtype), w_OI)
        ctx.mark_non_differentiable(aw_RO)
        return y, aw_RO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return grad, None, None, None, None, None, None, None


def _base_product(x: Tensor, w_OI: Tensor, bias: Tensor | None) -> Tensor:
    """(T, O), in the dtype of the weight."""
    return F.linear(_rows(x, w_OI.dtype), w_OI, None if bias is None else bias.to(w_OI.dtype))
