"""What watching costs: a training step with the ledger on and off, in turn, in one process.

    python benchmarks/ledger.py    write benchmarks/results/ledger.jsonl

One thread, process CPU time, medians and ranges; NF4 Llamas with random weights, rank 16, fp32.
"""

import json
import platform
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig

from qlora_kit.base import Quantization
from qlora_kit.base.architecture import build_model
from qlora_kit.base.freeze import freeze_and_quantize
from qlora_kit.lora import add_lora
from qlora_kit.memory import Ledger
from qlora_kit.train.activations import activation_blocks
from qlora_kit.train.step import accumulate_gradients

RESULTS = Path(__file__).parent / "results" / "ledger.jsonl"
REPEATS = 7
SHAPES = {"small": (256, 704, 6, 512), "larger": (768, 2048, 6, 512)}
"""Width, feed-forward width, layers and tokens."""


def overhead(name: str) -> dict[str, Any]:
    """Time both kinds of step of one shape."""
    width, inner, layers, tokens = SHAPES[name]
    config = LlamaConfig(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, vocab_size=2048,
                         num_attention_heads=width // 64, num_key_value_heads=width // 64)  # fmt: skip
    model = build_model(config, torch.float32, "sdpa")
    freeze_and_quantize(model, Quantization(), torch.float32, torch.device("cpu"))
    add_lora(model, rank=16)
    ids = torch.randint(0, 2048, (1, tokens))
    rows: Any = SimpleNamespace(input_ids=ids, labels=ids, position_ids=None, documents=None, attention_mask=None)
    times: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(2 * REPEATS + 2):
        is_watched = repeat % 2 == 1
        started = time.process_time()
        if is_watched:
            ledger = Ledger()
            ledger.adopt(model, activation_blocks(model))
            with ledger:
                accumulate_gradients(model.train(), [rows], tokens, phase=ledger.phase)
        else:
            accumulate_gradients(model.train(), [rows], tokens)
        if repeat > 1:  # the first of each warms up
            times[is_watched].append(time.process_time() - started)
    off, on = (statistics.median(times[kind]) for kind in (False, True))
    return {
        "benchmark": "ledger", "shape": name, "width": width, "layers": layers, "tokens": tokens,
        "off_s": round(off, 4), "off_range_s": [round(each, 4) for each in (min(times[False]), max(times[False]))],
        "on_s": round(on, 4), "on_range_s": [round(each, 4) for each in (min(times[True]), max(times[True]))],
        "ratio": round(on / off, 3), "machine": f"{platform.machine()}, torch {torch.__version__}, 1 thread",
    }  # fmt: skip


def main() -> None:
    """Measure all shapes."""
    torch.set_num_threads(1)
    rows = [overhead(name) for name in SHAPES]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for row in rows:
        print(f"{row['shape']:8} {row['off_s']:.3f} s off, {row['on_s']:.3f} s on, {row['ratio']:.2f}")


if __name__ == "__main__":
    main()
