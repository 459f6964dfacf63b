"""y = x W^T + bias + scale (x A^T) B^T, with a frozen W that exists only while it is multiplied.

W is decoded in the forward pass, used and forgotten, and decoded again in the backward pass, which needs it for
dx = g W. So autograd keeps no dense weight: only x, the small x A^T, and the adapter itself. x is kept as it came, so
that layers with one input (query, key and value; gate and up) keep one tensor between them, under autocast as well.

    dx = g W + scale (g B) A        dA = scale (g B)^T x        dB = scale g^T (x A^T)

What is kept is kept by a node that stands before the product and not around it. A block that runs again for its
backward pass ends where all that it kept is there once more, so the product of its last layer, which nothing waits
for, is not taken again: that of down_proj is 22 % of a Llama block's work.

DoRA gives every row of the merged weight a norm of its own, m:

    y = m / n * (x W^T + scale (x A^T) B^T) + bias        n_o = ||W_o + scale B_o A||, a constant in the backward pass

The norms cost no decoding of their own: n_o^2 = ||W_o||^2 + 2 scale B_o (A W^T)_o + scale^2 B_o A A^T B_o^T, the first
term never changes, and A W^T is taken while W stands decoded for the product with x.

In 16 bits the small products x A^T and g B are taken as two matrices, the second with what rounding has cut off the
first: so the update joins the sum with W as if it had been formed in fp32, and is rounded with it. With one matrix
the error of y and dx is half as large again (benchmarks/LOG.md).

Layers with one input (query, key and value; gate and up) take x A^T together, as one matrix A, and together what goes
back to x.

Axes: T tokens (all leading axes flattened), I in, O out, R rank, of all layers together where there are several. The
adapter is cast to the compute dtype, where it meets the decoded weight; its gradients come back in its own dtype.

Sources: LoRA, arXiv 2106.09685, equation 3; QLoRA, arXiv 2305.14314, equation 5; DoRA, arXiv 2402.09353, equations 5
and 11.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.ops.frozen import Decode, back_through, times
from qlora_kit.ops.products import product
from qlora_kit.ops.rows import as_rows

_TINY = torch.finfo(torch.float32).tiny


def lora_linear(
    x: Tensor,
    decode: Decode,
    bias: Tensor | None = None,
    a_RI: Tensor | None = None,
    b_OR: Tensor | None = None,
    scale: float = 1.0,
    x_adapter: Tensor | None = None,
) -> Tensor:
    """A frozen linear layer and, where `a_RI` and `b_OR` are given, its low-rank update.

    Args:
        x: input, (..., in), in the compute dtype; under autocast that is autocast's, whatever x has.
        decode: makes the frozen weight, (out, in); it must return the same values at every call.
        bias: frozen, (out,), or None.
        a_RI: (rank, in), any floating dtype.
        b_OR: (out, rank), any floating dtype.
        scale: factor of the update, alpha / rank.
        x_adapter: what the update sees in place of x (x with dropout), or None.

    Returns:
        (..., out) in the compute dtype.
    """
    if a_RI is None or b_OR is None:
        return _FrozenLinear.apply(x, decode, bias)
    (alone,) = share_input(x, [Update(decode, a_RI, b_OR, scale)], x_adapter)
    return alone.product(x, bias)


class Update(NamedTuple):
    """A frozen layer's weight and its low-rank update, as `lora_linear` is given them."""

    decode: Decode
    a_RI: Tensor
    b_OR: Tensor
    scale: float


class Shared(NamedTuple):
    """What a layer's result is made with beside its input: its part in products that layers have in common."""

    slot: Tensor
    h: tuple[Tensor, ...]
    update: Update

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's result, as `lora_linear` gives it, from the input that `share_input` was given."""
        decode, _, b_OR, scale = self.update
        return _Product.apply(self.slot, x, self.h, decode, bias, None, b_OR, scale)


def share_input(x: Tensor, updates: Sequence[Update], x_adapter: Tensor | None = None) -> list[Shared]:
    """x A^T of several layers with one input, and one node that has all their gradients.

    Args:
        x: as for `lora_linear`, like x_adapter.
        updates: of all layers, with one scale.

    Returns:
        What each layer's result is then made with.
    """
    decodes, matrices_a, matrices_b, scales = zip(*updates, strict=True)
    made = _Kept.apply(x, _own(x_adapter), decodes, scales[0], *matrices_a, *matrices_b)
    slots, h = made[: len(updates)], made[len(updates) :]
    own_h = (tuple(part[:, ranks] for part in h) for ranks in _ranks(matrices_a))
    return [Shared(*each) for each in zip(slots, own_h, updates, strict=True)]


