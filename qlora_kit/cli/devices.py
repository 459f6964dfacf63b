"""What the doctor tries on each device: the CPU, and every GPU that torch reaches."""

import os
import re
import shutil
import subprocess
from functools import partial

from qlora_kit.cli.check import FAULTS, AbsentError, Check, attempt
from qlora_kit.errors import DeviceError
from qlora_kit.units import format_bytes

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of nf4 (QLoRA, arXiv 2305.14314), written out here so that no library is compared with itself."""


def device_checks(device: str) -> list[Check]:
    """What is tried on each device: the CPU, and every GPU that torch reaches."""
    is_gpu = device != "cpu"
    step = "paged 8-bit step" if is_gpu else "8-bit step"
    attempts = [
        attempt(f"nf4 decode, {device}", partial(_nf4_decode, device), "reinstall bitsandbytes"),
        attempt(f"{step}, {device}", partial(_optimizer_step, device), "train with train.optimizer=adamw"),
    ]
    if is_gpu:
        attempts.insert(0, attempt(device, partial(_gpu, device), "look for other programs on the GPU: nvidia-smi"))
        advice = "raise the limit of locked memory (ulimit -l), or keep activations on the GPU: memory.activations=keep"
        attempts.append(attempt(f"pinned memory, {device}", _pinned_memory, advice))
        attempts.append(attempt(f"Triton kernels, {device}", partial(_triton_kernels, device), ""))
    return attempts


def cuda() -> str:
    """Driver and CUDA.

    Raises:
        AbsentError: there is no driver.
        DeviceError: torch and the driver do not go together.
    """
    import torch

    driver = _driver()
    built = torch.version.cuda or torch.version.hip
    if driver is None and not torch.cuda.is_available():
        raise AbsentError("no GPU driver here: training runs on the CPU")
    if built is None:
        raise DeviceError(f"{driver}, but torch {torch.__version__} is a CPU build")
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError as error:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = "" if hidden is None else f", CUDA_VISIBLE_DEVICES={hidden!r}"
        reason = str(error).splitlines()[0]
        raise DeviceError(f"{driver}, torch is built for CUDA {built}{visible}: {reason}") from error
    return f"{driver or 'driver not known'}, torch is built for CUDA {built}"


def _driver() -> str | None:
    """What nvidia-smi says of the driver and of the newest CUDA that it serves; None if there is none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    answer = subprocess.run([command], capture_output=True, text=True, timeout=30, check=False)
    driver = re.search(r"Driver Version:\s*([\d.]+)", answer.stdout)
    serves = re.search(r"CUDA[\w ]*Version:\s*([\d.]+)", answer.stdout)
    if driver is None:
        return None
    return f"driver {driver[1]}" + (f" for CUDA up to {serves[1]}" if serves else "")


def devices() -> list[str]:
    """The CPU and each GPU that torch reaches."""
    try:
        import torch

        return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    except FAULTS:  # a torch that cannot be imported has been reported by then
        return ["cpu"]


def _gpu(device: str) -> str:
    import torch

    from qlora_kit.base.device import default_compute_dtype

    major, minor = torch.cuda.get_device_capability(device)
    _check_is_compiled_for(device, major, minor)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    with torch.cuda.device(device):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    auto = str(default_compute_dtype(torch.device(device))).removeprefix("torch.")
    return (
        f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}), "
        f"{format_bytes(free_bytes)} of {format_bytes(total_bytes)} free, "
        f"{'bf16' if has_bf16 else 'no bf16'}; compute_dtype auto is {auto}"
    )


def _check_is_compiled_for(device: str, major: int, minor: int) -> None:
    """See that torch has code for a card: PyPI's leaves older ones out with every other CUDA."""
    import torch

    compiled = [int(found[1]) for each in torch.cuda.get_arch_list() if (found := re.match(r"sm_(\d+)", each))]
    if compiled and 10 * major + minor < min(compiled):
        oldest = min(compiled)
        raise DeviceError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and torch "
            f"{torch.__version__} is compiled for {oldest // 10}.{oldest % 10} and newer: install one for older CUDA "
            "(https://pytorch.org/get-started/locally)"
        )


def _nf4_decode(device: str) -> str:
    """Decode every pair of codes and compare with codebook times block constant, computed here in plain torch."""
    import torch

    from qlora_kit.base.formats import Quantization, decode_4bit

    codes = torch.arange(256, dtype=torch.uint8)
    absmax = torch.linspace(0.5, 2.0, 8)
    halves = torch.stack((codes >> 4, codes & 0xF), dim=1).flatten().int()
    expected = torch.tensor(_NF4)[halves].view(8, 64) * absmax[:, None]
    quantization = Quantization("nf4", double_quant=False, block_size=64)
    decoded = torch.empty(8, 64, device=device)
    decode_4bit(codes.to(device), absmax.to(device), None, None, quantization, decoded)
    worst = (decoded.cpu() - expected).abs().max().item()
    if not worst <= 1e-6:  # so that NaN fails, too
        raise DeviceError(f"a decoded weight is off by {worst:.2g}")
    return f"{expected.numel()} weights, each equal to its codebook value"


def _optimizer_step(device: str) -> str:
    """One step of the default optimizer; Adam's first step is the learning rate, against the sign of the gradient."""
    import torch
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    lr = 1e-3
    weight = torch.nn.Parameter(torch.zeros(2**17, device=device))  # the state of less than 100,000 is not paged
    optimizer = (AdamW8bit if device == "cpu" else PagedAdamW8bit)([weight], lr=lr, weight_decay=0.0)
    weight.grad = torch.linspace(-1, 1, weight.numel(), device=device)
    with torch.cuda.device_of(weight):
        optimizer.step()
    worst = (weight.detach() + lr * weight.grad.sign()).abs().max().item()
    if not worst <= 1e-2 * lr:
        raise DeviceError(f"a weight is off by {worst:.2g} after one step of {lr:g}")
    return f"{type(optimizer).__name__} moved {weight.numel()} weights as it should"


def _triton_kernels(device: str) -> str:
    import torch

    from qlora_kit.ops.triton import serves

    if not serves(torch.device(device)):
        raise AbsentError(
            "none, plain torch instead: Triton is not installed, switched off (QLORA_KIT_TRITON=0), or cannot compile "
            "(it needs a C compiler and Python's headers)"
        )
    return "norms, gates, rotary embeddings and the loss"


def _pinned_memory() -> str:
    import torch

    buffer = torch.empty(16 * 2**20, dtype=torch.uint8, pin_memory=True)
    if not buffer.is_pinned():
        raise DeviceError("the memory was allocated, but not pinned")
    return f"{format_bytes(buffer.numel())} pinned"
