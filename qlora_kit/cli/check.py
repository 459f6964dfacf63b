"""One thing that the doctor tries, and what came of it."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass

FAULTS = (ImportError, OSError, RuntimeError, ValueError, AssertionError, subprocess.SubprocessError)
"""What a library that is missing, broken or too old, a driver or a disk can raise (torch asserts that it has CUDA)."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried."""

    name: str
    ok: bool | None
    """None if there is nothing here to try it on."""
    found: str
    advice: str
    """What to do about it; empty unless it failed."""


class AbsentError(Exception):
    """What a check is about is not on this machine, and need not be."""


def attempt(name: str, probe: Callable[[], str], advice: str) -> Check:
    """Run one probe, which returns what it found or raises what stopped it."""
    try:
        return Check(name, True, probe(), "")
    except AbsentError as reason:
        return Check(name, None, str(reason), "")
    except FAULTS as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Check(name, False, lines[0] if lines else type(error).__name__, advice)
