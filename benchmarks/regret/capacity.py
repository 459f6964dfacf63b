"""Held-out loss against steps, by rank, beside full fine-tuning: where each rank leaves the common line.

    python benchmarks/regret/capacity.py       write benchmarks/regret/capacity.jsonl

LoRA Without Regret: ranks follow one line until what they can hold is full; high ranks stay on that of full
fine-tuning.
"""

from common import SEEDS, arms, experiment, record


def main() -> None:
    """300 steps of 8 rows, at the best rates of rate.py; of the two that are near for full fine-tuning the better."""
    steps = ("train.steps=300", "train.eval_every=25", SEEDS)
    rows = arms({"method": "lora", "lr": 4e-3}, "lora.rank=1,16,128", "train.lr=4e-3", *steps)
    record("capacity", rows)
    record("capacity", rows + arms({"method": "full"}, "train.full_finetune=true", "train.lr=1e-3,2e-3", *steps))


if __name__ == "__main__":
    experiment("capacity", main)
