"""Every kind of export of the quickstart, side by side: size and distance from the model as trained, a row a kind.

    python benchmarks/exports.py          write benchmarks/results/exports.jsonl

Trains the shipped recipe (seed 0) and calls `qlora-kit export RUN --compare`.
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results" / "exports.jsonl"
COMMAND = Path(sys.executable).with_name("qlora-kit")


def main() -> None:
    """Train, export and write the rows."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "quickstart"
        subprocess.run([COMMAND, "train", "quickstart", f"output={run}"], check=True)
        told = subprocess.run(
            [COMMAND, "export", run, "--compare", "--json"], check=True, capture_output=True, text=True
        )
    machine = f"{platform.machine()}, torch {torch.__version__}, CPU, {torch.get_num_threads()} threads"
    rows = [{"benchmark": "exports", **row, "machine": machine} for row in json.loads(told.stdout)["exports"]]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
