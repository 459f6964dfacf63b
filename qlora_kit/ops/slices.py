"""y = x W^T + bias with a frozen W that is decoded a few rows at a time: for the output head, the tallest matrix.

Decoded at once, the head of an 8B model takes 1.2 GB beside the logits; a slice is smaller than a layer of its body.
Backward decodes them once more, dx = sum over slices of g_slice W_slice.

Axes: T tokens, I in, O out (the vocabulary).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qlora_kit.ops.lora_linear import compute_dtype
from qlora_kit.ops.rows import as_rows, parts_alike
from qlora_kit.ops.wide import linear, linear_back

DecodeRows = Callable[[slice, torch.dtype], Tensor]
"""Gives some rows of the frozen weight, (rows, in), in the dtype asked for."""

SLICE_ELEMENTS = 2**24
"""Weights in one slice: 32 MiB in 16 bits."""


def sliced_linear(x: Tensor, decode_rows: DecodeRows, shape: tuple[int, int], bias: Tensor | None = None) -> Tensor:
    """A frozen linear layer of which never more than a slice stands decoded.

    Args:
        x: input, (..., in), in the compute dtype; under autocast that is autocast's, whatever x has.
        decode_rows: reads rows of the weight; it must return the same values at every call.
        shape: (out, in) of the weight.
        bias: frozen, (out,), or None.

    Returns:
        (..., out) in the compute dtype.
    """
    return _SlicedLinear.apply(x.to(compute_dtype(x)), decode_rows, shape, bias)


def row_slices(shape: tuple[int, int], x: Tensor, at_most: int | None = None) -> Iterator[slice]:
    """Rows of a weight, (out, in), that are decoded at one time: of `SLICE_ELEMENTS`, and no more than `at_most`; of a
    fake `x` three such slices."""
    out, width = shape
    step = max(1, SLICE_ELEMENTS // width)
    return parts_alike(out, step if at_most is None else min(step, at_most), x)


class _SlicedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, decode_rows: DecodeRows, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        ctx.decode_rows, ctx.shape = decode_rows, shape
        y = x.new_empty(*x.shape[:-1], shape[0])
        x_TI, y_TO = as_rows(x), as_rows(y)
        for rows in row_slices(shape, x_TI):
            linear(x_TI, decode_rows(rows, x.dtype), out=y_TO[:, rows])
        return y if bias is None else y.add_(bias.to(y.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        g_TO = as_rows(grad)
        # Not in 16 bits, where the sum would be rounded at every slice.
        dtype = torch.promote_types(grad.dtype, torch.float32)
        dx_TI = torch.zeros(len(g_TO), ctx.shape[1], dtype=dtype, device=grad.device)
        for rows in row_slices(ctx.shape, g_TO):
            dx_TI.add_(linear_back(g_TO[:, rows], ctx.decode_rows(rows, grad.dtype)))
        return dx_TI.to(grad.dtype).view(*grad.shape[:-1], ctx.shape[1]), None, None, None
