"""RMS norm, some rows a program, each row whole: x is read once in both directions, and y, 1 / rms or dx written once.

The twin is `ops/rms_norm.py`, and rounding follows it: x / rms(x) to the dtype of x and then its product with the
weight (twice), or the product of all in fp32 once; only sums are taken in another order. Backward has fp32 throughout
and one rounding at the end.

Axes: T rows, H width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096
"""Of all rows of a program, where a row has fewer."""
_WARP_ELEMENTS = 512
"""16 a thread: what it holds of them in fp32 stays in registers."""


def rms_norm(x: Tensor, weight_H: Tensor, epsilon: float, form: str, y: Tensor, inverse_T: Tensor) -> None:
    """Fill y, as x, and 1 / rms, (T,), fp32."""
    grid, sizes, warps = _layout(x)
    with torch.cuda.device_of(x):
        _forward[grid](x, weight_H, y, inverse_T, epsilon, *sizes, form != "twice", form == "offset", num_warps=warps)


def rms_norm_backward(grad: Tensor, x: Tensor, weight_H: Tensor, inverse_T: Tensor, form: str, dx: Tensor) -> None:
    """Fill dx, as x."""
    grid, sizes, warps = _layout(x)
    with torch.cuda.device_of(x):
        _backward[grid](grad, x, weight_H, inverse_T, dx, *sizes, form == "offset", num_warps=warps)


def _layout(x: Tensor) -> tuple[tuple[int], tuple[int, int, int, int], int]:
    """The grid; T, H, rows of a program and its columns, powers of two; warps."""
    width = x.shape[-1]
    tokens, columns = x.numel() // width, triton.next_power_of_2(width)
    rows = max(1, _ELEMENTS // columns)
    warps = min(32, rows * columns // _WARP_ELEMENTS)
    return (triton.cdiv(tokens, rows),), (tokens, width, rows, columns), warps


@triton.jit
def _place(tokens: tl.tensor, width: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    """Rows, columns and offsets of a program, and which of them are there; 64 bits, since T times H may pass 2^31."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    there = (rows < tokens)[:, None] & (columns < width)[None, :]
    return rows, columns, rows[:, None] * width + columns[None, :], there


@triton.jit
def _factor(weight: tl.tensor, columns: tl.tensor, width: tl.tensor, IS_OFFSET: tl.constexpr) -> tl.tensor:
    w = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    return (1.0 + w if IS_OFFSET else w)[None, :]


@triton.jit
def _forward(
    x: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    inverse: tl.tensor,
    epsilon: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROUNDS_ONCE: tl.constexpr,
    IS_OFFSET: tl.constexpr,
) -> None:
    rows, columns, offsets, there = _place(tokens, width, ROWS, COLUMNS)
    x32 = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32, 1) / width + epsilon)
    tl.store(inverse + rows, scale, mask=rows < tokens)
    normed = x32 * scale[:, None]
    if not ROUNDS_ONCE:
        normed = normed.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + offsets, normed * _factor(weight, columns, width, IS_OFFSET), mask=there)


@triton.jit
def _backward(
    grad: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    inverse: tl.tensor,
    dx: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_OFFSET: tl.constexpr,
) -> None:
    rows, columns, offsets, there = _place(tokens, width, ROWS, COLUMNS)
    x32 = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
    scaled = tl.load(grad + offsets, mask=there, other=0.0).to(tl.float32)
    scaled *= _factor(weight, columns, width, IS_OFFSET)
    scale = tl.load(inverse + rows, mask=rows < tokens, other=0.0)
    along = tl.sum(scaled * x32, 1) / width * scale * scale
    tl.store(dx + offsets, scale[:, None] * (scaled - x32 * along[:, None]), mask=there)
