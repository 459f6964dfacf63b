"""What quantising again costs, rounded plainly and with codes and constants chosen on calibration rows, three seeds.

    python benchmarks/requantize.py [RUN ...]      write benchmarks/results/requantize.jsonl, a row a seed and export

Each seed trains the quickstart in a process of its own; run folders that are given are measured as they are. `kl` is
the mean divergence of the export from the model as trained, in nats a token, on the run's 200 held-out rows, which are
from modules that neither training nor calibration has seen; `kept` is the share of plain rounding's that is left with
chosen ones. Dense parts and sums are fp32, so that nothing but codes and constants differs; nf4 in bf16, as the
command line makes it, and the merges in 16 bits stand beside. CPU seconds hold loading, the reading of the training
rows, and the audit.
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
FORMATS = (("nf4", "float32"), ("fp4", "float32"), ("int8", "float32"), ("nf4", "bfloat16"))
MERGES = {"merged": Asked(), "merged onto the original": Asked(onto="original")}


def trained(seed: int, folder: Path) -> Path:
    """A run of the shipped recipe."""
    run = folder / f"seed-{seed}"
    subprocess.run([COMMAND, "train", "quickstart", f"train.seed={seed}", f"output={run}"], check=True)
    return run


def measure(run: Path, name: str, asked: Asked, folder: Path) -> dict[str, Any]:
    """The row of one export of a run."""
    started, out = time.process_time(), folder / f"{name} {asked.written_in}".replace(" ", "-")
    exported = export_run(run, out, asked)
    (audit,) = exported["comparisons"].values()
    return {
        "benchmark": "requantize",
        "seed": read_recipe(run / "recipe.yaml").train.seed,
        "export": name,
        "dtype": asked.written_in,
        "kl": audit["mean_kl"],
        "max_kl": audit["max_kl"],
        "top1_agreement": audit["top1_agreement"],
        "loss_as_trained": audit["loss_as_trained"],
        "loss_export": audit["loss_export"],
        "tokens": audit["tokens"],
        "calibration_tokens": exported.get("quantization", {}).get("calibration_tokens", 0),
        "bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
        "cpu_s": round(time.process_time() - started, 1),
        "machine": MACHINE,
    }


def rows_of(run: Path) -> list[dict[str, Any]]:
    """All exports of one run."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, dtype in FORMATS:
            pair = [
                measure(run, f"{kind} {name}", Asked("quantized", "dequantized", dtype, kind, count), Path(folder))
                for name, count in (("plain", 0), ("calibrated", Asked().calibration_rows))
            ]
            pair[1]["kept"] = round(pair[1]["kl"] / pair[0]["kl"], 3)
            rows += pair
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
