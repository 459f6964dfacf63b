"""`verify` finds every byte that changed, and proves on a person's own recipe that resuming is exact."""

import json
import shutil
from importlib import import_module

import pytest
import torch
from typer.testing import CliRunner

from qlora_kit.cli.app import app
from qlora_kit.errors import RunError
from qlora_kit.run import verify
from qlora_kit.train.checkpoint import Progress, save_checkpoint
from qlora_kit.train.optim import AdapterOptimizer

train_run = import_module("qlora_kit.run.train")


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("verified")
    rows = [{"prompt": f"say {word} ", "completion": word} for word in ("cat", "dog", "owl", "bee", "ant", "elk")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["lora.dropout=0.1", "data.max_tokens=32", "train.steps=2", "train.save_every=1"]
    paths = [f"base.model={model_folder}", f"data.train={folder}/rows.jsonl", f"output={folder}/run"]
    result = call("train", "default", *settings, *paths)
    assert result.exit_code == 0, result.output
    return folder / "run"


def test_a_sound_run_is_told_file_by_folder(run):
    told = call("verify", run)
    assert told.exit_code == 0, told.output
    assert told.stdout.splitlines() == [
        f"{run}  8 files",
        f"{run}/checkpoints/step-000001  4 files",
        f"{run}/checkpoints/step-000002  4 files",
        f"{run}/adapter  2 files",
        "18 files, with the bytes that were written",
    ]


def changed_once(file):
    """The file with its first, its middle or its last byte changed; as it was when they are through."""
    before = file.read_bytes()
    for place in (0, len(before) // 2, len(before) - 1):
        changed = bytearray(before)
        changed[place] ^= 1
        file.write_bytes(changed)
        yield
    file.write_bytes(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_every_bit_of_the_text_of_a_checkpoint_is_looked_at(name, tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))  # what is hashed with each bit is small
    optimizer = AdapterOptimizer([("w", parameter)], "lion_32bit")
    folder = save_checkpoint(tmp_path, {"w": parameter}, optimizer, Progress(step=2), keep=1)
    before, missed = (folder / name).read_bytes(), []
    assert verify(folder).faults == []
    for bit in range(8 * len(before)):
        changed = bytearray(before)
        changed[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(changed)
        if not verify(folder).faults:
            missed.append(bit)
    assert len(before) > 100
    assert missed == []


def test_a_changed_byte_in_any_file_of_a_checkpoint_or_an_adapter_is_found(run):
    files = [*(run / "checkpoints" / "step-000002").iterdir(), *(run / "adapter").iterdir()]
    assert len(files) == 7
    for file in files:
        for _ in changed_once(file):
            told = call("verify", run, "--json")
            assert told.exit_code == 2, file
            (fault,) = json.loads(told.stdout)["faults"]
            assert str(file if file.name != "manifest.json" else file.parent) in fault
    (run / "adapter" / "adapter_config.json").rename(run / "hidden")
    assert "adapter_config.json is missing" in call("verify", run).stdout
    (run / "hidden").rename(run / "adapter" / "adapter_config.json")
    assert call("verify", run).exit_code == 0


def test_a_changed_byte_in_any_record_of_a_run_and_in_an_export_within_it_is_found(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    assert call("export", copy, "--to", "adapter", "--out", copy / "for_others").exit_code == 0
    assert verify(copy).files[str(copy / "for_others")] >= 2
    records = [path for path in copy.iterdir() if path.is_file() and path.name not in ("checksums.json", ".lock")]
    assert len(records) == 9
    for file in [*records, copy / "for_others" / "adapter_config.json"]:
        if file.name == "report.html":  # is written again
            continue
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        assert verify(copy).faults == [f"{file} does not have the bytes that were written"]
        file.write_bytes(before)
    assert verify(copy).faults == []


def test_a_run_that_goes_on_has_no_checksums_of_what_it_is_writing(run, tmp_path, monkeypatch):
    copy, written = shutil.copytree(run, tmp_path / "copy"), []

    def stopped(folder):
        assert not (folder / "checksums.json").exists()
        written.append(verify(folder).faults)
        raise RunError("stopped before its end")

    monkeypatch.setattr(train_run, "seal_records", stopped)
    assert call("train", copy / "recipe.yaml", "train.steps=3", f"output={copy}", "--resume").exit_code == 2
    assert written == [[]]
    assert verify(copy).faults == []
    monkeypatch.undo()
    assert call("train", copy / "recipe.yaml", f"output={copy}", "--resume").exit_code == 0
    assert str(copy) in verify(copy).files
    assert verify(copy).faults == []


@pytest.mark.parametrize("kind", ["adapter", "merged", "gguf", pytest.param("quantized", marks=pytest.mark.slow)])
def test_a_changed_byte_in_any_file_of_an_export_is_found(run, kind, tmp_path):
    told = call("export", run, "--to", kind, "--out", tmp_path / "out")
    assert told.exit_code == 0, told.output
    assert verify(tmp_path / "out").faults == []
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != "export.json"]
    assert len(files) >= 2
    for file in files:
        for _ in changed_once(file):
            (fault,) = verify(tmp_path / "out").faults
            assert file.name in fault


def test_an_adapter_whose_checksums_are_gone_is_told(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "result.json").unlink()
    assert verify(copy).faults == [f"{copy / 'result.json'} is missing"]


def test_a_folder_without_checksums_is_one_line(tmp_path):
    told = call("verify", tmp_path)
    assert told.exit_code == 2
    assert told.stderr == (
        f"error: {tmp_path} is not a run, checkpoint or export with checksums; give the folder of one\n"
    )


@pytest.mark.slow
def test_resuming_is_proved_on_the_runs_own_recipe_and_leaves_nothing(run):
    before = sorted(path for path in run.parent.rglob("*"))
    told = call("verify", run, "--resume")
    assert told.exit_code == 0, told.output
    assert told.stdout.endswith("a run that is stopped and resumed takes the same steps to the same bytes\n")
    assert sorted(path for path in run.parent.rglob("*")) == before


@pytest.mark.slow
def test_a_resume_that_forgets_something_is_told(run, monkeypatch):
    from qlora_kit.train import checkpoint

    monkeypatch.setattr(checkpoint, "set_random_states", lambda states, device: None)  # dropout draws others then
    told = call("verify", run, "--resume")
    assert told.exit_code == 2
    assert "resumed: step 4: " in told.stdout
    assert "resumed: parameters.safetensors of step 6 has different bytes" in told.stdout
