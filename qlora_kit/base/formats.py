"""nf4, fp4 and int8 as numbers: how a matrix becomes codes and constants, and how it is read back.

    4-bit:  w = table[code] * absmax[block]          blocks of `block_size` run over the flattened matrix
    double quantisation:  absmax = table8[code8] * scale[block of 256] + offset
    int8:   w = code * absmax[row] / 127             vector-wise, as LLM.int8() stores it

The codes are bit-identical to those of bitsandbytes' layers on the same device, with as many threads: the mean of the
constants, which double quantisation takes off, is a sum whose order they change. What is not used is the layers
themselves: `Linear4bit.forward` repacks the stored weight in evaluation mode on some processors.

Sources: QLoRA, arXiv 2305.14314, section 3; LLM.int8(), arXiv 2208.07339; bitsandbytes 0.50.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from qlora_kit.base.kernels import (
    ABSMAX_BLOCK,
    constants_4bit,
    decode_4bit_into,
    decode_int8_into,
    table_4bit,
    table_8bit,
)
from qlora_kit.base.quantizer import intervals, quantize_4bit, quantize_int8
from qlora_kit.errors import ModelError

Kind = Literal["nf4", "fp4", "int8", "none"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that bitsandbytes has for the 4-bit formats."""

SLICE_ELEMENTS = 2**18
"""Weights that are made fp16 at once on a CPU, on their way to int8: 512 KiB, which stay in a core's cache."""

FINE = 2**12
"""Steps from -1 to 1 in which 4-bit levels are looked up: 16 KiB."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the linear layers of a base are stored.

    Args:
        kind: the format of the codes; `none` leaves the weight as it is.
        double_quant: quantise the 4-bit block constants to 8 bits as well.
        block_size: weights that share one constant (4-bit only).

    Raises:
        ModelError: there is no such format, or bitsandbytes has no such block.
    """

    kind: Kind = "nf4"
    double_quant: bool = True
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ModelError(f"quantization {self.kind!r} is not known; choose one of {', '.join(get_args(Kind))}")
        if self.block_size not in BLOCK_SIZES:
            raise ModelError(f"block_size {self.block_size!r} is not possible; choose one of {BLOCK_SIZES}")

    @property
    def is_4bit(self) -> bool:
        """Whether the codes are 4 bits wide."""
        return self.kind in ("nf4", "fp4")

    def bits_per_parameter(self, in_features: int, dense_bits: int = 16) -> float:
        """Bits that one weight takes, block constants included and per-tensor constants left out.

        Args:
            in_features: width of the matrix; int8 keeps one fp32 constant a row.
            dense_bits: width of a weight that is not quantised.

        >>> Quantization("nf4", double_quant=True, block_size=64).bits_per_parameter(4096)
        4.126953125
        """
        if self.kind == "none":
            return float(dense_bits)
        if self.kind == "int8":
            return 8 + 32 / in_features
        constant = 8 + 32 / ABSMAX_BLOCK if self.double_quant else 32
        return 4 + constant / self.block_size


def quantize(w_OI: Tensor, quantization: Quantization) -> dict[str, Tensor]:
    """Codes and constants of a matrix, by the names under which a layer stores them.

    Args:
        w_OI: the weight, (out, in), fp32, bf16 or fp16, contiguous.
        quantization: the format; not `none`.

    Returns:
        4-bit: `codes` uint8 (ceil(out * in / 2),) with the even element in the high half, and `absmax` fp32 (blocks,)
        or, with double quantisation, `absmax` uint8 (blocks,), `absmax_scale` fp32 and `absmax_offset` fp32 ().
        int8: `codes` int8 (out, in) and `absmax` fp32 (out,).
    """
    if quantization.kind == "int8":
        return _quantize_int8(w_OI)
    codes, absmax = quantize_4bit(w_OI.view(-1), quantization.block_size, quantization.kind)
    if not quantization.double_quant:
        return {"codes": codes, "absmax": absmax}
    offset = absmax.mean()
    codes8, scale = torch.ops.bitsandbytes.quantize_blockwise.default(
        absmax - offset, table_8bit(absmax.device), ABSMAX_BLOCK
    )
    return {"codes": codes, "absmax": codes8, "absmax_scale": scale, "absmax_offset": offset}


