"""`qlora-kit doctor`: what this machine can do, found out by doing it.

A version number or a device name promises little, so each check does a small piece of the real work: it imports the
library, decodes a few weights, takes one optimizer step, writes a file into the cache. What fails is reported as what
was found, with what to do about it; what is not there (no GPU, no token) is no failure.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.errors import DeviceError
from qlora_kit.units import KIB, format_bytes

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

_PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "datasets", "safetensors")

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of nf4 (QLoRA, arXiv 2305.14314), written out here so that no library is compared with itself."""

_FAULTS = (ImportError, OSError, RuntimeError, ValueError, AssertionError, subprocess.SubprocessError)
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


class _AbsentError(Exception):
    """What a check is about is not on this machine, and need not be."""


def run_doctor(as_json: bool) -> int:
    """Try everything and print what was found.

    Args:
        as_json: one JSON object on standard output in place of a table.

    Returns:
        the exit code: 0, or 2 if something that is needed failed.
    """
    results = checks()
    failed = sum(check.ok is False for check in results)
    if as_json:
        print(json.dumps({"schema": 1, "ok": failed == 0, "checks": [asdict(check) for check in results]}, indent=2))
    else:
        _print_table(results, failed)
    return 2 if failed else 0


def checks() -> list[Check]:
    """Try what training needs on this machine, and tell what was found. Takes some seconds, mostly for imports."""
    results = [_attempt("Python", _python, "install a Python of that range")]
    for package in _PACKAGES:
        advice = f"pip install --upgrade {package}, or reinstall qlora-kit"
        results.append(_attempt(package, partial(_package, package), advice))
    results += [
        _attempt("memory", _memory, ""),
        _attempt("disk", _disk, "work in a folder that you can write"),
        _attempt("processor", _processor, "reinstall torch"),
        _attempt("compiled code", _compiled_code, ""),
        _attempt(
            "CUDA",
            _cuda,
            "install a torch whose CUDA the driver serves, or update the driver: https://pytorch.org/get-started/locally",
        ),
    ]
    for device in _devices():
        results += _device_checks(device)
    results += [
        _attempt("hub cache", _hub_cache, "set HF_HOME to a folder that you can write"),
        _attempt("hub access", _hub_access, "reinstall huggingface_hub"),
        _attempt("hub token", _hub_token, "`hf auth login` writes a new one"),
    ]
    return results


def _attempt(name: str, probe: Callable[[], str], advice: str) -> Check:
    """Run one probe, which returns what it found or raises what stopped it."""
    try:
        return Check(name, True, probe(), "")
    except _AbsentError as reason:
        return Check(name, None, str(reason), "")
    except _FAULTS as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Check(name, False, lines[0] if lines else type(error).__name__, advice)


def _device_checks(device: str) -> list[Check]:
    """What is tried on each device: the CPU, and every GPU that torch reaches."""
    is_gpu = device != "cpu"
    step = "paged 8-bit step" if is_gpu else "8-bit step"
    attempts = [
        _attempt(f"nf4 decode, {device}", partial(_nf4_decode, device), "reinstall bitsandbytes"),
        _attempt(f"{step}, {device}", partial(_optimizer_step, device), "train with train.optimizer=adamw"),
    ]
    if is_gpu:
        attempts.insert(0, _attempt(device, partial(_gpu, device), "look for other programs on the GPU: nvidia-smi"))
        advice = "raise the limit of locked memory (ulimit -l), or keep activations on the GPU: memory.activations=keep"
        attempts.append(_attempt(f"pinned memory, {device}", _pinned_memory, advice))
        attempts.append(_attempt(f"Triton kernels, {device}", partial(_triton_kernels, device), ""))
    return attempts


# --- the machine and its packages -------------------------------------------------------------------------------------


def _python() -> str:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    try:
        wanted = metadata.metadata("qlora-kit")["Requires-Python"]
    except metadata.PackageNotFoundError:
        raise _AbsentError(f"{version}; qlora-kit is not installed, so what it wants is not known") from None
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        raise RuntimeError(f"{version}, wanted {wanted}")
    return f"{version} ({wanted})"


def _package(package: str) -> str:
    """Import a package; an import finds more than a version does."""
    import_module(package)
    version = metadata.version(package)
    wanted = _wanted_range(package)
    if wanted is None:
        return version
    if not wanted.contains(version, prereleases=True):
        raise RuntimeError(f"{version}, wanted {wanted}")
    return f"{version} ({wanted})"


def _wanted_range(package: str) -> "SpecifierSet | None":
    """The versions of a package that qlora-kit's own metadata allows; None if it is not installed."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires("qlora-kit") or []]
    except metadata.PackageNotFoundError:
        return None
    return next((wanted.specifier for wanted in requirements if wanted.name == package), None)


def _memory() -> str:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError as error:
        raise _AbsentError("not known on this system") from error
    sizes = {key: int(count) * KIB for key, count in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    available, total = sizes.get("MemAvailable", 0), sizes.get("MemTotal", 0)
    return f"{format_bytes(available)} of {format_bytes(total)} available"


def _disk() -> str:
    folder = Path.cwd()
    return f"{_writable(folder)} free in {folder}"


def _writable(folder: Path) -> str:
    """The free bytes of a folder, in words, once a file has been written there; nothing is left behind."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"qlora-kit")
    return format_bytes(shutil.disk_usage(folder).free)


