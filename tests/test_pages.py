"""Pages of a mapped checkpoint are given back once they are read, and nothing else ever is."""

import os
import re
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForCausalLM

import qlora_kit
from qlora_kit.base import freeze, load_base
from qlora_kit.base.dense import QuantizedWeight
from qlora_kit.base.experts import ArrivedStack, ExpertStack, quantized_on_arrival
from qlora_kit.base.formats import Quantization
from qlora_kit.base.freeze import freeze_and_quantize
from qlora_kit.base.pages import _PART_BYTES, copy_off, let_go, let_go_of_clean_files
from qlora_kit.base.record import base_record
from qlora_kit.memory import Ledger

MIB = 2**20
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")


def resident_bytes(folder: Path) -> int:
    """Of the files in a folder, what this process has mapped in."""
    text = Path("/proc/self/smaps").read_text()
    return sum(1024 * int(kib) for kib in re.findall(rf" {folder}/.*\nSize:[^V]*\nRss: +(\d+) kB", text))


@pytest.fixture
def mapped(tmp_path):
    """Two tensors of 8 MiB in one mapped file, and what they hold."""
    wanted = {name: torch.randn(2048, 1024, generator=torch.Generator().manual_seed(n)) for n, name in enumerate("ab")}
    save_file(wanted, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in wanted}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, wanted[name])
    return tmp_path, tensors, wanted


@on_linux
def test_what_was_written_beside_a_tensor_that_is_given_back_stays_written(mapped):
    _, tensors, _ = mapped
    first, second = sorted(tensors.values(), key=Tensor.data_ptr)
    second[0] = 3.0
    let_go(first)
    assert (second[0] == 3.0).all()


@on_linux
def test_the_pages_of_a_tensor_that_was_read_are_given_back_and_come_back_as_they_were(mapped):
    folder, tensors, wanted = mapped
    assert resident_bytes(folder) > 15 * MIB
    let_go(tensors["a"])
    assert 5 * MIB < resident_bytes(folder) < 9 * MIB, "the other's are still there, but for those beside it"
    assert torch.equal(tensors["a"], wanted["a"])
    assert torch.equal(tensors["b"], wanted["b"])


def test_memory_that_is_no_file_is_never_given_back(mapped):
    _, tensors, wanted = mapped
    for tensor in (tensors["a"] + 0, tensors["a"].clone()[:1000], torch.ones(5_000_000), torch.ones(3), torch.ones(0)):
        before = tensor.clone()
        let_go(tensor)
        assert torch.equal(tensor, before)
    let_go(tensors["a"].t())  # what it holds alone is not told by its first address and its length
    with FakeTensorMode() as mode:
        let_go(mode.from_tensor(tensors["a"]))
    assert torch.equal(tensors["a"], wanted["a"])


