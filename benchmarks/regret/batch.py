"""LoRA beside full fine-tuning as the batch grows, over the same rows.

    python benchmarks/regret/batch.py       write benchmarks/regret/batch.jsonl

LoRA Without Regret: the gap to full fine-tuning grows with the batch, whatever the rank, and is small at 32.
"""

from common import arms_with_seeds, experiment, record

ROWS = 1536
"""That every arm sees once: 192 steps of 8 rows, 48 of 32, 12 of 128."""
RATES = {
    ("lora", 8): (4e-3, 8e-3),
    ("full", 8): (1e-3, 2e-3),
    ("lora", 32): (4e-3, 8e-3, 1.6e-2),
    ("full", 32): (1e-3, 2e-3, 4e-3),
    ("lora", 128): (8e-3, 1.6e-2, 3.2e-2),
    ("full", 128): (2e-3, 4e-3, 8e-3),
}
"""More rows a step want a higher rate; those of 8 are the best of rate.py and the next."""


def main() -> None:
    """Rank 16 and full fine-tuning; the best of the rates of each with three seeds."""
    rows = []
    for batch in (8, 32, 128):
        steps = (f"train.steps={ROWS // batch}", f"train.eval_every={ROWS // batch}")
        sizes = ("train.micro_batch=8", f"train.accumulation={batch // 8}")
        for method, setting in (("lora", "lora.rank=16"), ("full", "train.full_finetune=true")):
            rows += arms_with_seeds({"method": method, "batch": batch}, RATES[method, batch], setting, *steps, *sizes)
            record("batch", rows)


if __name__ == "__main__":
    experiment("batch", main)
