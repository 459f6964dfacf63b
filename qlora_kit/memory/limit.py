"""The budget is a promise: a card's allocator refuses what lies above it; on a CPU the memory in use is checked between
micro-batches.

On a card the limit stands with no budget, too: it is then what is free at the start less a reserve. Under WSL the
driver gives out memory of the host where the card's is gone, and a run would go on many times slower instead of
failing. bitsandbytes' paged state does not come from the allocator: it may move to the host, and is counted apart.

On a CPU a budget brings an allocation policy with it, that of `allocator.py`, which takes some time; without a budget
there is neither.
"""

import errno
import gc
import re
from types import TracebackType
from typing import Literal

import torch

from qlora_kit.errors import FitError
from qlora_kit.memory.allocator import give_back_free_memory, set_allocation_policy
from qlora_kit.memory.counter import PeakCounter, resident_bytes
from qlora_kit.units import format_bytes

CUDA_RESERVE_BYTES = 600 * 2**20
"""Left free on a card: the CUDA context and loaded kernels take 0.3 to 0.6 GiB outside the allocator."""

BESIDE_TENSORS_BYTES = 64 * 2**20
"""What a process on a CPU may take beside its tensors and outside the budget, as the context is on a card: Python's
objects, library workspaces, threads, what is free in the heap."""


_HOST_WORDS = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|could not (create|execute) a (primitive|memory object)$"
)
"""The last are oneDNN's, which says as much where it cannot do a thing, but then names a primitive descriptor."""
_DEVICE_WORDS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Triton Error [CUDA]: out of memory")


def whose_memory_ran_out(error: BaseException) -> Literal["device", "host"] | None:
    """Whose memory an error is about; None where it is about something else.

    PyTorch has a kind of its own where a card's allocator gives no more. A library that asks the card by itself, and
    the allocator of the CPU, raise what they raise for anything, and only their words tell.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return "device"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "host"
    if isinstance(error, RuntimeError) and _HOST_WORDS.search(str(error)):
        return "host"
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _DEVICE_WORDS):
        return "device"
    return None


class Limit:
    """Holds what is taken in the block to a budget, and counts it.

    Args:
        device: whose memory.
        budget_bytes: that may be taken over what the process holds at the start of the block. None is no limit on a
            CPU, and on a card what is free less `CUDA_RESERVE_BYTES`.

    Attributes:
        budget_bytes: on a card no more than is free.
        counter: of the block's peak.
        step: that was last asked for.
    """

    def __init__(self, device: torch.device, budget_bytes: int | None = None) -> None:
        if device.type == "cuda" and device.index is None:  # the allocator's limit is one numbered card's
            device = torch.device("cuda", torch.cuda.current_device())
        self.device, self.budget_bytes, self.step = device, budget_bytes, 0
        self.counter = PeakCounter(device)
        self._fraction_before = 1.0

    @property
    def can_be_kept(self) -> bool:
        """False where there is a budget and the system does not tell what a process holds."""
        return self.budget_bytes is None or self.device.type == "cuda" or resident_bytes()[0] > 0

    @property
    def needed_bytes(self) -> int:
        """The budget that would have held so far, on a CPU."""
        return self.counter.taken_bytes - BESIDE_TENSORS_BYTES

    @property
    def is_passed(self) -> bool:
        """Whether more than the budget, and than may lie beside it, was seen to be taken, on a CPU."""
        if self.device.type == "cuda" or self.budget_bytes is None:
            return False
        return self.needed_bytes > self.budget_bytes

    def check(self, step: int) -> None:
        """To be asked before each micro-batch.

        Args:
            step: that it belongs to.

        Raises:
            FitError: more than the budget and `BESIDE_TENSORS_BYTES` was taken since the start, at any sampled moment.
        """
        self.step, budget = step, self.budget_bytes
        if self.device.type == "cuda" or budget is None:
            return
        self.counter.sample()
        if self.is_passed:
            raise FitError(
                f"memory.budget is {format_bytes(budget)}, and {format_bytes(self.counter.taken_bytes)} was taken by "
                f"step {step} ({format_bytes(BESIDE_TENSORS_BYTES)} of it may lie outside the budget)"
            )

    def __enter__(self) -> "Limit":
        gc.collect()  # what is free now would hide as much of what the block takes
        if self.device.type == "cuda":
            self._hold_allocator()
        else:
            if self.budget_bytes is not None:
                set_allocation_policy()
            give_back_free_memory()
        self.counter.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.counter.__exit__(kind, error, trace)
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(self._fraction_before, self.device)

    def _hold_allocator(self) -> None:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        wanted = free - CUDA_RESERVE_BYTES if self.budget_bytes is None else self.budget_bytes
        self.budget_bytes = min(max(wanted, 0), free)
        self._fraction_before = torch.cuda.get_per_process_memory_fraction(self.device)
        allowed = torch.cuda.memory_reserved(self.device) + self.budget_bytes
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), self.device)
