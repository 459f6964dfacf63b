"""K-quants: 256 weights in a block, in sub-blocks whose scales are themselves whole numbers of a few bits.

    q4_k, q5_k   x = d sc q - dmin mn     8 sub-blocks of 32;  q of 4 or 5 bits, sc and mn of 6; d and dmin in fp16
    q6_k         x = d sc q               16 sub-blocks of 16; q of 6 bits and sc of 8, with a sign; d in fp16

Scales are searched for. A sub-block is rounded on grids of a few widths; to the whole numbers of each belongs one best
scale (and offset), the solution of a least-squares problem; the grid with the least error is kept. Scales are then
rounded to whole numbers, their neighbours are tried, and the weights are rounded once more to what will be read back.
The error that counts is the plain squared one: no calibration data stand behind any weight.

Sources: the layouts are ggml's (github.com/ggml-org/ggml, src/ggml-common.h); the `gguf` package decodes them, which is
the tests' oracle. Grids and search are the kit's own.

Axes: N blocks, S sub-blocks of one, K weights of one, E bytes of a block.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

BLOCK = 256
"""Weights in a block."""

CHUNK = 512
"""Blocks searched at a time: 128 k weights, so that what a search goes over again and again stays in the cache."""

AFFINE_GRIDS = tuple(0.3 * step for step in range(-4, 3))
"""By how much finer than its numbers allow the range of a sub-block is cut: above 0 its ends are clipped. Twice as many
grids take half as long again and save 0.2 % of the error."""

SYMMETRIC_GRIDS = tuple(0.4 * step for step in range(-3, 4))
"""The same for the largest magnitude of a sub-block of q6_k."""


def q4_k(x: Tensor) -> Tensor:
    """Weights as q4_k: 144 bytes a block.

    Args:
        x: finite, of magnitudes that fp16 can hold; (rows, columns), columns a multiple of 256.

    Returns:
        uint8, (rows, columns / 256 * 144).
    """
    return _by_chunks(x, lambda x_NSK: _pack_affine(*_affine(x_NSK, 15), with_high_bits=False), 32)


def q5_k(x: Tensor) -> Tensor:
    """Weights as q5_k: 176 bytes a block; as `q4_k` otherwise."""
    return _by_chunks(x, lambda x_NSK: _pack_affine(*_affine(x_NSK, 31), with_high_bits=True), 32)


def q6_k(x: Tensor) -> Tensor:
    """Weights as q6_k: 210 bytes a block; as `q4_k` otherwise."""
    return _by_chunks(x, lambda x_NSK: _pack_symmetric(*_symmetric(x_NSK)), 16)


def _by_chunks(x: Tensor, quantize: Callable[[Tensor], Tensor], width: int) -> Tensor:
    blocks = x.float().reshape(-1, BLOCK // width, width)
    return torch.cat([quantize(chunk) for chunk in blocks.split(CHUNK)]).view(*x.shape[:-1], -1)


def _affine(x_NSK: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Search for d, dmin (N,), sc, mn (N, S) and q (N, S, K), whole numbers as floats, of x = d sc q - dmin mn."""
    scale_NS, offset_NS = _affine_fit(x_NSK, levels)
    d_N, dmin_N = (_fp16(each.amax(-1) / 63) for each in (scale_NS, offset_NS))
    sc_NS, mn_NS = (
        _ratio(each, unit[:, None]).round().clamp(0, 63) for each, unit in ((scale_NS, d_N), (offset_NS, dmin_N))
    )

    def error(sc_NS: Tensor, mn_NS: Tensor) -> Tensor:
        scale, offset = d_N[:, None] * sc_NS, dmin_N[:, None] * mn_NS
        q_NSK = _affine_rounded(x_NSK, scale, offset, levels)
        return (q_NSK * scale[..., None] - offset[..., None]).sub_(x_NSK).square_().sum(-1)

    steps = [(sc, mn) for sc in (-1, 0, 1) for mn in (-1, 0, 1) if (sc, mn) != (0, 0)]
    tries = (((sc_NS + sc).clamp(0, 63), (mn_NS + mn).clamp(0, 63)) for sc, mn in steps)
    sc_NS, mn_NS = _best((sc_NS, mn_NS), tries, error)
    q_NSK = _affine_rounded(x_NSK, d_N[:, None] * sc_NS, dmin_N[:, None] * mn_NS, levels)
    return d_N, dmin_N, sc_NS, mn_NS, q_NSK


