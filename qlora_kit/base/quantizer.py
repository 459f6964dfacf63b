"""Making codes, as operators of torch: `qlora_kit::quantize_4bit` and `::quantize_int8`.

    4-bit:  code = number of bounds below w / absmax[block]      bounds: the middles between the table's values
    int8:   code = round(w * 127 / absmax[row])

On a CPU bitsandbytes computes this with torch's operators on whole matrices; here it is C (`ops/native/quantizer.c`),
or plain torch on parts that stay in a cache. Elsewhere bitsandbytes' own operators are called. All give the same bits,
for NaN and infinities too (but for the bits of a NaN itself): the rounding of every step is bitsandbytes', and so is
its last block, which is divided by its constant where it is not full; the others are multiplied by the reciprocal.

Each operator has a fake form, counts no FLOPs, and has a twin in plain torch. Axes: N weights, O out, I in.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import register_flop_formula

from qlora_kit.base.kernels import table_4bit
from qlora_kit.ops.native import library, threads

_C_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CHUNK = 1 << 17
"""Weights that the twins take at once, a multiple of every block: three fp32 buffers of 512 KiB."""

_LEAST = 1e-38
"""The least constant that bitsandbytes divides by."""

torch.library.define(
    "qlora_kit::quantize_4bit",
    "(Tensor weight, int block_size, str kind) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "qlora_kit::quantize_int8", "(Tensor weight) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
)


def quantize_4bit(w_N: Tensor, block_size: int, kind: str) -> tuple[Tensor, Tensor]:
    """Codes and block constants of a flat matrix.

    Args:
        w_N: (N,), fp32, bf16 or fp16, contiguous.
        block_size: weights that share one constant; even, at most 4,096.
        kind: nf4 or fp4.

    Returns:
        Codes, uint8 (ceil(N / 2),), the even element in the high half; constants, fp32 (blocks,).

    Raises:
        RuntimeError: `w_N` or `block_size` is not so.
    """
    return torch.ops.qlora_kit.quantize_4bit(w_N, block_size, kind)


def quantize_int8(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int8 (out, in), and row constants, fp32 (out,), of a matrix.

    Args:
        w_OI: (out, in), fp16, contiguous: bitsandbytes' Int8Params makes every weight fp16 first.

    Raises:
        RuntimeError: `w_OI` is not so.
    """
    return torch.ops.qlora_kit.quantize_int8(w_OI)


