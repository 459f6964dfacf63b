"""The benchmark for a GPU, of which there is none here: it says so, goes through its phases, and writes no number."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PHASES = ["memory", "speed", "kernels", "gradients", "peers", "packing", "lengths", "paged", "runs"]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "gpu.jsonl")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which the script sets itself, and must not stay set
    return gpu


def run(gpu, monkeypatch, capsys, *arguments):
    """The rows that were printed, of each phase."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    gpu.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert all(row["dry"] and row["environment"]["name"] == "cpu" for row in rows)
    return {phase: [row for row in rows if row["phase"] == phase] for phase in PHASES}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_in_one_line_and_writes_nothing(gpu, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA device here: nothing is measured"):
        gpu.main()
    assert not gpu.RESULTS.exists()


@pytest.mark.slow
def test_a_dry_call_goes_through_phases_and_writes_no_number(gpu, monkeypatch, capsys):
    rows = run(gpu, monkeypatch, capsys, "--dry", "memory", "kernels", "gradients", "packing", "lengths", "paged")
    assert not any("error" in row for each in rows.values() for row in each)
    assert {phase: len(each) for phase, each in rows.items() if each} == {
        "memory": 1, "kernels": 7, "gradients": 1, "packing": 6, "lengths": 2, "paged": 1,
    }  # fmt: skip
    assert rows["paged"][0]["same_losses"]
    assert [row["layout"] for row in rows["packing"]] == ["apart", "joined", "joined"] * 2
    assert all(each["tokens_per_s"] > 0 and each["rows"] == 16 for each in rows["packing"])
    assert 0 < rows["gradients"][0]["off_by"] < 0.05
    assert not gpu.RESULTS.exists()


def test_a_phase_that_fails_leaves_a_row_that_says_why_and_the_others_run(gpu, monkeypatch):
    def fails(bench):
        yield {"number": 1}
        raise RuntimeError("out of luck")

    monkeypatch.setattr(gpu, "PHASES", {"one": (fails, 0), "two": (lambda _: iter([{"number": 2}]), 0),
                                        "long": (fails, 10**6)})  # fmt: skip
    rows = []
    gpu.measure(None, ["one", "long", "two"], 1.0, rows.append)
    assert rows == [{"phase": "one", "number": 1}, {"phase": "one", "error": "RuntimeError: out of luck"},
                    {"phase": "two", "number": 2}]  # fmt: skip


def test_the_first_row_of_a_phase_takes_the_place_of_what_says_that_it_is_not_measured(gpu):
    none = [gpu.not_measured(phase) for phase in PHASES]
    rows = [json.loads(line) for line in (BENCHMARKS / "results" / "gpu.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in rows} == set(PHASES), "each is measured, or says that it is not"
    gpu.RESULTS.write_text("".join(f"{line}\n" for line in none))
    for line in ("one", "two"):
        gpu.keep("speed", line)
    others = [line for line in none if line != gpu.not_measured("speed")]
    assert gpu.RESULTS.read_text().splitlines() == [*others, "one", "two"]


@pytest.mark.parametrize(("again", "wanted"), [(1, 15_400), (0, 22_500)])
def test_the_floor_of_its_speed_is_what_was_computed_by_hand(gpu, again, wanted):
    """For 4 x 2,048 tokens at 790 TFLOP/s and 4.3 TB/s, from sums of 46.4 and 31.9 GFLOP a token and 52.7 and 35 GB."""
    floor = gpu.speed_floor(gpu.LLAMA_8B, 4, 2048, again, 790e12, 4.3e12)
    assert floor == pytest.approx(wanted, rel=0.01)  # the sums by hand have three digits


@pytest.mark.long
def test_the_whole_of_it_runs(gpu, monkeypatch, capsys):
    rows = run(gpu, monkeypatch, capsys, "--dry")
    assert not any("error" in row for each in rows.values() for row in each)
    assert [phase for phase, each in rows.items() if not each] == []
    assert {row["peer"] for row in rows["peers"]} >= {"peft, documented", "peft, bf16"}
    (ran,) = rows["runs"]
    assert ran["killed_at"] < ran["steps"] == 10
    assert ran["merged"]["top1_agreement"] > 0.9
