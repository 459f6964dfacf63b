"""Best learning rates on the larger base: rate.py on 9.8 M parameters, wider by half.

    python benchmarks/regret/larger_rate.py       write benchmarks/regret/larger_rate.jsonl

The base is pretrained first where it is missing: 20 minutes more.
"""

from common import arms_with_seeds, experiment, larger_base, record


def main() -> None:
    """60 steps each; the best of the rates with three seeds."""
    base = larger_base()
    rows = arms_with_seeds({"method": "lora", "rank": 16}, (2e-3, 4e-3, 8e-3), "lora.rank=16", base)
    record("larger_rate", rows)
    full = arms_with_seeds({"method": "full"}, (5e-4, 1e-3, 2e-3, 4e-3), "train.full_finetune=true", base)
    record("larger_rate", rows + full)


if __name__ == "__main__":
    experiment("larger_rate", main)
