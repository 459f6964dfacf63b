"""Every operation on the disk that a save makes fails once, and the process is killed at each once: what stood before
still stands, and what is new is whole or not there."""

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import tiny
from safetensors import safe_open
from test_gguf import byte_level

from qlora_kit.base.formats import Quantization
from qlora_kit.errors import RunError
from qlora_kit.export import export_merged, export_quantized, shelf, stream
from qlora_kit.export.gguf import export_gguf, writer
from qlora_kit.export.sealed import MANIFEST
from qlora_kit.lora import add_lora, save_adapter
from qlora_kit.storage import (
    clear_abandoned,
    files,
    folders,
    passing_folder,
    read_json,
    remove_folder,
    sha256_file,
    staged_folder,
    write_text,
)
from qlora_kit.train.checkpoint import (
    Progress,
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from qlora_kit.train.optim import AdapterOptimizer

NEVER = 10**9
OPERATIONS = ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (safetensors.torch, "save_file"))


class Disk:
    """Counts the operations that change it, and does `act` instead of the one of that number."""

    def __init__(self, monkeypatch):
        self.done, self.at, self.act = 0, NEVER, None
        for home, name in OPERATIONS:
            monkeypatch.setattr(home, name, self._counted(getattr(home, name)))
        for home in (files, stream, writer, shelf):
            monkeypatch.setattr(home, "open", self._opened, raising=False)

    def _counted(self, operation):
        def counted(*args, **kwargs):
            self.done += 1
            if self.done == self.at + 1:
                self.act()
            return operation(*args, **kwargs)

        return counted

    def _opened(self, path, mode="r", **kwargs):
        file = open(path, mode, **kwargs)  # noqa: SIM115  # the caller closes it
        if "r" not in mode:
            file.write = self._counted(file.write)
        return file


def full():
    raise OSError(errno.ENOSPC, "No space left on device", "the disk")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture(scope="module")
def model():
    made = tiny.quantized(tiny.llama())
    add_lora(made, rank=2, alpha=4)
    tiny.wake(made)
    return made


class Checkpoint:
    def __init__(self, model):
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters, self.optimizer = dict(named), AdapterOptimizer(named, "adamw")

    def save(self, folder, number):
        save_checkpoint(folder / "checkpoints", self.parameters, self.optimizer, Progress(step=number), keep=1)

    def check(self, folder):
        """Gives the number of the save that stands."""
        newest, faults = newest_checkpoint(folder / "checkpoints")
        assert faults == []
        assert all(verify_checkpoint(each) == [] for each in checkpoints(folder / "checkpoints"))
        return load_checkpoint(newest, self.parameters, self.optimizer).step


class AdapterFolder:
    def __init__(self, model):
        self.model = model

    def save(self, folder, number):
        save_adapter(self.model, folder / "adapter", provenance={"number": str(number)})

    def check(self, folder):
        with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
            number = int(file.metadata()["number"])
            assert len(file.keys()) == 28
        assert read_json(folder / "adapter" / "adapter_config.json")["r"] == 2
        return number


class Export:
    files = 5

    def __init__(self, model):
        self.model = model

    def save(self, folder, number):
        export_merged(self.model, None, folder / f"export-{number}", dtype="float32", shard_bytes=130_000)

    def check(self, folder):
        for export in folder.glob("export-*"):
            files = read_json(export / MANIFEST)["files"]
            assert len(files) >= self.files
            assert all(sha256_file(export / name) == checksum for name, checksum in files.items())
        return len(list(folder.glob("export-*")))


class Quantized(Export):
    files = 3

    def save(self, folder, number):
        export_quantized(self.model, None, folder / f"export-{number}", quantization=Quantization("nf4"))


class Gguf(Export):
    files = 2

    def __init__(self, model):
        self.tokenizer = byte_level()
        self.model = tiny.quantized(tiny.llama(vocab_size=len(self.tokenizer)))
        add_lora(self.model, rank=2, alpha=4)

    def save(self, folder, number):
        export_gguf(self.model, self.tokenizer, folder / f"export-{number}", dtype="f16")


class Page:
    def __init__(self, model):
        pass

    def save(self, folder, number):
        write_text(folder / "page.html", "number " + str(number) * 5000)

    def check(self, folder):
        text = (folder / "page.html").read_text()
        assert len(text) == 5007
        return int(text[-1])


EXPORTS = [
    pytest.param(kind, marks=mark)
    for kind, mark in ((Export, pytest.mark.slow), (Quantized, pytest.mark.long), (Gguf, pytest.mark.long))
]
EACH = pytest.mark.parametrize("kind", [Checkpoint, AdapterFolder, Page, *EXPORTS])


@EACH
def test_whichever_write_fails_what_stood_before_stands_and_nothing_half_written_is_left(kind, model, disk, tmp_path):
    saver, ends = kind(model), []
    for disk.at in range(1000):
        disk.act, disk.done = None, NEVER
        folder = tmp_path / f"{disk.at}"
        folder.mkdir()
        saver.save(folder, 1)
        disk.act, disk.done = full, 0
        try:
            saver.save(folder, 2)
        except (OSError, RunError):
            ends.append(saver.check(folder))
            assert left_over(folder) == []
        if disk.done <= disk.at:
            break
    assert ends[0] == 1, "nothing was refused"
    assert len(ends) > 3
    assert ends == sorted(ends), "a later fault left an earlier state"
    assert saver.check(folder) == 2


