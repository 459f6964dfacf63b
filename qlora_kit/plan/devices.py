"""How much memory there is to plan for, and how fast the processor multiplies."""

import math
import time
from functools import cache
from pathlib import Path

import psutil
import torch

from qlora_kit.memory.limit import CUDA_RESERVE_BYTES
from qlora_kit.units import counted

EFFICIENCY = 0.5
"""Share of the matrix-product rate that a whole training step reaches; an estimate, and named one wherever it shows."""


_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Memory that a run may take now: what is free on the card less a reserve, or available to the process."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free - CUDA_RESERVE_BYTES
    return int(min(psutil.virtual_memory().available, _left_by_container()))


def busy_note(device: torch.device) -> str | None:
    """What to say of a processor that others keep busy: threads that wait for each other then wait for those, too, and
    two may be ten times as slow as one (benchmarks/LOG.md)."""
    threads, cores, load = torch.get_num_threads(), psutil.cpu_count() or 1, psutil.getloadavg()[0]
    if device.type != "cpu" or threads == 1 or load <= cores:
        return None
    return (
        f"this machine is busy (load {load:.1f} on {counted(cores, 'core')}): {threads} threads, which wait for each "
        "other, may take many times as long as one; OMP_NUM_THREADS=1 uses one"
    )


def _left_by_container() -> float:
    """What a container's limit leaves, where there is one; the system tells of the whole machine."""
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return math.inf
    return max(0, limit - used)


def device_name(device: torch.device) -> str:
    """The device as a person knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}"


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Floating-point operations a second of a matrix product, measured once.

    Args:
        device: to measure.
        dtype: of the product.
        seconds: to spend, about.
    """
    side = 4096 if device.type == "cuda" else 512
    x = torch.randn(side, side, device=device).to(dtype)
    x @ x
    _wait(device)
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        x @ x
        _wait(device)
        products += 1
    return 2 * side**3 * products / (time.perf_counter() - started)


def estimated_tokens_per_s(
    parameters: int, recomputed: float, rate: float, *, trains_weights: bool = False, passes: int = 0
) -> float:
    """Tokens a second of a step: 2 N operations forward, 2 N backward for dx, 2 N more where blocks are recomputed,
    2 N more for dW where the weights train, and 2 N for each further pass.

    Frozen weights want no gradient, which saves LoRA the third of a full step (LoRA Without Regret).

    Args:
        parameters: N, of the base.
        recomputed: part of a forward pass that is run twice, 0 to 1.
        rate: floating-point operations a second of a matrix product.
        trains_weights: whether the base wants gradients, too.
        passes: forward, of every token, from which nothing is learnt.
    """
    return EFFICIENCY * rate / (2 * (2 + recomputed + trains_weights + passes) * parameters)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
