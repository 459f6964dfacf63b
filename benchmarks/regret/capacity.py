"""Held-out loss against steps, by rank, beside full fine-tuning: where each rank leaves the common line.

    python benchmarks/regret/capacity.py       write benchmarks/regret/capacity.jsonl

LoRA Without Regret: ranks follow one line until what they can hold is full; high ranks stay on that of full
fine-tuning.
"""

import torch
from common import arms, record


def main() -> None:
    """500 steps of 8 rows; each at the better of two rates."""
    torch.set_num_threads(1)
    steps = ("train.steps=500", "train.eval_every=50")
    rows = arms({"method": "full"}, "train.full_finetune=true", "train.lr=5e-4,1e-3", *steps)
    for rank in (1, 4, 16, 128):
        rows += arms({"method": "lora", "rank": rank}, f"lora.rank={rank}", "train.lr=2e-3,4e-3", *steps)
        record("capacity", rows)


if __name__ == "__main__":
    main()