def test_where_folders_cannot_exchange_names_a_failed_write_leaves_the_old_one_too(model, disk, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    test_whichever_write_fails_what_stood_before_stands_and_nothing_half_written_is_left(
        AdapterFolder, model, disk, tmp_path
    )


@EACH
def test_whenever_the_process_is_killed_what_stands_is_whole_and_the_next_save_clears_up(kind, model, disk, tmp_path):
    saver, ends = kind(model), []
    for disk.at in range(1000):
        disk.act, disk.done = None, NEVER
        folder = tmp_path / f"{disk.at}"
        folder.mkdir()
        saver.save(folder, 1)
        child = os.fork()
        if child == 0:
            disk.act, disk.done = kill, 0
            saver.save(folder, 2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        ends.append(saver.check(folder))
        if ends[-1] == 1:
            saver.save(folder, 2)
            assert left_over(folder) == []
        assert saver.check(folder) == 2
    assert len(ends) > 3
    assert ends == sorted(ends)


def test_where_folders_cannot_exchange_names_a_kill_between_the_two_renames_loses_nothing(
    model, disk, tmp_path, monkeypatch
):
    monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    saver, ends, were_away = AdapterFolder(model), [], 0
    for disk.at in range(1000):
        disk.act, disk.done = None, NEVER
        folder = tmp_path / f"{disk.at}"
        folder.mkdir()
        saver.save(folder, 1)
        child = os.fork()
        if child == 0:
            disk.act, disk.done = kill, 0
            saver.save(folder, 2)
            os._exit(0)
        if os.WIFEXITED(os.waitpid(child, 0)[1]):
            break
        were_away += not (folder / "adapter").exists()
        clear_abandoned(folder)
        ends.append(saver.check(folder))
        assert left_over(folder) == []
    assert were_away == 1, "no kill came between the renames"
    assert ends == sorted(ends)
    assert {*ends} == {1, 2}


def left_over(folder):
    return [path for path in folder.rglob(".*") if path.suffix in (".tmp", ".old", ".gone")]


def test_a_file_of_a_living_process_is_left_alone(tmp_path):
    mine, dead = (tmp_path / f".page.{number}.tmp" for number in (os.getppid(), tiny.dead_process()))
    mine.touch()
    dead.touch()
    write_text(tmp_path / "page", "text")
    assert mine.exists()
    assert not dead.exists()


def test_what_a_dead_process_of_the_same_number_left_is_cleared_up_or_put_back(tmp_path, monkeypatch):
    """In a container every run has the same number."""
    monkeypatch.setattr(folders, "_exchange", lambda first, second: False)

    def leave(kind):
        left = tmp_path / f".run.{os.getpid()}.{kind}"
        left.mkdir()
        (left / "page").write_text(kind)

    leave("old")
    clear_abandoned(tmp_path)
    assert (tmp_path / "run" / "page").read_text() == "old"
    for kind in ("tmp", "old", "gone"):
        leave(kind)
    with staged_folder(tmp_path / "run") as staged:
        (staged / "page").write_text("new")
        monkeypatch.chdir(tmp_path)
        clear_abandoned(Path())
        assert staged.exists(), "it is being written"
    assert (tmp_path / "run" / "page").read_text() == "new"
    leave("gone")
    remove_folder(tmp_path / "run")
    leave("tmp")
    with passing_folder(tmp_path / "run") as passing:
        assert list(passing.iterdir()) == []
    leave("tmp")
    write_text(tmp_path / "run", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_was_being_deleted_does_not_come_back(tmp_path):
    doomed = tmp_path / "doomed"
    doomed.mkdir()
    (doomed / "page").touch()
    child = os.fork()
    if child == 0:
        shutil.rmtree = lambda path: kill()
        remove_folder(doomed)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not doomed.exists()
    assert len(left_over(tmp_path)) == 1
    clear_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_that_look_abandoned_and_lead_elsewhere_or_count_too_far_are_cleared_up_too(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "page").touch()
    (tmp_path / f".link.{tiny.dead_process()}.tmp").symlink_to(tmp_path / "mine")
    (tmp_path / f".page.{'9' * 20}.tmp").touch()
    clear_abandoned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "page").exists()


def test_every_folder_that_got_a_new_entry_is_flushed(tmp_path, monkeypatch):
    flushed, flush = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.add(os.fstat(file).st_ino), flush(file)))
    with staged_folder(tmp_path / "new" / "deep" / "run" / "checkpoint") as staged:
        (staged / "page").touch()
    made = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert len(made) == 4
    assert {path.stat().st_ino for path in (tmp_path, *made)} <= flushed


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_one_and_the_folder_that_it_leads_to_is_meant(tmp_path, is_there):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    if is_there:
        target.mkdir()
    link.symlink_to(target)
    with staged_folder(link) as staged:
        write_text(staged / "page", "text")
    assert link.readlink() == target
    assert (target / "page").read_text() == "text"
    assert left_over(tmp_path) == []


def test_of_two_exports_into_one_new_folder_the_later_is_refused_and_the_first_stands(tmp_path):
    def write():
        with staged_folder(tmp_path / "out", replaces=False) as staged:
            (staged / "of").write_text("the later")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "of").write_text("the first")

    with pytest.raises(RunError, match="out was written by another program in the meantime"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "of").read_text() == "the first"
