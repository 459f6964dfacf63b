"""The kit's C code: compiled once with the system's compiler, kept in the user's cache folder, called by ctypes.

It is an addition, never a need: without a compiler, or a folder to keep the result in, there is no library, and callers
take their twins in plain torch. `QLORA_KIT_COMPILE=0` switches it off.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("quantizer.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fPIC")
_LONGEST_S = 120


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions of `quantizer.c`; None where there are none."""
    if os.environ.get("QLORA_KIT_COMPILE") == "0" or sys.platform not in ("linux", "darwin"):
        return None
    compiler = next((found for found in map(shutil.which, ("cc", "gcc", "clang")) if found), None)
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_built(compiler, _private_folder())))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # no home is a RuntimeError
        return None


def _private_folder() -> Path:
    """Where libraries are kept.

    Raises:
        OSError: it cannot be made, or another user may write there: what is loaded from it runs.
    """
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (asked if asked.is_absolute() else Path("~/.cache").expanduser()) / "qlora_kit" / "compiled"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"others can write to {folder}")
    return folder


def _built(compiler: str, folder: Path) -> Path:
    """The library for this source, these flags and this processor, compiled if it is not there."""
    # What -march=native means here, and which compiler this is, stand in the macros that it defines.
    macros = _run(compiler, *FLAGS, "-dM", "-E", "-x", "c", os.devnull)
    parts = (SOURCE.read_bytes(), " ".join(FLAGS).encode(), macros, f"{sys.platform} {platform.machine()}".encode())
    path = folder / f"{hashlib.sha256(b'|'.join(parts)).hexdigest()}.so"
    if not path.exists():
        handle, made = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            _run(compiler, *FLAGS, "-shared", str(SOURCE), "-o", made, "-lm")
            os.replace(made, path)
        finally:
            Path(made).unlink(missing_ok=True)
    return path


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=_LONGEST_S).stdout