def quantize_4bit_plain(w_N: Tensor, block_size: int, kind: str) -> tuple[Tensor, Tensor]:
    """The operator in plain torch: comparisons that write fp32 are vectorised, those that write bool are not."""
    codes, absmax = _empty_4bit(w_N, block_size)
    bounds, order = intervals(kind, w_N.device)
    pairs = (order[:, None] * 16 + order).view(-1)
    x = torch.empty(min(_CHUNK, w_N.numel() + 1), dtype=torch.float32, device=w_N.device)
    is_below = torch.empty_like(x)
    for begin in range(0, w_N.numel(), _CHUNK):
        chunk_n = w_N[begin : begin + _CHUNK]
        even = len(chunk_n) + len(chunk_n) % 2
        constants = absmax[begin // block_size : -(-(begin + _CHUNK) // block_size)]
        _scale_into(x[: len(chunk_n)], chunk_n, constants, block_size)
        x[len(chunk_n) : even] = 0
        interval = torch.full((even,), 15.0, device=w_N.device)
        for bound in bounds.tolist():
            interval.sub_(torch.le(x[:even], bound, out=is_below[:even]))
        pair = interval[::2].mul(16).add_(interval[1::2])
        codes[begin // 2 : (begin + even) // 2] = pair if kind == "nf4" else pairs[pair.int()]
    return codes, absmax


def _scale_into(x: Tensor, w_N: Tensor, absmax: Tensor, block_size: int) -> None:
    """Weights over their constants, and the constants themselves, of whole blocks and perhaps a part of one."""
    x.copy_(w_N)
    whole = len(x) // block_size * block_size
    blocks, rest = x[:whole].view(-1, block_size), x[whole:]
    most = absmax[: len(blocks)]
    torch.amax(blocks.abs(), 1, out=most)
    blocks.mul_((1.0 / most.clamp(min=_LEAST))[:, None])
    if len(rest):
        absmax[len(blocks)] = rest.abs().max().clamp(min=_LEAST)
        rest.div_(absmax[len(blocks)])
    x.clamp_(-1, 1)


def quantize_int8_plain(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The operator in plain torch."""
    codes, absmax = _empty_int8(w_OI)
    rows = max(1, _CHUNK // w_OI.shape[1])
    for w_PI, codes_PI, absmax_P in zip(w_OI.split(rows), codes.split(rows), absmax.split(rows), strict=True):
        absmax_P.copy_(w_PI.abs().amax(1))
        codes_PI.copy_((w_PI * (127.0 / absmax_P[:, None])).round_())
    return codes, absmax


def _check_4bit(weight: Tensor, block_size: int) -> None:
    """C reads and writes as many as it is told: so they must be there, in this type and order."""
    torch._check(weight.dtype in _C_DTYPES, lambda: f"weights in {weight.dtype}")
    torch._check(weight.dim() == 1 and weight.is_contiguous(), lambda: f"strides {weight.stride()}, one of 1 is wanted")
    torch._check(block_size % 2 == 0 and 2 <= block_size <= 4096, lambda: f"blocks of {block_size}")


def _check_int8(weight: Tensor) -> None:
    torch._check(weight.dtype == torch.float16, lambda: f"weights in {weight.dtype}")
    torch._check(weight.dim() == 2 and weight.is_contiguous(), lambda: f"strides {weight.stride()} of a matrix")


def _empty_4bit(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    count = weight.numel()
    codes = torch.empty((count + 1) // 2, dtype=torch.uint8, device=weight.device)
    return codes, torch.empty(-(-count // block_size), dtype=torch.float32, device=weight.device)


def _empty_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(weight, dtype=torch.int8)
    return codes, torch.empty(len(weight), dtype=torch.float32, device=weight.device)


@torch.library.impl("qlora_kit::quantize_4bit", "cpu")
def _quantize_4bit_cpu(weight: Tensor, block_size: int, kind: str) -> tuple[Tensor, Tensor]:
    _check_4bit(weight, block_size)
    functions = c_functions()
    return (quantize_4bit_plain if functions is None else functions.quantize_4bit)(weight, block_size, kind)


@torch.library.impl("qlora_kit::quantize_int8", "cpu")
def _quantize_int8_cpu(weight: Tensor) -> tuple[Tensor, Tensor]:
    _check_int8(weight)
    functions = c_functions()
    return (quantize_int8_plain if functions is None else functions.quantize_int8)(weight)


@torch.library.impl("qlora_kit::quantize_4bit", "default")
def _quantize_4bit_elsewhere(weight: Tensor, block_size: int, kind: str) -> tuple[Tensor, Tensor]:
    codes, absmax = torch.ops.bitsandbytes.quantize_4bit.default(weight, block_size, kind, torch.uint8)
    return codes.view(-1), absmax


@torch.library.impl("qlora_kit::quantize_int8", "default")
def _quantize_int8_elsewhere(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(weight, 0.0)
    return codes, absmax


@torch.library.register_fake("qlora_kit::quantize_4bit")
def _quantize_4bit_fake(weight: Tensor, block_size: int, kind: str) -> tuple[Tensor, Tensor]:
    _check_4bit(weight, block_size)
    return _empty_4bit(weight, block_size)


@torch.library.register_fake("qlora_kit::quantize_int8")
def _quantize_int8_fake(weight: Tensor) -> tuple[Tensor, Tensor]:
    _check_int8(weight)
    return _empty_int8(weight)


@register_flop_formula([torch.ops.qlora_kit.quantize_4bit, torch.ops.qlora_kit.quantize_int8])
def _no_flops(*_: Any, **__: Any) -> int:
    return 0


class CFunctions:
    """The functions of `quantizer.c`, on tensors that are checked already."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        self._4bit, self._int8 = compiled.qlora_kit_quantize_4bit, compiled.qlora_kit_quantize_int8
        address, size = ctypes.c_void_p, ctypes.c_int64
        self._4bit.argtypes = [address, ctypes.c_int, size, size, address, address, address, address, ctypes.c_int]
        self._int8.argtypes = [address, size, size, address, address, ctypes.c_int]
        self._4bit.restype = self._int8.restype = None

    def quantize_4bit(self, w_N: Tensor, block_size: int, kind: str) -> tuple[Tensor, Tensor]:
        """As `quantize_4bit_plain`."""
        codes, absmax = _empty_4bit(w_N, block_size)
        tables = (each.data_ptr() for each in intervals(kind, w_N.device))
        sizes = w_N.numel(), block_size
        made = codes.data_ptr(), absmax.data_ptr()
        self._4bit(w_N.data_ptr(), _C_DTYPES[w_N.dtype], *sizes, *tables, *made, threads())
        return codes, absmax

    def quantize_int8(self, w_OI: Tensor) -> tuple[Tensor, Tensor]:
        """As `quantize_int8_plain`."""
        codes, absmax = _empty_int8(w_OI)
        self._int8(w_OI.data_ptr(), *w_OI.shape, codes.data_ptr(), absmax.data_ptr(), threads())
        return codes, absmax

    def agree_with_plain(self) -> bool:
        """Whether they give the bits of their twins, on some thousand numbers: compilers have errors, too."""
        w_OI = torch.linspace(-2, 3, 9 * 1025).view(9, 1025).pow(3)
        pairs = [(self.quantize_int8(w_OI.half()), quantize_int8_plain(w_OI.half()))]
        for kind in ("nf4", "fp4"):
            for dtype in _C_DTYPES:
                w_N = w_OI.to(dtype).view(-1)
                pairs.append((self.quantize_4bit(w_N, 64, kind), quantize_4bit_plain(w_N, 64, kind)))
        return all(torch.equal(ours, theirs) for pair in pairs for ours, theirs in zip(*pair, strict=True))


@functools.cache
def c_functions() -> CFunctions | None:
    """The compiled functions, where there are some that give the right bits."""
    compiled = library()
    if compiled is None:
        return None
    with _disable_current_modes():
        functions = CFunctions(compiled)
        return functions if functions.agree_with_plain() else None


@functools.cache
def intervals(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 15 bounds between a format's 16 values, ascending, fp32, and the codes of the intervals, uint8.

    Computed as bitsandbytes does it: fp4 has two zeros, and the order of equals is the sort's.
    """
    with _disable_current_modes():
        table = table_4bit(kind, device)
        order = torch.argsort(table)
        return (table[order[:-1]] + table[order[1:]]) / 2, order.to(torch.uint8)
