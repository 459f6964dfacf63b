"""Causal attention over documents that lie end to end, each read by itself, as two operators of torch.

    o = softmax(scale q k^T) v      over the tokens of a document up to each, within a window where there is one

C code does it on a CPU that multiplies tiles (Intel AMX), in bf16: the way there, and the way back from the inputs,
the output and the logarithm of each softmax's sum, scores in blocks that never stand in memory together. torch's
kernels pass small products one by one to a library there, which keeps code for each length; their way back takes three
to fourteen times as long (benchmarks/attention.py). `can_attend` says where; elsewhere torch's own is called.

On the way back each thread works in 26 D bytes for each token of the longest document (104 MiB for 32,768 tokens of
heads of 128): all of a head in the orders that tiles want, and sums in fp32.

Axes: N tokens of all documents, H heads, G heads of keys and values, each for H / G of queries, D width of a head.
Source: FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import register_flop_formula

from qlora_kit.ops.native import address, library, size, threads

_WIDTHS = 32
"""Of a head's width a tile takes these."""
_UNBOUND = 2**40
"""The window where there is none."""

_OF = "Tensor q, Tensor k, Tensor v, int[] lengths, int window, float scale, Tensor(a!) space"
for _name, _form in {
    "attend": f"({_OF}) -> (Tensor, Tensor)",
    "attend_back": f"(Tensor d_out, Tensor out, Tensor lse, {_OF}) -> (Tensor, Tensor, Tensor)",
}.items():
    torch.library.define(f"qlora_kit::{_name}", _form, tags=torch.Tag.pt2_compliant_tag)


