"""Decoding into memory that is there already, as operators of torch: `qlora_kit::decode_4bit` and `::decode_int8`.

bitsandbytes' own operators make a new tensor at every call, but for 4 bits on CUDA. On a CPU the C function under its
operator is called instead, with a pointer to our memory.

Each operator has a fake form, counts no FLOPs, and has a twin in plain torch. Axes: O out, I in.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from bitsandbytes.cextension import lib
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import register_flop_formula

_C_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_INT8_CHUNK = 1 << 18
"""Elements of an int8 matrix that are decoded at once: their fp32 values, 1 MiB, stay in a core's cache."""

torch.library.define(
    "qlora_kit::decode_4bit",
    "(Tensor codes, Tensor absmax, int block_size, str kind, Tensor(a!) out) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "qlora_kit::decode_int8",
    "(Tensor codes, Tensor absmax, Tensor(a!) out) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)


def decode_4bit_into(out_OI: Tensor, codes: Tensor, absmax: Tensor, block_size: int, kind: str) -> Tensor:
    """Fill `out_OI` with a 4-bit matrix, each value rounded once from the fp32 product of table entry and constant.

    Args:
        out_OI: (out, in), any floating dtype on a CPU, contiguous.
        codes: uint8 (ceil(out * in / 2),), the even element in the high half.
        absmax: fp32 (blocks,).
        block_size: weights that share one constant.
        kind: nf4 or fp4.

    Returns:
        `out_OI`.

    Raises:
        RuntimeError: codes or constants are not as many as the shape takes, or `out_OI` is not contiguous.
    """
    torch.ops.qlora_kit.decode_4bit(codes, absmax, block_size, kind, out_OI)
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


def _check_4bit(codes: Tensor, absmax: Tensor, block_size: int, out: Tensor) -> None:
    """C reads and writes as many as it is told: so they must be there, in this type and order."""
    count, shape = out.numel(), tuple(out.shape)
    torch._check(codes.numel() == (count + 1) // 2, lambda: f"{codes.numel()} bytes of codes for {shape}")
    torch._check(absmax.numel() == -(-count // block_size), lambda: f"{absmax.numel()} constants for {shape}")
    torch._check(absmax.dtype == torch.float32, lambda: f"constants in {absmax.dtype}")
    torch._check(out.is_contiguous(), lambda: f"strides {out.stride()} of {shape}")


@torch.library.impl("qlora_kit::decode_4bit", "cpu")
def _decode_4bit_cpu(codes: Tensor, absmax: Tensor, block_size: int, kind: str, out: Tensor) -> None:
    _check_4bit(codes, absmax, block_size, out)
    rows, columns = out.shape
    if columns % max(64, block_size) != 0:
        # On AVX-512 processors bitsandbytes 0.50.2 decodes rows wrongly that are a multiple of 16 but not of 64, and
        # those in which a block of constants does not end: it takes a new block at every row.
        rows, columns = 1, out.numel()
    if columns % 64 != 0 or out.dtype not in _C_NAMES:
        return decode_4bit_plain(codes, absmax, block_size, kind, out)
    decode = _c_decoder(kind, out.dtype, block_size)
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
def _decode_4bit_cuda(codes: Tensor, absmax: Tensor, block_size: int, kind: str, out: Tensor) -> None:
    torch.ops.bitsandbytes.dequantize_4bit.out(codes, absmax, block_size, kind, out.shape, out.dtype, out=out)


@torch.library.impl("qlora_kit::decode_int8", "default")
def _decode_int8(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
    rows = max(1, _INT8_CHUNK // codes.shape[1])
    parts = zip(codes.split(rows), absmax[:, None].split(rows), out.split(rows), strict=True)
    for codes_PI, absmax_P1, out_PI in parts:
        out_PI.copy_((codes_PI * absmax_P1).mul_(1 / 127))


@torch.library.register_fake("qlora_kit::decode_4bit")
def _decode_4bit_fake(codes: Tensor, absmax: Tensor, block_size: int, kind: str, out: Tensor) -> None:
    _check_4bit(codes, absmax, block_size, out)


@torch.library.register_fake("qlora_kit::decode_int8")
def _decode_int8_fake(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
    torch._check(codes.shape == out.shape, lambda: f"codes {tuple(codes.shape)} for {tuple(out.shape)}")


@register_flop_formula([torch.ops.qlora_kit.decode_4bit, torch.ops.qlora_kit.decode_int8])
def _no_flops(*_: Any, **__: Any) -> int:
    return 0


@functools.cache
def _c_decoder(kind: str, dtype: torch.dtype, block_size: int) -> Callable[..., Any] | None:
    """bitsandbytes' C function, or None where its Python operator has to be asked.

    That is in other versions, whose C functions may take other arguments; and for large blocks on AVX-512 processors,
    where the operator itself avoids it.
    """
    is_known = bitsandbytes.__version__.startswith("0.50.")
    is_large = block_size >= 2048 and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return getattr(lib, f"cdequantize_blockwise_cpu_{kind}_{_C_NAMES[dtype]}") if is_known and not is_large else None


@functools.cache
def table_4bit(kind: str, device: torch.device) -> Tensor:
    """The 16 values of a 4-bit format, fp32, one real copy a device."""
    with _disable_current_modes():
        return bnb.get_4bit_type(kind, device=device)
