"""A run on a base and rows of the hub, over HTTP: a hub on this machine, and the clients as they are installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from local_hub import files_of, serving

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart"
OF_THE_HUB = ["base.model=some/base", "data.train=some/rows", "data.eval=[{path: some/rows, split: test}]"]


@pytest.fixture(scope="module")
def hub():
    """Has the quickstart's base, and some of its rows in two splits."""
    lines = (QUICKSTART / "train.jsonl").read_bytes().splitlines(keepends=True)
    with serving() as server:
        server.repositories["models/some/base"] = files_of(QUICKSTART / "base")
        splits = {"train.jsonl": b"".join(lines[:60]), "test.jsonl": b"".join(lines[60:70])}
        server.repositories["datasets/some/rows"] = splits
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What the clients keep."""
    return tmp_path_factory.mktemp("home")


def call(hub, home, *words, **environment):
    """A command in a process of its own, since the clients read the hub's address when they are imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    direct = {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", "from qlora_kit.cli import main; main()", *words]
    hub.asked.clear()
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=kept | here | direct | environment)


@pytest.mark.slow
def test_a_run_fetches_base_and_splits_from_the_hub_once_and_then_needs_none(hub, home, tmp_path):
    words = ["train", "quickstart", *OF_THE_HUB, "train.steps=2"]
    first = call(hub, home, *words, f"output={tmp_path / 'first'}")
    assert first.returncode == 0, first.stderr
    assert hub.asked
    assert sorted(hub.fetched) == sorted([*files_of(QUICKSTART / "base"), "train.jsonl", "test.jsonl"])
    data = json.loads((tmp_path / "first" / "data.json").read_text())
    assert (data["train"]["rows"], data["eval"]["rows"]) == (60, 10)
    config = json.loads((tmp_path / "first" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    again = call(hub, home, *words, f"output={tmp_path / 'again'}", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    written = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("first", "again")]
    assert written[0] == written[1]


@pytest.mark.parametrize(("wrong", "told"), [
    pytest.param("base.model=some/bas", "the hub has no such model, or it is private. Check the spelling",
                 marks=pytest.mark.slow),
    pytest.param("base.revision=v2", "it has no revision 'v2'. Choose one at http://127.0.0.1", marks=pytest.mark.long),
    pytest.param("data.train=some/row", "Dataset 'some/row' doesn't exist on the Hub or cannot be accessed",
                 marks=pytest.mark.slow),
    pytest.param("data.train=[{path: some/rows, split: valid}]", "Unknown split \"valid\". Should be one of",
                 marks=pytest.mark.long),
])  # fmt: skip
def test_what_the_hub_does_not_have_is_one_line(wrong, told, hub, home, tmp_path):
    done = call(hub, home, "train", "quickstart", *OF_THE_HUB, wrong, f"output={tmp_path / 'run'}")
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told in error
    assert not (tmp_path / "run").exists()
