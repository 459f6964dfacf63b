"""Products with a quantised matrix as it is stored, as an operator of torch: `qlora_kit::multiply_stored`.

On a CPU that multiplies tiles (Intel AMX) C code decodes some columns at a time into the first cache and multiplies
them there (ops/native/tiles.c): faster than to write the decoded matrix and multiply that, but for many rows beside a
small matrix. On a CUDA device a Triton kernel multiplies one row, the next token of an answer (ops/triton/stored.py).
`can_multiply` says where; elsewhere weights are decoded.

The operator has a fake form, FLOPs as any product has, and a twin in plain torch. Axes: T tokens, O out, I in.
"""

import ctypes
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import register_flop_formula

from qlora_kit.base.formats import Quantization, dequantize
from qlora_kit.base.kernels import check_4bit, check_int8, table_4bit, table_8bit
from qlora_kit.ops.native import address, library, size, threads
from qlora_kit.ops.triton import device_kernel

_BLOCK = 64
"""Inputs that are decoded together; a block of constants must be some of these, or one constant would be two's."""
_OUTPUTS = 32
_LONG = 2048
"""The shorter side of a matrix that is multiplied as it is stored by any number of rows."""

torch.library.define(
    "qlora_kit::multiply_stored",
    "(Tensor x, Tensor? bias, Tensor codes, Tensor absmax, Tensor? scale, Tensor? offset, int block_size, str kind, "
    "bool is_back, Tensor(a!) space) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


class _Stored(ctypes.Structure):
    """`Stored` of tiles.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "absmax8", "scale", "offset", "table8", "absmax", "table4")),
        *((name, ctypes.c_int64) for name in ("out", "width", "shift")),
    ]


class _Matrix(NamedTuple):
    codes: Tensor
    absmax: Tensor
    scale: Tensor | None
    offset: Tensor | None
    block_size: int
    kind: str


def can_multiply(x: Tensor, shape: tuple[int, int], quantization: Quantization, *, is_back: bool = False) -> bool:
    """Whether a product with such a matrix is taken without decoding it first.

    Not of more rows than half its shorter side, unless that is long: a small matrix, decoded again for every 512 rows,
    is then slower than decoded once for torch's products (benchmarks/LOG.md).

    Args:
        x: what it is multiplied with, (rows, in) or (rows, out).
        shape: (out, in) of the matrix.
        quantization: its format.
        is_back: as for `multiply_stored`.
    """
    if torch.compiler.is_compiling():
        return False
    kind, block_size = quantization.kind, quantization.block_size
    if _row_kernel(x, shape[1], kind, block_size, is_back) is not None:
        return True
    return (2 * len(x) <= min(shape) or min(shape) >= _LONG) and _fits(x, *shape, kind, block_size)


def multiply_stored(
    x: Tensor,
    stored: Mapping[str, Tensor | None],
    quantization: Quantization,
    space_OI: Tensor,
    *,
    bias: Tensor | None = None,
    is_back: bool = False,
) -> Tensor:
    """x W^T + bias, or with `is_back` x W; each weight is rounded to the dtype of x, sums are fp32, rounded once.

    Args:
        x: (T, in), or (T, out) with `is_back`; bf16 on a CPU.
        stored: codes and constants as `quantize` names them.
        quantization: nf4, fp4 or int8.
        space_OI: memory of the decoded matrix, (out, in), as x, contiguous; a CPU puts x there in another order.
        bias: (out,), as x, or None.
        is_back: whether W is meant and not its transpose.

    Returns:
        (T, out), or (T, in) with `is_back`, as x.
    """
    codes, absmax, scale, offset = (stored.get(name) for name in ("codes", "absmax", "absmax_scale", "absmax_offset"))
    how = quantization.block_size, quantization.kind
    made: Tensor = torch.ops.qlora_kit.multiply_stored(x, bias, codes, absmax, scale, offset, *how, is_back, space_OI)
    return made


def multiply_stored_plain(
    x: Tensor,
    stored: Mapping[str, Tensor | None],
    quantization: Quantization,
    space_OI: Tensor,
    *,
    bias: Tensor | None = None,
    is_back: bool = False,
) -> Tensor:
    """The same from the decoded matrix, for which there is that memory."""
    dequantize(stored, quantization, space_OI)
    return x @ space_OI if is_back else torch.nn.functional.linear(x, space_OI, bias)


def _fits(x: Tensor, out: int, width: int, kind: str, block_size: int) -> bool:
    """Whether the C code takes it, and the processor what the code was compiled to."""
    step = _BLOCK if kind == "int8" else block_size
    fits = out % _OUTPUTS == 0 and step % _BLOCK == 0 and width % step == 0
    is_there = min(out, width) > 0 and kind != "none"
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and fits and is_there and has_tiles()


def _row_kernel(x: Tensor, width: int, kind: str, block_size: int, is_back: bool) -> Callable[..., None] | None:
    """What a device has for one row, whose width must be whole blocks of constants: none may be two rows'."""
    if len(x) != 1 or is_back or kind == "none" or width == 0:
        return None
    if kind == "int8":
        return device_kernel("row_times_int8", x)
    return device_kernel("row_times_4bit", x) if width % block_size == 0 else None


@functools.cache
def has_tiles() -> bool:
    """Whether the processor multiplies tiles, the system lets it, and what was compiled gives the right bits."""
    kernels = library()
    if kernels is None or not kernels.multiplies_tiles():
        return False
    with _disable_current_modes(), torch.device("cpu"):
        return all(_is_right(kernels, kind, is_back) for kind in ("nf4", "int8") for is_back in (False, True))


def _is_right(kernels: ctypes.CDLL, kind: Literal["nf4", "int8"], is_back: bool) -> bool:
    """Whether a matrix of all codes, times one, is what it is decoded to."""
    out, width = 32, 64
    codes = torch.arange(out * width // (2 if kind == "nf4" else 1)).to(torch.uint8)
    codes = codes if kind == "nf4" else codes.view(torch.int8).view(out, width)
    absmax = torch.linspace(0.1, 3, out, dtype=torch.float32)
    one, space = (
        torch.eye(out if is_back else width, dtype=torch.bfloat16),
        torch.empty(out, width, dtype=torch.bfloat16),
    )
    made = _run(kernels, one, None, _Matrix(codes, absmax, None, None, _BLOCK, kind), is_back, space)
    stored = {"codes": codes, "absmax": absmax}
    return torch.equal(made, multiply_stored_plain(one, stored, Quantization(kind), space, is_back=is_back))


@torch.library.impl("qlora_kit::multiply_stored", ("cpu", "cuda"))
def _multiply_stored(
    x: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    kind: str,
    is_back: bool,
    space: Tensor,
) -> Tensor:
    out, width = space.shape
    run = _runner(x, out, width, kind, block_size, is_back)
    if run is None:
        raise RuntimeError(f"{tuple(x.shape)} with {(out, width)} in {kind}: decode it, can_multiply says no")
    if kind == "int8":
        check_int8(codes, absmax, (out, width))
    else:
        check_4bit(codes, absmax, scale, offset, block_size, (out, width))
    if space.dtype != x.dtype or not space.is_contiguous():
        raise RuntimeError(f"{space.dtype} with strides {space.stride()} for x")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (out,) or is_back):
        raise RuntimeError(
            f"a bias of {tuple(bias.shape)} in {bias.dtype}, ({out},) in {x.dtype} wanted, forward alone"
        )
    return run(x, bias, _Matrix(codes, absmax, scale, offset, block_size, kind), is_back, space)


def _runner(
    x: Tensor, out: int, width: int, kind: str, block_size: int, is_back: bool
) -> Callable[[Tensor, Tensor | None, _Matrix, bool, Tensor], Tensor] | None:
    """What takes the product; None where nothing does."""
    by_row = _row_kernel(x, width, kind, block_size, is_back)
    if by_row is not None:
        return functools.partial(_run_row, by_row)
    kernels = library()
    if kernels is None or not _fits(x, out, width, kind, block_size):
        return None
    return functools.partial(_run, kernels)


def _run_row(
    kernel: Callable[..., None], x: Tensor, bias: Tensor | None, matrix: _Matrix, is_back: bool, space: Tensor
) -> Tensor:
    y = _shaped(x, space, is_back)
    x, codes, absmax = x.contiguous(), matrix.codes.contiguous(), matrix.absmax.contiguous()
    bias, scale = (None if each is None else each.contiguous() for each in (bias, matrix.scale))
    if matrix.kind == "int8":
        kernel(x, codes, absmax, bias, y)
    else:
        tables = table_4bit(matrix.kind, x.device), table_8bit(x.device)
        kernel(x, codes, absmax, scale, matrix.offset, tables, matrix.block_size, bias, y)
    return y


def _run(kernels: ctypes.CDLL, x: Tensor, bias: Tensor | None, matrix: _Matrix, is_back: bool, space: Tensor) -> Tensor:
    y = _shaped(x, space, is_back)
    x, codes, absmax = x.contiguous(), matrix.codes.contiguous(), matrix.absmax.contiguous()
    bias, scale = (None if each is None else each.contiguous() for each in (bias, matrix.scale))
    coded, plain = (None, absmax) if scale is None else (absmax, None)
    table4 = None if matrix.kind == "int8" else table_4bit(matrix.kind, x.device)
    tensors = codes, coded, scale, matrix.offset, table_8bit(x.device), plain, table4
    stored = _Stored(*(address(each) for each in tensors), *space.shape, matrix.block_size.bit_length() - 1)
    how = ctypes.byref(stored), int(is_back), address(bias)
    if kernels.multiply_stored(address(x), size(len(x)), *how, address(space), address(y), threads()):
        raise MemoryError("no memory for 1 MiB of sums a thread")
    return y


@torch.library.register_fake("qlora_kit::multiply_stored")
def _multiply_stored_fake(x: Tensor, *rest: Any) -> Tensor:
    is_back, space = rest[-2:]
    return _shaped(x, space, is_back)


def _shaped(x: Tensor, space: Tensor, is_back: bool) -> Tensor:
    """The result, without values. A pointer is what C is given: x must have what it reads."""
    inner, outer = space.shape if is_back else reversed(space.shape)
    if x.dim() != 2 or x.shape[1] != inner:
        raise RuntimeError(f"x {tuple(x.shape)}, (tokens, {inner}) wanted")
    return x.new_empty(len(x), outer)


@register_flop_formula(torch.ops.qlora_kit.multiply_stored)
def _flops(x_shape: Any, *rest: Any, out_shape: Any = None, **__: Any) -> int:
    (tokens, inner), outer = x_shape, out_shape[-1]
    return int(2 * tokens * inner * outer)
