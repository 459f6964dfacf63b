"""Triton kernels: what a CUDA device runs of the kit's operators, each in one pass over memory.

They are an addition, never a need: where Triton is not installed, or cannot compile (it wants a C compiler and Python's
headers), or with `QLORA_KIT_TRITON=0`, operators take their twins in plain torch. Triton is imported at the first use.
"""

import functools
import os
import subprocess
from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LAUNCHERS = {
    "rms_norm": "norm",
    "rms_norm_backward": "norm",
    "gated": "gate",
    "gated_backward": "gate",
    "rotary": "turn",
    "softmax_gradient": "loss",
    "row_times_4bit": "stored",
    "row_times_int8": "stored",
}
"""The file of each."""


def device_kernel(name: str, *tensors: Tensor) -> Callable[..., None] | None:
    """A function that launches a kernel on tensors of one dtype, all contiguous; None where there is none.

    Args:
        name: of the operator.
        tensors: what it reads and writes, of one device.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) != 1 or not dtypes <= {*_DTYPES} or not serves(tensors[0].device):
        return None
    return _launcher(name)


@functools.cache
def serves(device: torch.device) -> bool:
    """Whether kernels run on a device: they are tried once, since that something is installed says little."""
    return device.type == "cuda" and os.environ.get("QLORA_KIT_TRITON") != "0" and _work(device)


def _work(device: torch.device) -> bool:
    try:
        from triton.errors import TritonError
    except (ImportError, OSError):
        return False
    try:
        with _disable_current_modes(), torch.inference_mode(False):
            x = torch.ones(16, device=device)
            _launcher("gated")(x, x, "silu", x)
            return bool((x > 0.7).all() and (x < 0.8).all())  # silu(1) = 0.731
    except (AssertionError, ImportError, OSError, RuntimeError, subprocess.SubprocessError, TritonError):
        return False  # Triton asserts that it finds the driver's library, and imports the launcher that it has built


@functools.cache
def _launcher(name: str) -> Callable[..., None]:
    launcher: Callable[..., None] = getattr(import_module(f"{__name__}.{_LAUNCHERS[name]}"), name)
    return launcher