class _Heads(ctypes.Structure):
    """`Heads` of attention.c."""

    _fields_ = [("data", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]


class _Attention(ctypes.Structure):
    """`Attention` of attention.c."""

    _fields_ = [
        *((name, _Heads) for name in ("q", "k", "v", "out", "d_out", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("lse", "starts")),
        *((name, ctypes.c_int64) for name in ("documents", "heads", "groups", "width", "window")),
        ("scale", ctypes.c_float),
    ]


def can_attend(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend` takes them.

    Args:
        q: queries, the width of a head in their last axis.
        k: keys, as q.
        v: values, as q.
    """
    return not torch.compiler.is_compiling() and _fit(q, k, v) and _is_compiled()


def attend(q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, lengths: Sequence[int], window: int | None, scale: float
           ) -> Tensor:  # fmt: skip
    """The output of attention, (N, H, D).

    Args:
        q_NHD: queries, bf16, on a CPU.
        k_NGD: keys, as q.
        v_NGD: values, as q.
        lengths: tokens of each document, in order; N in all.
        window: how many tokens back one sees, itself included; None is to the start of its document.
        scale: factor of the scores.

    Raises:
        RuntimeError: shapes that do not fit.
    """
    return _Attend.apply(q_NHD, k_NGD, v_NGD, tuple(lengths), _UNBOUND if window is None else window, scale)


def attend_plain(q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, lengths: Sequence[int], window: int | None, scale: float
                 ) -> Tensor:  # fmt: skip
    """The same function in plain torch, for autograd to differentiate: the oracle of the tests."""
    shared, read = q_NHD.shape[1] // max(1, k_NGD.shape[1]), []
    for q, k, v in zip(*(each.split(list(lengths)) for each in (q_NHD, k_NGD, v_NGD)), strict=True):
        scores_HTT = torch.einsum("thd,shd->hts", q, k.repeat_interleave(shared, 1)) * scale
        is_seen_TT = torch.ones_like(scores_HTT[0], dtype=torch.bool).tril_().triu_(1 - (window or len(q)))
        weights_HTT = scores_HTT.masked_fill(~is_seen_TT, -torch.inf).softmax(-1)
        read.append(torch.einsum("hts,shd->thd", weights_HTT, v.repeat_interleave(shared, 1)))
    return torch.cat(read)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int, scale: float
    ) -> Tensor:
        out, lse = torch.ops.qlora_kit.attend(q, k, v, lengths, window, scale, _space(q, k, lengths))
        ctx.save_for_backward(out, lse, q, k, v)
        ctx.how = lengths, window, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        out, lse, q, k, v = ctx.saved_tensors
        space = _space(q, k, ctx.how[0], is_back=True)
        return *torch.ops.qlora_kit.attend_back(d_out, out, lse, q, k, v, *ctx.how, space), None, None, None


def _fit(*heads: Tensor) -> bool:
    """Whether the C code takes them, where it is."""
    width = heads[0].shape[-1]
    is_wide = width > 0 and width % _WIDTHS == 0 and all(each.shape[-1] == width for each in heads)
    return is_wide and all(each.device.type == "cpu" and each.dtype == torch.bfloat16 for each in heads)


@functools.cache
def _is_compiled() -> bool:
    """Whether the processor multiplies tiles, the system lets it, and what was compiled computes the function."""
    kernels = library()
    if kernels is None or not kernels.multiplies_tiles():
        return False
    with _disable_current_modes(), torch.device("cpu"), torch.no_grad():
        return _is_right()


def _is_right() -> bool:
    """Whether one head of a document comes out as it does written down, to the roundings of bf16.

    Without autograd: this may be asked first where what it keeps for the way back is being counted.
    """
    tokens, window, scale = 40, 33, 0.2
    values = torch.arange(tokens * 4 * 32, dtype=torch.float32).view(tokens, 4, 32).sin().bfloat16()
    q, k, v, d_out = (each.float() for each in values.unbind(1))
    is_seen = torch.ones(tokens, tokens, dtype=torch.bool).tril_().triu_(1 - window)
    p = (scale * q @ k.t()).masked_fill_(~is_seen, -torch.inf).softmax(-1)
    out, dp = p @ v, d_out @ v.t()
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    how = [tokens], window, scale
    q16, k16, v16, d16 = (values[:, i : i + 1] for i in range(4))
    spaces = (_space(q16, k16, [tokens], is_back=is_back) for is_back in (False, True))
    found = torch.ops.qlora_kit.attend(q16, k16, v16, *how, next(spaces))
    grads = torch.ops.qlora_kit.attend_back(d16, *found, q16, k16, v16, *how, next(spaces))
    pairs = zip((found[0], *grads), (out, ds @ k, ds.t() @ q, p.t() @ d_out), strict=True)
    return all(bool((one[:, 0] - other).norm() < 2**-6 * other.norm()) for one, other in pairs)


def _space(q: Tensor, k: Tensor, lengths: Sequence[int], *, is_back: bool = False) -> Tensor:
    """Memory to work in, fp32: a row for each thread, of which none is without a document and a head of keys."""
    rows = max(1, min(threads(), len(lengths) * k.shape[1]))
    return torch.empty(rows, _room(q, lengths, is_back=is_back), dtype=torch.float32, device=q.device)


def _room(q: Tensor, lengths: Sequence[int], *, is_back: bool) -> int:
    """Floats that a thread works in."""
    kernels = library()
    if kernels is None:
        return 0
    room = kernels.attention_room
    room.restype = ctypes.c_int64
    return int(room(size(max(lengths, default=0)), size(q.shape[-1]), int(is_back)))


def _run(
    name: str, lengths: Sequence[int], window: int, scale: float, space: Tensor, *, lse: Tensor, **heads: Tensor
) -> None:
    """Call C with what it reads side by side, the values of a head, and the results, which are so."""
    kernels = library()
    heads = {key: each if each.stride(-1) == 1 else each.contiguous() for key, each in heads.items()}
    q, k = heads["q"], heads["k"]
    if kernels is None or not _fit(q, k, heads["v"]) or not kernels.multiplies_tiles():
        raise RuntimeError(f"attention of {tuple(q.shape)} in {q.dtype}: can_attend says no")
    room = _room(q, lengths, is_back="dq" in heads)
    is_matrix = space.dim() == 2 and space.is_contiguous() and space.dtype == torch.float32
    if not is_matrix or len(space) == 0 or space.shape[1] < room:
        raise RuntimeError(f"{tuple(space.shape)} {space.dtype} to work in, rows of {room} fp32 wanted")
    starts = torch.tensor([0, *lengths], dtype=torch.int64, device="cpu").cumsum(0)
    attention = _Attention(
        lse=address(lse), starts=address(starts), documents=len(lengths), heads=q.shape[1], groups=k.shape[1],
        width=q.shape[2], window=min(window, _UNBOUND), scale=scale,
        **{key: _Heads(each.data_ptr(), each.stride(0), each.stride(1)) for key, each in heads.items()},
    )  # fmt: skip
    getattr(kernels, name)(ctypes.byref(attention), address(space), size(space.shape[1]), len(space))


@torch.library.impl("qlora_kit::attend", "cpu")
def _attend_cpu(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    out, lse = _results(q, k, v, *how)
    if q.numel() > 0:
        _run("attend", *how, q=q, k=k, v=v, out=out, lse=lse)
    return out, lse


@torch.library.impl("qlora_kit::attend_back", "cpu")
def _attend_back_cpu(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = grads = _gradients(d_out, out, lse, q, k, v, *how)
    if q.numel() > 0:
        lse = lse.contiguous()
        _run("attend_back", *how, q=q, k=k, v=v, d_out=d_out, out=out, lse=lse, dq=dq, dk=dk, dv=dv)
    return grads


@torch.library.register_fake("qlora_kit::attend")
def _attend_fake(*of: Any) -> tuple[Tensor, Tensor]:
    return _results(*of)


@torch.library.register_fake("qlora_kit::attend_back")
def _attend_back_fake(*of: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(*of)


def _results(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int, *rest: Any
             ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Memory for the output and for lse, if the shapes are what kernels will read."""
    torch._check(q.dim() == k.dim() == 3, lambda: f"queries {tuple(q.shape)}, keys {tuple(k.shape)}")
    (tokens, heads, width), groups = q.shape, k.shape[1]
    torch._check(
        k.shape == v.shape == (tokens, groups, width) and heads > 0 and groups > 0 and heads % groups == 0,
        lambda: f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}",
    )
    torch._check(
        sum(lengths) == tokens and min(lengths, default=1) > 0 and window > 0,
        lambda: f"documents of {list(lengths)} tokens for {tokens}, a window of {window}",
    )
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(tokens, heads, dtype=torch.float32)


def _gradients(d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *how: Any
               ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Memory for the gradients of q, k and v."""
    torch._check(
        d_out.shape == out.shape == q.shape
        and d_out.dtype == out.dtype == q.dtype
        and lse.shape == q.shape[:2]
        and lse.dtype == torch.float32,
        lambda: f"a gradient of {tuple(d_out.shape)}, an output of {tuple(out.shape)} for {tuple(q.shape)}",
    )
    dq, dk, dv = (torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (q, k, v))
    return dq, dk, dv


@register_flop_formula(torch.ops.qlora_kit.attend)
def _flops(q_shape: Any, k_shape: Any, v_shape: Any, lengths: Any, *rest: Any, **__: Any) -> int:
    """Two products of each document's tokens, as torch counts them: those that no token sees, too."""
    return int(4 * sum(n * n for n in lengths) * q_shape[1] * q_shape[2])


@register_flop_formula(torch.ops.qlora_kit.attend_back)
def _flops_back(grad_shape: Any, made_shape: Any, lse_shape: Any, *forth: Any, **__: Any) -> int:
    """Five products in place of two."""
    return _flops(*forth) * 5 // 2
