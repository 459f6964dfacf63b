"""LoRA on nf4, fp4, int8 and dense bases beside full fine-tuning: final loss, memory, what is stored, time.

    python benchmarks/regret/quantised.py       write benchmarks/regret/quantised.jsonl

QLoRA: adapters on a 4-bit base reach what 16-bit tuning reaches, within 1 to 2 %.
"""

from common import arms, experiment, record

SEEDS = "train.seed=0,1,2"
STEPS = ("train.steps=150", "train.eval_every=150")


def main() -> None:
    """Rank 16 at the best rate of rate.py, full fine-tuning at its own; three seeds."""
    rows = arms({"method": "full", "base": "none"}, "train.full_finetune=true", "train.lr=1e-3", *STEPS, SEEDS)
    for base in ("none", "nf4", "fp4", "int8"):
        rows += arms({"method": "lora", "base": base}, f"base.quantization={base}", "train.lr=4e-3", *STEPS, SEEDS)
        record("quantised", rows)


if __name__ == "__main__":
    experiment("quantised", main)
