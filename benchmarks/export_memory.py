"""Writing a trained model as a GGUF, or quantised again: time, memory and size, by type.

    python benchmarks/export_memory.py [SHAPE ...]    of 134m, 1.1b, 7b-layers; rows: results/export_memory.jsonl

The models and adapters of benchmarks/merge.py; one thread, no audit. Each type has processes of its own. CPU seconds
are the process's from the loaded model to the written folder, checksums and flushing to the disk included, once for the
time and once for the memory: what the process holds at most above what it held before, sampled every 2 ms, anonymous
pages. A tensor is as large as its fp32 is. "nf4, calibrated" chooses codes and constants on 16 rows of 256 tokens,
which takes minutes. The two layers of a 7B model are there for their widths: they are quantised again and not more.
"""

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from merge import make_adapter
from step import MACHINE, SHAPES, VOCAB, make_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qlora_kit.base import load_base
from qlora_kit.data import Encoded, collate
from qlora_kit.export import export_quantized
from qlora_kit.export.gguf import export_gguf
from qlora_kit.lora import load_adapter
from qlora_kit.memory.counter import PeakCounter
from qlora_kit.units import MIB

RESULTS = Path(__file__).parent / "results" / "export_memory.jsonl"
CALIBRATED = "nf4, calibrated"
GGUF = ("f16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k")
DTYPES = {"134m": (*GGUF, "nf4", CALIBRATED), "1.1b": (*GGUF, "nf4"), "7b-layers": ("nf4", CALIBRATED)}
CALIBRATION_ROWS, CALIBRATION_TOKENS = 16, 256
ONE = "--one"


def bytes_only() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without a merge; the rows above its tokens are unused."""
    bpe = Tokenizer(
        models.BPE({character: row for row, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}, [])
    )
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


def export(model: PreTrainedModel, out: Path, dtype: str) -> None:
    """Write one type."""
    if not dtype.startswith("nf4"):
        export_gguf(model, bytes_only(), out, dtype=dtype)
        return
    torch.manual_seed(2)
    count, tokens = CALIBRATION_ROWS if dtype == CALIBRATED else 0, CALIBRATION_TOKENS
    rows = [Encoded(torch.randint(3, VOCAB, (tokens,)).tolist(), [True] * tokens) for _ in range(count)]
    export_quantized(model, None, out, calibration=[collate([row], pad_id=0) for row in rows])


def measure(dtype: str, base: Path, adapter: Path, out: Path, *, is_timed: bool) -> dict[str, float]:
    """What one process says of one type."""
    model = load_base(base, quantization="nf4", compute_dtype="bfloat16", device="cpu")
    load_adapter(model, adapter)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    if is_timed:
        begun = time.process_time()
        export(model, out, dtype)
        return {"cpu_s": time.process_time() - begun}
    with PeakCounter(torch.device("cpu"), interval_s=0.002) as counter:
        counter.sample()
        export(model, out, dtype)
    return {"extra_bytes": counter.taken_bytes}


def row(name: str, dtype: str, base: Path, adapter: Path) -> dict[str, Any]:
    """All measurements of one type."""
    found: dict[str, float] = {}
    for what in ("time", "memory"):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            command = [sys.executable, __file__, ONE, dtype, what, str(base), str(adapter), str(out)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found |= json.loads(said.splitlines()[-1])
            written = sum(path.stat().st_size for kind in ("gguf", "safetensors") for path in out.glob(f"*.{kind}"))
    width, inner = SHAPES[name]["hidden_size"], SHAPES[name]["intermediate_size"]
    return {
        "benchmark": "export_memory",
        "shape": name,
        "dtype": dtype,
        "cpu_s": round(found["cpu_s"], 1),
        "extra_mib": round(found["extra_bytes"] / MIB, 1),
        "largest_tensor_mib": round(4 * width * max(inner, VOCAB) / MIB, 1),
        "written_bytes": written,
        "machine": MACHINE,
    }


def main() -> None:
    """Measure the shapes that are asked for, or all."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == [ONE]:
        dtype, what, *folders = sys.argv[2:]
        print(json.dumps(measure(dtype, *map(Path, folders), is_timed=what == "time")))
        return
    for name in sys.argv[1:] or DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            base, adapter = Path(folder) / "base", Path(folder) / "adapter"
            make_checkpoint(SHAPES[name], base)
            adapter.mkdir()
            make_adapter(SHAPES[name], adapter)
            rows = [row(name, dtype, base, adapter) for dtype in DTYPES[name]]
        lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
        others = [each for each in map(json.loads, lines) if each["shape"] != name]
        RESULTS.write_text("".join(json.dumps(each) + "\n" for each in [*others, *rows]), encoding="utf-8")
        for each in rows:
            print(f"{name:9} {each['dtype']:15} {each['cpu_s']:7.1f} s  {each['extra_mib']:7.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
