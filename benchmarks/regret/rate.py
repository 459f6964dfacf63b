"""Best learning rate of LoRA by rank, and of full fine-tuning, on text that the base hardly knows.

    python benchmarks/regret/rate.py       write benchmarks/regret/rate.jsonl

LoRA Without Regret: LoRA's best rate is about 10 times that of full fine-tuning, about 15 times in runs of fewer than
100 steps, and hardly depends on the rank.
"""

from common import SEEDS, arms, experiment, record

LORA = "train.lr=1e-3,2e-3,4e-3,8e-3,1.6e-2,3.2e-2"
FULL = "train.lr=2.5e-4,5e-4,1e-3,2e-3,4e-3,8e-3"


def main() -> None:
    """60 steps each, two seeds."""
    lora = arms({"method": "lora"}, "lora.rank=1,4,16,128", LORA, SEEDS)
    record("rate", lora)
    record("rate", lora + arms({"method": "full"}, "train.full_finetune=true", FULL, SEEDS))


if __name__ == "__main__":
    experiment("rate", main)
