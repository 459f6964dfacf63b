"""Products with a frozen weight: it exists as a matrix only while it is multiplied, and where a processor multiplies it
as it is stored, not even then.

Axes: T tokens, O out, I in.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from qlora_kit.ops.rows import as_rows
from qlora_kit.ops.wide import linear, linear_back

Decode = Callable[[torch.dtype], Tensor]
"""Gives the frozen weight, (out, in), in the dtype asked for."""


class Stored(ABC):
    """A `Decode` of a weight that some processors multiply as it is stored."""

    @abstractmethod
    def __call__(self, dtype: torch.dtype) -> Tensor:
        """The weight, (out, in), in `dtype`."""

    @abstractmethod
    def multiply(self, x: Tensor, bias: Tensor | None = None, *, is_back: bool = False) -> Tensor | None:
        """x W^T + bias, or with `is_back` x W; None where the weight has to be decoded for it.

        Args:
            x: (T, in), or (T, out) with `is_back`, in the dtype to compute in.
            bias: (out,) in that dtype, or None.
            is_back: whether W is meant and not its transpose.
        """


def times(x: Tensor, decode: Decode, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + bias, (..., in) -> (T, out), in `dtype`."""
    x_TI, bias = as_rows(x).to(dtype), None if bias is None else bias.to(dtype)
    made = decode.multiply(x_TI, bias) if isinstance(decode, Stored) else None
    return linear(x_TI, decode(dtype), bias) if made is None else made


def back_through(g: Tensor, decode: Decode) -> Tensor:
    """g W, (..., out) -> (T, in), in the dtype of g."""
    g_TO = as_rows(g)
    made = decode.multiply(g_TO, is_back=True) if isinstance(decode, Stored) else None
    return linear_back(g_TO, decode(g.dtype)) if made is None else made
