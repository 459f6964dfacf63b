"""The folder of a run: what may be replaced or gone on with, who writes to it, and what goes when another run comes."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from qlora_kit.errors import RunError
from qlora_kit.recipe import dump_recipe, read_recipe
from qlora_kit.run.folder import check_run_folder, clear_run_folder, files_of_run, run_folder, write_memory


@pytest.fixture
def asked(tmp_path):
    """A recipe, and with overrides others like it."""
    (tmp_path / "recipe.yaml").write_text("base: {model: org/name}\ndata: {train: org/rows}\n")
    return lambda *overrides: read_recipe(tmp_path / "recipe.yaml", [f"output={tmp_path / 'run'}", *overrides])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def checked(folder, recipe, **words):
    check_run_folder(folder, recipe, **{"resume": False, "overwrite": False, **words})


def put(folder, *names):
    for name in names:
        (folder / name).write_text("as it was left")


@pytest.mark.parametrize("left", [
    [".lock", "plan.json"], [".lock", ".adapter.123.tmp"], [".plan.json.123.tmp"],
])  # fmt: skip
def test_what_a_run_leaves_that_is_killed_before_it_has_said_what_it_is_is_replaced(left, asked, folder):
    put(folder, *left)
    checked(folder, asked())


@pytest.mark.parametrize("left", [
    ["plan.json"], [".lock", "thesis.tex"], [".lock", ".thesis.tex.123.tmp"], ["recipe.yaml"],
])  # fmt: skip
def test_what_no_run_leaves_is_not_replaced(left, asked, folder):
    put(folder, *left)
    for words in ({}, {"overwrite": True}, {"force": True}):
        with pytest.raises(RunError, match="is not empty and holds no run; set output to another folder"):
            checked(folder, asked(), **words)


def test_a_recipe_alone_is_a_runs_if_it_has_every_key_as_runs_write_it(asked, folder):
    (folder / "recipe.yaml").write_text(dump_recipe(asked()))
    checked(folder, asked())
    (folder / "recipe.yaml").write_text("# mine\n" + dump_recipe(asked()))
    with pytest.raises(RunError, match="is not empty and holds no run"):
        checked(folder, asked())


def test_an_adapter_without_a_recipe_is_no_run_to_go_on_with(asked, folder):
    (folder / "adapter").mkdir()
    with pytest.raises(RunError, match="holds no run to resume"):
        checked(folder, asked(), resume=True)


@pytest.fixture
def run(asked, folder):
    """As much of a run as is looked at."""
    (folder / "adapter").mkdir()
    (folder / "recipe.yaml").write_text(dump_recipe(asked()))
    put(folder, "plan.json")
    return folder


def test_force_alone_replaces_no_run(asked, run):
    with pytest.raises(RunError, match="already holds a run; continue it with --resume, replace it with --overwrite"):
        checked(run, asked(), force=True)
    checked(run, asked(), overwrite=True)


@pytest.mark.parametrize("change", [
    "base.cache=true", "memory.budget=1GiB", "memory.activations=keep", "train.epochs=2", "train.tokens=9",
    "train.steps=9", "train.eval_every=1", "train.save_every=1", "train.sample_every=1", "train.keep_checkpoints=1",
    "train.early_stopping=1", "train.trackers=[wandb]", "base.quantize_head=auto", "lora.rank=auto",
])  # fmt: skip
def test_what_changes_no_step_may_be_otherwise_when_a_run_goes_on(change, asked, run):
    assert asked(change) != asked()
    checked(run, asked(change), resume=True)


@pytest.mark.parametrize("change", [
    "base.block_size=128", "lora.rank=8", "lora.alpha=64", "data.max_tokens=64", "train.lr=1e-3", "train.seed=1",
    "train.warmup=0", "train.schedule=linear", "train.max_grad_norm=1", "train.master_weights=none",
])  # fmt: skip
def test_what_changes_steps_may_be_otherwise_only_by_force(change, asked, run):
    with pytest.raises(RunError, match=rf"was made with another recipe: {change.partition('=')[0]} was \S+, is "):
        checked(run, asked(change), resume=True)
    checked(run, asked(change), resume=True, force=True)


def test_a_run_is_not_written_over_the_adapter_that_it_starts_from_by_whatever_name(asked, run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(RunError, match="which a run replaces"):
        checked(run, asked(f"lora.from={tmp_path / 'link' / 'adapter'}"), overwrite=True)


def test_one_run_at_a_time_writes_to_a_folder_which_goes_if_nothing_came_into_it(tmp_path):
    with run_folder(tmp_path / "run"):
        with pytest.raises(RunError, match="another run is writing to"), run_folder(tmp_path / "run"):
            pass
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
    with run_folder(tmp_path / "run"):
        put(tmp_path / "run", "plan.json")
    assert (tmp_path / "run" / "plan.json").is_file()


def test_what_a_killed_run_left_unfinished_goes_when_the_next_one_comes(run):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = [run / f".adapter.{ended.pid}.tmp", run / "checkpoints" / f".step-000010.{ended.pid}.tmp"]
    for each in left:
        each.mkdir(parents=True)
    with run_folder(run):
        assert not any(each.exists() for each in left)
        assert (run / "adapter").is_dir()


def test_all_that_a_run_wrote_goes_and_what_tells_whose_the_folder_is_stays(run):
    (run / "checkpoints" / "step-000002").mkdir(parents=True)
    (run / "checkpoints" / "step-000002" / "manifest.json").write_text("{}")
    for name in ("qlora-kit", "model"):
        (run / name).mkdir()
    put(run, "result.json", "notes.txt", "qlora-kit/events")
    clear_run_folder(run, files_of_run(run))
    assert sorted(path.name for path in run.iterdir()) == ["notes.txt", "plan.json", "recipe.yaml"]


def test_the_error_of_a_plan_is_what_it_says_too_much_as_a_share_of_what_was_measured(folder):
    ledger = SimpleNamespace(
        history=SimpleNamespace(timeline=list, largest=list),
        summary=lambda: {"peak_bytes": 100, "by_category": {"base": 40, "adapters": 50, "workspace": 0}},
    )
    counter = SimpleNamespace(name="rss", peak_bytes=120, start_bytes=10, file_backed_bytes=0)
    write_memory(folder, {"peak_bytes": 110, "by_category": {"base": 50, "adapters": 45}}, ledger, counter)
    error = json.loads((folder / "memory.json").read_text())["error"]
    assert error == pytest.approx({"peak": 0.1, "base": 0.25, "adapters": -0.1})
