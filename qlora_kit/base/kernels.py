"""Decoding into memory that is there already, as operators of torch: `qlora_kit::decode_4bit` and `::decode_int8`.

bitsandbytes' own operators make a new tensor at every call, but for 4 bits on CUDA. On a CPU the C function under its
operator is called instead, with a pointer to our memory.

Each operator has a fake form, counts no FLOPs, and has a twin in plain torch. Axes: O out, I in.
"""

import ctypes
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from bitsandbytes.cextension import lib
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import register_flop_formula

from qlora_kit.ops.native import address, library, size, threads, typed_kernel
from qlora_kit.ops.rows import row_parts

_C_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_LARGEST_BLOCK = 1024
"""Weights of a constant up to which bitsandbytes decodes in C. Above, on AVX-512 processors, its C function errs, and
its operator compiles Python for seconds at its first call. A constant that stands for each part of them is the same.
"""
ABSMAX_BLOCK = 256
"""Constants that share one second-level scale under double quantisation (QLoRA, section 3)."""

torch.library.define(
    "qlora_kit::decode_4bit",
    "(Tensor codes, Tensor absmax, Tensor? scale, Tensor? offset, int block_size, str kind, Tensor(a!) out) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "qlora_kit::decode_int8",
    "(Tensor codes, Tensor absmax, Tensor(a!) out) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)


def decode_4bit_into(
    out_OI: Tensor,
    codes: Tensor,
    absmax: Tensor,
    block_size: int,
    kind: str,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Fill `out_OI` with a 4-bit matrix, each value rounded once from the fp32 product of table entry and constant.

    Args:
        out_OI: (out, in), any floating dtype on a CPU, contiguous.
        codes: uint8 (ceil(out * in / 2),), the even element in the high half.
        absmax: fp32 (blocks,), or uint8 under double quantisation.
        block_size: weights that share one constant.
        kind: nf4 or fp4.
        scale: fp32, one for 256 constants, under double quantisation.
        offset: fp32 scalar, under double quantisation.

    Returns:
        `out_OI`.

    Raises:
        RuntimeError: codes or constants are not as many as the shape takes, or `out_OI` is not contiguous.
    """
    torch.ops.qlora_kit.decode_4bit(codes, absmax, scale, offset, block_size, kind, out_OI)
    return out_OI


def decode_int8_into(out_OI: Tensor, codes_OI: Tensor, absmax_O: Tensor) -> Tensor:
    """Fill `out_OI` with an int8 matrix, rounded once from fp32.

    Args:
        out_OI: (out, in), any floating dtype.
        codes_OI: int8 (out, in).
        absmax_O: fp32 (out,).

    Returns:
        `out_OI`.
    """
    torch.ops.qlora_kit.decode_int8(codes_OI, absmax_O, out_OI)
    return out_OI


def decode_4bit_plain(codes: Tensor, absmax: Tensor, block_size: int, kind: str, out_OI: Tensor) -> None:
    """The operator in plain torch, for any shape and dtype; in memory it takes 16 bytes a weight and more."""
    halves = torch.stack((codes >> 4, codes & 0xF), dim=1).view(-1)[: out_OI.numel()].int()
    constants = absmax.repeat_interleave(block_size)[: out_OI.numel()]
    out_OI.copy_((table_4bit(kind, codes.device)[halves] * constants).view_as(out_OI))


def decode_int8_plain(codes_OI: Tensor, absmax_O: Tensor, out_OI: Tensor) -> None:
    """The operator as bitsandbytes computes it: the whole matrix in fp32, and then rounded."""
    out_OI.copy_(torch.ops.bitsandbytes.int8_vectorwise_dequant.default(codes_OI, absmax_O))


def constants_4bit(absmax: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """The block constants of a matrix, fp32, as `decode_4bit_into` is given them."""
    if scale is None or offset is None:
        return absmax
    table = table_8bit(absmax.device)
    made = torch.ops.bitsandbytes.dequantize_blockwise.default(absmax, scale, table, ABSMAX_BLOCK, torch.float32)
    return made.add_(offset)


def _check(is_so: bool, message: Callable[[], str]) -> None:
    """torch._check at a tenth of its time: a step decodes hundreds of times, and no size here is a symbol."""
    if not is_so:
        raise RuntimeError(message())


def check_4bit(
    codes: Tensor, absmax: Tensor, scale: Tensor | None, offset: Tensor | None, block_size: int, shape: tuple[int, ...]
) -> None:
    """C reads as many as it is told: so they must be there, in this type.

    Raises:
        RuntimeError: codes or constants are not those of a 4-bit matrix of this shape.
    """
    count = math.prod(shape)
    blocks = -(-count // block_size)
    dtype = torch.float32 if scale is None else torch.uint8
    _check(codes.numel() == (count + 1) // 2, lambda: f"{codes.numel()} bytes of codes for {tuple(shape)}")
    _check(absmax.numel() == blocks, lambda: f"{absmax.numel()} constants for {tuple(shape)}")
    _check(absmax.dtype == dtype, lambda: f"constants in {absmax.dtype}")
    _check(codes.dtype == torch.uint8, lambda: f"codes in {codes.dtype}")
    _check((scale is None) == (offset is None), lambda: "scales without an offset, or it without them")
    _check_constant("scales", scale, -(-blocks // ABSMAX_BLOCK))
    _check_constant("offsets", offset, 1)


def _check_constant(what: str, constant: Tensor | None, count: int) -> None:
    if constant is not None:
        _check(constant.numel() == count, lambda: f"{constant.numel()} {what}, {count} wanted")
        _check(constant.dtype == torch.float32, lambda: f"{what} in {constant.dtype}")


def _check_4bit(
    codes: Tensor, absmax: Tensor, scale: Tensor | None, offset: Tensor | None, block_size: int, out: Tensor
) -> None:
    """The same, and C writes one value after another."""
    check_4bit(codes, absmax, scale, offset, block_size, out.shape)
    _check(out.is_contiguous(), lambda: f"strides {out.stride()} of {tuple(out.shape)}")


@torch.library.impl("qlora_kit::decode_4bit", "cpu")
def _decode_4bit_cpu(
    codes: Tensor, absmax: Tensor, scale: Tensor | None, offset: Tensor | None, block_size: int, kind: str, out: Tensor
) -> None:
    _check_4bit(codes, absmax, scale, offset, block_size, out)
    kernels = library()
    whole = out.numel() % block_size == 0 and block_size % 32 == 0
    if whole and out.dtype == torch.bfloat16 and kernels is not None and kernels.decodes_fast():
        tables = table_8bit(out.device), table_4bit(kind, out.device)
        _decode_4bit_fast(kernels, codes.contiguous(), absmax.contiguous(), scale, offset, *tables, block_size, out)
    else:
        _decode_4bit_bitsandbytes(codes, constants_4bit(absmax, scale, offset), block_size, kind, out)


def _decode_4bit_fast(
    kernels: ctypes.CDLL,
    codes: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    table8: Tensor,
    table4: Tensor,
    block_size: int,
    out: Tensor,
) -> None:
    coded, plain = (None, absmax) if scale is None else (absmax, None)
    scale = None if scale is None else scale.contiguous()
    constants = (address(each) for each in (coded, scale, offset, table8, plain))
    sizes = size(absmax.numel()), size(block_size)
    kernels.decode_4bit_bf16(address(codes), *constants, address(table4), *sizes, address(out), threads())


def _decode_4bit_bitsandbytes(codes: Tensor, absmax: Tensor, block_size: int, kind: str, out: Tensor) -> None:
    if block_size > _LARGEST_BLOCK:
        parts = -(-out.numel() // _LARGEST_BLOCK)
        absmax, block_size = absmax.repeat_interleave(block_size // _LARGEST_BLOCK)[:parts], _LARGEST_BLOCK
    rows, columns = out.shape
    if columns % max(64, block_size) != 0:
        # On AVX-512 processors bitsandbytes 0.50.2 decodes rows wrongly that are a multiple of 16 but not of 64, and
        # those in which a block of constants does not end: it takes a new block at every row.
        rows, columns = 1, out.numel()
    if columns % 64 != 0 or out.dtype not in _C_NAMES:
        return decode_4bit_plain(codes, absmax, block_size, kind, out)
    decode = _c_decoder(kind, out.dtype)
    packed, absmax = codes.reshape(rows, columns // 2).contiguous(), absmax.contiguous()
    if decode is None:
        shape = (rows, columns)
        made = torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, block_size, kind, shape, out.dtype)
        out.copy_(made.view_as(out))
        return None
    sizes = (ctypes.c_longlong(number) for number in (block_size, rows, columns))
    decode(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in (packed, absmax, out)), *sizes)
    return None


@torch.library.impl("qlora_kit::decode_4bit", "cuda")
def _decode_4bit_cuda(
    codes: Tensor, absmax: Tensor, scale: Tensor | None, offset: Tensor | None, block_size: int, kind: str, out: Tensor
) -> None:
    absmax = constants_4bit(absmax, scale, offset)
    torch.ops.bitsandbytes.dequantize_4bit.out(codes, absmax, block_size, kind, out.shape, out.dtype, out=out)


def check_int8(codes: Tensor, absmax: Tensor, shape: tuple[int, ...]) -> None:
    """The same for an int8 matrix.

    Raises:
        RuntimeError: codes or constants are not those of an int8 matrix of this shape.
    """
    _check(codes.shape == shape, lambda: f"codes {tuple(codes.shape)} for {tuple(shape)}")
    _check(absmax.shape == codes.shape[:1], lambda: f"{tuple(absmax.shape)} constants for {tuple(shape)}")
    _check(codes.dtype == torch.int8, lambda: f"codes in {codes.dtype}")
    _check(absmax.dtype == torch.float32, lambda: f"constants in {absmax.dtype}")


def _decode_int8(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
    for part in row_parts(codes):
        out[part].copy_((codes[part] * absmax[part, None]).mul_(1 / 127))


torch.library.impl("qlora_kit::decode_int8", "default", _decode_int8)


@torch.library.impl("qlora_kit::decode_int8", "cpu")
def _decode_int8_cpu(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
    check_int8(codes, absmax, out.shape)
    kernel = typed_kernel("decode_int8", out)
    if kernel is None or not out.is_contiguous():
        _decode_int8(codes, absmax, out)
    else:
        codes, absmax = codes.contiguous(), absmax.contiguous()
        kernel(address(codes), address(absmax), size(len(codes)), size(codes.shape[1]), address(out), threads())


@torch.library.register_fake("qlora_kit::decode_4bit")
def _decode_4bit_fake(
    codes: Tensor, absmax: Tensor, scale: Tensor | None, offset: Tensor | None, block_size: int, kind: str, out: Tensor
) -> None:
    _check_4bit(codes, absmax, scale, offset, block_size, out)


@torch.library.register_fake("qlora_kit::decode_int8")
def _decode_int8_fake(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
    check_int8(codes, absmax, out.shape)


@register_flop_formula([torch.ops.qlora_kit.decode_4bit, torch.ops.qlora_kit.decode_int8])
def _no_flops(*_: Any, **__: Any) -> int:
    return 0


@functools.cache
def _c_decoder(kind: str, dtype: torch.dtype) -> Callable[..., Any] | None:
    """bitsandbytes' C function; None in other versions, where it may take other arguments: the operator does."""
    is_known = bitsandbytes.__version__.startswith("0.50.")
    return getattr(lib, f"cdequantize_blockwise_cpu_{kind}_{_C_NAMES[dtype]}") if is_known else None


@functools.cache
def table_4bit(kind: str, device: torch.device) -> Tensor:
    """The 16 values of a 4-bit format, fp32, one real copy a device."""
    with _as_by_default():
        return bnb.get_4bit_type(kind, device=device)


@functools.cache
def table_8bit(device: torch.device) -> Tensor:
    """The 256 values in which bitsandbytes stores block constants, fp32, one real copy a device, in nobody's ledger."""
    with _as_by_default():
        return bnb.create_dynamic_map().to(device)


@contextmanager
def _as_by_default() -> Iterator[None]:
    """bitsandbytes makes its tables in torch's default dtype, on its default device: here in fp32, on a CPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with _disable_current_modes(), torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
