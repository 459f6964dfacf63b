"""What attention takes on a CPU that multiplies tiles, by the kit's kernel and by torch's, forth and back.

    python benchmarks/attention.py    write benchmarks/results/attention.jsonl, a row a shape

Process CPU milliseconds of one layer's causal attention in bf16: median and range of nine rounds after one that does
not count, one thread, both in turn in one process. 2,048 tokens, in documents of one length or, as in training, of
other lengths in every round, where torch's libraries meet forms that they have no code for. The kit calls its own
kernel once for all of them, and torch's once a document.
"""

import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from step import MACHINE
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qlora_kit.ops import attend, can_attend

RESULTS = Path(__file__).parent / "results" / "attention.jsonl"
TOKENS, ROUNDS = 2048, 9
HEADS = ((12, 64), (32, 64), (32, 128))
"""Heads and their width: of a 134M, a 1.1B and a 7B Llama."""
DOCUMENTS = (16, 64, 256, 2048)
Way = Callable[[Tensor, Tensor, Tensor, list[int]], Tensor]


def by_kit(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """One call for all documents."""
    return attend(q, k, v, lengths, None, q.shape[2] ** -0.5)


def by_torch(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """A call for each document."""
    parts = zip(*(each.split(lengths) for each in (q, k, v)), strict=True)
    heads = ([each.transpose(0, 1)[None] for each in part] for part in parts)
    return torch.cat([scaled_dot_product_attention(*each, is_causal=True)[0].transpose(0, 1) for each in heads])


WAYS: dict[str, Way] = {"kit": by_kit, "torch": by_torch}


def alike(n: int, _: int) -> list[int]:
    """Documents of n tokens."""
    return [n] * (TOKENS // n)


def drawn(round_: int) -> list[int]:
    """Documents of lognormal lengths, half of them below 60 tokens, and what is left."""
    draw, lengths = random.Random(round_), []
    while (left := TOKENS - sum(lengths)) > 0:
        lengths.append(min(left, max(1, round(draw.lognormvariate(4.1, 0.9)))))
    return lengths


def timed(heads: int, width: int, lengths_of: Callable[[int], list[int]]) -> dict[str, dict[str, list[float]]]:
    """Milliseconds forth and back, by each way, in every round."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(TOKENS, heads, width, dtype=torch.bfloat16) for _ in range(4))
    inputs = [each.requires_grad_() for each in (q, k, v)]
    taken: dict[str, dict[str, list[float]]] = {name: {"forth": [], "back": []} for name in WAYS}
    for round_ in range(ROUNDS + 1):
        for name, way in WAYS.items():
            begun = time.process_time()
            out = way(q, k, v, lengths_of(round_))
            between = time.process_time()
            torch.autograd.grad(out, inputs, grad)
            ended = time.process_time()
            taken[name]["forth"].append(1000 * (between - begun))
            taken[name]["back"].append(1000 * (ended - between))
    return {name: {side: each[1:] for side, each in sides.items()} for name, sides in taken.items()}


def rows_of(heads: int, width: int, documents: str, lengths_of: Callable[[int], list[int]]) -> list[dict[str, Any]]:
    """A row a way."""
    taken = timed(heads, width, lengths_of)
    middle = {name: {side: statistics.median(each) for side, each in sides.items()} for name, sides in taken.items()}
    return [
        {
            "benchmark": "attention",
            "machine": MACHINE,
            "heads": heads,
            "width": width,
            "tokens": TOKENS,
            "documents": documents,
            "way": name,
            "forth_ms": round(middle[name]["forth"], 2),
            "back_ms": round(middle[name]["back"], 2),
            "range_ms": {side: [round(min(each), 2), round(max(each), 2)] for side, each in sides.items()},
            "times_as_fast": {side: round(middle["torch"][side] / middle[name][side], 2) for side in sides},
        }
        for name, sides in taken.items()
    ]


def main() -> None:
    """All shapes, each in documents of one length and in such as data has."""
    torch.set_num_threads(1)
    nothing = torch.empty(1, 1, 64, dtype=torch.bfloat16)
    if not can_attend(nothing, nothing, nothing):
        raise SystemExit("this CPU multiplies no tiles, or the kit's C code is not there: nothing to measure")
    rows = []
    for heads, width in HEADS:
        for n in DOCUMENTS:
            rows += rows_of(heads, width, f"{TOKENS // n} of {n}", partial(alike, n))
        rows += rows_of(heads, width, "of other lengths in each round", drawn)
    for row in rows:
        print(row)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
