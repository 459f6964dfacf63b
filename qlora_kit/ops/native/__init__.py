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
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qlora_kit.storage import name_file, private_folder

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.[ch]")))
_WIDTH = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
FLAGS = ("-O3", "-march=native", *_WIDTH, "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
"""No contraction: products and sums are rounded one by one, as torch and bitsandbytes round them. Where a processor has
vectors of 512 bits, compilers by themselves take half of them."""

_THREADS = "-fopenmp"
"""Left away where a compiler has none; the code then runs on one."""

_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_LONGEST_S = 120


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where there is none."""
    if os.environ.get("QLORA_KIT_COMPILE") == "0" or sys.platform not in ("linux", "darwin"):
        return None
    compiler = next((found for found in map(shutil.which, ("cc", "gcc", "clang")) if found), None)
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_built(compiler, private_folder("compiled"))))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # no home is a RuntimeError
        return None


def typed_kernel(name: str, *tensors: Tensor) -> Callable[..., None] | None:
    """A function for tensors of one dtype; None where there is none."""
    kernels, dtypes = library(), {tensor.dtype for tensor in tensors}
    suffix = _SUFFIXES.get(dtypes.pop()) if len(dtypes) == 1 else None
    if kernels is None or suffix is None:
        return None
    kernel: Callable[..., None] = getattr(kernels, f"{name}_{suffix}")
    return kernel


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """What C is given of a tensor."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def size(number: int) -> ctypes.c_int64:
    """A count for C."""
    return ctypes.c_int64(number)


def threads() -> int:
    """Threads that a function may take."""
    return torch.get_num_threads()


def _built(compiler: str, folder: Path) -> Path:
    """The library for these sources, these flags and this processor, compiled if it is not there."""
    # What -march=native means here, and which compiler this is, stand in the macros that it defines.
    macros = _run(compiler, *FLAGS, "-dM", "-E", "-x", "c", os.devnull)
    parts = (macros, " ".join(FLAGS).encode(), f"{sys.platform} {platform.machine()}".encode())
    made_from = b"|".join((*parts, *(source.read_bytes() for source in SOURCES)))
    path = folder / f"{hashlib.sha256(made_from).hexdigest()}.so"
    if not path.exists():
        handle, made = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            _compile(compiler, made)
            name_file(Path(made), path)
        finally:
            Path(made).unlink(missing_ok=True)
    return path


def _compile(compiler: str, made: str) -> None:
    files = [str(source) for source in SOURCES if source.suffix == ".c"]
    command = compiler, *FLAGS, "-shared", *files, "-o", made
    try:
        _run(*command, _THREADS, "-lm")
    except subprocess.CalledProcessError:
        _run(*command, "-lm")


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=_LONGEST_S).stdout
