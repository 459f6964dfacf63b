"""Memory that a model's weights are decoded into, one after another.

A new tensor of that size is new memory from the system, which a CPU clears page by page: that took four times as long
as the decoding itself (benchmarks/LOG.md). So one buffer stays, and is lent:
- it is lent with a tensor and is back when that tensor is gone, so nobody has to give it back;
- whoever asks while it is lent, on the same thread or another, gets memory of its own: no two live tensors share any;
- it goes back to the system where the model's body ends, since heads and losses are where memory peaks.
"""

import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import maybe_get_fake_mode


class Workspace:
    """Lends one buffer for each device, dtype and kind of tensor, fake or real; it belongs to one model.

    A copy of it, deep or pickled, is a new one: what was lent stays with the original.
    """

    def __init__(self) -> None:
        self._idle: dict[Hashable, Tensor] = {}

    def lend(self, shape: tuple[int, int], dtype: torch.dtype, like: Tensor) -> Tensor:
        """A matrix with no values yet. The memory is its own while it lives; views of it do not keep it.

        Args:
            shape: (rows, columns).
            dtype: of its values.
            like: a tensor on the same device, fake if the new one shall be.
        """
        if torch.compiler.is_compiling():  # a compiled program plans its own buffers
            return torch.empty(shape, dtype=dtype, device=like.device)
        (rows, columns), key = shape, (dtype, *_place(like))
        buffer = self._idle.pop(key, None)  # in one move, so that of two threads only one gets it
        if buffer is None or buffer.numel() < rows * columns:
            buffer = None  # freed before the larger one is made
            # Or training could not write where an evaluation wrote first. That alone would turn gradients on, and the
            # buffer be taken for something that a backward pass computes again.
            with torch.inference_mode(False), torch.no_grad():
                buffer = torch.empty(rows * columns, dtype=dtype, device=like.device)
        lent = buffer.as_strided(shape, (columns, 1))
        weakref.finalize(lent, self._idle.__setitem__, key, buffer)
        return lent

    def release(self, *_: Any) -> None:
        """Give idle memory back; takes what a forward hook is given, to be one."""
        if not torch.compiler.is_compiling():
            self._idle.clear()

    def __reduce__(self) -> tuple[type["Workspace"], tuple[()]]:
        return Workspace, ()


def _place(like: Tensor) -> tuple[Hashable, ...]:
    """What two uses of one memory must have in common so that the second can only come after the first."""
    mode = maybe_get_fake_mode(like) or active_fake_mode()
    if mode is None and like.device.type == "cuda":
        # Kernels are still running when the tensor is gone: only those of the same stream wait for each other.
        return like.device, torch.cuda.current_stream(like.device)
    return like.device, mode
