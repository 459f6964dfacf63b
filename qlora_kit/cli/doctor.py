"""`qlora-kit doctor`: what this machine can do, found out by doing it.

A version number or a device name promises little, so each check does a small piece of the real work: it imports the
library, decodes a few weights, takes one optimizer step, writes a file into the cache. What fails is reported as what
was found, with what to do about it; what is not there (no GPU, no token) is no failure.
"""

import json
import platform
import re
import shutil
import tempfile
from dataclasses import asdict
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.cli.check import AbsentError, Check, attempt
from qlora_kit.cli.devices import cuda, device_checks, devices
from qlora_kit.units import KIB, format_bytes

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

_PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "datasets", "safetensors")


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
    results = [attempt("Python", _python, "install a Python in that range")]
    for package in _PACKAGES:
        advice = f"pip install --upgrade {package}, or reinstall qlora-kit"
        results.append(attempt(package, partial(_package, package), advice))
    results += [
        attempt("memory", _memory, ""),
        attempt("disk", _disk, "work in a folder that you can write to"),
        attempt("processor", _processor, "reinstall torch"),
        attempt("compiled code", _compiled_code, ""),
        attempt(
            "CUDA",
            cuda,
            "install a torch whose CUDA the driver serves, or update the driver: "
            "https://pytorch.org/get-started/locally",
        ),
    ]
    for device in devices():
        results += device_checks(device)
    results += [
        attempt("hub cache", _hub_cache, "set HF_HOME to a folder that you can write to"),
        attempt("hub access", _hub_access, "reinstall huggingface_hub"),
        attempt("hub token", _hub_token, "`hf auth login` writes a new one"),
    ]
    return results


# --- the machine and its packages -------------------------------------------------------------------------------------


def _python() -> str:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    try:
        wanted = metadata.metadata("qlora-kit")["Requires-Python"]
    except metadata.PackageNotFoundError:
        raise AbsentError(f"{version}; qlora-kit is not installed, so the versions it needs are not known") from None
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
        raise AbsentError("unknown on this system") from error
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
        raise AbsentError(
            "none, plain torch instead: no C compiler (cc, gcc, clang) whose code can be stored and gives right results"
        )
    return "available, for a CPU" + (
        ", which multiplies quantised matrices as they are stored (AMX)" if has_tiles() else ""
    )


# --- the hub ----------------------------------------------------------------------------------------------------------


def _hub_cache() -> str:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return f"{_writable(nearest)} free in {cache}"


def _hub_access() -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session

    if constants.is_offline_mode():
        raise AbsentError("HF_HUB_OFFLINE is set: only models in the cache can be used")
    try:
        status = get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT).status_code
    except (HTTPError, OSError) as error:
        raise AbsentError(
            f"{constants.ENDPOINT} cannot be reached ({error}): only models in the cache and in folders can be used"
        ) from error
    if status >= 500:
        raise AbsentError(f"{constants.ENDPOINT} answers with status {status}: try again later")
    return f"{constants.ENDPOINT} answers"


def _hub_token() -> str:
    from huggingface_hub import get_token

    if get_token() is None:
        raise AbsentError("none: only public models can be fetched (`hf auth login` adds one)")
    return "found"


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