def _affine_fit(x_NSK: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale and offset, neither negative, (N, S), of the grid with the least error."""
    count = x_NSK.shape[-1]
    low_NS, sum_x = x_NSK.amin(-1).clamp_(max=0), x_NSK.sum(-1)
    span_NS = x_NSK.amax(-1) - low_NS
    above_NSK = x_NSK - low_NS[..., None]
    best = [torch.full_like(span_NS, torch.inf), torch.zeros_like(span_NS), torch.zeros_like(span_NS)]
    for more in AFFINE_GRIDS:
        q_NSK = (above_NSK * _ratio(levels + more, span_NS)[..., None]).round_().clamp_(0, levels)
        sum_q, sum_qq, sum_qx = q_NSK.sum(-1), (q_NSK * q_NSK).sum(-1), (q_NSK * x_NSK).sum(-1)
        scale = _ratio(count * sum_qx - sum_q * sum_x, count * sum_qq - sum_q * sum_q)
        offset = (scale * sum_q - sum_x) / count
        # An offset below 0 cannot be stored; then the best line goes through 0.
        scale = torch.where(offset < 0, _ratio(sum_qx, sum_qq), scale)
        offset = offset.clamp_(min=0)
        # The squared error, but for the sum of x^2, which all grids share.
        error = scale * (scale * sum_qq - 2 * sum_qx - 2 * offset * sum_q) + offset * (2 * sum_x + count * offset)
        is_better = (error < best[0]) & (scale >= 0)
        best = [torch.where(is_better, new, old) for new, old in zip((error, scale, offset), best, strict=True)]
    return best[1], best[2]


def _affine_rounded(x_NSK: Tensor, scale_NS: Tensor, offset_NS: Tensor, levels: int) -> Tensor:
    return ((x_NSK + offset_NS[..., None]) * _ratio(1, scale_NS)[..., None]).round_().clamp_(0, levels)


def _symmetric(x_NSK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Search for d (N,), sc (N, S) and q (N, S, K), whole numbers as floats, of x = d sc q."""
    scale_NS = _symmetric_fit(x_NSK)
    # The scale furthest from 0 becomes -128, the one number that has no opposite.
    d_N = _fp16(_furthest(scale_NS) / -128)
    sc_NS = _ratio(scale_NS, d_N[:, None]).round().clamp(-128, 127)

    def error(sc_NS: Tensor) -> Tensor:
        scale = d_N[:, None] * sc_NS
        return (_symmetric_rounded(x_NSK, scale) * scale[..., None]).sub_(x_NSK).square_().sum(-1)

    (sc_NS,) = _best((sc_NS,), (((sc_NS + step).clamp(-128, 127),) for step in (-2, -1, 1, 2)), error)
    return d_N, sc_NS, _symmetric_rounded(x_NSK, d_N[:, None] * sc_NS)


def _symmetric_fit(x_NSK: Tensor) -> Tensor:
    """The scale, (N, S), of the grid with the least error; it bears the sign that lets the largest weight be -32."""
    furthest_NS = _furthest(x_NSK)
    best_gain, best_NS = torch.full_like(furthest_NS, -1), torch.zeros_like(furthest_NS)
    for more in SYMMETRIC_GRIDS:
        q_NSK = _symmetric_rounded(x_NSK, furthest_NS / -(32 + more))
        sum_qq, sum_qx = (q_NSK * q_NSK).sum(-1), (q_NSK * x_NSK).sum(-1)
        scale = _ratio(sum_qx, sum_qq)
        gain = scale * sum_qx  # by so much is the squared error below the sum of x^2
        is_better = gain > best_gain
        best_gain, best_NS = torch.where(is_better, gain, best_gain), torch.where(is_better, scale, best_NS)
    return best_NS


def _symmetric_rounded(x_NSK: Tensor, scale_NS: Tensor) -> Tensor:
    return (x_NSK * _ratio(1, scale_NS)[..., None]).round_().clamp_(-32, 31)


def _best(
    first: tuple[Tensor, ...], tries: Iterable[tuple[Tensor, ...]], error: Callable[..., Tensor]
) -> tuple[Tensor, ...]:
    """Of several ways to store each sub-block, that with the least error."""
    best, least = first, error(*first)
    for other in tries:
        found = error(*other)
        is_better = found < least
        best = tuple(torch.where(is_better, new, old) for new, old in zip(other, best, strict=True))
        least = torch.where(is_better, found, least)
    return best


def _pack_affine(
    d_N: Tensor, dmin_N: Tensor, sc_NS: Tensor, mn_NS: Tensor, q_NSK: Tensor, *, with_high_bits: bool
) -> Tensor:
    """The bytes of q4_k or q5_k, (N, E): d, dmin, 12 bytes of scales and offsets, high bits, low halves."""
    sc, mn, q = sc_NS.byte(), mn_NS.byte(), q_NSK.byte()
    # Numbers 0 to 3 lie in the low 6 bits of bytes; 4 to 7 in 4 bits of bytes of their own, their upper 2 above 0 to 3.
    scales = [
        sc[:, :4] | (sc[:, 4:] >> 4 << 6),
        mn[:, :4] | (mn[:, 4:] >> 4 << 6),
        (sc[:, 4:] & 15) | ((mn[:, 4:] & 15) << 4),
    ]
    high = [_bits(q >> 4, 1)] if with_high_bits else []
    low = (q[:, 0::2] & 15) | ((q[:, 1::2] & 15) << 4)
    return torch.cat([_as_bytes(d_N), _as_bytes(dmin_N), *scales, *high, low.flatten(1)], dim=1)


def _pack_symmetric(d_N: Tensor, sc_NS: Tensor, q_NSK: Tensor) -> Tensor:
    """The bytes of q6_k, (N, E): low 4 bits, upper 2 bits, scales, d; the halves of a block one after the other."""
    q = (q_NSK + 32).byte().view(-1, 2, 4, 32)
    low = (q[:, :, :2] & 15) | ((q[:, :, 2:] & 15) << 4)
    high = torch.stack([_bits(half >> 4, 2) for half in q.unbind(1)], dim=1)
    return torch.cat([low.flatten(1), high.flatten(1), sc_NS.to(torch.int8).view(torch.uint8), _as_bytes(d_N)], dim=1)


def _bits(parts: Tensor, width: int) -> Tensor:
    """Small numbers, (N, parts, K), of so many bits, the first part lowest, in one byte for each of K."""
    packed = parts[:, 0].clone()
    for number in range(1, parts.shape[1]):
        packed |= parts[:, number] << number * width
    return packed


def _furthest(x: Tensor) -> Tensor:
    """Along the last axis the value furthest from 0, with its sign."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)


def _ratio(above: float | Tensor, below: Tensor) -> Tensor:
    """A quotient that is 0 where there is nothing to divide by."""
    return torch.where(below == 0, 0.0, above / below).nan_to_num_(0.0, 0.0, 0.0)


def _fp16(d_N: Tensor) -> Tensor:
    """As it will be read back."""
    return d_N.half().float()


def _as_bytes(d_N: Tensor) -> Tensor:
    return d_N.half().view(-1, 1).view(torch.uint8)
