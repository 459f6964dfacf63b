"""Devices and compute dtypes by their names in a recipe."""

import re

import torch

from qlora_kit.errors import DeviceError, ModelError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def default_compute_dtype(device: torch.device) -> torch.dtype:
    """What `compute_dtype: auto` means on `device`.

    bf16 where the hardware multiplies it; otherwise fp16 on a GPU, and fp32 on a CPU, where emulated bf16 was measured
    ten times slower than fp32 (AVX2, two threads).
    """
    if device.type == "cuda":
        with torch.cuda.device(device):  # torch answers for the current card, and others may be older
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def emulation_note(dtype: torch.dtype, device: torch.device) -> str | None:
    """What to say of bf16 on a card that does not multiply it; None elsewhere."""
    if device.type != "cuda" or dtype != torch.bfloat16 or default_compute_dtype(device) == dtype:
        return None
    return f"{torch.cuda.get_device_name(device)} multiplies no bfloat16 and is slow at it: set base.compute_dtype=auto"


def resolve_dtype(compute_dtype: str, device: torch.device) -> torch.dtype:
    """The compute dtype by its name in the recipe.

    Raises:
        ModelError: there is no such dtype.
    """
    if compute_dtype == "auto":
        return default_compute_dtype(device)
    if compute_dtype not in DTYPES:
        raise ModelError(f"compute_dtype {compute_dtype!r} is not known; choose auto or one of {', '.join(DTYPES)}")
    return DTYPES[compute_dtype]


def resolve_device(device: str) -> torch.device:
    """The device by its name in the recipe.

    Raises:
        DeviceError: it is no device's name, CUDA is asked for and not there, or there is no card of that number.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        raise DeviceError(f"device {device!r} is not known; choose auto, cpu, cuda or cuda:N")
    asked = torch.device(device)
    if asked.type == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        why = "this torch is a CPU build" if built is None else f"torch {torch.__version__} (CUDA {built}) finds no GPU"
        raise DeviceError(f"device {device} was asked for, but {why}; use base.device=cpu, or see `qlora-kit doctor`")
    if asked.type == "cuda" and (asked.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise DeviceError(f"device {device} was asked for, but there are {count} GPUs, numbered from 0")
    return asked
