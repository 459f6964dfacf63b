"""A real disk that is full, or read-only: one line, nothing half-written, what stood before intact."""

import importlib
import json
import subprocess

import pytest
from typer.testing import CliRunner

from qlora_kit.cli.app import app
from qlora_kit.run import verify

MIB = 2**20


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 20 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root alone")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def words(tmp_path, model_folder, small_disk):
    rows = [{"prompt": f"say {word} ", "completion": word} for word in ("cat", "dog", "owl", "bee", "ant", "elk")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [f"base.model={model_folder}", f"data.train={tmp_path}/rows.jsonl", f"output={small_disk}/run"]
    return [
        "default", *paths, "data.max_tokens=32", "train.micro_batch=2", "train.accumulation=1", "train.save_every=1",
    ]  # fmt: skip


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fill(disk, leave_bytes):
    """Leave so many bytes free."""
    block = bytes(MIB // 4)
    with (disk / "filler").open("ab", buffering=0) as file:
        while (room := free(disk) - leave_bytes) > 0:
            file.write(block[:room])


def free(disk):
    found = subprocess.run(["df", "-B1", "--output=avail", disk], capture_output=True, text=True, check=True)
    return int(found.stdout.split()[-1])


def test_checkpoints_that_will_not_fit_are_refused_before_the_first_step(words, small_disk):
    fill(small_disk, 2 * MIB)
    told = call("train", *words, "train.steps=2")
    assert told.exit_code == 2
    assert told.stderr.startswith("error: keeping 2 checkpoints (train.keep_checkpoints) needs ")
    assert f"on the disk of {small_disk}/run, which has " in told.stderr
    assert not (small_disk / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_in_a_line_and_the_last_checkpoint_goes_on_when_there_is_room(
    words, small_disk, monkeypatch
):
    from qlora_kit.train import loop

    saved = loop.save_checkpoint

    def save(*given):
        saved(*given)
        fill(small_disk, MIB // 2)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    told = call("train", *words, "train.steps=3")
    assert told.exit_code == 2
    said = told.stderr.strip().splitlines()[-1]
    assert said.startswith("error: the checkpoint of step 2 needs ")
    assert f"step-000001 is kept: continue with --resume once that is fixed (output={small_disk}/run)" in said
    assert [path.name for path in (small_disk / "run" / "checkpoints").iterdir()] == ["step-000001"]
    assert verify(small_disk / "run").faults == []
    monkeypatch.setattr(loop, "save_checkpoint", saved)
    (small_disk / "filler").unlink()
    assert call("train", *words, "train.steps=3", "--resume").exit_code == 0
    assert verify(small_disk / "run").faults == []


@pytest.mark.parametrize(
    ("home", "name", "at"),
    [
        ("train.metrics", "_line", 2),
        pytest.param("train.checkpoint", "write_tensors", 5, marks=pytest.mark.slow),
        pytest.param("run.train", "save_adapter", 1, marks=pytest.mark.slow),
    ],
)
def test_wherever_it_fills_up_to_the_last_byte_the_line_names_the_folder_the_checkpoint_and_the_way_on(
    home, name, at, words, small_disk, monkeypatch
):
    """In a row of metrics, in the middle of a save, and when all is trained; memory.json has no room either then."""
    module, calls = importlib.import_module(f"qlora_kit.{home}"), []
    whole = getattr(module, name)

    def filling(*given, **named):
        calls.append(1)
        if len(calls) == at:
            fill(small_disk, 0)
        return whole(*given, **named)

    monkeypatch.setattr(module, name, filling)
    told = call("train", *words, "train.steps=2", "data.eval=null")
    assert len(calls) == at
    assert told.exit_code == 2, told.output
    said = told.stderr.strip().splitlines()[-1]
    kept = "step-000002" if name == "save_adapter" else "step-000001"
    assert f"{kept} is kept: continue with --resume once that is fixed (output={small_disk}/run)" in said
    monkeypatch.undo()
    (small_disk / "filler").unlink()
    assert call("train", *words, "train.steps=2", "data.eval=null", "--resume").exit_code == 0
    assert verify(small_disk / "run").faults == []


@pytest.mark.slow
def test_an_export_to_a_full_disk_leaves_nothing(words, small_disk, tmp_path):
    assert call("train", *words, "train.steps=1", f"output={tmp_path}/run").exit_code == 0
    for kind in ("merged", "adapter", "quantized", "gguf", "gguf-adapter"):
        told = call("export", tmp_path / "run", "--to", kind, "--out", small_disk / "out")
        assert told.exit_code == 2
        assert "on the disk of" in told.stderr
        assert "make room there" in told.stderr
        assert list(small_disk.iterdir()) == []


def test_a_read_only_disk_is_refused_before_anything_is_read(words, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    told = call("train", *words, "train.steps=1")
    assert told.exit_code == 2
    assert len(told.stderr.strip().splitlines()) == 1
    assert told.stderr.startswith(f"error: {small_disk}/run cannot be ")
