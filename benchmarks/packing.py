"""How much of what a step computes is tokens, and not padding, when rows share sequences, and what that takes.

    python benchmarks/packing.py    write benchmarks/results/packing.jsonl

Rows of lognormal lengths (mean of the logarithm 5.5, deviation 0.9: half are below 245 tokens), 8 to 2,048 tokens,
2,000 rows for each of five seeds; sequences of 2,048. `all_rows` is how full whole sequences are, made of all rows at
once; `steps` how full the micro-batches of single steps, as training makes them. One sequence at a time needs no
padding at all, so two and four stand here.

`time` is process CPU seconds of a step of 16 rows (median and range of five rounds after one that does not count, one
thread, all ways in turn in one process), at three of a 134M Llama's layers in nf4, rank 16, recomputed: the rows of a
pass side by side, as `data.packing=false` has them, and end to end; under sdpa, which reads each document alone, under
the same with a mask of all pairs, as transformers has it, and under eager, which knows no other way.
"""

import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from step import MACHINE, SHAPES, VOCAB, make_checkpoint

from qlora_kit.base import documents, load_base
from qlora_kit.data import (
    Batch,
    Encoded,
    Packing,
    Room,
    arrange,
    best_fit,
    collate_packs,
    efficiency,
    lay_out,
    side_by_side,
)
from qlora_kit.data.pack import places as places_of
from qlora_kit.lora import add_lora
from qlora_kit.train.activations import set_activation_policy
from qlora_kit.train.head import automatic_chunk
from qlora_kit.train.pace import OVERHEAD_TOKENS, ROWS_A_STEP, TOKENS_A_MICRO_BATCH
from qlora_kit.train.step import accumulate_gradients

RESULTS = Path(__file__).parent / "results" / "packing.jsonl"
SEEDS, ROWS, ROOM = range(5), 2000, 2048
MIXES = (4.1, 5.5)
"""Means of the logarithm of the lengths whose steps are timed."""
ROUNDS = 5
STEPS = ((16, 2), (64, 2), (64, 4))
"""Rows in a step, and sequences side by side."""


def lengths_of(seed: int, rows: int = ROWS, mean: float = 5.5) -> list[int]:
    """Tokens of each row."""
    draw = random.Random(seed)
    return [min(ROOM, max(8, round(draw.lognormvariate(mean, 0.9)))) for _ in range(rows)]


def laid_out(step: list[int], micro_batch: int, room: int | None) -> list[list[list[int]]]:
    """A step's rows packed, or side by side on a card."""
    if room is None:
        return side_by_side(step, Room(micro_batch, ROOM, overhead=OVERHEAD_TOKENS["cuda"]))
    return arrange(step, micro_batch, room)


def filled(lengths: list[int], rows_a_step: int, micro_batch: int, room: int | None) -> float:
    """Share of the places of all steps that hold a token."""
    steps = [lengths[start : start + rows_a_step] for start in range(0, len(lengths), rows_a_step)]
    places = sum(sum(step) / efficiency(step, laid_out(step, micro_batch, room)) for step in steps)
    return sum(lengths) / places


def spread(shares: list[float]) -> dict[str, float]:
    """Least and most of the seeds."""
    return {"least": round(min(shares), 4), "most": round(max(shares), 4)}


def timed(steps: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """CPU seconds of each, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS + 1):
        for name, step in steps.items():
            begun = time.process_time()
            step()
            taken[name].append(time.process_time() - begun)
    return {name: seconds[1:] for name, seconds in taken.items()}


def times() -> Iterator[dict[str, Any]]:
    """A row for each mix, layout and attention."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(SHAPES["134m"] | {"num_hidden_layers": 3}, Path(folder))
        model = load_base(folder, quantization="nf4", compute_dtype="bfloat16", device="cpu")
    add_lora(model, rank=16)
    set_activation_policy(model, "recompute")
    model.train()

    def step_on(batches: list[Batch], attention: str) -> Callable[[], None]:
        families = documents.FAMILIES if attention == "sdpa" else frozenset()

        def step() -> None:
            model.set_attn_implementation(attention.split()[0])
            with patch.object(documents, "FAMILIES", families):
                count = sum(batch.count for batch in batches)
                accumulate_gradients(model, batches, count, loss_chunk=automatic_chunk(VOCAB))

        return step

    for mean in MIXES:
        lengths, draw = lengths_of(0, ROWS_A_STEP, mean), random.Random(0)
        rows = [Encoded([draw.randrange(3, VOCAB) for _ in range(n)], [True] * n) for n in lengths]
        room = Room(max(1, TOKENS_A_MICRO_BATCH // max(lengths)), max(lengths), overhead=OVERHEAD_TOKENS["cpu"])
        layouts = {
            "apart": lay_out(lengths, room),
            "joined": lay_out(lengths, Packing(1, room.micro_batch * room.longest)),
        }
        made = {
            layout: [collate_packs([[rows[row] for row in pack] for pack in packs], 0) for packs in arranged]
            for layout, arranged in layouts.items()
        }
        ways = [("apart", "sdpa"), ("joined", "sdpa"), ("joined", "sdpa with a mask"), ("apart", "eager"),
                ("joined", "eager")]  # fmt: skip
        taken = timed({" ".join(way): step_on(made[way[0]], way[1]) for way in ways})
        for layout, attention in ways:
            seconds = taken[f"{layout} {attention}"]
            yield {
                "benchmark": "packing", "what": "time", "machine": MACHINE, "half_below": round(math.exp(mean)),
                "rows": len(rows), "tokens": sum(lengths), "longest": max(lengths), "layout": layout,
                "attention": attention, "passes": len(layouts[layout]), "places": places_of(lengths, layouts[layout]),
                "cpu_s": round(statistics.median(seconds), 3),
                "range_s": [round(min(seconds), 3), round(max(seconds), 3)],
            }  # fmt: skip


def main() -> None:
    """Every way to cut steps, each over all seeds; then the time of some."""
    mixes = [lengths_of(seed) for seed in SEEDS]
    whole = [sum(lengths) / (ROOM * len(best_fit(lengths, ROOM))) for lengths in mixes]
    facts: dict[str, Any] = {"benchmark": "packing", "seeds": list(SEEDS), "rows": ROWS, "sequence_tokens": ROOM}
    rows = [{**facts, "what": "all_rows", "packed": spread(whole)}]
    for rows_a_step, micro_batch in STEPS:
        packed, padded = (
            spread([filled(lengths, rows_a_step, micro_batch, room) for lengths in mixes]) for room in (ROOM, None)
        )
        cut = {"rows_a_step": rows_a_step, "micro_batch": micro_batch}
        rows.append({**facts, "what": "steps", **cut, "packed": packed, "unpacked": padded})
    kept = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    rows += [row for row in kept if row["what"] == "time" and row["machine"] != MACHINE]  # of other processors
    rows += times()
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
