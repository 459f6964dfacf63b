"""The C library's allocator on a CPU: freed memory goes back to the system, so that a promise of bytes can be kept.

glibc raises the size from which a request gets pages of its own with every such request that is freed, to 32 MiB. What
is smaller lies on one heap, of which only the end goes back. A training step frees its activations in another order
than it makes them, so the heap holds more than is alive, and grows over the steps (benchmarks/LOG.md).
"""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h

MMAP_THRESHOLD_BYTES = 128 * 2**10
"""Requests of this size and above get pages of their own: glibc's first value, which setting it keeps from growing."""
TRIM_THRESHOLD_BYTES = 2**20
"""Free memory at the heap's end beyond this goes back."""


def set_allocation_policy() -> bool:
    """Keep what the process holds near to what is alive, from now on; it cannot be taken back.

    Returns:
        Whether it was done: only under glibc.
    """
    if not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES) and mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES))


def give_back_free_memory() -> None:
    """Give all whole pages that are free back to the system, from anywhere in the heap; without glibc, nothing."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _is_glibc() -> bool:
    """macOS has no such name, and musl an empty answer."""
    name = "CS_GNU_LIBC_VERSION"
    return name in os.confstr_names and (os.confstr(name) or "").startswith("glibc")
