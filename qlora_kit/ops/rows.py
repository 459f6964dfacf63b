"""Tensors of any number of axes as rows: all tokens below one another, and a few of them at a time.

Axes: T tokens, H hidden.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

PART_ELEMENTS = 2**17
"""Values that an elementwise operator takes at once on a CPU: 512 KiB in fp32, which its caches hold."""
CARD_PART_ELEMENTS = 2**23
"""And elsewhere: 32 MiB in fp32, so that a plan, which does not see what is made of them, is hardly exceeded."""


def as_rows(x: Tensor) -> Tensor:
    """(..., H) -> (T, H)."""
    return x.reshape(-1, x.shape[-1])


def row_parts(x: Tensor) -> Iterator[slice]:
    """Some rows of (..., H) after others, so few that what is made of them in fp32 is small."""
    count = x.numel() // x.shape[-1]
    step = max(1, (PART_ELEMENTS if x.device.type == "cpu" else CARD_PART_ELEMENTS) // x.shape[-1])
    for begin in range(0, count, step):
        yield slice(begin, begin + step)


def parts_alike(count: int, step: int, x: Tensor) -> Iterator[slice]:
    """`count` things, `step` at a time: where `x` is a fake tensor, with which nothing is computed, three of the parts,
    which show what all allocate."""
    begins: Sequence[int] = range(0, count, step)
    if isinstance(x, FakeTensor) and len(begins) > 3:
        begins = (begins[0], begins[1], begins[-1])
    for begin in begins:
        yield slice(begin, min(begin + step, count))
