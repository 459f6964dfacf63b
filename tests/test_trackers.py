"""Trackers: what is logged has the numbers of metrics.jsonl under sensible names, and a failure is one line."""

import json
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


def test_trackers_are_told_no_number_that_is_none():
    assert as_tracked({"step": 1, "loss": None, "lr": 0.1, "eval_loss": None, "rows": ["a:1"]}) == {"train/lr": 0.1}


def test_tensorboard_which_writes_at_once_starts_last(tmp_path, monkeypatch):
    named = []
    accelerator = SimpleNamespace(end_training=lambda: None)
    monkeypatch.setattr("qlora_kit.train.trackers.make_accelerator", lambda *_, **__: accelerator)
    monkeypatch.setattr("qlora_kit.train.trackers.start_trackers", lambda _, trackers, *__: named.extend(trackers))
    with tracking(["tensorboard", "wandb", "mlflow"], tmp_path, {}, tiny.CPU):
        assert named == ["wandb", "mlflow", "tensorboard"]


def test_trackers_end_when_training_fails(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(tensorboard.SummaryWriter, "close", lambda self: closed.append(self))

    def fail():
        with tracking(["tensorboard"], tmp_path, {"lora.rank": 4}, tiny.CPU) as track:
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
