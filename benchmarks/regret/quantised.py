"""LoRA on nf4, fp4, int8 and dense bases beside full fine-tuning: final loss, memory, what is stored, time.

    python benchmarks/regret/quantised.py       write benchmarks/regret/quantised.jsonl

QLoRA: adapters on a 4-bit base reach what 16-bit tuning reaches, within 1 to 2 %.
"""

import time

import torch
from common import arms, record

SEEDS = "train.seed=0,1,2"
STEPS = ("train.steps=150", "train.eval_every=150")


def timed(label: dict[str, object], *settings: str) -> list[dict[str, object]]:
    """Arms with the processor time of each, the whole run's, on one thread."""
    started = time.process_time()
    rows = arms(label, *settings)
    seconds = (time.process_time() - started) / len(rows)
    return [{**row, "cpu_s": round(seconds, 2)} for row in rows]


def main() -> None:
    """Rank 16 at the best rate of rate.py, full fine-tuning at its own; three seeds."""
    torch.set_num_threads(1)
    rows = timed({"method": "full", "base": "none"}, "train.full_finetune=true", "train.lr=1e-3", *STEPS, SEEDS)
    for base in ("none", "nf4", "fp4", "int8"):
        rows += timed({"method": "lora", "base": base}, f"base.quantization={base}", "train.lr=4e-3", *STEPS, SEEDS)
        record("quantised", rows)


if __name__ == "__main__":
    main()
