"""A run that is killed again and again comes to the same bytes as one that nobody touched."""

import json
import os
import random
import signal
import statistics
import time

import pytest
import tiny
from safetensors.torch import load_file

from qlora_kit.errors import RunError
from qlora_kit.recipe import read_recipe
from qlora_kit.run import train, verify
from qlora_kit.run.folder import run_folder
from qlora_kit.train import loop
from qlora_kit.train.checkpoint import newest_checkpoint

STEPS, KILLS = 100, 30


@pytest.fixture(autouse=True)
def no_wait_for_the_disk():
    """Here it is waited for: it is when most of a save's time passes."""


def recipe(folder, model_folder, name):
    rows = [{"prompt": f"say {word} ", "completion": word} for word in ("cat", "dog", "owl", "bee", "ant", "elk")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [f"base.model={model_folder}", f"data.train={folder}/rows.jsonl", f"output={folder}/{name}"]
    return read_recipe(
        "default",
        [*paths, "data.max_tokens=32", "data.eval=null", "lora.dropout=0.1", "train.micro_batch=2",
         "train.accumulation=1", f"train.steps={STEPS}", "train.save_every=1"],
    )  # fmt: skip


def killed(run, resume, after, in_save=False):
    """Run in a process of its own, which is killed so many seconds after its first new checkpoint, or after it has
    begun the save that comes next; whether it was."""
    folder, child = f"{run.output}/checkpoints", os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train(run, resume=resume)
        os._exit(0)
    before, has_saved = names_in(folder), False
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        names = names_in(folder)
        has_saved = has_saved or any(name.startswith("step-") for name in names - before)
        if has_saved and (not in_save or any(name.endswith(f".{child}.tmp") for name in names)):
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
            return os.WIFSIGNALED(os.waitpid(child, 0)[1])
        time.sleep(0.0002)
    return False


def names_in(folder):
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


@pytest.mark.long
def test_a_run_that_is_killed_thirty_times_loses_nothing_and_ends_with_the_same_bytes(
    tmp_path, model_folder, monkeypatch
):
    whole, parts = (recipe(tmp_path, model_folder, name) for name in ("whole", "parts"))
    save_s = seconds_of_a_save(whole, monkeypatch)
    draw, steps, in_saves = random.Random(0), [], 0
    for kill in range(KILLS):
        after = draw.uniform(0, 0.35 * save_s)  # a save has gone on for a while when its folder is seen
        assert killed(parts, resume=kill > 0, after=after, in_save=True), f"it ended after {kill} kills"
        in_saves += bool(left_over(tmp_path))
        newest, faults = newest_checkpoint(tmp_path / "parts" / "checkpoints")
        assert faults == []
        steps.append(int(newest.name.removeprefix("step-")))
    # Most do where there is a core for each process; beside other tests the one that kills is late, and fewer.
    assert in_saves >= 5, f"{in_saves} of {KILLS} kills came within a save"
    assert steps == sorted(set(steps)), "a kill lost a step that stood"
    train(parts, resume=True)
    assert verify(tmp_path / "parts").faults == []
    ours, theirs = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("parts", "whole"))
    assert all((ours[key] == theirs[key]).all() for key in theirs)
    rows, wanted = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("parts", "whole"))
    assert [losses(row) for row in rows] == [losses(row) for row in wanted]
    assert not left_over(tmp_path)


def seconds_of_a_save(run, monkeypatch):
    """The median over a whole run."""
    taken, save = [], loop.save_checkpoint

    def timed(*given):
        start = time.monotonic()
        save(*given)
        taken.append(time.monotonic() - start)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", timed)
        train(run)
    return statistics.median(taken)


def left_over(folder):
    return [path for path in folder.rglob(".*") if path.suffix in (".tmp", ".old", ".gone")]


def losses(line):
    row = json.loads(line)
    return row["step"], row["loss"], row["grad_norm"]


def test_a_second_run_in_a_folder_that_is_being_written_to_is_refused(tmp_path):
    refused = pytest.raises(RunError, match=f"another run is writing to {tmp_path}/run; wait for it")
    with run_folder(tmp_path / "run"), refused, run_folder(tmp_path / "run"):
        pytest.fail("both have it")


def test_a_lock_that_leads_elsewhere_empties_nothing(tmp_path):
    """In a run folder that somebody else made it may be a link to a file of its reader."""
    (tmp_path / "mine").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine")
    with run_folder(tmp_path / "run"):
        assert (tmp_path / "mine").read_text() == "text"


@pytest.mark.slow
def test_a_folder_that_a_killed_run_had_locked_is_free(tmp_path, model_folder):
    run = recipe(tmp_path, model_folder, "run")
    assert killed(run, resume=False, after=0)
    with pytest.raises(RunError, match="already holds a run"):
        train(run)
    (tmp_path / "run" / "checkpoints" / f".step-000001.{tiny.dead_process()}.old").mkdir()
    assert killed(run, resume=True, after=0), "the dead one's lock held"
    assert not list((tmp_path / "run" / "checkpoints").glob(".step-000001.*"))
