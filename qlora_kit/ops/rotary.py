"""y = x cos + turned(x) sin, rotary position embedding, in one pass and with the angles alone kept.

A head's width falls into two halves, which turn against each other: turned(x) = (-x2, x1).

    y1 = x1 cos1 - x2 sin1        dx1 = g1 cos1 + g2 sin2
    y2 = x2 cos2 + x1 sin2        dx2 = g2 cos2 - g1 sin1

Each product is rounded before its sum, as families round it. Written out in torch, it takes five passes over memory one
way and more on the way back.

Axes: B rows, T tokens, N heads, D width of a head. Source: RoFormer, arXiv 2104.09864, equation 34, with the halves in
place of its pairs, as in GPT-NeoX and Llama.
"""

from typing import Any

import torch
from torch import Tensor

from qlora_kit.ops.native import address, size, threads, typed_kernel
from qlora_kit.ops.rows import row_parts
from qlora_kit.ops.triton import device_kernel

torch.library.define(
    "qlora_kit::rotary",
    "(Tensor x, Tensor cos, Tensor sin, bool is_back) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def rotary(x_BTND: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """Queries or keys, turned by their positions.

    Args:
        x_BTND: (B, T, N, D), any floating dtype; D is even.
        cos_BTD: in the dtype of x, (B, T, D), or (1, T, D) for all rows; takes no gradient.
        sin_BTD: as cos.

    Returns:
        (B, T, N, D), in the dtype of x.

    Raises:
        RuntimeError: D is odd, or the angles are not as many as the tokens.
    """
    return _Rotary.apply(x_BTND, cos_BTD, sin_BTD)


def rotary_plain(x_BTND: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """The same function in plain torch, for autograd to differentiate: the oracle of the tests."""
    first, second = x_BTND.chunk(2, -1)
    return x_BTND * cos_BTD.unsqueeze(2) + torch.cat((-second, first), -1) * sin_BTD.unsqueeze(2)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.ops.qlora_kit.rotary(x, cos, sin, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.qlora_kit.rotary(grad, *ctx.saved_tensors, True), None, None


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, is_back: bool) -> Tensor:
    y = _result(x, cos, sin)
    for row in range(len(x)):
        turn = row % len(cos)
        for part in row_parts(x[row].flatten(1)):
            _turn(x[row, part], cos[turn, part, None], sin[turn, part, None], is_back, y[row, part])
    return y


def _turn(x_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, is_back: bool, y_TND: Tensor) -> None:
    (x1, x2), (cos1, cos2), (sin1, sin2) = (each.chunk(2, -1) for each in (x_TND, cos_T1D, sin_T1D))
    y1, y2 = y_TND.chunk(2, -1)
    if is_back:
        sin1, sin2 = -sin2, -sin1
    torch.sub(x1 * cos1, x2 * sin1, out=y1)
    torch.add(x2 * cos2, x1 * sin2, out=y2)


torch.library.impl("qlora_kit::rotary", "default", _rotary)


@torch.library.impl("qlora_kit::rotary", "cpu")
def _rotary_cpu(x: Tensor, cos: Tensor, sin: Tensor, is_back: bool) -> Tensor:
    kernel = typed_kernel("rotary", x, cos, sin)
    if kernel is None:
        return _rotary(x, cos, sin, is_back)
    y = _result(x, cos, sin)
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    sizes = (size(count) for count in (x[..., 0, 0].numel(), cos[..., 0].numel(), *x.shape[2:]))
    kernel(address(x), address(cos), address(sin), is_back, *sizes, address(y), threads())
    return y


def _rotary_cuda(x: Tensor, cos: Tensor, sin: Tensor, is_back: bool) -> Tensor:
    kernel = device_kernel("rotary", x, cos, sin)
    if kernel is None:
        return _rotary(x, cos, sin, is_back)
    y = _result(x, cos, sin)
    kernel(x.contiguous(), cos.contiguous(), sin.contiguous(), is_back, y)
    return y


torch.library.impl("qlora_kit::rotary", "cuda", _rotary_cuda)


@torch.library.register_fake("qlora_kit::rotary")
def _rotary_fake(x: Tensor, cos: Tensor, sin: Tensor, is_back: bool) -> Tensor:
    return _result(x, cos, sin)


def _result(x: Tensor, *angles: Tensor) -> Tensor:
    """Memory for y, if the angles are as many as kernels will read."""
    rows, tokens, _, width = x.shape
    torch._check(width % 2 == 0, lambda: f"a head of width {width}, which has no halves")
    for each in angles:
        torch._check(
            each.shape in ((rows, tokens, width), (1, tokens, width)),
            lambda each=each: f"angles of {tuple(each.shape)} for {tuple(x.shape)}",
        )
    return torch.empty_like(x, memory_format=torch.contiguous_format)
