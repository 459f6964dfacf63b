"""How much of what a step computes is tokens, and not padding, when rows share sequences.

    python benchmarks/packing.py    write benchmarks/results/packing.jsonl

Rows of lognormal lengths (mean of the logarithm 5.5, deviation 0.9: half are below 245 tokens), 8 to 2,048 tokens,
2,000 rows for each of five seeds; sequences of 2,048. `all_rows` is how full whole sequences are, made of all rows at
once; `steps` how full the micro-batches of single steps, as training makes them. One sequence at a time needs no
padding at all, so two and four stand here.
"""

import json
import random
from pathlib import Path
from typing import Any

from qlora_kit.data import Room, arrange, best_fit, efficiency, side_by_side
from qlora_kit.train.pace import OVERHEAD_TOKENS

RESULTS = Path(__file__).parent / "results" / "packing.jsonl"
SEEDS, ROWS, ROOM = range(5), 2000, 2048
STEPS = ((16, 2), (64, 2), (64, 4))
"""Rows in a step, and sequences side by side."""


def lengths_of(seed: int) -> list[int]:
    """Tokens of each row."""
    draw = random.Random(seed)
    return [min(ROOM, max(8, round(draw.lognormvariate(5.5, 0.9)))) for _ in range(ROWS)]


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


def main() -> None:
    """Every way to cut steps, each over all seeds."""
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
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
