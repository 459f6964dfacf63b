"""Rotary position embedding, a token's heads some at a time. The twin is `ops/rotary.py`: each product is rounded to
the dtype of x, and then its sum with the other, as there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Pairs of a program at most."""


def rotary(x: Tensor, cos: Tensor, sin: Tensor, is_back: bool, y: Tensor) -> None:
    """Fill y, (B, T, N, D), as x; angles are (B or 1, T, D)."""
    rows, tokens, heads, width = x.shape
    pairs = heads * width // 2
    block = min(_BLOCK, triton.next_power_of_2(max(1, pairs)))
    grid = (rows * tokens, triton.cdiv(pairs, block))
    with torch.cuda.device_of(x):
        # Or the compiler joins a product and the sum, and rounds once where torch rounds twice.
        _turn[grid](x, cos, sin, y, len(cos) * tokens, pairs, width // 2, is_back, block, enable_fp_fusion=False)


@triton.jit
def _turn(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    y: tl.tensor,
    turns: tl.tensor,
    pairs: tl.tensor,
    half: tl.tensor,
    IS_BACK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = pair < pairs
    inside = pair % half
    place = token * pairs * 2 + pair // half * half * 2 + inside
    angle = token % turns * half * 2 + inside
    kind: tl.constexpr = y.dtype.element_ty
    x1 = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    x2 = tl.load(x + place + half, mask=there, other=0.0).to(tl.float32)
    cos1 = tl.load(cos + angle, mask=there, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + angle + half, mask=there, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + angle, mask=there, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + angle + half, mask=there, other=0.0).to(tl.float32)
    if IS_BACK:
        sin1, sin2 = -sin2, -sin1
    tl.store(y + place, (x1 * cos1).to(kind).to(tl.float32) - (x2 * sin1).to(kind).to(tl.float32), mask=there)
    tl.store(y + place + half, (x2 * cos2).to(kind).to(tl.float32) + (x1 * sin2).to(kind).to(tl.float32), mask=there)
