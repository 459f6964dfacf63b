"""Claims about exports: they hold the formula to the last rounding, plain transformers reads them, and they say so."""

import json
import os
import struct
import subprocess
import sys
import weakref
from collections import namedtuple

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from qlora_kit.base.dense import QuantizedLinear
from qlora_kit.base.files import check_model_folder
from qlora_kit.base.formats import Quantization, quantize
from qlora_kit.base.freeze import freeze_and_quantize
from qlora_kit.base.header import read_header
from qlora_kit.base.load import load_base
from qlora_kit.base.vocabulary import QuantizedTable
from qlora_kit.data import Encoded, collate
from qlora_kit.errors import AdapterError, DataError, ModelError, RunError
from qlora_kit.export import audit, compare, export_adapter, export_merged, merge, merged_tensors
from qlora_kit.export.folder import model_card
from qlora_kit.export.stream import SLICE_ELEMENTS, row_slices, streamed, write_safetensors, write_weights
from qlora_kit.lora import (
    adapter_parameters,
    adapters_off,
    add_lora,
    combine_adapters,
    load_adapter,
    lora_layers,
    save_adapter,
)
from qlora_kit.lora.inject import wrap
from qlora_kit.lora.layer import Adapter, LoraLinear
from qlora_kit.memory import Ledger
from qlora_kit.storage import sha256_file
from qlora_kit.units import MIB

VOCAB = 97
# 72 is no multiple of 64, 72 * 100 none either: rows share 4-bit blocks, and the last block is short.
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 60, "n_layer": 2, "n_head": 3, "n_positions": 64}
KINDS = ("nf4", "fp4", "int8", "none")


def dense_model(family="llama", tied=False):
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2))
    return LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied, attention_bias=True))


def trained_model(family="llama", kind="nf4", *, tied=False, double_quant=True, **lora):
    """A quantised base with an adapter whose B is not zero, in fp32."""
    quantization = Quantization(kind, double_quant, 64)
    model = freeze_and_quantize(dense_model(family, tied), quantization, torch.float32, torch.device("cpu"))
    add_lora(model, rank=4, alpha=12, **lora)
    fill_adapters(model)
    return model


@torch.no_grad()
def fill_adapters(model):
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        for adapter in layer.adapters.values():
            adapter.b_OR.copy_(torch.randn(adapter.b_OR.shape, generator=generator) * 0.1)


def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    return made


def held_out(rows=3):
    generator = torch.Generator().manual_seed(2)
    encoded = []
    for row in range(rows):
        ids = torch.randint(3, VOCAB, (9 + 5 * row,), generator=generator).tolist()
        encoded.append(Encoded(ids, [i >= 4 for i in range(len(ids))]))
    return [collate(encoded[:2], pad_id=0), collate(encoded[2:], pad_id=0)]


