"""Products with a frozen matrix in bf16, in fp32 where a processor is faster at it.

Without AMX an Intel processor multiplies bf16 at half the rate of fp32, and one without bf16 instructions at a fifth
(benchmarks/LOG.md). There both factors are widened, the matrix a slice at a time so that it stays in a cache; sums are
fp32 and rounded once, as those of any bf16 product. Of few rows it would cost more than it gains: so a row's last place
may be another alone than among 63 others.

Axes: T tokens, O out, I in.
"""

import functools
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.ops.rows import parts_alike
from qlora_kit.ops.stand_in import stands_for_card

_ELEMENTS = 2**20
"""Weights that are widened at a time: 4 MiB."""
_ROWS = 64
"""The fewest for which it is worth it."""


def linear(x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x W^T + bias, (T, O), in the dtype of x, which the others have, too; into `out`, if it is given."""
    if not _is_widened(x_TI):
        if out is None:
            return F.linear(x_TI, w_OI, bias_O)
        return torch.mm(x_TI, w_OI.t(), out=out) if bias_O is None else torch.addmm(bias_O, x_TI, w_OI.t(), out=out)
    y_TO, wide_TI = x_TI.new_empty(len(x_TI), len(w_OI)) if out is None else out, x_TI.float()
    with torch.autocast("cpu", enabled=False):
        for rows in _slices(w_OI):
            part = torch.mm(wide_TI, w_OI[rows].float().t())
            y_TO[:, rows] = part if bias_O is None else part.add_(bias_O[rows])
    return y_TO


def linear_back(g_TO: Tensor, w_OI: Tensor) -> Tensor:
    """g W, (T, I), in the dtype of both."""
    if not _is_widened(g_TO):
        return g_TO @ w_OI
    sum_TI = torch.zeros(len(g_TO), w_OI.shape[1], dtype=torch.float32, device=g_TO.device)
    with torch.autocast("cpu", enabled=False):
        for rows in _slices(w_OI):
            sum_TI.addmm_(g_TO[:, rows].float(), w_OI[rows].float())
    return sum_TI.to(g_TO.dtype)


def _slices(w_OI: Tensor) -> Iterator[slice]:
    return parts_alike(len(w_OI), max(1, _ELEMENTS // max(1, w_OI.shape[1])), w_OI)


def _is_widened(x_TI: Tensor) -> bool:
    is_narrow = x_TI.dtype == torch.bfloat16 and x_TI.device.type == "cpu" and not stands_for_card()
    return is_narrow and len(x_TI) >= _ROWS and not torch.compiler.is_compiling() and multiplies_fp32_faster()


@functools.cache
def multiplies_fp32_faster() -> bool:
    """Whether this processor is faster at fp32 than at bf16."""
    if platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_amx_tile_supported():
        return False
    return not torch.cpu._is_avx512_bf16_supported() or _vendor() == "GenuineIntel"


def _vendor() -> str:
    """As the system names it; "" where it does not."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
