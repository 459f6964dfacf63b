"""Task A, then task B: with the same adapter, a new one, one on the merged weights, and with all weights.

    python benchmarks/regret/continual.py       write benchmarks/regret/continual.jsonl

What is told is the held-out loss on both tasks after both: A is the near text, B the far one.
"""

import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

from common import RECIPES, each, experiment, record, rows_ready

import qlora_kit as qk
from qlora_kit.recipe import read_recipe
from qlora_kit.run import Asked, evaluate, export_run, train

HELD_OUT = {kind: RECIPES / f"{kind}-held-out.jsonl" for kind in ("near", "far")}


def learn(run: Path, kind: str, *settings: str) -> Path:
    """Train on one task."""
    data = (f"data.train={RECIPES / kind}.jsonl", f"data.eval={HELD_OUT[kind]}", "train.steps=120")
    train(read_recipe(RECIPES / "text.yaml", [*data, "train.eval_every=120", *settings, f"output={run}"]))
    return run


def losses(run: Path, bare_base: bool = False) -> dict[str, float]:
    """Of a run on both tasks."""
    found = {kind: evaluate(run, data=path, bare_base=bare_base, force=False) for kind, path in HELD_OUT.items()}
    return {kind: round(score.loss, 4) for kind, score in found.items()}


def added(first: Path, second: Path) -> dict[str, float]:
    """Both adapters on one base at a time, their updates added."""
    from qlora_kit.run import load_run
    from qlora_kit.run.rows import eval_batches, held_out_rows
    from qlora_kit.run.tokenizer import pad_id
    from qlora_kit.train.evaluate import evaluate_loss

    model, tokenizer, recipe = load_run(first)
    qk.load_adapter(model, second / "adapter", name="second")
    model_names = ("default", "second")
    qk.combine_adapters(model, dict.fromkeys(model_names, 1.0), "both")
    told = {}
    for kind, path in HELD_OUT.items():
        rows = held_out_rows(recipe, tokenizer, model.config, path).rows
        told[kind] = round(evaluate_loss(model, eval_batches(rows, pad_id(tokenizer), model.device)).loss, 4)
    return told


def both(seed: int) -> list[dict[str, Any]]:
    """A and then B in every way; what each loses on both."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lora = ("lora.rank=16", "train.lr=4e-3", f"train.seed={seed}")
        full = ("train.full_finetune=true", "train.lr=1e-3", f"train.seed={seed}")
        first = learn(folder / "a", "near", *lora)
        second = learn(folder / "b", "far", *lora)
        export_run(first, folder / "merged", Asked("merged"))
        whole = learn(folder / "full-a", "near", *full)
        told = {
            "base": losses(first, bare_base=True),
            "A alone": losses(first),
            "same adapter": losses(learn(folder / "ab", "far", *lora, f"lora.from={first}")),
            "new adapter": losses(second),
            "both added": added(first, second),
            "merged, then new": losses(learn(folder / "merged-b", "far", *lora, f"base.model={folder / 'merged'}")),
            "A alone, all weights": losses(whole),
            "all weights": losses(learn(folder / "full-b", "far", *full, f"base.model={whole / 'model'}")),
        }
    return [{"how": how, "seed": seed, **found} for how, found in told.items()]


def main() -> None:
    """120 steps a task, rank 16, two seeds."""
    rows_ready()
    record("continual", chain.from_iterable(each(both, (0, 1))))


if __name__ == "__main__":
    experiment("continual", main)
