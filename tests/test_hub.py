"""A run on a base and rows of the hub, over HTTP: a hub on this machine, and the clients as they are installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from local_hub import COMMIT, serving

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart"
OF_THE_HUB = ["base.model=some/base", "data.train=some/rows", "data.eval=[{path: some/rows, split: test}]"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Serves the quickstart's base, and some of its rows in two splits."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(QUICKSTART / "base", root / "models" / "some" / "base")
    rows = root / "datasets" / "some" / "rows"
    rows.mkdir(parents=True)
    lines = (QUICKSTART / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (rows / "train.jsonl").write_text("".join(lines[:60]), encoding="utf-8")
    (rows / "test.jsonl").write_text("".join(lines[60:70]), encoding="utf-8")
    with serving(root) as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What the clients keep."""
    return tmp_path_factory.mktemp("home")


def call(hub, home, *words, **environment):
    """A command in a process of its own, since the clients read the hub's address when they are imported."""
    here = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}  # fmt: skip
    command = [sys.executable, "-c", "from qlora_kit.cli import main; main()", *words]
    hub.asked.clear()
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | here | environment)


def test_a_run_fetches_base_and_splits_from_the_hub_once_and_then_needs_none(hub, home, tmp_path):
    words = ["train", "quickstart", *OF_THE_HUB, "train.steps=2"]
    first = call(hub, home, *words, f"output={tmp_path / 'first'}")
    assert first.returncode == 0, first.stderr
    fetched = [line for line in hub.asked if line.startswith("GET") and "/resolve/" in line]
    assert sorted(line.rpartition(f"resolve/{COMMIT}/")[2] for line in fetched) == [
        "config.json", "generation_config.json", "model.safetensors", "test.jsonl", "tokenizer.json",
        "tokenizer_config.json", "train.jsonl",
    ]  # fmt: skip
    data = json.loads((tmp_path / "first" / "data.json").read_text())
    assert (data["train"]["rows"], data["eval"]["rows"]) == (60, 10)
    config = json.loads((tmp_path / "first" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    again = call(hub, home, *words, f"output={tmp_path / 'again'}", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert hub.asked == []
    written = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("first", "again")]
    assert written[0] == written[1]


@pytest.mark.parametrize(("wrong", "told"), [
    ("base.model=some/bas", r"the hub has no such model, or it is private. Check the spelling"),
    ("base.revision=v2", r"it has no revision 'v2'. Choose one at http://127.0.0.1"),
    ("data.train=some/row", r"Dataset 'some/row' doesn't exist on the Hub or cannot be accessed"),
    ("data.train=[{path: some/rows, split: valid}]", "Unknown split \"valid\". Should be one of"),
])  # fmt: skip
@pytest.mark.slow
def test_what_the_hub_does_not_have_is_one_line(wrong, told, hub, home, tmp_path):
    done = call(hub, home, "train", "quickstart", *OF_THE_HUB, wrong, f"output={tmp_path / 'run'}")
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told in error
    assert not (tmp_path / "run").exists()
