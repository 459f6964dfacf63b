"""The machine's own word on memory, to hold the ledger against: the CUDA allocator's peak, or the process's pages.

On CPU it samples anonymous resident bytes (`RssAnon`), because Linux keeps no high-water mark for them, and resident
bytes backed by files apart, because a mapped checkpoint is no memory that a run needs.
"""

import threading
from pathlib import Path
from types import TracebackType

import torch

_STATUS = Path("/proc/self/status")


class PeakCounter:
    """Counts the peak over a block; what it says may be read inside the block and after it.

    Args:
        device: whose memory.
        interval_s: seconds between two samples on CPU.

    Attributes:
        start_bytes: counted when the block began: what was there before, of whomever.
        file_backed_bytes: the most that was resident of mapped files, on CPU.
    """

    def __init__(self, device: torch.device, interval_s: float = 0.05) -> None:
        self.device, self._interval_s = device, interval_s
        self.start_bytes = self._peak_bytes = self.file_backed_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)

    @property
    def name(self) -> str:
        """What is counted."""
        return "torch.cuda.max_memory_allocated" if self.device.type == "cuda" else "RssAnon, sampled"

    @property
    def peak_bytes(self) -> int:
        """The highest count so far; on systems without /proc, 0."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else self._peak_bytes

    @property
    def taken_bytes(self) -> int:
        """The highest count so far over what was there before the block."""
        return max(0, self.peak_bytes - self.start_bytes)

    def sample(self) -> None:
        """Count now, on CPU."""
        anonymous, file_backed = resident_bytes()
        self._peak_bytes = max(self._peak_bytes, anonymous)
        self.file_backed_bytes = max(self.file_backed_bytes, file_backed)

    def __enter__(self) -> "PeakCounter":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start_bytes = torch.cuda.memory_allocated(self.device)
        else:
            self.start_bytes = resident_bytes()[0]
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type != "cuda":
            self._stop.set()
            self._thread.join()

    def _sample_until_stopped(self) -> None:
        while True:
            self.sample()
            if self._stop.wait(self._interval_s):
                return


def resident_bytes() -> tuple[int, int]:
    """Anonymous and file-backed resident bytes of this process; zeros where the system does not tell."""
    if not _STATUS.exists():
        return 0, 0
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return tuple(int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))  # type: ignore[return-value]
