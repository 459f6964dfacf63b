"""Ctrl-C in a program that calls `train`, or a notebook's interrupt: the step is finished and saved, and told of."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from qlora_kit.recipe import read_recipe
from qlora_kit.run import train, verify
from qlora_kit.train.checkpoint import checkpoints
from qlora_kit.watch import Watch


@pytest.fixture
def settings(tmp_path, model_folder):
    rows = [{"prompt": f"say {word} ", "completion": word} for word in ("cat", "dog", "owl", "bee", "ant", "elk")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"base.model={model_folder}", f"data.train={tmp_path}/rows.jsonl", "data.eval=null", "data.max_tokens=32",
        "train.micro_batch=2", "train.accumulation=1", f"output={tmp_path}/run",
    ]  # fmt: skip


@pytest.fixture
def python_s_own():
    """The handler that a plain program and a notebook have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "it is put back"
    signal.signal(signal.SIGINT, before)


class Interrupted(Watch):
    """Sends SIGINT while a step is told of."""

    def __init__(self, step, times=1):
        self.last, self.times = step, times

    def row(self, row):
        if row["step"] == self.last:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("python_s_own")
def test_an_interrupt_finishes_the_step_saves_and_says_how_to_go_on(settings, tmp_path):
    recipe = read_recipe("default", [*settings, "train.steps=5"])
    with pytest.raises(KeyboardInterrupt, match=r"^step 2 is done and saved; train\(recipe, resume=True\) continues"):
        train(recipe, watch=Interrupted(2))
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000002"]
    assert (tmp_path / "run" / "adapter").is_dir()
    assert verify(tmp_path / "run").faults == []
    assert train(recipe, resume=True, watch=Interrupted(5)).finished, "one in the last step is a finish"


@pytest.mark.usefixtures("python_s_own")
def test_the_second_interrupt_quits_at_once(settings, tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught:
        train(read_recipe("default", [*settings, "train.steps=5"]), watch=Interrupted(2, times=2))
    assert str(caught.value) == ""
    assert not checkpoints(tmp_path / "run" / "checkpoints")


def test_a_programs_own_handler_stays_in_charge(settings):
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append("here"))
    try:
        assert train(read_recipe("default", [*settings, "train.steps=2"]), watch=Interrupted(1)).finished
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == ["here"]


PROGRAM = """
import sys
import qlora_kit as qk
qk.train(qk.read_recipe("default", sys.argv[2:]), resume=sys.argv[1] == "resume")
print("what comes behind")
"""


@pytest.mark.long
def test_a_plain_program_that_is_interrupted_stops_there_and_goes_on_when_it_is_asked_to(settings, tmp_path):
    def run(how, steps, wait_for=0):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, how, *settings, f"train.steps={steps}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        metrics = tmp_path / "run" / "metrics.jsonl"
        if wait_for:
            deadline = time.monotonic() + 60
            while not (metrics.exists() and metrics.read_text().count("\n") >= wait_for):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
        return process, *process.communicate(timeout=120)

    process, said, told = run("start", 100_000, wait_for=3)
    assert process.returncode != 0, told  # -2, or 1 where a package (colorama) does something as Python ends
    last = told.strip().splitlines()[-1]
    assert last.startswith("KeyboardInterrupt: step ")
    assert "resume=True" in last
    assert said == ""
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    step = json.loads(rows[-1])["step"]
    assert newest.name == f"step-{step:06d}", "not a step is lost"
    assert verify(tmp_path / "run").faults == []
    process, said, told = run("resume", step + 2)
    assert process.returncode == 0, told
    assert said == "what comes behind\n"
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, step + 3))
