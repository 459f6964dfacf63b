"""Tensors that wait in files: what an export comes back to, and memory has no room for.

A file is mapped and loses its name at once, so nothing of it is left however the process ends; its room on the disk is
free again when the tensor is gone. Its pages are the system's, which writes them out and takes them where it needs to.
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qlora_kit.units import MIB

WORTH_A_FILE = 2**16
"""Bytes below which a tensor stays in memory."""


class Shelf:
    """Keeps tensors in files of a folder.

    Args:
        folder: that is there as long as tensors are put into it; see that its disk has room.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor to be written to, on the CPU, zero until then.

        Raises:
            OSError: the disk is full.
        """
        count, path = prod(shape), self._folder / "shelf.tmp"
        left = count * dtype.itemsize
        with open(path, "xb") as file:
            while left > 0:  # a file with holes would end the process where the disk is full, at some later time
                left -= file.write(bytes(min(left, MIB)))
        try:
            return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(*shape)
        finally:
            path.unlink()

    def keep(self, values: Tensor) -> Tensor:
        """The same values, which need no memory; a small tensor as it is."""
        if values.nbytes < WORTH_A_FILE:
            return values
        return self.empty(values.shape, values.dtype).copy_(values)
