"""Gated products, element by element. The twin is `ops/gated.py`: act(g) is rounded to the dtype of g, and then its
product with u, as there; what goes back to g is rounded once, at its end.

GELU is taken as g sigmoid(2 k), which is g (1 + tanh(k)) / 2 without the difference of two numbers close to one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Elements of a program: 8 a thread of 4 warps, 16 bytes at a time in 16 bits."""


def gated(g: Tensor, u: Tensor, gate: str, out: Tensor) -> None:
    """Fill out, as g."""
    with torch.cuda.device_of(g):
        _forward[(triton.cdiv(g.numel(), _BLOCK),)](g, u, out, g.numel(), gate == "gelu", _BLOCK)


def gated_backward(grad: Tensor, g: Tensor, u: Tensor, gate: str, dg: Tensor, du: Tensor) -> None:
    """Fill dg and du, as g."""
    with torch.cuda.device_of(g):
        _backward[(triton.cdiv(g.numel(), _BLOCK),)](grad, g, u, dg, du, g.numel(), gate == "gelu", _BLOCK)


@triton.jit
def _twice_k(x: tl.tensor) -> tl.tensor:
    """2 k = 2 sqrt(2 / pi) (x + 0.044715 x^3)"""
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def _place(count: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Offsets of a program, in 64 bits, and which of them are there."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return offsets, offsets < count


@triton.jit
def _forward(
    g: tl.tensor, u: tl.tensor, out: tl.tensor, count: tl.tensor, IS_GELU: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    offsets, there = _place(count, BLOCK)
    x = tl.load(g + offsets, mask=there, other=0.0).to(tl.float32)
    through = tl.load(u + offsets, mask=there, other=0.0).to(tl.float32)
    act = x / (1.0 + tl.exp(-(_twice_k(x) if IS_GELU else x)))
    tl.store(out + offsets, act.to(out.dtype.element_ty).to(tl.float32) * through, mask=there)


@triton.jit
def _backward(
    grad: tl.tensor,
    g: tl.tensor,
    u: tl.tensor,
    dg: tl.tensor,
    du: tl.tensor,
    count: tl.tensor,
    IS_GELU: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    offsets, there = _place(count, BLOCK)
    d = tl.load(grad + offsets, mask=there, other=0.0).to(tl.float32)
    x = tl.load(g + offsets, mask=there, other=0.0).to(tl.float32)
    through = tl.load(u + offsets, mask=there, other=0.0).to(tl.float32)
    if IS_GELU:
        near = tl.minimum(tl.maximum(x, -16.0), 16.0)  # beyond it the slope is 0 or 1, and x^3 soon no number
        near = tl.where(x == x, near, x)
        e = tl.exp(-_twice_k(near))
        share = 1.0 / (1.0 + e)
        slope = share + near * share * (1.0 / (1.0 + 1.0 / e)) * 1.5957691216057308 * (1.0 + 0.134145 * near * near)
    else:
        share = 1.0 / (1.0 + tl.exp(-x))
        slope = share * (1.0 + x * (1.0 - share))
    act = (x * share).to(du.dtype.element_ty).to(tl.float32)
    tl.store(du + offsets, d * act, mask=there)
    tl.store(dg + offsets, d * through * slope, mask=there)