@on_linux
def test_files_that_were_written_to_stay_and_all_others_go(mapped, tmp_path_factory):
    folder, tensors, wanted = mapped
    let_go_of_clean_files()
    assert resident_bytes(folder) == 0
    tensors["a"][7] = 3.0
    assert torch.equal(tensors["b"], wanted["b"])
    let_go_of_clean_files()
    assert (tensors["a"][7] == 3.0).all()
    assert resident_bytes(folder) > 7 * MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_off_a_file_is_the_whole_tensor_in_memory_of_its_own(dtype, tmp_path):
    wanted = torch.randn(3 * _PART_BYTES // 2800, 777, generator=torch.Generator().manual_seed(0))  # 3.3 parts
    save_file({"a": wanted}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        tensor = opened.get_tensor("a")
    copy = copy_off(tensor, dtype, tiny.CPU)
    assert torch.equal(copy, wanted.to(dtype))
    assert copy.data_ptr() != tensor.data_ptr()
    if sys.platform == "linux":
        assert resident_bytes(tmp_path) < MIB


@on_linux
@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_while_a_model_is_loaded_little_more_than_one_matrix_is_mapped_in(kind, tmp_path, monkeypatch):
    """Of 20 MiB of linear layers and embeddings; the last pages of two neighbours may stay, and 64 KiB around them."""
    tiny.llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, vocab_size=4096).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 20 * MIB
    largest, seen = 4 * 4096 * 256, []

    def watched(read):
        def reading(*args, **kwargs):
            made = read(*args, **kwargs)
            seen.append(resident_bytes(tmp_path))
            return made

        return reading

    let_go_of_clean_files()
    monkeypatch.setattr(freeze, "quantize_linear", watched(freeze.quantize_linear))
    monkeypatch.setattr(freeze, "copy_off", watched(freeze.copy_off))
    load_base(tmp_path, quantization=kind, device="cpu")
    assert len(seen) >= 11
    assert max(seen) < largest + 4 * MIB


# --- mixtures of experts ----------------------------------------------------------------------------------------------

MAKERS = [tiny.mixtral, tiny.qwen3_moe, tiny.gpt_oss]


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
@pytest.mark.parametrize("make", MAKERS)
def test_experts_quantised_while_they_are_read_have_the_bytes_of_those_quantised_in_place(make, kind, tmp_path):
    make().save_pretrained(tmp_path)
    wanted = freeze_and_quantize(make(), Quantization(kind), torch.float32, tiny.CPU)
    settings = {"compute_dtype": "float32", "device": "cpu", "attention": "eager"}
    loaded = load_base(tmp_path, quantization=kind, **settings)
    assert kind == "none" or sum(isinstance(module, ExpertStack) for module in loaded.modules()) == 4
    assert tiny.stored(loaded) == tiny.stored(wanted)
    assert base_record(loaded).marks == base_record(wanted).marks


@pytest.mark.parametrize("make", [tiny.mixtral, tiny.qwen3_moe])
def test_no_two_dense_stacks_of_experts_stand_at_once(make, tmp_path, monkeypatch):
    make().save_pretrained(tmp_path)
    stored = safe_open(tmp_path / "model.safetensors", framework="pt").keys()
    assert any(".experts.3." in name for name in stored), "the checkpoint holds experts one by one"
    stacks, alive = [], []
    make_stack = ExpertStack.__init__

    def watched(self, weight_EOI, *args, **kwargs):
        stacks.append(weakref.ref(weight_EOI.untyped_storage()))
        alive.append(sum(stack() is not None for stack in stacks))
        make_stack(self, weight_EOI, *args, **kwargs)

    monkeypatch.setattr(ExpertStack, "__init__", watched)
    load_base(tmp_path, device="cpu")
    assert alive == [1, 1, 1, 1]


def test_the_ledger_of_a_run_counts_experts_that_were_quantised_while_they_were_read(tmp_path):
    tiny.mixtral().save_pretrained(tmp_path)
    ledger = Ledger()

    def watching(dense):
        assert sum(isinstance(parameter, ArrivedStack) for parameter in dense.parameters()) == 4
        ledger.ignore(dense.parameters())
        return ledger.watch("load")

    model = load_base(tmp_path, device="cpu", watching=watching)
    codes = sum(buffer.nbytes for each in model.modules() if isinstance(each, QuantizedWeight) for buffer in
                each.buffers(recurse=False))  # fmt: skip
    assert ledger.peak_by_phase()["load"] >= codes > 0
    before = ledger.current()
    ledger.adopt(model)
    buffers = sum(b.nbytes for name, b in model.named_buffers() if "inv_freq" in name)
    assert ledger.current() - before <= buffers, "nothing else was unknown"


def set_again(model):
    """Put a layer's experts into the model once more, as transformers does when it has read them."""
    layer = model.model.layers[0].mlp.experts
    layer.down_proj = nn.Parameter(layer.down_proj.detach() + 0)
    return isinstance(layer.down_proj, ArrivedStack)


def test_experts_are_taken_in_the_block_only_and_from_its_own_thread():
    model, others = tiny.mixtral(), []
    with suppress(KeyError), quantized_on_arrival(Quantization(), torch.float32, tiny.CPU):
        thread = threading.Thread(target=lambda: others.append(set_again(model)))
        thread.start()
        thread.join()
        assert others == [False]
        assert set_again(tiny.mixtral())
        raise KeyError
    assert not set_again(model)


def test_a_dense_model_takes_no_part_in_it(tmp_path):
    model = LlamaForCausalLM(tiny.llama().config)
    with quantized_on_arrival(Quantization(), torch.float32, tiny.CPU):
        again = LlamaForCausalLM(model.config)
    assert again.state_dict().keys() == model.state_dict().keys()


MEASURED = """
import sys
from pathlib import Path
import transformers.models.llama.modeling_llama
from qlora_kit.base import load_base

def most():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

Path("/proc/self/clear_refs").write_text("5")
before = most()
model = load_base(sys.argv[1], compute_dtype="bfloat16", device="cpu")
print(most() - before, sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]))
"""


@on_linux
@pytest.mark.slow
def test_a_process_that_loads_takes_the_model_and_its_largest_tensor_mapped_pages_counted(tmp_path):
    """By the system's own high-water mark. The 48 MiB are for threads of transformers' loader, whose heaps take up to
    64 MiB at a larger model (benchmarks/LOG.md), and for the compiler; the checkpoint has 390 MiB."""
    make = tiny.llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, vocab_size=32_000)
    make.to(torch.bfloat16).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 350 * MIB
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(qlora_kit.__file__).parents[1])}
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    taken_kib, model_bytes = map(int, done.stdout.split())
    largest_bytes = 2 * 32_000 * 1024
    print(f"taken {taken_kib / 1024:.0f} MiB, the model {model_bytes / MIB:.0f}")
    assert 1024 * taken_kib > model_bytes
    assert 1024 * taken_kib < 1.05 * model_bytes + largest_bytes + 48 * MIB