# --- devices ----------------------------------------------------------------------------------------------------------


def _processor() -> str:
    import torch

    from qlora_kit.base.device import default_compute_dtype

    has_bf16 = {"AVX512-BF16": torch.cpu._is_avx512_bf16_supported(), "AMX": torch.cpu._is_amx_tile_supported()}
    bf16 = " and ".join(name for name, is_there in has_bf16.items() if is_there) or "none"
    auto = str(default_compute_dtype(torch.device("cpu"))).removeprefix("torch.")
    return (
        f"{torch.backends.cpu.get_cpu_capability()}, bf16 instructions: {bf16}, {torch.get_num_threads()} threads; "
        f"compute_dtype auto is {auto}"
    )


def _compiled_code() -> str:
    from qlora_kit.base.multiply import has_tiles
    from qlora_kit.base.quantizer import c_functions

    if c_functions() is None:
        raise _AbsentError(
            "none, plain torch instead: no C compiler (cc, gcc, clang) whose code may be kept and is right"
        )
    return "there, for a CPU" + (
        ", which multiplies quantised matrices as they are stored (AMX)" if has_tiles() else ""
    )


def _cuda() -> str:
    import torch

    driver = _driver()
    built = torch.version.cuda or torch.version.hip
    if driver is None and not torch.cuda.is_available():
        raise _AbsentError("no GPU driver here: training runs on the CPU")
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


def _devices() -> list[str]:
    """The CPU and each GPU that torch reaches."""
    try:
        import torch

        return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    except _FAULTS:  # a torch that cannot be imported has been reported by then
        return ["cpu"]


def _gpu(device: str) -> str:
    import torch

    from qlora_kit.base.device import default_compute_dtype

    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        auto = str(default_compute_dtype(torch.device(device))).removeprefix("torch.")
    return (
        f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}), "
        f"{format_bytes(free_bytes)} of {format_bytes(total_bytes)} free, "
        f"{'bf16' if has_bf16 else 'no bf16'}; compute_dtype auto is {auto}"
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
    return f"{expected.numel()} weights, each as the codebook says"


def _optimizer_step(device: str) -> str:
    """One step of the default optimizer; Adam's first step is the learning rate, against the sign of the gradient."""
    import torch
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    lr = 1e-3
    weight = torch.nn.Parameter(torch.zeros(4096, device=device))  # smaller ones keep 32-bit states
    optimizer = (AdamW8bit if device == "cpu" else PagedAdamW8bit)([weight], lr=lr, weight_decay=0.0)
    weight.grad = torch.linspace(-1, 1, 4096, device=device)
    optimizer.step()
    worst = (weight.detach() + lr * weight.grad.sign()).abs().max().item()
    if not worst <= 1e-2 * lr:
        raise DeviceError(f"a weight is off by {worst:.2g} after one step of {lr:g}")
    return f"{type(optimizer).__name__} moved {weight.numel()} weights as it should"


def _triton_kernels(device: str) -> str:
    import torch

    from qlora_kit.ops.triton import serves

    if not serves(torch.device(device)):
        raise _AbsentError(
            "none, plain torch instead: Triton is not installed, switched off (QLORA_KIT_TRITON=0), or cannot compile "
            "(it wants a C compiler and Python's headers)"
        )
    return "norms, gates, rotary embeddings and the loss"


def _pinned_memory() -> str:
    import torch

    buffer = torch.empty(16 * 2**20, dtype=torch.uint8, pin_memory=True)
    if not buffer.is_pinned():
        raise DeviceError("the memory was given, but not pinned")
    return f"{format_bytes(buffer.numel())} pinned"


# --- the hub ----------------------------------------------------------------------------------------------------------


def _hub_cache() -> str:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return f"{_writable(nearest)} free in {cache}"


def _hub_access() -> str:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise _AbsentError("HF_HUB_OFFLINE is set: only models in the cache can be used")
    return f"downloads from {constants.ENDPOINT} are allowed"


def _hub_token() -> str:
    from huggingface_hub import get_token

    if get_token() is None:
        raise _AbsentError("none: only public models can be fetched (`hf auth login` adds one)")
    return "there is one"


# --- printing ---------------------------------------------------------------------------------------------------------


def _print_table(results: list[Check], failed: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    marks = {True: Text("ok", "green"), None: Text("-", "dim"), False: Text("failed", "bold red")}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in results:
        # Text, not markup: what was found may hold square brackets.
        found = check.found + (f"\n-> {check.advice}" if check.advice else "")
        table.add_row(marks[check.ok], Text(check.name), Text(found))
    console = Console()
    console.print(table)
    failures = f"{failed} check{'s' if failed > 1 else ''} failed"
    console.print(f"\n{failures}" if failed else "\nEverything that training needs works here.")
