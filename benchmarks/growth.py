"""Whether a step grows in a straight line: its time with the layers, its memory with the tokens.

    python benchmarks/growth.py    write benchmarks/results/growth.jsonl

NF4 Llamas of width 1024 with random weights in bf16, rank 16 on all linears, activations recomputed, one row, one
thread. A line goes through the two smallest of four sizes; a row says how far the largest, four times the smallest, is
from it.

Time: 256 tokens, 2 to 8 layers; process CPU time, the depths in turn in one process, medians and ranges of 15 steps
after one that does not count. Memory: 4 layers, 512 to 2,048 tokens, the loss 64 tokens at a time (with more, the loss
is where the memory of so shallow a model peaks, until all tokens are one chunk); above what stands between two steps,
as planned, and as a process of its own holds it at most in its second step (anonymous pages): with glibc's allocation
policy, and with the one that a run with a budget sets.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from step import EXTRA, MACHINE, VOCAB, extra_bytes, kit, make_checkpoint, seconds
from transformers.utils.logging import disable_progress_bar

from qlora_kit.base import Quantization
from qlora_kit.base.architecture import read_config
from qlora_kit.memory.allocator import set_allocation_policy
from qlora_kit.plan import Workload
from qlora_kit.plan.dry_run import dry_step
from qlora_kit.recipe import Lora

RESULTS = Path(__file__).parent / "results" / "growth.jsonl"
SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}
LAYERS, ROUNDS = (2, 4, 6, 8), 15
TOKENS, LOSS_CHUNK = (512, 1024, 1536, 2048), 64
POLICIES = ("glibc's policy", "a budget's policy")


def step_times(folder: Path) -> dict[int, list[float]]:
    """CPU seconds of the steps at each depth."""
    ids, steps = torch.randint(0, VOCAB, (1, 256)), {}
    for layers in LAYERS:
        make_checkpoint({**SHAPE, "num_hidden_layers": layers}, folder / str(layers))
        steps[layers] = kit(folder / str(layers), ids, "nf4", "recompute")
    taken: dict[int, list[float]] = {layers: [] for layers in LAYERS}
    for turn in range(ROUNDS + 1):
        for layers, step in steps.items():
            took = seconds(step)
            if turn:
                taken[layers].append(took)
    return taken


def planned_bytes(folder: Path, tokens: int) -> int:
    """What a step takes at most above what stands after it, planned."""
    work = Workload(
        quantization=Quantization(),
        lora=Lora(),
        dtype=torch.bfloat16,
        attention="sdpa",
        micro_batch=1,
        tokens=tokens,
        accumulation=1,
        activations="recompute",
        optimizer="adamw",
        master_weights="fp32",
        loss_chunk=LOSS_CHUNK,
    )
    planned = dry_step(read_config(folder), work)
    return planned["peak_bytes"] - planned["resident_bytes"]


def taken_bytes(folder: Path, tokens: int, policy: str) -> int:
    """What a step takes in a process of its own."""
    command = [sys.executable, __file__, EXTRA, str(folder), str(tokens), policy]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def row(what: str, sizes: dict[int, float], unit: str, **more: Any) -> dict[str, Any]:
    """The line through the two smallest, and how far the largest is from it."""
    (x0, y0), (x1, y1), *_, (x, y) = sorted(sizes.items())
    line = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    facts = {
        "benchmark": "growth",
        "what": what,
        "unit": unit,
        "found": {str(size): each for size, each in sizes.items()},
    }
    return {**facts, "on_the_line": round(line, 4), "off_by": round(y / line - 1, 4), **more, "machine": MACHINE}


def main() -> None:
    """Measure time, then memory."""
    torch.set_num_threads(1)
    disable_progress_bar()
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == [EXTRA]:
        folder, tokens = Path(sys.argv[2]), int(sys.argv[3])
        if sys.argv[4] == POLICIES[1]:
            assert set_allocation_policy()
        print(extra_bytes(kit(folder, torch.randint(0, VOCAB, (1, tokens)), "nf4", "recompute", LOSS_CHUNK)))
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        taken = step_times(folder)
        times = {layers: round(statistics.median(each), 4) for layers, each in taken.items()}
        ranges = {str(layers): [round(min(each), 4), round(max(each), 4)] for layers, each in taken.items()}
        rows = [row("time of a step by layers", times, "CPU seconds", ranges=ranges)]
        base = folder / "4"
        planned = {tokens: planned_bytes(base, tokens) for tokens in TOKENS}
        rows.append(row("memory of a step by tokens, planned", planned, "bytes", layers=4))
        for policy in POLICIES:
            measured = {tokens: taken_bytes(base, tokens, policy) for tokens in TOKENS}
            rows.append(row(f"memory of a step by tokens, measured, {policy}", measured, "bytes", layers=4))
    RESULTS.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    for each in rows:
        print(json.dumps(each))


if __name__ == "__main__":
    main()
