"""What a run leaves that ends at its start, however it ends, is started over, and what is a person's own never is."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import tiny

from qlora_kit.errors import RunError
from qlora_kit.recipe import dump_recipe, read_recipe
from qlora_kit.run import train, verify
from qlora_kit.run.folder import FILES, LOCK, check_run_folder, clear_run_folder, files_of_run

TAKES = "already holds a run"
REFUSES = "is not empty and holds no run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    """A run that is over, and its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [{"prompt": f"say {word} ", "completion": word} for word in ("cat", "dog", "owl", "bee", "ant", "elk")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [f"base.model={model_folder}", f"data.train={folder}/rows.jsonl", f"output={folder}/run"]
    settings = ["data.max_tokens=32", "train.steps=2", "train.save_every=1", "data.eval=null"]
    recipe = read_recipe("default", [*paths, *settings])
    train(recipe)
    return folder / "run", recipe


def check(folder, recipe, overwrite=False):
    check_run_folder(folder, recipe, resume=False, overwrite=overwrite)


def begun(name):
    return f".{name}.{tiny.dead_process()}.tmp"


LEFT = {
    "killed in its first write": lambda: [begun("recipe.yaml")],
    "killed in its second write": lambda: [LOCK, "recipe.yaml", begun("plan.json")],
    "no room for its second file": lambda: [LOCK, "recipe.yaml"],
    "recipe alone, of a copy": lambda: ["recipe.yaml"],
    "killed while an earlier one was removed": lambda: [LOCK, "plan.json", "data.json", "scores.json", begun("model")],
}


@pytest.mark.parametrize("left", LEFT)
def test_what_a_run_leaves_at_its_start_is_started_over_without_a_word(left, finished, tmp_path):
    run, recipe = finished
    for name in LEFT[left]():
        there = run / name
        (tmp_path / name).write_bytes(there.read_bytes() if there.is_file() else b"")
    assert len(list(tmp_path.iterdir())) > 0
    check(tmp_path, recipe)
    check(tmp_path, recipe, overwrite=True)


def test_a_run_in_what_another_left_at_its_start_is_a_whole_one(finished, tmp_path):
    run, recipe = finished
    (tmp_path / begun("recipe.yaml")).write_text("base:")
    shutil.copy(run / "recipe.yaml", tmp_path)
    train(recipe.model_copy(update={"output": str(tmp_path)}))
    assert verify(tmp_path).faults == []
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in run.iterdir()}


@pytest.mark.parametrize("name", [*FILES, "adapter", "model", "checkpoints", ".notes.1.tmp", "thesis.tex"])
def test_a_file_of_ones_own_is_no_run_whatever_its_name(name, finished, tmp_path):
    (tmp_path / name).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(RunError, match=REFUSES):
            check(tmp_path, finished[1], overwrite)


def test_a_recipe_with_a_word_of_ones_own_is_no_run(finished, tmp_path):
    _, recipe = finished
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    check(tmp_path, recipe)
    (tmp_path / "recipe.yaml").write_text("# what I want\n" + dump_recipe(recipe))
    with pytest.raises(RunError, match=REFUSES):
        check(tmp_path, recipe, overwrite=True)


@pytest.mark.parametrize("name", ["adapter/adapter_config.json", "thesis.tex"])
def test_a_lock_beside_something_to_lose_is_no_word_for_losing_it(name, finished, tmp_path):
    (tmp_path / LOCK).touch()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunError, match=REFUSES):
        check(tmp_path, finished[1], overwrite=True)


def test_wherever_it_is_killed_that_removes_a_run_the_next_one_can_and_only_that_ones_files_are_gone(
    finished, tmp_path, monkeypatch
):
    """Without a word where no adapter and no checkpoint is left."""
    run, recipe = finished
    said, removals = [], ((os, "rename"), (os, "rmdir"), (os, "unlink"), (Path, "unlink"), (Path, "rmdir"))
    for last in range(1000):
        folder = shutil.copytree(run, tmp_path / f"{last}")
        for own in (folder / "thesis.tex", folder / "checkpoints" / "step-best" / "state.json"):
            own.parent.mkdir(exist_ok=True)
            own.write_text("mine")
        child = os.fork()
        if child == 0:
            _kill_at(last, removals, monkeypatch)
            clear_run_folder(folder, files_of_run(folder))
            os._exit(0)
        was_killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        check(folder, recipe, overwrite=True)
        try:
            check(folder, recipe)
            said.append("")
        except RunError as error:
            said.append(TAKES if TAKES in str(error) else str(error))
        assert (folder / "thesis.tex").exists()
        assert (folder / "checkpoints" / "step-best" / "state.json").exists()
        if not was_killed:
            break
    assert len(said) > 10
    assert said[0] == TAKES
    assert said[-1] == ""
    assert sorted(said, reverse=True) == said, "from there on nothing is to lose"
    assert not {*FILES} - {"recipe.yaml", "plan.json"} & {path.name for path in folder.iterdir()}


def _kill_at(last, operations, monkeypatch):
    """End this process in the removal of that number."""
    done = [0]

    def counted(operation):
        def count(*args, **kwargs):
            done[0] += 1
            if done[0] > last:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return count

    for home, name in operations:
        monkeypatch.setattr(home, name, counted(getattr(home, name)))
