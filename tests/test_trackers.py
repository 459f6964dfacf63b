"""Trackers: what is logged has the numbers of metrics.jsonl under sensible names, and a failure is one line."""

import json
import os
import sqlite3
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import tiny
from test_cli import assert_mistake, call
from test_use import WORDS, write_recipe
from torch.utils import tensorboard

from qlora_kit.errors import RunError
from qlora_kit.run.folder import clear_run_folder, files_of_run
from qlora_kit.train.trackers import as_tracked, start_trackers, tracking


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny model as a user would have it."""
    return tiny.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(tmp_path, model_folder):
    """A recipe of two steps with an evaluation."""
    rows = [{"prompt": f"say {word} ", "completion": word} for word in WORDS]
    return write_recipe(tmp_path, model_folder, rows, steps=2)


def test_rows_are_grouped_by_what_they_tell_of():
    row = {"step": 3, "loss": 1.0, "lr": 0.1, "tokens_per_s": 5.0}
    assert as_tracked(row) == {"train/loss": 1.0, "train/lr": 0.1, "train/tokens_per_s": 5.0}
    assert as_tracked({"step": 3, "eval_loss": 2.0}) == {"eval/loss": 2.0}


@pytest.mark.slow
def test_tensorboard_gets_the_rows_of_metrics_and_the_settings_of_the_recipe(recipe, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = call("train", recipe, "train.trackers=[tensorboard]", "train.lr=auto")
    assert result.exit_code == 0, result.output
    run = recipe.parent / "run"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = events.EventAccumulator(str(run / "qlora-kit"))
    logged.Reload()
    for tag, key in (("train/loss", "loss"), ("train/lr", "lr"), ("eval/loss", "eval_loss")):
        wanted = [(row["step"], row[key]) for row in metrics if key in row]
        assert wanted
        found = [(event.step, event.value) for event in logged.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        # events hold 32-bit floats
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-6)
    (settings,) = (run / "qlora-kit").rglob("hparams.yml")
    text = settings.read_text()
    assert "base.quantization: nf4" in text
    assert "lora.rank: 4" in text
    assert f"train.lr: {metrics[-2]['lr']}" in text
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def fails(*_, **__):
        raise OSError("no room for logs")

    monkeypatch.setattr(tensorboard, "SummaryWriter", fails)
    refused = call("train", recipe, "train.trackers=[tensorboard]", "--overwrite")
    assert_mistake(refused, "tensorboard cannot be started", "no room for logs")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before, "the run outlives that"
    earlier = files_of_run(run)
    (run / "qlora-kit" / "events of the next run").touch()
    clear_run_folder(run, earlier)
    assert [path.name for path in (run / "qlora-kit").iterdir()] == ["events of the next run"]


def read_wandb(folder):
    """An offline run's project, name, settings and rows, from the log of records that `wandb sync` would send.

    The file is a LevelDB log: blocks of 32 KiB of chunks, each behind a checksum, its length and its kind (1 whole,
    2 first, 3 middle, 4 last).
    """
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, record, records = path.read_bytes(), 7, b"", []  # behind the file's own header
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(messages.Record.FromString(record))
            record = b""
    (run,) = [each.run for each in records if each.WhichOneof("record_type") == "run"]
    configs = [*run.config.update, *(item for each in records for item in each.config.update)]
    settings = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in configs}
    histories = [each.history.item for each in records if each.WhichOneof("record_type") == "history"]
    rows = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in items} for items in histories]
    return run.project, run.display_name, settings, [(row["_step"], row) for row in rows]


def read_mlflow(folder):
    """The same of MLflow's database, where each number is a row."""
    tables = sqlite3.connect(folder / "mlflow.db")
    (project,) = [name for (name,) in tables.execute("select name from experiments") if name != "Default"]
    ((uuid, name, status),) = tables.execute("select run_uuid, name, status from runs")
    assert status == "FINISHED"
    settings = dict(tables.execute("select key, value from params where run_uuid = ?", [uuid]))
    rows = tables.execute("select step, key, value from metrics where run_uuid = ?", [uuid])
    return project, name, settings, [(step, {key: value}) for step, key, value in rows]


