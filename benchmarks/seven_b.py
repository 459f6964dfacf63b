"""A 7B model on a CPU from end to end, as a user would have it: what each phase takes, and that the result is right.

    python benchmarks/seven_b.py [--layers 32] [--folder /tmp]      rows of benchmarks/results/seven_b.jsonl

The shape of Llama-2-7B with cheap random weights, written shard by shard: 13.5 GB, and the merged weights as many
again; the folder is removed afterwards. `qlora-kit train` takes one step of one row of 128 tokens (NF4, rank 16 on all
linears, activations recomputed, one thread), after the rehearsal of one that every run begins with; `qlora-kit export`
reads and quantises the base again and merges. No row is held out, so the export is not audited.

Both commands are watched from outside, 50 times a second: CPU seconds and seconds by the clock of each phase, and the
most that the process held in anonymous pages and in pages of mapped files. A phase ends when a file appears. Beside
them stands what full fine-tuning of the same model on the same row is planned to take at most.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from merge import formula, tensor_of
from step import MACHINE, SHAPES, VOCAB
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_kit.export import StreamedTensor, write_weights
from qlora_kit.export.stream import row_slices
from qlora_kit.units import GIB, MIB

RESULTS = Path(__file__).parent / "results" / "seven_b.jsonl"
TOKENIZER = Path(__file__).parent.parent / "recipes" / "quickstart" / "base"
KIT = [sys.executable, "-c", "from qlora_kit.cli import main; main()"]
TOKENS, INTERVAL_S = 128, 0.02
NOISE = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()


def random_slices(shape: tuple[int, ...], seed: int) -> Iterator[Tensor]:
    """Norms of one, and matrices out of one block of noise, turned at every slice: writing them is what takes time."""
    if len(shape) == 1:
        yield torch.ones(shape, dtype=torch.bfloat16)
        return
    for rows in row_slices(shape):
        count = rows.stop - rows.start
        yield NOISE.roll(7919 * seed + rows.start)[: count * shape[1]].view(count, shape[1])


def make_checkpoint(layers: int, folder: Path) -> None:
    """Random weights in bf16, in shards, beside a tokenizer."""
    shape = {**SHAPES["7b-layers"], "num_hidden_layers": layers, "max_position_embeddings": 4096}
    config = LlamaConfig(**shape, vocab_size=VOCAB, tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    shapes = ((name, tuple(tensor.shape)) for name, tensor in state.items())
    tensors = [
        StreamedTensor(name, size, torch.bfloat16, partial(random_slices, size, seed))
        for seed, (name, size) in enumerate(shapes)
    ]
    config.save_pretrained(folder)
    write_weights(tensors, folder)
    for path in TOKENIZER.glob("tokenizer*"):
        shutil.copy(path, folder)


class Sample(NamedTuple):
    """What a process had taken and held at one time."""

    phase: int
    wall_s: float
    cpu_s: float
    anonymous_bytes: int
    mapped_bytes: int


def watch(command: list[str], ends: Mapping[str, Callable[[], bool]], last: str) -> list[dict[str, Any]]:
    """Run a command of the kit, and cut what it takes into phases.

    Args:
        command: the verb and its arguments.
        ends: phase -> whether it is over; in the order in which they come.
        last: the phase that ends with the command.
    """
    samples, waiting, begun = [Sample(0, 0.0, 0.0, 0, 0)], list(ends.values()), time.perf_counter()
    process = psutil.Popen([*KIT, *command], env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None:
        memory, times = process.memory_info(), process.cpu_times()
        if memory.rss:  # none of a process that has just ended
            held = memory.rss - memory.shared, memory.shared
            samples.append(
                Sample(len(ends) - len(waiting), time.perf_counter() - begun, times.user + times.system, *held)
            )
        if waiting and waiting[0]():
            waiting.pop(0)
        time.sleep(INTERVAL_S)
    assert process.returncode == 0, f"{command[0]} ended with {process.returncode}"
    assert not waiting, f"{len(waiting)} phases were not seen to end"
    return [phase_row(command[0], name, number, samples) for number, name in enumerate([*ends, last])]


def phase_row(verb: str, name: str, number: int, samples: list[Sample]) -> dict[str, Any]:
    """What one phase took and held at most."""
    before = [sample for sample in samples if sample.phase < number][-1:] or samples[:1]
    during = [sample for sample in samples if sample.phase == number]
    return {
        "command": f"qlora-kit {verb}",
        "phase": name,
        "cpu_s": round(during[-1].cpu_s - before[0].cpu_s, 1),
        "wall_s": round(during[-1].wall_s - before[0].wall_s, 1),
        "anonymous_peak_bytes": max(sample.anonymous_bytes for sample in during),
        "file_backed_peak_bytes": max(sample.mapped_bytes for sample in during),
    }


def off_by(base: Path, adapter: Path, merged: Path, layers: int) -> float:
    """The most that one written weight is off by over its size, in two layers; rounding to bf16 makes up to 2^-8."""
    most = []
    for name in ("model.layers.0.self_attn.q_proj", f"model.layers.{layers - 1}.mlp.down_proj"):
        exact = formula(base, adapter, name)
        difference = tensor_of(merged, f"{name}.weight").double() - exact
        most.append((difference.abs() / exact.abs().clamp(min=2e-5)).max().item())
    return round(max(most), 6)


def measure(layers: int, folder: Path) -> list[dict[str, Any]]:
    """All phases, and a row of the whole."""
    base, run, merged, data = (folder / name for name in ("base", "run", "merged", "row.jsonl"))
    begun = time.perf_counter()
    base.mkdir()
    make_checkpoint(layers, base)
    print(f"checkpoint written in {time.perf_counter() - begun:.0f} s", flush=True)
    data.write_text(json.dumps({"text": "return value " * TOKENS}) + "\n")
    settings = [f"base.model={base}", f"data.train={data}", f"output={run}", "data.eval=null"]
    settings += [f"data.max_tokens={TOKENS}", "data.over_length=truncate", "memory.activations=recompute"]
    settings += ["train.task=pretrain", "train.steps=1"]
    metrics, saved = run / "metrics.jsonl", run / "checkpoints" / "step-000001"
    ends = {
        "plan": run.exists,
        "load, quantise, adapt": (run / "plan.json").exists,
        "rehearsal and step": lambda: metrics.exists() and metrics.stat().st_size > 0,
        "checkpoint": saved.exists,
    }
    phases = watch(["train", "default", *settings], ends, "adapter and report")
    plan, trained = json.loads((run / "plan.json").read_text()), json.loads(metrics.read_text().splitlines()[0])
    ends = {"load, quantise, adapt": lambda: any(folder.glob(f".{merged.name}.*"))}
    phases += watch(["export", str(run), "--out", str(merged)], ends, "merge and write")
    whole = {
        "command": "all",
        "tokens": trained["tokens"],
        "parameters": plan["parameters"],
        "anonymous_peak_bytes": max(phase["anonymous_peak_bytes"] for phase in phases),
        "planned_peak_bytes": {name: method["peak_bytes"] for name, method in plan["methods"].items()},
        "cpu_s": round(sum(phase["cpu_s"] for phase in phases), 1),
        "wall_s": round(sum(phase["wall_s"] for phase in phases), 1),
        "checkpoint_bytes": sum(path.stat().st_size for path in base.iterdir()),
        "merged_bytes": sum(path.stat().st_size for path in merged.iterdir()),
        "off_by": off_by(base, run / "adapter", merged, layers),
    }
    return [{"benchmark": "seven_b", "layers": layers, **row, "machine": MACHINE} for row in [*phases, whole]]


def replace_rows(layers: int, rows: list[dict[str, Any]]) -> None:
    """Put the rows of one depth in the place of those that were there."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    others = [row for row in map(json.loads, lines) if row["layers"] != layers]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in [*others, *rows]), encoding="utf-8")


def main() -> None:
    """Run it in a folder that goes away again, whatever happens."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    free_bytes, needed_bytes = shutil.disk_usage(asked.folder).free, (asked.layers + 2) * GIB
    if free_bytes < needed_bytes:
        sys.exit(f"{asked.folder} has {free_bytes / GIB:.0f} GiB free, wanted {needed_bytes / GIB:.0f}; give --folder")
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        rows = measure(asked.layers, Path(folder))
    replace_rows(asked.layers, rows)
    for row in rows:
        took = f"{row['cpu_s']:8.1f} CPU s {row['wall_s']:8.1f} s"
        print(f"{row['command']:18} {row.get('phase', ''):22} {took} {row['anonymous_peak_bytes'] / MIB:9.0f} MiB")
    print(json.dumps(rows[-1]))


if __name__ == "__main__":
    main()