def dora_linear(
    x: Tensor,
    decode: Decode,
    bias: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    scale: float,
    magnitude_O: Tensor,
    square_O: Tensor,
    x_adapter: Tensor | None = None,
) -> Tensor:
    """The same with the rows of the merged weight scaled to the norms `magnitude_O` (DoRA).

    Args:
        x: as for `lora_linear`, like those that are not named here.
        magnitude_O: trained norms, (out,), fp32.
        square_O: the squared norms of the frozen weight's rows, (out,), fp32.

    Returns:
        (..., out) in the compute dtype.
    """
    ((slot, h, _),) = share_input(x, [Update(decode, a_RI, b_OR, scale)], x_adapter)
    y, aw_RO = _Product.apply(slot, x, h, decode, None, a_RI, b_OR, scale)
    y = y * (magnitude_O / row_norms(square_O, aw_RO, a_RI, b_OR, scale)).to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


@torch.no_grad()
def row_norms(square_O: Tensor, aw_RO: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """||W_o + scale B_o A|| of every row, (out,), fp32, without the dense sum.

    Args:
        square_O: ||W_o||^2, fp32.
        aw_RO: A W^T, any floating dtype.
        a_RI: A.
        b_OR: B.
        scale: factor of the update.
    """
    a, b = a_RI.float(), b_OR.float()
    crossed = (b * aw_RO.t().float()).sum(1)
    own = ((b @ (a @ a.t())) * b).sum(1)
    # Not zero: a row of zeros has no direction, and its factor 0 / tiny is 0, where 0 / 0 would be NaN.
    return square_O.add(crossed, alpha=2 * scale).add_(own, alpha=scale**2).clamp_min_(_TINY).sqrt_()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an operator on x computes: its own, under autocast autocast's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _own(x_adapter: Tensor | None) -> Tensor | None:
    """The update's own input, which no other layer keeps: cast before, it is kept in the compute dtype."""
    return None if x_adapter is None else x_adapter.to(compute_dtype(x_adapter))


def _stacked(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(R, in): the matrices A of all layers, one below the other."""
    return matrices[0].to(dtype) if len(matrices) == 1 else torch.cat([a_RI.to(dtype) for a_RI in matrices])


def _ranks(matrices_a: Sequence[Tensor]) -> list[slice]:
    """Where in R each layer has its own."""
    ends = list(accumulate(len(a_RI) for a_RI in matrices_a))
    return [slice(end - len(a_RI), end) for end, a_RI in zip(ends, matrices_a, strict=True)]


def _slot(x: Tensor, out: int, dtype: torch.dtype) -> Tensor:
    """(..., out) without memory."""
    shape = (*x.shape[:-1], out)
    return x.new_empty_strided(shape, [0] * len(shape), dtype=dtype)


def _side_by_side(g: Sequence[Tensor | None], matrices_b: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """g B of all layers, (T, R), in as many parts as `_product` gives; zeros where nothing came back."""
    tokens = next(len(each) for each in g if each is not None)
    parts = [
        _product(b_OR.new_zeros(tokens, len(b_OR), dtype=dtype) if each is None else each, b_OR.to(dtype))
        for each, b_OR in zip(g, matrices_b, strict=True)
    ]
    return parts[0] if len(parts) == 1 else tuple(torch.cat(each, 1) for each in zip(*parts, strict=True))


def _back_through(g: Sequence[Tensor | None], decodes: Sequence[Decode]) -> Tensor:
    """The sum over layers of g W, (T, in); one frozen weight stands decoded at a time."""
    dx: Tensor | None = None
    for g_TO, decode in zip(g, decodes, strict=True):
        if g_TO is not None:
            through = back_through(g_TO, decode)
            dx = through if dx is None else dx.add_(through)  # quicker than addmm_ in 16 bits (benchmarks/LOG.md)
    assert dx is not None
    return dx


def _product(left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
    """left @ right: in fp32 one matrix; in 16 bits a second one with what rounding has cut off the first.

    For the small products with A or B only: the second costs as much again, and leaves the sum with W the one rounding
    that is seen in the result.
    """
    product = left @ right
    if product.dtype.itemsize > 2:
        return (product,)
    return product, torch.addmm(product, left, right, beta=-1)


def _add_product(sum_TN: Tensor, parts: tuple[Tensor, ...], right_RN: Tensor, scale: float) -> None:
    """sum += scale (all parts) @ right, in place and rounded once."""
    if len(parts) == 1:
        sum_TN.addmm_(parts[0], right_RN, alpha=scale)
    else:
        sum_TN.addmm_(torch.cat(parts, 1), _repeated(right_RN, len(parts)), alpha=scale)


def _repeated(matrix_RN: Tensor, count: int) -> Tensor:
    """A matrix so often below itself. B comes turned, and copied in its own layout it takes a third of the time
    (benchmarks/LOG.md)."""
    if matrix_RN.is_contiguous():
        return torch.cat([matrix_RN] * count)
    return torch.cat([matrix_RN.t()] * count, 1).t()


def lora_linear_plain(
    x: Tensor,
    decode: Decode,
    bias: Tensor | None = None,
    a_RI: Tensor | None = None,
    b_OR: Tensor | None = None,
    scale: float = 1.0,
    x_adapter: Tensor | None = None,
) -> Tensor:
    """The same function in plain torch: the oracle of the tests. It keeps the dense weight until backward."""
    y = F.linear(x, decode(x.dtype), None if bias is None else bias.to(x.dtype))
    if a_RI is None or b_OR is None:
        return y
    x = x if x_adapter is None else x_adapter
    return y + scale * F.linear(F.linear(x, a_RI.to(x.dtype)), b_OR.to(x.dtype))


def _shaped(y_TO: Tensor, leading: tuple[int, ...]) -> Tensor:
    """The same memory as (*leading, O), and to autograd no view: models add to the output of a linear layer in place,
    which autograd does not allow on a view that a function of ours returns."""
    return torch.ops.aten._unsafe_view(y_TO, (*leading, y_TO.shape[-1]))


class _FrozenLinear(torch.autograd.Function):
    """x W^T + bias; nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, decode: Decode, bias: Tensor | None) -> Tensor:
        ctx.decode, ctx.shape, ctx.dtype = decode, x.shape, x.dtype
        return product(lambda: _shaped(times(x, decode, bias, compute_dtype(x)), x.shape[:-1]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        dx = back_through(grad, ctx.decode)
        return dx.view(ctx.shape).to(ctx.dtype), None, None


class _Kept(torch.autograd.Function):
    """x A^T of layers with one input, and all that their backward pass wants. The gradients of their results, which are
    `_Product`'s, come in through `slots`, which have the results' shapes and no memory."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_adapter: Tensor | None, decodes: tuple[Decode, ...], scale: float, *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.decodes, ctx.scale, ctx.has_own = decodes, scale, x_adapter is not None
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.set_materialize_grads(False)
        dtype, count = compute_dtype(x), len(decodes)
        a_RI, seen = _stacked(matrices[:count], dtype), x if x_adapter is None else x_adapter
        h = _product(as_rows(seen).to(dtype), a_RI.t())
        trains_a = any(a.requires_grad for a in matrices[:count])
        ctx.save_for_backward(seen if trains_a else None, h[0], *matrices)
        ctx.mark_non_differentiable(*h)
        return *(_slot(x, len(b_OR), dtype) for b_OR in matrices[count:]), *h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        seen, h_TR, *matrices = ctx.saved_tensors
        count, scale = len(ctx.decodes), ctx.scale
        needs_x, needs_own, _, _, *needs = ctx.needs_input_grad
        g = [None if grad is None else as_rows(grad) for grad in grads[:count]]
        dtype = next(each.dtype for each in g if each is not None)
        dx = dx_adapter = None
        das: list[Tensor | None] = [None] * count
        dbs: list[Tensor | None] = [None] * count
        gb: tuple[Tensor, ...] = ()
        if needs_x or needs_own or any(needs[:count]):
            gb = _side_by_side(g, matrices[count:], dtype)
        if needs_x:
            dx = _back_through(g, ctx.decodes)
            if not ctx.has_own:
                _add_product(dx, gb, _stacked(matrices[:count], dtype), scale)
            dx = dx.view(ctx.shape).to(ctx.dtype)
        if needs_own:
            dx_adapter = (gb[0] @ _stacked(matrices[:count], dtype)).mul_(scale).view(ctx.shape)
        if any(needs[:count]):
            da_RI = (gb[0].t() @ as_rows(seen).to(dtype)).mul_(scale)
            das = [da_RI[ranks].to(a.dtype) for ranks, a in zip(_ranks(matrices[:count]), matrices, strict=False)]
        for layer, (g_TO, ranks) in enumerate(zip(g, _ranks(matrices[:count]), strict=True)):
            if needs[count + layer] and g_TO is not None:
                dbs[layer] = (g_TO.t() @ h_TR[:, ranks]).mul_(scale).to(matrices[count + layer].dtype)
        return dx, dx_adapter, None, None, *das, *dbs


class _Product(torch.autograd.Function):
    """x W^T + bias + scale h B^T, and A W^T where it is asked for; nothing is kept, and `slot` has the one gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        slot: Tensor,
        x: Tensor,
        h: tuple[Tensor, ...],
        decode: Decode,
        bias: Tensor | None,
        a_RI: Tensor | None,
        b_OR: Tensor,
        scale: float,
    ) -> Tensor | tuple[Tensor, Tensor]:
        def make(decode: Decode) -> Tensor:
            y_TO = times(x, decode, bias, slot.dtype)
            _add_product(y_TO, h, b_OR.to(slot.dtype).t(), scale)
            return _shaped(y_TO, x.shape[:-1])

        if a_RI is None:
            return product(lambda: make(decode))
        w_OI = decode(slot.dtype)
        aw_RO = F.linear(a_RI.to(slot.dtype), w_OI)
        ctx.mark_non_differentiable(aw_RO)
        return make(lambda _: w_OI), aw_RO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return grad, None, None, None, None, None, None, None