def read_trackio(folder):
    """The same of trackio's database."""
    tables = sqlite3.connect(folder / "trackio" / "qlora-kit.db")
    ((name, settings),) = tables.execute("select run_name, config from configs")
    rows = tables.execute("select step, metrics from metrics")
    return "qlora-kit", name, json.loads(settings), [(step, json.loads(row)) for step, row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_installed_has_the_rows_and_the_settings(tmp_path, recipe, monkeypatch, tracker):
    pytest.importorskip(tracker, reason=f"{tracker} is not installed: make extras")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-c", "from qlora_kit.cli import main; main()", "train", str(recipe)]
    subprocess.run([*command, f"train.trackers=[{tracker}]"], check=True, cwd=tmp_path, env=os.environ | environment)
    run = recipe.parent / "run"
    read = {"wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}[tracker]
    project, name, settings, rows = read(tmp_path)
    assert (project, name) == ("qlora-kit", "run")
    assert settings["base.quantization"] == "nf4"
    assert int(settings["lora.rank"]) == 4
    logged = {(step, key): value for step, row in rows for key, value in row.items() if not key.startswith("_")}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = {(row["step"], key): value for row in metrics for key, value in as_tracked(row).items()}
    assert {key for _, key in wanted} >= {"train/loss", "train/lr", "eval/loss"}
    assert logged == wanted


class Gone(Exception):
    """As a tracker's own error, once its server is gone."""


def test_a_tracker_that_fails_on_the_way_is_told_once_and_the_others_go_on(tmp_path, monkeypatch):
    faults = ModuleType("mlflow.exceptions")
    faults.MlflowException = Gone
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.exceptions", faults)
    kept, noted, ended = [], [], []

    def log(values, step):
        if step == 2:
            raise Gone("no answer.\nsee https://...")
        kept.append(("mlflow", step))

    lost = SimpleNamespace(name="mlflow", log=log, finish=lambda: ended.append("mlflow"))
    well = SimpleNamespace(
        name="tensorboard",
        log=lambda values, step: kept.append(("tensorboard", step)),
        finish=lambda: ended.append("tensorboard"),
    )
    accelerator = SimpleNamespace(trackers=[lost, well])
    monkeypatch.setattr("qlora_kit.train.trackers.make_accelerator", lambda *_, **__: accelerator)
    monkeypatch.setattr("qlora_kit.train.trackers.start_trackers", lambda *_: None)
    with tracking(["tensorboard", "mlflow"], tmp_path, {}, tiny.CPU, noted.append) as track:
        for step in (1, 2, 3):
            track({"step": step, "loss": 1.0})
    assert kept == [("mlflow", 1), ("tensorboard", 1), ("tensorboard", 2), ("tensorboard", 3)]
    assert noted == ["train.trackers: mlflow gets no more rows: no answer; metrics.jsonl has them all"]
    assert ended == ["tensorboard"]


def test_what_is_no_fault_of_a_tracker_is_not_taken_for_one(tmp_path, monkeypatch):
    def log(values, step):
        raise KeyError(step)

    accelerator = SimpleNamespace(trackers=[SimpleNamespace(name="tensorboard", log=log, finish=lambda: None)])
    monkeypatch.setattr("qlora_kit.train.trackers.make_accelerator", lambda *_, **__: accelerator)
    monkeypatch.setattr("qlora_kit.train.trackers.start_trackers", lambda *_: None)
    with (
        pytest.raises(KeyError),
        tracking(["tensorboard"], tmp_path, {}, tiny.CPU, lambda text: None) as track,
    ):
        track({"step": 1, "loss": 1.0})


def test_trackers_are_told_no_number_that_is_none():
    assert as_tracked({"step": 1, "loss": None, "lr": 0.1, "eval_loss": None, "rows": ["a:1"]}) == {"train/lr": 0.1}


def test_tensorboard_which_writes_at_once_starts_last(tmp_path, monkeypatch):
    named = []
    accelerator = SimpleNamespace(trackers=[])
    monkeypatch.setattr("qlora_kit.train.trackers.make_accelerator", lambda *_, **__: accelerator)
    monkeypatch.setattr("qlora_kit.train.trackers.start_trackers", lambda _, trackers, *__: named.extend(trackers))
    with tracking(["tensorboard", "wandb", "mlflow"], tmp_path, {}, tiny.CPU, lambda text: None):
        assert named == ["wandb", "mlflow", "tensorboard"]


def test_trackers_end_when_training_fails(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(tensorboard.SummaryWriter, "close", lambda self: closed.append(self))

    def fail():
        with tracking(["tensorboard"], tmp_path, {"lora.rank": 4}, tiny.CPU, lambda text: None) as track:
            track({"step": 1, "loss": 2.0, "grad_norm": None})
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert closed


class Refused(Exception):
    """As wandb.errors.Error: none of Python's own."""


@pytest.mark.parametrize("error", [Refused("not logged in\nsee https://..."), OSError("no such host"), RuntimeError()])
def test_a_tracker_that_does_not_start_is_one_line(tmp_path, monkeypatch, error):
    faults = ModuleType("wandb.errors")
    faults.Error = Refused
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    monkeypatch.setitem(sys.modules, "wandb.errors", faults)

    def fails(*_, **__):
        raise error

    with pytest.raises(RunError) as caught:
        start_trackers(SimpleNamespace(init_trackers=fails), ["wandb"], tmp_path, {"lora.rank": 4})
    line = str(caught.value)
    assert "\n" not in line
    assert "wandb cannot be started" in line
    assert (str(error).splitlines() or ["RuntimeError"])[0] in line
    assert "train.trackers=[]" in line


def test_trackers_are_told_the_name_of_the_run_and_plain_settings(tmp_path):
    told = {}

    def init(project, config, init_kwargs):
        told.update(project=project, config=config, names=init_kwargs)

    settings = {"lora.rank": 4, "lora.dora": False, "train.lr": 1e-3, "base.revision": None, "base.skip": ["head"]}
    start_trackers(SimpleNamespace(init_trackers=init), ["tensorboard", "trackio"], tmp_path / "wide", settings)
    assert told["project"] == "qlora-kit"
    assert told["names"] == {"trackio": {"name": "wide"}}
    assert told["config"] == settings | {"base.revision": "None", "base.skip": "['head']"}
