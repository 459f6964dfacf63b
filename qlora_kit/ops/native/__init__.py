"""The kernels of kernels.c, compiled once by the machine's own C compiler; without one, torch's operators do the same.

The library is kept in the user's cache folder under a name that says from what it was made: source, flags, compiler and
processor. `QLORA_KIT_COMPILE=0` switches it off.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

_HERE = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math",
          "-ffp-contract=off")  # fmt: skip
"""No contraction: products and sums are rounded as torch and bitsandbytes round them."""

_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "fp32"}

_SECONDS = 60
"""After which a compiler is given up; it takes two."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or os.environ.get("QLORA_KIT_COMPILE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """What C is given of a tensor."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def size(number: int) -> ctypes.c_int64:
    """A count for C."""
    return ctypes.c_int64(number)


def typed_kernel(name: str, *tensors: Tensor) -> Callable[..., None] | None:
    """A kernel for tensors of one dtype; None where there is none."""
    kernels, dtypes = library(), {tensor.dtype for tensor in tensors}
    suffix = _SUFFIXES.get(dtypes.pop()) if len(dtypes) == 1 else None
    if kernels is None or suffix is None:
        return None
    kernel: Callable[..., None] = getattr(kernels, f"{name}_{suffix}")
    return kernel


def threads() -> int:
    """Threads that a kernel may take."""
    return torch.get_num_threads()


def _compiled(compiler: str) -> Path:
    """The library's file, made if it is not there.

    Raises:
        OSError: the cache folder cannot be written.
        SubprocessError: the compiler fails.
    """
    sources = sorted(each for each in _HERE.iterdir() if each.suffix in (".c", ".h"))
    made_from = hashlib.sha256("\0".join((*_machine(compiler), *_FLAGS)).encode())
    for source in sources:
        made_from.update(source.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_kit"
    made = folder / f"kernels-{made_from.hexdigest()[:16]}.so"
    if not made.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            fresh = Path(beside) / made.name
            _run_compiler(compiler, fresh)
            fresh.replace(made)
    return made


def _run_compiler(compiler: str, made: Path) -> None:
    """Threads where the compiler has them, one where it has not."""
    command = [compiler, *_FLAGS, str(_HERE / "kernels.c"), "-o", str(made), "-lm"]
    for threads in ((), ("-fopenmp",))[::-1]:
        done = subprocess.run([*command, *threads], capture_output=True, timeout=_SECONDS, check=not threads)
        if done.returncode == 0:
            return


def _machine(compiler: str) -> Iterator[str]:
    """What the same source compiles differently for."""
    yield compiler
    yield platform.platform()
    yield torch.backends.cpu.get_cpu_capability()
    info = Path("/proc/cpuinfo")
    if info.exists():
        yield from (line for line in info.read_text().splitlines()[:40] if line.startswith(("model name", "flags")))
