"""What quantising again costs, with codes rounded plainly and with codes chosen on calibration rows, three seeds.

    python benchmarks/requantize.py [RUN ...]      write benchmarks/results/requantize.jsonl, a row a seed and export

Each seed trains the quickstart in a process of its own; run folders that are given are measured as they are. `kl` is
the mean divergence of the export from the model as trained, in nats a token, on the run's 200 held-out rows, which are
from modules that neither training nor calibration has seen; `kept` is the share of plain rounding's that is left with
chosen codes. Dense parts and sums are fp32, so that nothing but the codes differs; the exports in bf16, as the command
line makes them, stand beside. The merges in 16 bits are there to compare with.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from step import MACHINE
from transformers.utils.logging import disable_progress_bar

from qlora_kit.recipe import read_recipe
from qlora_kit.run import Asked, export_run

RESULTS = Path(__file__).parent / "results" / "requantize.jsonl"
COMMAND = Path(sys.executable).with_name("qlora-kit")
SEEDS = (0, 1, 2)
FORMATS = ("nf4", "fp4", "int8")
MERGES = {"merged": Asked(), "merged onto the original": Asked(onto="original")}


def trained(seed: int, folder: Path) -> Path:
    """A run of the shipped recipe."""
    run = folder / f"seed-{seed}"
    subprocess.run([COMMAND, "train", "quickstart", f"train.seed={seed}", f"output={run}"], check=True)
    return run


def measure(run: Path, name: str, asked: Asked, folder: Path) -> dict[str, Any]:
    """The row of one export of a run."""
    started = time.perf_counter()
    exported = export_run(run, folder / name.replace(" ", "-"), asked)
    (audit,) = exported["comparisons"].values()
    return {
        "benchmark": "requantize",
        "seed": read_recipe(run / "recipe.yaml").train.seed,
        "export": name,
        "dtype": asked.dtype,
        "kl": audit["mean_kl"],
        "max_kl": audit["max_kl"],
        "top1_agreement": audit["top1_agreement"],
        "loss_as_trained": audit["loss_as_trained"],
        "loss_export": audit["loss_export"],
        "tokens": audit["tokens"],
        "calibration_tokens": exported.get("quantization", {}).get("calibration_tokens", 0),
        "bytes": sum(file.stat().st_size for file in (folder / name.replace(" ", "-")).glob("*.safetensors")),
        "wall_s": round(time.perf_counter() - started, 1),
        "machine": MACHINE,
    }


def rows_of(run: Path) -> list[dict[str, Any]]:
    """All exports of one run."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        for kind in FORMATS:
            with tempfile.TemporaryDirectory() as folder:
                pair = [
                    measure(run, f"{kind} {name}", Asked("quantized", "dequantized", dtype, kind, count), Path(folder))
                    for name, count in (("plain", 0), ("calibrated", Asked().calibration_rows))
                ]
            pair[1]["kept"] = round(pair[1]["kl"] / pair[0]["kl"], 3)
            rows += pair
    with tempfile.TemporaryDirectory() as folder:
        rows += [measure(run, name, asked, Path(folder)) for name, asked in MERGES.items()]
    return rows


def main() -> None:
    """Measure the runs that are given, or three new ones."""
    torch.set_num_threads(1)
    disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for run in map(Path, sys.argv[1:]) if sys.argv[1:] else (trained(seed, Path(folder)) for seed in SEEDS):
            for each in rows_of(run):
                rows.append(each)
                kept = f"  kept {each['kept']:.0%}" if "kept" in each else ""
                print(
                    f"seed {each['seed']}  {each['export']:24} {each['dtype']:8}  KL {each['kl']:.2e}{kept}", flush=True
                )
    RESULTS.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
