"""The compiled code: made once, in a folder of the user's own; and nothing is said where it cannot be had. How long
its threads and torch's wait for each other is the user's to say."""

import ctypes
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qlora_kit.base import quantizer
from qlora_kit.ops import native
from qlora_kit.storage import private_folder

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))) or sys.platform not in ("linux", "darwin"),
    reason="there is no C compiler here",
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Compiling as in a new process, into a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("QLORA_KIT_COMPILE", raising=False)
    native.library.cache_clear()
    quantizer.c_functions.cache_clear()
    yield tmp_path / "cache" / "qlora_kit" / "compiled"
    native.library.cache_clear()
    quantizer.c_functions.cache_clear()


@pytest.mark.slow
@needs_compiler
def test_the_code_is_compiled_once_into_a_folder_of_the_users_own(fresh, monkeypatch):
    assert isinstance(native.library(), ctypes.CDLL)
    (made,) = fresh.iterdir()
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    written = made.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert [made] == list(fresh.iterdir())
    assert made.stat().st_mtime_ns == written
    native.library.cache_clear()
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-O2"))
    assert native.library() is not None
    assert len(list(fresh.iterdir())) == 2, "other flags are another library"


@pytest.mark.slow
@needs_compiler
def test_what_was_compiled_is_on_the_disk_before_it_bears_its_name(fresh, monkeypatch):
    """Or a machine that goes down leaves a library cut short, and whoever loads it ends with a bus error."""
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.fstat(descriptor).st_ino) or sync(descriptor))
    monkeypatch.setattr(os, "replace", lambda made, path: done.append("named") or replace(made, path))
    assert native.library() is not None
    (made,) = fresh.iterdir()
    assert done == [made.stat().st_ino, "named", fresh.stat().st_ino]


def homeless(path):
    raise RuntimeError("Could not determine home directory.")


@needs_compiler
@pytest.mark.parametrize("trouble", ["switched off", "no compiler", "no such flag", "no folder", "no home",
                                     "others write there"])  # fmt: skip
def test_where_nothing_can_be_compiled_plain_torch_gives_the_codes(trouble, fresh, monkeypatch, recwarn, capfd):
    if trouble == "switched off":
        monkeypatch.setenv("QLORA_KIT_COMPILE", "0")
    elif trouble == "no compiler":
        monkeypatch.setenv("PATH", str(fresh))
    elif trouble == "no such flag":
        monkeypatch.setattr(native, "FLAGS", ("-fno-such-flag",))
    elif trouble == "no folder":
        fresh.parent.parent.write_text("a file, and no folder")
    elif trouble == "no home":
        monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/do/not/count")
        monkeypatch.setattr(Path, "expanduser", homeless)
    else:
        fresh.mkdir(parents=True)
        fresh.chmod(0o777)
    assert native.library() is None
    assert quantizer.c_functions() is None
    w_N = torch.linspace(-2, 3, 1000)
    theirs = torch.ops.bitsandbytes.quantize_4bit.default(w_N, 64, "nf4", torch.uint8)
    for ours, wanted in zip(quantizer.quantize_4bit(w_N, 64, "nf4"), theirs, strict=True):
        assert torch.equal(ours, wanted.view(-1))
    assert not fresh.is_dir() or not list(fresh.iterdir())
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@needs_compiler
def test_a_compiler_that_gives_other_bits_is_not_used(fresh, monkeypatch, tmp_path):
    for source in native.SOURCES:
        text = source.read_text()
        (tmp_path / source.name).write_text(text.replace("!(bounds[k] >= x[i])", "bounds[k] < x[i] + 1e-3f"))
    sources = tuple(tmp_path / source.name for source in native.SOURCES)
    assert sum(one.read_text() != other.read_text() for one, other in zip(sources, native.SOURCES, strict=True)) == 1
    monkeypatch.setattr(native, "SOURCES", sources)
    assert native.library() is not None
    assert quantizer.c_functions() is None


@pytest.mark.slow
@needs_compiler
def test_several_that_compile_at_the_same_time_end_with_one_library(fresh):
    folder = private_folder("compiled")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda _: native._built(compiler, folder), range(4)))
    assert list(fresh.iterdir()) == list(made)
    assert ctypes.CDLL(str(made.pop())).qlora_kit_quantize_4bit


@pytest.mark.slow
@needs_compiler
def test_without_openmp_it_is_compiled_for_one_thread(fresh, monkeypatch):
    monkeypatch.setattr(native, "_THREADS", "-fno-such-flag")
    assert native.library() is not None
    assert quantizer.c_functions() is not None


# --- threads ----------------------------------------------------------------------------------------------------------


def test_how_long_threads_wait_is_the_users_to_say():
    def waits(**own):
        clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        code = "import os, qlora_kit; print(os.environ.get('GOMP_SPINCOUNT'))"
        done = subprocess.run([sys.executable, "-c", code], env=clean | own, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert waits() == "10000"
    assert waits(GOMP_SPINCOUNT="7") == "7"
    assert waits(OMP_WAIT_POLICY="passive") == "None"
