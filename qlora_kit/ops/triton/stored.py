"""One row times a quantised matrix as it is stored, as for the next token of an answer: codes are read, and no decoded
matrix is written and read again, which is eight times as many bytes of a 4-bit one.

Some outputs a program, along their whole width. Each weight is rounded to the dtype of x as its decoder rounds it
(`base/kernels.py`), sums are fp32 and rounded once; the twin is `multiply_stored_plain` in `base/multiply.py`.

Axes: O out, I in.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_OUTPUTS = 4
"""Of a program, whose x is then read once for all."""
_WEIGHTS = 512
"""Of each output that are taken together."""
_WARPS = 4


def row_times_4bit(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    tables: tuple[Tensor, Tensor],
    block_size: int,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """Fill y, (1, out), from x, (1, in): the width is whole blocks of constants, block_size a power of two.

    Args:
        x: and codes, absmax, scale, offset and block_size as `decode_4bit_into` is given them.
        tables: the 16 values of a code, and the 256 of a constant's.
        bias: (out,) in the dtype of x, or None.
    """
    out, width = y.shape[1], x.shape[1]
    is_double, of_block = scale is not None, max(1, _WEIGHTS // block_size)
    # Not fused: or the compiler joins a constant's product and sum, and rounds once where its decoder rounds twice.
    with torch.cuda.device_of(x):
        _times_4bit[(triton.cdiv(out, _OUTPUTS),)](
            x, codes, absmax, absmax if scale is None else scale, absmax if offset is None else offset, *tables,
            x if bias is None else bias, y, out, width // block_size, is_double, bias is not None,
            block_size // 2, of_block, _OUTPUTS, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def row_times_int8(x: Tensor, codes_OI: Tensor, absmax_O: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """The same of int8, of any width."""
    out, width = codes_OI.shape
    with torch.cuda.device_of(x):
        _times_int8[(triton.cdiv(out, _OUTPUTS),)](
            x, codes_OI, absmax_O, x if bias is None else bias, y, out, width, bias is not None, _WEIGHTS, _OUTPUTS,
            num_warps=_WARPS,
        )  # fmt: skip


@triton.jit
def _times_4bit(
    x: tl.tensor,
    codes: tl.tensor,
    absmax: tl.tensor,
    scale: tl.tensor,
    offset: tl.tensor,
    table4: tl.tensor,
    table8: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    out: tl.tensor,
    row_blocks: tl.tensor,
    IS_DOUBLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
    OUTPUTS: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    inner = tl.arange(0, BYTES)
    sums = tl.zeros((OUTPUTS, BLOCKS, BYTES), tl.float32)
    for start in range(0, row_blocks, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        there = (rows < out)[:, None] & (blocks < row_blocks)[None, :]
        places = rows[:, None] * row_blocks + blocks[None, :]
        constants = tl.load(absmax + places, mask=there, other=0)
        if IS_DOUBLE:
            # 256: ABSMAX_BLOCK of base/kernels.py.
            scales = tl.load(scale + places // 256, mask=there, other=0.0)
            constants = tl.load(table8 + constants.to(tl.int32)) * scales + tl.load(offset)
        pairs = tl.load(codes + places[:, :, None] * BYTES + inner[None, None, :], mask=there[:, :, None], other=0)
        even = x + (blocks[:, None] * BYTES + inner[None, :]) * 2
        first = tl.load(even, mask=(blocks < row_blocks)[:, None], other=0.0)
        second = tl.load(even + 1, mask=(blocks < row_blocks)[:, None], other=0.0)
        high = tl.load(table4 + (pairs >> 4).to(tl.int32)) * constants[:, :, None]
        low = tl.load(table4 + (pairs & 15).to(tl.int32)) * constants[:, :, None]
        sums += high.to(x.dtype.element_ty).to(tl.float32) * first.to(tl.float32)[None, :, :]
        sums += low.to(x.dtype.element_ty).to(tl.float32) * second.to(tl.float32)[None, :, :]
    _store(tl.sum(tl.sum(sums, 2), 1), bias, y, rows, out, HAS_BIAS)


@triton.jit
def _times_int8(
    x: tl.tensor,
    codes: tl.tensor,
    absmax: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    HAS_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    constants = tl.load(absmax + rows, mask=rows < out, other=0.0)[:, None]
    sums = tl.zeros((OUTPUTS, COLUMNS), tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        there = (rows < out)[:, None] & (columns < width)[None, :]
        read = tl.load(codes + rows[:, None] * width + columns[None, :], mask=there, other=0)
        weights = (read.to(tl.float32) * constants * (1 / 127)).to(x.dtype.element_ty).to(tl.float32)
        sums += weights * tl.load(x + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    _store(tl.sum(sums, 1), bias, y, rows, out, HAS_BIAS)


@triton.jit
def _store(
    sums: tl.tensor, bias: tl.tensor, y: tl.tensor, rows: tl.tensor, out: tl.tensor, HAS_BIAS: tl.constexpr
) -> None:
    if HAS_BIAS:
        sums += tl.load(bias + rows, mask=rows < out, other=0.0).to(tl.float32)
    tl.store(y + rows, sums, mask=rows < out)
