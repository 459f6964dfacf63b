"""LoRA beside full fine-tuning as the batch grows, over the same rows.

    python benchmarks/regret/batch.py       write benchmarks/regret/batch.jsonl

LoRA Without Regret: the gap to full fine-tuning grows with the batch, whatever the rank, and is small at 32.
"""

import torch
from common import arms_with_seeds, record

ROWS = 2048
"""That every arm sees once: 256 steps of 8 rows, 64 of 32, 16 of 128."""
RATES = {
    ("lora", 8): (4e-3, 8e-3),
    ("full", 8): (1e-3, 2e-3),
    ("lora", 32): (4e-3, 8e-3, 1.6e-2),
    ("full", 32): (1e-3, 2e-3, 4e-3),
    ("lora", 128): (4e-3, 8e-3, 1.6e-2),
    ("full", 128): (1e-3, 2e-3, 4e-3, 8e-3),
}
"""More rows a step want a higher rate: the best of each lies inside, or at an end beyond which it is known to rise."""


def main() -> None:
    """Rank 16 and full fine-tuning; the best of the rates of each with three seeds."""
    torch.set_num_threads(2)
    rows = []
    for batch in (8, 32, 128):
        steps = (f"train.steps={ROWS // batch}", f"train.eval_every={ROWS // batch}")
        sizes = ("train.micro_batch=8", f"train.accumulation={batch // 8}")
        for method, setting in (("lora", "lora.rank=16"), ("full", "train.full_finetune=true")):
            rows += arms_with_seeds({"method": method, "batch": batch}, RATES[method, batch], setting, *steps, *sizes)
            record("batch", rows)


if __name__ == "__main__":
    main()
