"""Pages of a mapped checkpoint, given back to the system as soon as what they hold has been read.

They count as resident memory of the process while they are mapped in, though the system can drop them. On systems
other than Linux nothing is given back here.
"""

import ctypes
import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_PART_BYTES = 1 << 23
"""Of a matrix that is copied off its pages, those that are read before they are given back."""

_WINDOW_BYTES = 1 << 21
"""What one access can map in, on both sides of it: a large folio of the system's cache (Linux 6.18 on ext4)."""

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 0+ \S+ [1-9]\d* +(?!\S*\.so)")
"""A line of /proc/self/maps: a private mapping of a file from its beginning, as safetensors makes it; no library."""


def let_go(tensor: Tensor) -> None:
    """Give back the pages of a mapped file that hold `tensor`, and those around it; of any other tensor nothing.

    Args:
        tensor: not written to since it was mapped, or not to be read again: a page that comes back is the file's.
    """
    found = _mapping_of(tensor)
    if found is not None:
        _drop(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
        _drop_around(tensor, found)  # neighbours came along; theirs come back as they were, if nobody wrote to them


def let_go_if_clean(tensor: Tensor) -> None:
    """The same, if none of these pages was written to."""
    found = _mapping_of(tensor)
    if found is not None:
        _drop_around(tensor, found)


def let_go_of_clean_files() -> None:
    """Give back the pages of all files that are mapped whole and were not written to: they come back as they were.

    Not while another thread may write to such a page for the first time.
    """
    for low, high in _mappings():
        _drop_clean(low, high)


def copy_off(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy of `tensor` that does not point into a mapped file, and whose source's pages are given back."""
    if _mapping_of(tensor) is None:
        return tensor.to(device=device, dtype=dtype, copy=True)
    made = torch.empty(tensor.shape, dtype=dtype, device=device)
    step = max(1, _PART_BYTES // tensor[0].nbytes)
    for part, source in zip(made.split(step), tensor.split(step), strict=True):
        part.copy_(source)
        let_go(source)
    return made


def _mapping_of(tensor: Tensor) -> tuple[int, int] | None:
    """Addresses of the mapped file that a tensor lies in, asked of the system each time: they change hands."""
    if isinstance(tensor, FakeTensor) or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    if tensor.nbytes < mmap.PAGESIZE:
        return None
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return next(((low, high) for low, high in _mappings() if low <= begin and end <= high), None)


def _mappings() -> Iterator[tuple[int, int]]:
    if sys.platform == "linux":
        for line in Path("/proc/self/maps").read_text().splitlines():
            # Of a thousand lines a few are such: trying the expression on each took longer than reading them.
            if " rw-p 0" in line and (found := _MAPPING.match(line)):
                yield int(found[1], 16), int(found[2], 16)


def _drop_around(tensor: Tensor, mapping: tuple[int, int]) -> None:
    """A tensor's pages in a mapped file, and those that an access to it brings along."""
    begin, end = tensor.data_ptr() - _WINDOW_BYTES, tensor.data_ptr() + tensor.nbytes + _WINDOW_BYTES
    _drop_clean(max(mapping[0], begin), min(mapping[1], end))


def _drop(begin: int, end: int) -> None:
    """Whole pages between two addresses."""
    first, last = -(-begin // mmap.PAGESIZE), end // mmap.PAGESIZE
    if last > first:
        size = (last - first) * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(size), ctypes.c_int(mmap.MADV_DONTNEED)
        )


def _drop_clean(begin: int, end: int) -> None:
    """The same, if the system says that none of them was written to."""
    first, last = -(-begin // mmap.PAGESIZE), end // mmap.PAGESIZE
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as table:
            table.seek(8 * first)
            entries = np.frombuffer(table.read(8 * (last - first)), np.uint64)
    except OSError:  # some sandboxes have no such table
        return
    # Bit 63: present; 62: in the swap; 61: the file's page, which one that was written to is no longer.
    is_written = ((entries >> np.uint64(61)) & np.uint64(1) == 0) & (entries >> np.uint64(62) != 0)
    if len(entries) == last - first and not is_written.any():
        _drop(begin, end)
