"""Which layers carry the adapter, at the same number of trained parameters.

    python benchmarks/regret/layers.py       write benchmarks/regret/layers.jsonl

LoRA Without Regret and QLoRA: attention alone does worse, though it gets a higher rank; MLP alone is about as good as
all layers.
"""

from common import SEEDS, arms, experiment, record

RANKS = {"attention": 72, "mlp": 51, "all-linear": 30}
"""About 885,000 parameters each: 12,288, 17,280 and 29,568 for each rank."""


def main() -> None:
    """150 steps; each at three rates, two seeds."""
    rows = []
    for targets, rank in RANKS.items():
        settings = (f"lora.targets={targets}", f"lora.rank={rank}", "train.lr=2e-3,4e-3,8e-3", "train.steps=150")
        rows += arms({"targets": targets, "rank": rank}, *settings, "train.eval_every=150", SEEDS)
        record("layers", rows)


if __name__ == "__main__":
    experiment("layers", main)
