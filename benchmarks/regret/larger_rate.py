"""Best learning rates on the larger base: rate.py on 9.8 M parameters, wider by half.

    python benchmarks/regret/larger_rate.py       write benchmarks/regret/larger_rate.jsonl

The base is pretrained first where it is missing: 20 minutes more.
"""

import torch
from common import SEEDS, arms, larger_base, record

LORA = "train.lr=2e-3,4e-3,8e-3"
FULL = "train.lr=5e-4,1e-3,2e-3,4e-3"


def main() -> None:
    """60 steps each, two seeds."""
    torch.set_num_threads(1)
    base = larger_base()
    rows = arms({"method": "lora"}, "lora.rank=16,128", LORA, SEEDS, base)
    record("larger_rate", rows)
    record("larger_rate", rows + arms({"method": "full"}, "train.full_finetune=true", FULL, SEEDS, base))


if __name__ == "__main__":
    main()
