"""What goes on for long takes no more memory at its end than at its beginning, and leaves no file open."""

import gc
import json
import os

import psutil
import pytest
import tiny

from qlora_kit.lora import add_lora, delete_adapter, load_adapter, save_adapter
from qlora_kit.recipe import read_recipe
from qlora_kit.run import train
from qlora_kit.watch import Watch

GROWTH = 1.01  # of resident memory; what is leaked each time is far above it after a thousand times


class Gauge(Watch):
    """Resident bytes and open files of the process, by step."""

    def __init__(self):
        self.resident, self.files = {}, {}

    def row(self, row):
        if row["step"] % 100 == 0:
            gc.collect()
            self.resident[row["step"]] = psutil.Process().memory_info().rss
            self.files[row["step"]] = len(os.listdir("/proc/self/fd"))


@pytest.mark.long
def test_two_thousand_steps_with_evaluations_checkpoints_and_samples_take_no_more_than_a_few_hundred(
    tmp_path, model_folder
):
    rows = [{"prompt": f"say {word} ", "completion": word} for word in ("cat", "dog", "owl", "bee", "ant", "elk")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [f"base.model={model_folder}", f"data.train={tmp_path}/rows.jsonl", f"data.eval={tmp_path}/rows.jsonl"]
    often = ["train.eval_every=10", "train.save_every=20", "train.sample_every=50", "train.steps=2000"]
    size = ["data.max_tokens=32", "train.micro_batch=2", "train.accumulation=1"]
    gauge, before = Gauge(), len(os.listdir("/proc/self/fd"))
    train(read_recipe("default", [*paths, *often, *size, f"output={tmp_path}/run"]), watch=gauge)
    assert gauge.resident[2000] < GROWTH * gauge.resident[300], gauge.resident
    assert gauge.files[2000] == gauge.files[300]
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.slow
def test_a_thousand_adapters_come_and_go_without_a_trace(tmp_path):
    model = tiny.quantized(tiny.llama())
    add_lora(model, rank=64, alpha=128)
    save_adapter(model, tmp_path / "adapter")
    resident, files = [], len(os.listdir("/proc/self/fd"))
    for turn in range(1000):
        load_adapter(model, tmp_path / "adapter", name="guest")
        delete_adapter(model, "guest")
        if turn in (100, 999):
            gc.collect()
            resident.append(psutil.Process().memory_info().rss)
    assert resident[1] < GROWTH * resident[0], resident
    assert len(os.listdir("/proc/self/fd")) == files
