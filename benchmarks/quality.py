"""Is the kit's speed bought with quality? The quickstart trained by the kit and by TRL on PEFT, three seeds each.

    python benchmarks/quality.py          write benchmarks/results/quality.jsonl

Both train rank 16 on all linears of the shipped base in NF4, on the same tokens (that is asserted), 400 steps of 8 rows
at the same rates, with 32-bit AdamW, in fp32 on a CPU; rows are drawn by each in its own order. The kit's adapters are
bf16 with fp32 masters. TRL makes those on a quantised base bf16 and steps them there, so it trains a second time with
adapters that are made fp32 again. One command scores all on the same held-out rows: `qlora-kit eval`. All are compared
at their last step. What a run of the kit leaves is the best of its ten evaluations, which TRL is not asked for: that
stands by itself, as `kit, its best`.
"""

import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from qlora_kit.recipe import read_recipe
from qlora_kit.run.prepare import prepare
from qlora_kit.watch import Watch

HERE = Path(__file__).parent
SHIPPED = HERE.parent / "recipes" / "quickstart"
RESULTS = HERE / "results" / "quality.jsonl"
COMMAND = Path(sys.executable).with_name("qlora-kit")
SEEDS = (0, 1, 2)


def train_kit(seed: int, run: Path) -> None:
    """The shipped recipe, with TRL's batch: 8 rows at once."""
    asked = f"train.seed={seed}", f"output={run}", "train.micro_batch=8", "train.accumulation=1"
    subprocess.run([COMMAND, "train", "quickstart", *asked], check=True)


def train_trl(seed: int, adapter: Path, *, has_fp32_adapters: bool) -> None:
    """The same by TRL's SFTTrainer on a base that bitsandbytes quantises."""
    settings = read_recipe("quickstart").train
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    rows = [json.loads(line) for line in (SHIPPED / "train.jsonl").read_text().splitlines()]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(SHIPPED / "base", quantization_config=four, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(adapter.parent / "trl"),
            max_steps=settings.steps,
            per_device_train_batch_size=8,
            learning_rate=settings.lr,
            lr_scheduler_type=settings.schedule,
            warmup_steps=round(settings.warmup * settings.steps),
            optim="adamw_torch",
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            max_length=128,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            seed=seed,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(SHIPPED / "base"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    check_rows(trainer.train_dataset)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.bfloat16}
    if has_fp32_adapters:
        for parameter in trained:
            parameter.data = parameter.data.float()
    trainer.train()
    trainer.model.save_pretrained(adapter)


def check_rows(theirs: Dataset) -> None:
    """Both train the same tokens of the same rows."""
    ours = prepare(read_recipe("quickstart"), Watch(), weights=False).train.rows
    found = sorted((row["input_ids"], [label != -100 for label in row["labels"]]) for row in theirs)
    assert found == sorted((row.input_ids, row.trained) for row in ours)


def row_of(way: str, seed: int, folder: Path) -> dict[str, Any]:
    """What `qlora-kit eval` says of a run, or of one of its checkpoints."""
    asked = [COMMAND, "eval", folder, "--json", "--force"]
    score = json.loads(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)
    return {
        "benchmark": "quality",
        "way": way,
        "seed": seed,
        "loss": round(score["loss"], 5),
        "exact_match": score["exact_match"],
        "held_out_rows": score["rows"],
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}",
    }


def main() -> None:
    """Train with all seeds, the ways in turn."""
    rows, settings = [], read_recipe("quickstart").train
    with tempfile.TemporaryDirectory() as name:
        for seed in SEEDS:
            run = Path(name) / f"kit-{seed}"
            train_kit(seed, run)
            rows.append(row_of("kit", seed, run / "checkpoints" / f"step-{settings.steps:06}"))
            rows.append(row_of("kit, its best", seed, run))
            for way, has_fp32_adapters in (("trl", False), ("trl, fp32 adapters", True)):
                shutil.rmtree(run / "adapter")
                train_trl(seed, run / "adapter", has_fp32_adapters=has_fp32_adapters)
                rows.append(row_of(way, seed, run))
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for way in dict.fromkeys(row["way"] for row in rows):
        losses = [row["loss"] for row in rows if row["way"] == way]
        print(f"{way:18} held-out loss {statistics.mean(losses):.4f}, seeds {losses}")


if __name__ == "__main__":
    main()