@torch.no_grad()
def logits(model):
    return model(torch.arange(3, 43).view(2, 20), use_cache=False).logits.float()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors_of(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


# --- an independent reader of the quantised formats ---

NF4 = (
    "-1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334 "
    "-0.09105003625154495 0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 "
    "0.44070982933044434 0.5626170039176941 0.7229568362236023 1"
)
FP4_HALF = np.array([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
TABLES = {"nf4": np.array([float(v) for v in NF4.split()]), "fp4": np.concatenate([FP4_HALF, -FP4_HALF])}


def dynamic_table():
    """The 256 values of double quantisation: seven decades below 1, each cut into twice as many steps as the last."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2**decade + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [*middles, *-middles]
    return np.sort(values)


def numpy_decode(layer):
    """The weight that the bytes of a quantised layer stand for, (out, in), float64."""
    codes, absmax = layer.codes.numpy(), layer.absmax.numpy()
    shape = (layer.out_features, layer.in_features)
    if layer.quantization.kind == "int8":
        return codes.astype(np.float64) * absmax[:, None].astype(np.float64) / 127
    if layer.absmax_scale is not None:
        scale = np.repeat(layer.absmax_scale.numpy().astype(np.float64), 256)[: len(absmax)]
        absmax = dynamic_table()[absmax] * scale + float(layer.absmax_offset)
    halves = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[: shape[0] * shape[1]]
    blocks = np.repeat(absmax.astype(np.float64), layer.quantization.block_size)[: len(halves)]
    return (TABLES[layer.quantization.kind][halves] * blocks).reshape(shape)


def numpy_merged(layer):
    """decode(Wq) + scale B A in float64, (out, in)."""
    adapter = layer.adapters[layer.active]
    a, b = (p.detach().double().numpy() for p in (adapter.a_RI, adapter.b_OR))
    base = layer.base
    if isinstance(base, QuantizedLinear):
        weight = numpy_decode(base)
    else:
        weight = base.weight.detach().double().numpy()
        weight = weight if isinstance(base, torch.nn.Linear) else weight.T
    return weight + 3.0 * (b @ a)  # alpha 12 / rank 4


def half_unit(exact):
    """Half a unit in the last place of bf16, which keeps 8 bits: 2^-8 of the value's power of two."""
    return 2.0 ** (np.floor(np.log2(np.abs(exact) + 1e-30)) - 8)


# --- what the export holds ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_fp32_gives_the_logits_of_the_adapter_model(tmp_path, family, kind):
    model = trained_model(family, kind)
    expected = logits(model)
    with adapters_off(model):
        assert relative(logits(model), expected) > 1e-2
    export_merged(model, None, tmp_path / "out", dtype="float32")
    export, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert export.dtype == torch.float32
    assert relative(logits(export), expected) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_dora_gives_the_logits_of_the_adapter_model(tmp_path, family):
    model = trained_model(family, "nf4", dora=True)
    for name, parameter in adapter_parameters(model):
        if name.endswith("magnitude_O"):
            parameter.data *= torch.linspace(0.8, 1.2, len(parameter))
    export_merged(model, None, tmp_path / "out", dtype="float32")
    export = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert relative(logits(export), logits(model)) < 1e-5


def test_adapters_that_were_combined_are_merged_together(tmp_path):
    model = trained_model(targets=["q_proj", "up_proj"])
    add_lora(model, rank=2, alpha=8, targets=["q_proj", "down_proj"], name="second")
    fill_adapters(model)
    alone = logits(model)
    combine_adapters(model, {"default": 0.5, "second": -2.0}, "both")
    assert relative(alone, logits(model)) > 1e-2
    export_merged(model, None, tmp_path / "out", dtype="float32")
    export = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert relative(logits(export), logits(model)) < 1e-5


@pytest.mark.parametrize(("kind", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_merged_weight_is_the_formula_within_one_rounding(tmp_path, family, kind, double_quant):
    model = trained_model(family, kind, double_quant=double_quant)
    export_merged(model, None, tmp_path / "out")
    stored = tensors_of(tmp_path / "out")
    layers = dict(lora_layers(model))
    assert len(layers) == (14 if family == "llama" else 8)
    for name, layer in layers.items():
        weight = stored[f"{name}.weight"]
        assert weight.dtype == torch.bfloat16
        exact = numpy_merged(layer)
        found = weight.double().numpy().T if family == "gpt2" else weight.double().numpy()
        assert np.all(np.abs(found - exact) <= half_unit(exact) + 2e-7)  # 2e-7 is fp32's noise


@pytest.mark.parametrize("shape", [(5, 3), (7, 48), (130, 257)])
@pytest.mark.parametrize(("kind", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True)])
def test_layers_of_any_widths_are_merged_within_one_rounding(shape, kind, double_quant):
    how = Quantization(kind, double_quant)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = LoraLinear(QuantizedLinear.from_stored(shape, quantize(weight, how), None, how))
    layer.adapters["default"], layer.active = Adapter(shape, rank=4, alpha=12), "default"
    torch.nn.init.normal_(layer.adapters["default"].a_RI)
    model = torch.nn.ModuleDict({"x": layer})
    fill_adapters(model)
    (merged,) = merged_tensors(model, torch.bfloat16)
    exact = numpy_merged(layer)
    assert np.all(np.abs(merged.read().double().numpy() - exact) <= half_unit(exact) + 2e-7)


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_names_shapes_and_order_are_those_of_a_plain_checkpoint(tmp_path, family, tied):
    model = trained_model(family, tied=tied)
    plain = dense_model(family, tied)
    plain.save_pretrained(tmp_path / "plain")
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors_of(tmp_path / "plain").items()}
    produced = {tensor.name: tensor.shape for tensor in merged_tensors(model, torch.bfloat16)}
    assert produced == wanted
    assert ("lm_head.weight" in produced) == (not tied)
    assert list(produced) == [name for name in plain.state_dict() if name in produced]


def test_only_persistent_buffers_are_exported_in_their_own_dtype():
    model = trained_model()
    model.model.register_buffer("kept", torch.tensor(7))
    model.model.register_buffer("dropped", torch.ones(2), persistent=False)
    produced = {tensor.name: tensor for tensor in merged_tensors(model, torch.float16)}
    assert "model.dropped" not in produced
    assert produced["model.kept"].dtype == torch.int64
    assert produced["model.kept"].shape == ()
    assert produced["model.kept"].read() == 7


def test_layers_without_the_adapter_are_the_decoded_base():
    model = trained_model(targets=["q_proj"])
    produced = {tensor.name: tensor for tensor in merged_tensors(model, torch.float32)}
    layer = model.model.layers[1].mlp.up_proj
    assert isinstance(layer, QuantizedLinear)
    np.testing.assert_allclose(produced["model.layers.1.mlp.up_proj.weight"].read(), numpy_decode(layer), rtol=1e-6)


@torch.no_grad()
def test_a_tied_head_with_its_own_adapter_is_untied(tmp_path):
    model = trained_model(tied=True)
    donor = add_head_adapter(model)
    assert model.config.tie_word_embeddings
    expected = logits(model)
    export_merged(model, None, tmp_path / "out", dtype="float32")
    export = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert not export.config.tie_word_embeddings
    assert model.config.tie_word_embeddings
    assert torch.equal(export.model.embed_tokens.weight, donor)
    assert relative(logits(export), expected) < 1e-5


def add_head_adapter(model):
    """An adapter on a head that shares the embedding's matrix, as other programs make it."""
    embedding = model.model.embed_tokens.weight.clone()
    layer = wrap(model, "lm_head")
    template = next(layer for _, layer in lora_layers(model) if layer.shape[1] == 72)
    adapter = type(template.adapters["default"])((VOCAB, 72), 4, 12.0, dtype=torch.float32)
    torch.nn.init.normal_(adapter.a_RI, std=0.1)
    torch.nn.init.normal_(adapter.b_OR, std=0.1)
    layer.adapters["default"] = adapter
    layer.active = "default"
    return embedding


def test_using_model_and_tokenizer_between_two_exports_changes_no_byte(tmp_path):
    model, words = trained_model(), tokenizer()
    export_merged(model, words, tmp_path / "one", audit_batches=held_out())
    generated = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert generated.shape[1] > 3
    assert words(["w5 w6 w7", "w8"], padding=True, truncation=True, max_length=2).input_ids == [[5, 6], [8, 0]]
    export_merged(model, words, tmp_path / "two", audit_batches=held_out())
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


# --- the file format ---


def test_the_writer_is_read_back_exactly_and_aligned(tmp_path):
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "ü": torch.arange(5.0, dtype=torch.float64),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "half": torch.randn(3, 7).to(torch.bfloat16).t(),
    }
    path = tmp_path / "x.safetensors"
    said = write_safetensors(path, [streamed(name, tensor) for name, tensor in tensors.items()], {"format": "pt"})
    assert said == sha256_file(path)
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    assert length % 8 == 0
    assert raw[8:9] == b"{"
    assert raw[8 : 8 + length].rstrip(b" ").endswith(b"}")
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
    for name, entry in read_header(path).items():
        assert entry.begin % tensors[name].element_size() == 0


def test_large_exports_are_sharded_with_an_index(tmp_path):
    model = trained_model(kind="int8")
    export_merged(model, None, tmp_path / "whole")
    export_merged(model, None, tmp_path / "cut", shard_bytes=40_000)
    index = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    whole, cut = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "cut")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert set(index["weight_map"]) == set(whole) == set(cut)
    for shard in shards:
        held = sum(tensor.nbytes for name, tensor in whole.items() if index["weight_map"][name] == shard)
        assert held <= 40_000
    check_model_folder(tmp_path / "cut")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype="auto")
    assert torch.equal(loaded.state_dict()["model.norm.weight"], whole["model.norm.weight"])


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path):
    tensors = [streamed(name, torch.ones(count)) for name, count in (("a", 2), ("b", 100), ("c", 3))]
    paths = write_weights(tensors, tmp_path, shard_bytes=64)
    assert [list(read_header(path)) for path in paths] == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize(
    ("shape", "elements"), [((5, 3), 7), ((1, 100), 7), ((130, 257), 4096), ((0, 4), 7), ((9,), 4)]
)
def test_row_slices_cover_every_row_once_and_stay_small(shape, elements):
    rows = torch.arange(shape[0])
    cut = [rows[part] for part in row_slices(shape, elements)]
    assert torch.equal(torch.cat([*cut, rows[:0]]), rows)
    width = int(np.prod(shape[1:]))
    assert all(len(part) * width <= max(elements, width) for part in cut)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators make, and their peak; those in files are not memory."""

    def __init__(self, model):
        super().__init__()
        self.own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self.alive, self.holders, self.peak = {}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.from_file.default:
            key = result.untyped_storage().data_ptr()
            self.own.add(key)
            weakref.finalize(result.untyped_storage(), self.own.discard, key)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.own:
                key = tensor.untyped_storage().data_ptr()
                self.alive[key] = tensor.untyped_storage().nbytes()
                self.holders[key] = self.holders.get(key, 0) + 1
                weakref.finalize(tensor, self.let_go, key)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result

    def let_go(self, key):
        self.holders[key] -= 1
        if self.holders[key] == 0:
            del self.alive[key], self.holders[key]


@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_memory_beside_the_model_stays_below_two_tensors(kind):
    width = 3072
    linear = torch.nn.Linear(width, width, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer = LoraLinear(linear if kind == "none" else QuantizedLinear(linear.weight, None, Quantization(kind)))
    adapter = trained_model(targets=["q_proj"]).model.layers[0].self_attn.q_proj.adapters["default"]
    layer.adapters["default"] = type(adapter)((width, width), 4, 12.0)
    torch.nn.init.normal_(layer.adapters["default"].a_RI)
    layer.active = "default"
    model = torch.nn.Sequential(layer)
    (tensor,) = merged_tensors(model, torch.bfloat16)
    with LiveBytes(model) as live:
        counts = [part.numel() for part in tensor.slices()]
    assert sum(counts) == width * width
    assert max(counts) <= SLICE_ELEMENTS < width * width
    # A slice takes 4 MiB in fp32 unless it lies in the decoded weight, and 2 MiB as it leaves, and the last one is
    # still there while the next is made; block constants are a sixteenth of the decoded weight.
    decoded_bytes = 4 * width * width if kind == "nf4" else 0
    assert decoded_bytes + 2 * MIB < live.peak < decoded_bytes * 17 / 16 + 12 * MIB
    assert live.peak < 2 * tensor.stored_bytes + 64 * MIB


def test_layers_are_decoded_into_one_memory_that_is_let_go_of_after_an_export(tmp_path):
    model = trained_model()
    workspace = model.model.layers[0].self_attn.q_proj.base.workspace
    produced = [tensor for tensor in merged_tensors(model, torch.bfloat16) if "_proj.weight" in tensor.name]
    with LiveBytes(model) as live:
        for tensor in produced:
            for _ in tensor.slices():
                pass
    assert len(produced) == 14
    assert len(workspace._idle) == 1
    largest = 4 * LLAMA["hidden_size"] * LLAMA["intermediate_size"]
    # All of a matrix is one slice here: half as many bytes as it leaves, twice, and its block constants.
    assert largest < live.peak < 2.2 * largest < sum(2 * tensor.stored_bytes for tensor in produced)
    export_merged(model, None, tmp_path / "out")
    assert not workspace._idle


def test_a_quantised_head_is_read_a_slice_at_a_time():
    width, vocabulary = 1024, 12_288
    torch.manual_seed(0)
    table = QuantizedTable(torch.randn(vocabulary, width, dtype=torch.bfloat16), None, Quantization())
    (tensor,) = merged_tensors(torch.nn.Sequential(table), torch.bfloat16)
    with LiveBytes(table) as live:
        counts = [part.numel() for part in tensor.slices()]
    assert len(counts) == 12
    # 4 MiB in fp32 and 2 as it leaves, twice as above, and less than 1 MiB of codes and constants.
    assert 6 * MIB < live.peak < 13 * MIB < tensor.stored_bytes
    assert torch.equal(tensor.read(), table.dense(torch.float32).to(torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_export_changes_no_byte_of_the_model_and_its_slices_share_no_memory(family, kind):
    model = trained_model(family, kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    produced = list(merged_tensors(model, torch.float32))
    kept = [list(tensor.slices()) for tensor in produced]
    for tensor, parts in zip(produced, kept, strict=True):
        assert torch.equal(torch.cat([part.reshape(-1) for part in parts]), tensor.read().view(-1))
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


# --- the folder ---


def test_the_folder_is_complete_and_says_what_it_is(tmp_path):
    model = trained_model()
    hostile = "a`b\n---\n# <script>|"
    content = export_merged(
        model,
        tokenizer(),
        tmp_path / "out",
        audit_batches=held_out(),
        provenance={"base": "acme/tiny", "revision": "abc123", "note": hostile},
    )
    found = json.loads((tmp_path / "out/export.json").read_text())
    assert found == content
    assert (found["schema"], found["kind"], found["onto"], found["dtype"]) == (1, "merged", "dequantized", "bfloat16")
    on_disk = {path.name for path in (tmp_path / "out").iterdir()} - {"export.json"}
    assert set(found["files"]) == on_disk
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= on_disk
    assert all(sha256_file(tmp_path / "out" / name) == sha for name, sha in found["files"].items())
    assert found["trained_against"]["qlora_kit.quantization"] == "nf4"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    check_model_folder(tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer().chat_template
    assert again("w5 w6").input_ids == [5, 6]


def test_the_end_tokens_of_a_base_without_a_generation_config_stand_in_one_of_the_exports_own(tmp_path):
    model, words = trained_model(), tokenizer()
    words.add_special_tokens({"extra_special_tokens": ["w7"]})
    words.chat_template = "{% for m in messages %}{{ m.content }}w7{% endfor %}"
    assert model.generation_config._from_model_config
    export_merged(model, words, tmp_path / "out")
    found = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert found["eos_token_id"] == [2, 7]
    assert "_from_model_config" not in found
    assert not GenerationConfig.from_pretrained(tmp_path / "out")._from_model_config


def test_the_card_is_valid_and_no_value_acts_as_markup(tmp_path):
    export_merged(
        trained_model(),
        None,
        tmp_path / "out",
        audit_batches=held_out(),
        provenance={"base": "acme/tiny", "note": "a`b\n---\n# <script>|"},
    )
    _, front, body = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "acme/tiny"
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "qlora" in yaml.safe_load(front)["tags"]
    assert "- note: `a'b --- # <script>|`\n" in body
    assert "mean_kl: `" in body
    assert "rank: `4`" in body
    assert "base_model" not in model_card("t", str(tmp_path), "peft", [], {})


def test_the_audit_of_an_exact_export_finds_agreement(tmp_path):
    model = trained_model()
    model.train()
    content = export_merged(model, None, tmp_path / "out", dtype="float32", audit_batches=held_out())
    found = content["comparisons"]["merged"]
    assert model.training
    assert found["top1_agreement"] == 1.0
    assert 0 <= found["mean_kl"] <= found["max_kl"] < 1e-6
    assert found["tokens"] == sum(batch.trained_tokens for batch in held_out())
    assert found["loss_export"] == pytest.approx(found["loss_as_trained"], rel=1e-5)


def test_the_audit_is_the_textbook_divergence_and_sees_a_missing_adapter(tmp_path):
    model, bare = trained_model(), trained_model()
    for _, layer in lora_layers(bare):
        layer.active = None
    found = compare(model, bare, held_out())
    divergences = []
    for batch in held_out():
        with torch.no_grad():
            p, q = (m(batch.input_ids).logits.double().softmax(-1) for m in (model, bare))
        for row, position in zip(*torch.where(batch.labels != -100), strict=True):
            pair = p[row, position - 1], q[row, position - 1]
            divergences.append((pair[0] * (pair[0] / pair[1]).log()).sum().item())
    assert found["mean_kl"] == pytest.approx(np.mean(divergences), rel=1e-4)
    assert found["max_kl"] == pytest.approx(max(divergences), rel=1e-4)
    assert found["mean_kl"] > 1e-3
    assert found["top1_agreement"] < 1


@pytest.mark.parametrize("has_head", [True, False])
def test_the_audit_is_the_same_whether_heads_can_be_called_or_not_and_holds_no_whole_logits(has_head, monkeypatch):
    model, bare = trained_model(), trained_model()
    for _, layer in lora_layers(bare):
        layer.active = None
    wanted = compare(model, bare, held_out())
    monkeypatch.setattr(audit, "CHUNK", 4)
    if not has_head:
        monkeypatch.setattr(audit, "settled_chunk", lambda *_: (None, "no head of its own"))
    ledger = Ledger()
    ledger.ignore([*model.parameters(), *bare.parameters()])
    with ledger:
        found = compare(model, bare, held_out())
    assert {key: pytest.approx(value, rel=1e-5) for key, value in wanted.items()} == found
    tallest = max(each.shape.numel() for each, _ in ledger.history.events() if each.shape[-1:] == (VOCAB,))
    whole = max(batch.input_ids.numel() for batch in held_out()) * VOCAB
    assert (tallest <= 16 * VOCAB < whole) if has_head else (tallest == whole)  # the probe asks about 16 tokens


def test_an_audit_without_a_labelled_token_is_refused():
    model = trained_model()
    with pytest.raises(DataError, match="no labelled token"):
        compare(model, model, [collate([Encoded([5, 6, 7], [False] * 3)], pad_id=0)])


@pytest.mark.parametrize(("is_export", "culprit"), [(True, "export"), (False, "model as trained")])
def test_an_audit_of_a_model_that_gives_nan_names_it(is_export, culprit):
    sound, broken = trained_model(), trained_model()
    broken.lm_head.weight.data[5, 5] = float("nan")
    with pytest.raises(RunError, match=f"the {culprit} gives NaN"):
        compare(*((sound, broken) if is_export else (broken, sound)), held_out())


@pytest.mark.parametrize(("count", "allowed"), [(1, 0.13), (100, 0.04), (1_000_000, 0.0301)])
def test_a_loss_may_be_a_hundredth_of_a_nat_and_of_itself_from_the_scored_one_and_further_where_it_is_of_few_tokens(
    count, allowed
):
    for away in (-allowed, allowed):
        told = {"mean_kl": 0.0, "tokens": count}
        audit.check_audit("merged", told | {"loss_as_trained": 2 + 0.99 * away}, "dequantized", None, 2.0, force=False)
        beyond = told | {"loss_as_trained": 2 + 1.01 * away}
        with pytest.raises(RunError, match="held-out loss is"):
            audit.check_audit("merged", beyond, "dequantized", None, 2.0, force=False)
        audit.check_audit("merged", beyond, "dequantized", None, None, force=False)


# --- refusals ---


def test_a_folder_that_is_not_empty_is_refused_and_untouched(tmp_path):
    model = trained_model()
    (tmp_path / "out").mkdir()
    export_merged(model, None, tmp_path / "out")
    before = files_of(tmp_path / "out")
    for export in (
        lambda: export_merged(model, None, tmp_path / "out"),
        lambda: export_adapter(model, tmp_path / "out"),
    ):
        with pytest.raises(RunError, match="is not empty") as caught:
            export()
        assert "\n" not in str(caught.value)
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize(("where", "fault"), [("adapter", AdapterError), ("norm", ModelError)])
def test_a_value_that_is_not_finite_is_refused_by_name_with_nothing_left_behind(tmp_path, where, fault):
    model = trained_model()
    broken = (
        model.model.layers[1].mlp.up_proj.adapters["default"].b_OR if where == "adapter" else model.model.norm.weight
    )
    broken.data.view(-1)[3] = float("nan")
    with pytest.raises(fault, match=r"layers\.1\.mlp\.up_proj" if where == "adapter" else r"model\.norm"):
        export_merged(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_wherever_it_stands(value, dtype):
    norm = torch.nn.LayerNorm(37, bias=False)
    (tensor,) = merged_tensors(torch.nn.Sequential(norm), dtype)
    assert torch.equal(tensor.read(), torch.ones(37, dtype=dtype))
    for place in range(37):
        norm.weight.data.fill_(1)[place] = value
        with pytest.raises(ModelError, match=r"0\.weight holds NaN or infinity"):
            tensor.read()


def test_a_weight_too_large_for_float16_is_refused(tmp_path):
    model = trained_model()
    model.model.layers[0].self_attn.q_proj.adapters["default"].b_OR.data[0, 0] = 1e7
    with pytest.raises(AdapterError, match=r"q_proj.*float16"):
        export_merged(model, None, tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 5000, 5000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(RunError, match=r"needs 64\.\d MiB on the disk of .* has 4\.88 KiB free"):
        export_merged(trained_model(), None, tmp_path / "deep/out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_makes_room_for_the_next_and_a_running_one_is_left_alone(tmp_path, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f".out.{ended.pid}.tmp"
    others = [tmp_path / f".out.{os.getppid()}.tmp", tmp_path / f".other.{ended.pid}.tmp", tmp_path / ".out.mine.tmp"]
    for folder in (left, *others):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 0, 0 if left.exists() else 10**9))
    export_merged(trained_model(), None, tmp_path / "out")
    assert set(tmp_path.iterdir()) == {tmp_path / "out", *others}


def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path):
    model = trained_model()
    with pytest.raises(RunError, match="dtype='int4'"):
        export_merged(model, None, tmp_path / "out", dtype="int4")
    with adapters_off(model), pytest.raises(AdapterError, match="no adapter is in use"):
        export_merged(model, None, tmp_path / "out")
    with pytest.raises(RunError, match=r"onto='moon' is not a merge target; use one of dequantized, original"):
        merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", onto="moon")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is a file"):
        export_merged(model, None, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- adapters, and the way from files to files ---


@pytest.fixture
def base_folder(tmp_path):
    dense_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(("kind", "double_quant"), [("nf4", True), ("fp4", False), ("int8", True), ("none", True)])
def test_merge_quantises_as_the_adapter_file_says(tmp_path, base_folder, kind, double_quant):
    settings = {"quantization": kind, "double_quant": double_quant, "compute_dtype": "float32"}
    model = load_base(base_folder, device="cpu", skip=["k_proj"] if kind == "nf4" else [], **settings)
    add_lora(model, rank=4, alpha=12, targets=["q_proj", "down_proj"])
    fill_adapters(model)
    export_adapter(model, tmp_path / "adapter")
    export_merged(model, tokenizer(), tmp_path / "direct")
    # The keyword is wrong on purpose: what the file says counts.
    wrong = "int8" if kind == "nf4" else "nf4"
    out = merge(tmp_path / "adapter", base_folder, tmp_path / "merged", quantization=wrong, device="cpu")
    assert out == tmp_path / "merged"
    direct, merged = files_of(tmp_path / "direct"), files_of(out)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert merged[name] == direct[name]


def test_merge_takes_its_settings_from_keywords_where_the_file_is_silent(tmp_path, base_folder):
    model = load_base(base_folder, quantization="int8", compute_dtype="bfloat16", device="cpu")
    add_lora(model, rank=4, alpha=12)
    fill_adapters(model)
    save_adapter(model, tmp_path / "adapter", provenance={"qlora_kit.double_quant": "false"})
    export_merged(model, None, tmp_path / "direct")
    merge(tmp_path / "adapter", base_folder, tmp_path / "right", quantization="int8", device="cpu")
    merge(tmp_path / "adapter", base_folder, tmp_path / "other", quantization="nf4", device="cpu")
    direct = files_of(tmp_path / "direct")["model.safetensors"]
    assert files_of(tmp_path / "right")["model.safetensors"] == direct
    assert files_of(tmp_path / "other")["model.safetensors"] != direct


def test_merge_refuses_settings_that_it_does_not_know(tmp_path, base_folder):
    model = trained_model()
    save_adapter(model, tmp_path / "adapter", provenance={"qlora_kit.quantization": "nf5"})
    with pytest.raises(AdapterError, match="quantization='nf5'; known are nf4"):
        merge(tmp_path / "adapter", base_folder, tmp_path / "out")
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"\x07")
    with pytest.raises(AdapterError, match="is damaged"):
        merge(tmp_path / "adapter", base_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_exported_adapter_is_byte_stable_and_loads_again(tmp_path):
    model = trained_model()
    provenance = {"base": "acme/tiny", "revision": "abc123"}
    content = export_adapter(model, tmp_path / "one", provenance=provenance)
    for number in range(4):
        export_adapter(model, tmp_path / f"again{number}", provenance=provenance)
        assert files_of(tmp_path / f"again{number}") == files_of(tmp_path / "one")
    assert set(content["files"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert content["kind"] == "adapter"
    config = json.loads((tmp_path / "one/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/tiny", "abc123")
    with safe_open(tmp_path / "one/adapter_model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["qlora_kit.quantization"] == "nf4"
    assert metadata["qlora_kit.double_quant"] == "true"
    assert metadata["qlora_kit.block_size"] == "64"
    assert metadata["qlora_kit.base_fingerprint"].startswith("sha256:")
    expected = logits(model)
    bare = freeze_and_quantize(dense_model(), Quantization(), torch.float32, torch.device("cpu"))
    assert not torch.equal(logits(bare), expected)
    load_adapter(bare, tmp_path / "one")
    assert torch.equal(logits(bare), expected)