def _quantize_int8(w_OI: Tensor) -> dict[str, Tensor]:
    """Codes and row constants; on a CPU some rows at a time."""
    out, width = w_OI.shape
    codes = torch.empty(out, width, dtype=torch.int8, device=w_OI.device)
    absmax = torch.empty(out, dtype=torch.float32, device=w_OI.device)
    for begin, end in _slices(out, max(1, SLICE_ELEMENTS // width), w_OI):
        part = slice(begin, end)
        # fp16 first, because that is what bitsandbytes' Int8Params does to every weight.
        half = w_OI[part].to(torch.float16)
        codes[part], absmax[part] = quantize_int8(half)
    return {"codes": codes, "absmax": absmax}


def _slices(count: int, step: int, weight: Tensor) -> Iterator[tuple[int, int]]:
    """Ends of slices on a CPU; elsewhere, and on fake tensors, which do no work, all is one."""
    step = step if weight.device.type == "cpu" and not isinstance(weight, FakeTensor) else count
    for begin in range(0, count, step):
        yield begin, min(begin + step, count)


class Grid:
    """The values that the weights of a matrix can have: level[code] * constant.

    Args:
        stored: as `quantize` gives them; the codes are not read. Constants that are put stand in its `absmax`.
        shape: (out, in).
        quantization: of these.
    """

    def __init__(self, stored: Mapping[str, Tensor], shape: tuple[int, ...], quantization: Quantization) -> None:
        out, self.in_features = shape
        self.quantization, self._stored = quantization, stored
        self.constants, self.rows_O = stored["absmax"], torch.arange(out, device=stored["absmax"].device)
        if quantization.is_4bit:
            self.constants = constants_4bit(stored["absmax"], stored.get("absmax_scale"), stored.get("absmax_offset"))

    def nearest(self, w_O: Tensor, column: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Codes, one a byte, and what they are read as, fp32, of the weights nearest to `w_O` in some rows of a
        column."""
        how, rows_O = self.quantization, self.rows_O[rows]
        blocks_O = (rows_O * self.in_features + column) // how.block_size if how.is_4bit else rows_O
        constants_O = self.constants[blocks_O]
        x_O = torch.where(constants_O == 0, 0, w_O / constants_O)
        if how.is_4bit:
            bounds, codes = intervals(how.kind, w_O.device)
            codes_O = codes[torch.bucketize(x_O, bounds)]
            return codes_O, table_4bit(how.kind, w_O.device)[codes_O.int()] * constants_O
        codes_O = (x_O * 127).round_().clamp_(-127, 127)
        return codes_O.to(torch.int8), codes_O * constants_O / 127

    def about(self, w: Tensor, constants: Tensor) -> Tensor:
        """What weights of any shape would be read as with constants that broadcast to it, in a tenth of the time.

        One that lies in the middle of two 4-bit levels, within 2^-12 of its constant, may be read as either.
        """
        x = w / torch.where(constants == 0, 1, constants)
        if not self.quantization.is_4bit:
            return x.mul_(127).round_().clamp_(-127, 127).mul_(constants).div_(127)
        places = x.add_(1).mul_(FINE / 2).clamp_(0, FINE - 1).int()
        levels = _fine_levels(self.quantization.kind, w.device)
        return levels.index_select(0, places.reshape(-1)).view(w.shape).mul_(constants)

    def blocks(self, rows: slice, columns: slice) -> Tensor | None:
        """Numbers of the constants of some rows and columns, (rows, constants of each), int64; None where one of them
        is others', too."""
        size = self.quantization.block_size if self.quantization.is_4bit else self.in_features
        if any(end % size for end in (self.in_features, columns.start, columns.stop)):
            return None
        of_row_K = torch.arange(columns.start // size, columns.stop // size, device=self.rows_O.device)
        return self.rows_O[rows, None] * (self.in_features // size) + of_row_K

    def constants_near(self, wanted: Tensor, blocks: Tensor) -> Tensor:
        """What constants would be read as, if these were stored as nearly as they can be."""
        return self._second_level(wanted, blocks)[1] if self._is_double else wanted

    def put(self, constants: Tensor, blocks: Tensor) -> None:
        """Take other constants, which `constants_near` gave."""
        self.constants[blocks] = constants
        self._stored["absmax"][blocks] = self._second_level(constants, blocks)[0] if self._is_double else constants

    @property
    def _is_double(self) -> bool:
        return self.quantization.is_4bit and self.quantization.double_quant

    def _second_level(self, wanted: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Under double quantisation: 8-bit codes, and what they are read as."""
        levels = table_8bit(wanted.device)  # in rising order
        scale, offset = self._stored["absmax_scale"][blocks // ABSMAX_BLOCK], self._stored["absmax_offset"]
        places = torch.bucketize((wanted - offset) / scale, (levels[1:] + levels[:-1]) / 2)
        return places.to(torch.uint8), levels[places] * scale + offset

    def packed(self, codes_OI: Tensor) -> Tensor:
        """Such codes of all columns as `quantize` stores them."""
        if not self.quantization.is_4bit:
            return codes_OI
        flat = codes_OI.reshape(-1)
        flat = torch.cat((flat, flat.new_zeros(flat.numel() % 2)))
        return flat[::2] * 16 + flat[1::2]


@functools.cache
def _fine_levels(kind: str, device: torch.device) -> Tensor:
    """The level nearest to the middle of each of the fine steps, fp32."""
    bounds, codes = intervals(kind, device)
    middles = (torch.arange(FINE, device=device) + 0.5) * (2 / FINE) - 1
    return table_4bit(kind, device)[codes[torch.bucketize(middles, bounds)].int()]


def decode_4bit(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    quantization: Quantization,
    out_OI: Tensor,
) -> Tensor:
    """Read a 4-bit matrix back.

    Args:
        codes: as `quantize` returns them, like the three constants; the last two are None without double quantisation.
        absmax: block constants, or their 8-bit codes.
        absmax_scale: fp32, one for 256 constants.
        absmax_offset: fp32 scalar.
        quantization: the format that made the codes.
        out_OI: where to, (out, in), fp32, bf16 or fp16, contiguous.

    Returns:
        `out_OI`, each value rounded once from the fp32 product of table entry and constant.
    """
    how = quantization.block_size, quantization.kind
    return decode_4bit_into(out_OI, codes, absmax, *how, absmax_scale, absmax_offset)


def dequantize(stored: Mapping[str, Tensor | None], quantization: Quantization, out_OI: Tensor) -> Tensor:
    """Read a matrix back, of whatever format.

    Args:
        stored: codes and constants, as `quantize` names them.
        quantization: the format that made them; not `none`.
        out_OI: where to, (out, in), fp32, bf16 or fp16, contiguous.

    Returns:
        `out_OI`, each value rounded once from fp32.
    """
    codes, absmax, scale, offset = (stored.get(name) for name in ("codes", "absmax", "absmax_scale", "absmax_offset"))
    assert codes is not None
    assert absmax is not None
    if quantization.kind == "int8":
        return decode_int8_into(out_OI, codes, absmax)
    return decode_4bit(codes, absmax, scale, offset, quantization, out_OI)


def block_constants(
    absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None, blocks: Tensor
) -> Tensor:
    """Some of a matrix's 4-bit block constants, (len(blocks),), fp32, with the values that `decode_4bit` gives them.

    Args:
        absmax: as `quantize` returns them, like the next two, which are None without double quantisation.
        absmax_scale: fp32, one for 256 constants.
        absmax_offset: fp32 scalar.
        blocks: numbers of the blocks, (N,), int64.
    """
    if absmax_scale is None or absmax_offset is None:
        return absmax[blocks]
    table = table_8bit(absmax.device)
    return (table[absmax[blocks].int()] * absmax_scale[blocks // ABSMAX_BLOCK]).add_(absmax_offset)
