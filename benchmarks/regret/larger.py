"""The larger base, 9.8 M parameters: ranks, layers and quantised bases beside full fine-tuning.

    python benchmarks/regret/larger.py       write benchmarks/regret/larger.jsonl

The base is pretrained first where it is missing: 20 minutes more.
"""

from common import SEEDS, arms, experiment, larger_base, record

STEPS = ("train.steps=100", "train.eval_every=50", SEEDS)
LORA, FULL = "train.lr=4e-3", "train.lr=1e-3"
"""The best of larger_rate.py; full fine-tuning is as good at twice its rate."""
ARMS = {
    "full fine-tuning": ("train.full_finetune=true", FULL),
    "rank 1": ("lora.rank=1", LORA),
    "rank 16": ("lora.rank=16", LORA),
    "rank 128": ("lora.rank=128", LORA),
    "attention alone, rank 77": ("lora.targets=attention", "lora.rank=77", LORA),
    "MLP alone, rank 55": ("lora.targets=mlp", "lora.rank=55", LORA),
    "all layers, rank 32": ("lora.rank=32", LORA),
    "rank 16 on nf4": ("lora.rank=16", "base.quantization=nf4", LORA),
}


def main() -> None:
    """100 steps each, two seeds."""
    base, rows = larger_base(), []
    for arm, settings in ARMS.items():
        rows += arms({"arm": arm}, *settings, *STEPS, base)
        record("larger", rows)


if __name__ == "__main__":
    experiment("larger", main)
