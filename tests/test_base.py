"""The frozen base: bitsandbytes' own numbers, everything linear is quantised and nothing else, nothing moves it."""

import copy
import gc
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import cache

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import tiny
import torch
from bitsandbytes.nn import Int8Params
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from qlora_kit.base import Quantization, QuantizedLinear, decode, formats, kernels, linear_shape, load_base, multiply
from qlora_kit.base.dense import parameter_count, quantize_linear
from qlora_kit.base.device import default_compute_dtype, emulation_note
from qlora_kit.base.formats import quantize
from qlora_kit.base.prequantized import check_agreement
from qlora_kit.errors import DeviceError, ModelError, QloraKitError
from qlora_kit.export import export_merged
from qlora_kit.lora import adapters_off, add_lora

KINDS_4BIT = ["nf4", "fp4"]
EVERY = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", True), ("none", True)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def matrix(out: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer_of(w_OI: Tensor, kind: str, *, double_quant: bool = True, block_size: int = 64) -> QuantizedLinear:
    return QuantizedLinear(w_OI, None, Quantization(kind, double_quant, block_size))


# --- a decoder of our own, in NumPy -----------------------------------------------------------------------------------

# QLoRA, arXiv 2305.14314, appendix E.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip


def fp4_value(code: int) -> float:
    """A sign, 2 bits of exponent and 1 of mantissa, over the largest, 12; bitsandbytes' subnormal is 1/192."""
    sign, exponent, mantissa = -1 if code & 8 else 1, (code >> 1) & 3, code & 1
    magnitude = {0: 1 / 16 * mantissa, 1: 8 + 4 * mantissa, 2: 4 + 2 * mantissa, 3: 2 + mantissa}[exponent]
    return sign * magnitude / 12


TABLES = {"nf4": NF4, "fp4": np.array([fp4_value(code) for code in range(16)], np.float32)}


@cache
def dynamic_table() -> np.ndarray:
    """Dynamic 8-bit values: for each power of ten the middles of an even grid on [0.1, 1], twice as many each time.

    The grid is torch's in fp32, since its rounding is part of the format.
    """
    values = [0.0, 1.0]
    for power in range(7):
        grid = torch.linspace(0.1, 1, 2**power + 1).numpy()
        middles = ((grid[:-1] + grid[1:]) / 2 * 10.0 ** (power - 6)).tolist()
        values += [*middles, *(-value for value in middles)]
    return np.sort(np.array(values)).astype(np.float32)


def numpy_decode(layer: QuantizedLinear) -> np.ndarray:
    """The weight, (out, in), fp32, from the stored bytes alone."""
    codes, count = layer.codes.numpy(), layer.out_features * layer.in_features
    nibbles = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:count]
    absmax = layer.absmax.numpy()
    if layer.absmax_scale is not None:
        scale = np.repeat(layer.absmax_scale.numpy(), 256)[: len(absmax)]
        absmax = dynamic_table()[absmax] * scale + layer.absmax_offset.numpy()
    constants = np.repeat(absmax, layer.quantization.block_size)[:count]
    return (TABLES[layer.quantization.kind][nibbles] * constants).reshape(layer.out_features, layer.in_features)


def assert_reads_like_numpy(layer: QuantizedLinear) -> None:
    wanted = torch.from_numpy(numpy_decode(layer))
    assert torch.equal(layer.dense(torch.float32), wanted)
    for dtype in DTYPES:
        assert torch.equal(layer.dense(dtype), wanted.to(dtype)), "rounded once, from fp32"


# --- the formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS_4BIT)
def test_our_tables_are_bitsandbytes_tables(kind):
    assert np.array_equal(bnb.get_4bit_type(kind, device="cpu").numpy(), TABLES[kind])
    assert np.array_equal(bnb.create_dynamic_map().numpy(), dynamic_table())


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", KINDS_4BIT)
def test_codes_and_constants_are_those_of_bitsandbytes(kind, double_quant, block_size):
    w = matrix(72, 320)  # 23,040 elements: 5.6 blocks of 4096, 2.8 groups of 256 blocks of 32
    layer = layer_of(w, kind, double_quant=double_quant, block_size=block_size)
    packed, state = bnb.quantize_4bit(w, blocksize=block_size, compress_statistics=double_quant, quant_type=kind)
    assert torch.equal(layer.codes, packed.view(-1))
    assert layer.absmax.dtype == state.absmax.dtype
    assert torch.equal(layer.absmax, state.absmax)
    if double_quant:
        assert torch.equal(layer.absmax_scale, state.state2.absmax)
        assert torch.equal(layer.absmax_offset, state.offset)
    if block_size < 2048:  # above, bitsandbytes has another decoder
        state.shape = torch.Size((1, w.numel()))  # rows in which no block ends it reads wrongly on some processors
        for dtype in DTYPES:
            state.dtype = dtype
            assert torch.equal(layer.dense(dtype), bnb.dequantize_4bit(packed, state).view_as(w))
    assert_reads_like_numpy(layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS_4BIT)
def test_codes_agree_whatever_dtype_the_checkpoint_has(kind, dtype):
    w = matrix(40, 192, dtype=dtype)
    layer = layer_of(w, kind)
    packed, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type=kind)
    assert torch.equal(layer.codes, packed.view(-1))
    assert torch.equal(layer.absmax, state.absmax)
    assert_reads_like_numpy(layer)


@pytest.mark.parametrize("kind", KINDS_4BIT)
def test_every_width_from_1_to_300_is_read_right(kind):
    """bitsandbytes 0.50.2 reads some of these wrongly on AVX-512 processors: rows a multiple of 16 and not of 64."""
    for width in range(1, 301):
        assert_reads_like_numpy(layer_of(matrix(5, width, seed=width), kind, double_quant=width % 2 == 0))


def test_bitsandbytes_is_never_asked_for_rows_that_it_reads_wrongly(monkeypatch):
    """Seen on every processor, also on those where its decoder would be right."""
    asked = []

    def watched(kind, dtype):
        decode = find(kind, dtype)
        return lambda *arguments: asked.append(arguments[-1].value) or decode(*arguments)

    find = kernels._c_decoder
    monkeypatch.setattr(kernels, "_c_decoder", watched)
    for width in (32, 48, 64, 80, 96, 128, 176, 544):
        layer_of(matrix(64, width), "nf4").dense(torch.float32)
    assert len(asked) == 8
    assert [columns for columns in asked if columns % 64] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [128, 256, 512, 1024, 2048, 4096])
def test_rows_in_which_no_block_ends_are_read_right(block_size, dtype):
    """bitsandbytes 0.50.2 takes a new block at every row of them, on AVX-512 processors."""
    for rows, width in ((7, 64), (72, 320), (10, 1088), (3, 4160)):
        layer = layer_of(matrix(rows, width), "nf4", double_quant=False, block_size=block_size)
        plain = torch.empty(rows, width, dtype=dtype)
        kernels.decode_4bit_plain(layer.codes, layer.absmax, block_size, "nf4", plain)
        assert torch.equal(layer.dense(dtype), plain), (rows, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "shape"), [("nf4", (24, 192)), ("fp4", (64, 48)), ("nf4", (33, 127)),
                                             ("int8", (33, 127)), ("int8", (3, 1 << 19))])  # fmt: skip
def test_decoding_into_given_memory_is_the_plain_formula_and_writes_nowhere_else(kind, shape, dtype, monkeypatch):
    """By the C function, by bitsandbytes' own operator where that is of a version unknown, and in plain torch."""
    layer = layer_of(matrix(*shape), kind, double_quant=False)
    memory = torch.full((shape[0] + 2, shape[1]), 7, dtype=dtype)
    plain = torch.empty(shape, dtype=dtype)
    for is_known in (True, False):
        if not is_known:
            monkeypatch.setattr(kernels, "_c_decoder", lambda *_: None)
        if kind == "int8":
            kernels.decode_int8_into(memory[1:-1], layer.codes, layer.absmax)
            kernels.decode_int8_plain(layer.codes, layer.absmax, plain)
        else:
            kernels.decode_4bit_into(memory[1:-1], layer.codes, layer.absmax, 64, kind)
            kernels.decode_4bit_plain(layer.codes, layer.absmax, 64, kind, plain)
        assert torch.equal(memory[1:-1], plain)
        assert plain.any()
        assert torch.equal(memory[[0, -1]], torch.full_like(memory[:2], 7))
        memory.fill_(7)


def test_decoding_takes_no_memory_that_is_not_as_it_must_be():
    layer, out = layer_of(matrix(32, 64), "nf4", double_quant=False), torch.empty(32, 64)
    assert kernels.decode_4bit_into(out, layer.codes, layer.absmax, 64, "nf4").any()
    for codes, absmax, wrong, message in [
        (layer.codes[1:], layer.absmax, out, "1023 bytes of codes for"),
        (layer.codes, layer.absmax[1:], out, "31 constants for"),
        (layer.codes, layer.absmax.half(), out, "constants in torch.float16"),
        (layer.codes, layer.absmax, torch.empty(64, 32).t(), "strides"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            kernels.decode_4bit_into(wrong, codes, absmax, 64, "nf4")
    spread_codes, spread_absmax = (t.repeat_interleave(2)[::2] for t in (layer.codes, layer.absmax))
    assert not spread_codes.is_contiguous()
    again = kernels.decode_4bit_into(torch.empty(32, 64), spread_codes, spread_absmax, 64, "nf4")
    assert torch.equal(again, out)


def test_a_weight_is_read_in_float64_as_its_fp32_values():
    layer = layer_of(matrix(32, 64), "nf4")
    assert torch.equal(layer.dense(torch.float64), torch.from_numpy(numpy_decode(layer)).double())


def test_decoding_counts_no_flops_and_its_products_count_theirs():
    layer = layer_of(matrix(64, 128), "nf4")
    with FlopCounterMode(display=False) as counter:
        layer(matrix(5, 128))
    assert counter.get_total_flops() == 2 * 5 * 64 * 128


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    kind=st.sampled_from(KINDS_4BIT),
    double_quant=st.booleans(),
    block_size=st.sampled_from([32, 64, 128, 256]),
    size=st.sampled_from([1e-6, 1e-2, 1.0, 1e4]),
    trouble=st.sampled_from(["none", "a zero block", "all zero", "one outlier"]),
)
def test_codes_are_the_nearest_and_are_read_right(shape, kind, double_quant, block_size, size, trouble):
    w = matrix(*shape, seed=shape[0]) * size
    flat = w.view(-1)
    if trouble == "all zero":
        flat.zero_()
    elif trouble == "a zero block":
        flat[:block_size] = 0
    elif trouble == "one outlier":
        flat[len(flat) // 2] = 1000 * size
    layer = layer_of(w, kind, double_quant=double_quant, block_size=block_size)
    assert_reads_like_numpy(layer)
    if trouble == "all zero":
        assert not layer.dense(torch.float32).any()
    single = layer_of(w, kind, double_quant=False, block_size=block_size)
    absmax = single.absmax.double().repeat_interleave(block_size)[: len(flat)]
    table = torch.from_numpy(TABLES[kind]).double()
    best = (flat.double()[:, None] - table * absmax[:, None]).abs().amin(1)
    error = (flat.double() - single.dense(torch.float32).double().view(-1)).abs()
    # bitsandbytes compares w / absmax with rounded midpoints: within 1e-6 of a midpoint either neighbour will do.
    assert ((error - best) <= 2e-6 * absmax).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_that_of_int8params(dtype):
    for out, width in [(33, 127), (48, 176), (1, 1), (7, 300)]:
        w = matrix(out, width, seed=width, dtype=dtype)
        layer = layer_of(w, "int8")
        theirs = Int8Params(w.clone(), requires_grad=False).to("cpu")
        assert theirs.CB.dtype == torch.int8
        assert torch.equal(layer.codes, theirs.CB)
        assert torch.equal(layer.absmax, theirs.SCB)
        assert torch.equal(layer.dense(torch.float32), bnb.int8_vectorwise_dequant(theirs.CB, theirs.SCB))
        exact = theirs.CB.double() * theirs.SCB.double()[:, None] / 127
        # 1/127 in fp32 and two products: 2 ulp.
        torch.testing.assert_close(layer.dense(torch.float32).double(), exact, rtol=2.5e-7, atol=0)
        for other in DTYPES:
            assert torch.equal(layer.dense(other), layer.dense(torch.float32).to(other))


def test_nf4_error_on_normal_numbers_is_the_published_one():
    w = matrix(1024, 1024)
    error = (layer_of(w, "nf4", double_quant=False).dense(torch.float32) - w).abs().mean().item()
    assert abs(error - 0.072798) <= 7 * 0.000074  # mean and deviation as in bitsandbytes' own tests


@pytest.mark.parametrize("kind", KINDS_4BIT)
def test_quantising_what_was_read_back_changes_nothing(kind):
    once = layer_of(matrix(64, 192), kind, double_quant=False)
    twice = layer_of(once.dense(torch.float32), kind, double_quant=False)
    # fp4 has two zeros, and the negative one reads back as the positive.
    assert torch.equal(once.dense(torch.float32), twice.dense(torch.float32))
    assert kind == "fp4" or torch.equal(once.codes, twice.codes)


@pytest.mark.parametrize(
    ("kind", "double_quant", "block_size", "wanted"),
    [("nf4", True, 64, 4.126953125), ("nf4", False, 64, 4.5), ("fp4", True, 64, 4.126953125),
     ("nf4", True, 128, 4.0634765625), ("fp4", False, 4096, 4.0078125), ("int8", True, 64, 8.0625)],
)  # fmt: skip
def test_bits_per_parameter_are_read_off_real_tensors(kind, double_quant, block_size, wanted):
    quantization = Quantization(kind, double_quant, block_size)
    w = matrix(512, 512)
    held = quantize(w, quantization)
    stored = sum(t.numel() * t.element_size() for name, t in held.items() if name != "absmax_offset")
    assert 8 * stored / w.numel() == wanted == quantization.bits_per_parameter(512)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("shape", [(48, 176), (33, 65), (130, 700)])
def test_a_matrix_quantised_slice_by_slice_has_the_codes_of_one_quantised_at_once(kind, shape, monkeypatch):
    w_OI = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    at_once = quantize(w_OI, Quantization(kind))
    monkeypatch.setattr(formats, "SLICE_ELEMENTS", 1024)
    assert w_OI.numel() > 2 * formats.SLICE_ELEMENTS
    by_slices = quantize(w_OI, Quantization(kind))
    assert at_once.keys() == by_slices.keys()
    assert all(torch.equal(at_once[name], by_slices[name]) for name in at_once)


def test_bits_per_parameter_of_a_dense_weight_are_those_of_its_dtype():
    assert Quantization("none").bits_per_parameter(512) == 16
    assert Quantization("none").bits_per_parameter(512, dense_bits=32) == 32


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "double_quant"), EVERY[:5])
@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.double,
        lambda m: m.type(torch.float16),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: nn.Sequential(m).half()[0],
    ],
)
def test_no_change_of_dtype_reaches_the_stored_weight(kind, double_quant, change):
    layer = QuantizedLinear(matrix(33, 127), torch.ones(33), Quantization(kind, double_quant))
    wanted = layer.dense(torch.float32)
    before = {name: (t.dtype, t.clone()) for name, t in layer.named_buffers()}
    changed = change(layer)
    assert torch.equal(changed.dense(torch.float32), wanted)
    for name, buffer in changed.named_buffers():
        assert buffer.dtype == before[name][0]
        assert torch.equal(buffer, before[name][1])


def test_a_deep_copy_shares_no_memory():
    layer = layer_of(matrix(32, 64), "nf4")
    twin = copy.deepcopy(layer)
    wanted = twin.dense(torch.float32)
    layer.codes.zero_()
    assert not torch.equal(layer.dense(torch.float32), wanted)
    assert torch.equal(twin.dense(torch.float32), wanted)


@pytest.mark.parametrize(("kind", "double_quant"), EVERY[:5])
def test_a_state_dict_goes_out_and_comes_back_bit_for_bit(kind, double_quant, tmp_path):
    one = tiny.quantized(tiny.llama(seed=1), kind, double_quant=double_quant)
    other = tiny.quantized(tiny.llama(seed=2), kind, double_quant=double_quant)
    assert not torch.equal(tiny.logits(one), tiny.logits(other))
    save_file({name: t.contiguous() for name, t in one.state_dict().items()}, tmp_path / "state.safetensors")
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(tiny.logits(one), tiny.logits(other))
    assert tiny.stored(one) == tiny.stored(other)


@pytest.mark.parametrize(("source", "target"), [
    (("nf4", True), ("nf4", False)), (("nf4", False), ("nf4", True)), (("int8", True), ("nf4", True)),
    (("none", True), ("nf4", True)), (("nf4", True), ("none", True)), (("nf4", True), ("fp4", True)),
])  # fmt: skip
def test_the_state_dict_of_another_format_is_refused(source, target):
    state = tiny.quantized(tiny.llama(seed=1), source[0], double_quant=source[1]).state_dict()
    model = tiny.quantized(tiny.llama(seed=2), target[0], double_quant=target[1])
    with pytest.raises((RuntimeError, ModelError)):
        model.load_state_dict(state)


@pytest.mark.parametrize(("source", "target"), [
    (("nf4", True), ("nf4", False)), (("nf4", False), ("nf4", True)), (("nf4", True), ("fp4", True)),
    (("int8", True), ("nf4", True)),
])  # fmt: skip
def test_a_lenient_load_of_another_format_is_refused_too(source, target):
    """With strict=False torch lets missing and surplus keys pass, and converts a dtype without a word."""
    state = tiny.quantized(tiny.llama(seed=1), source[0], double_quant=source[1]).state_dict()
    model = tiny.quantized(tiny.llama(seed=2), target[0], double_quant=target[1])
    with pytest.raises((RuntimeError, ModelError)):
        model.load_state_dict(state, strict=False)


def test_a_lenient_load_of_dense_weights_changes_nothing_that_is_quantised():
    model = tiny.quantized(tiny.llama(seed=2))
    before = {name: layer.dense(torch.float32) for name, layer in tiny.quantized_layers(model).items()}
    missed = model.load_state_dict(tiny.llama(seed=1).state_dict(), strict=False)
    assert len([key for key in missed.missing_keys if key.endswith("codes")]) == len(before) == 14
    for name, layer in tiny.quantized_layers(model).items():
        assert torch.equal(layer.dense(torch.float32), before[name])


def test_the_output_is_that_of_the_decoded_weight():
    layer = QuantizedLinear(matrix(33, 127), torch.ones(33), Quantization("nf4"))
    x = matrix(5, 127, seed=1)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.dense(torch.float32), layer.bias))


def test_a_layer_shows_what_it_is():
    assert "127, 33, bias=False, fp4" in repr(layer_of(matrix(33, 127), "fp4"))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_conv1d_is_stored_as_out_by_in_and_remembers_that_it_was_turned(kind):
    conv = Conv1D(33, 20)  # 20 in, 33 out
    nn.init.normal_(conv.bias)
    layer = quantize_linear(conv, Quantization(kind), torch.float32, tiny.CPU)
    assert linear_shape(conv) == linear_shape(layer) == (33, 20)
    assert layer.is_transposed
    assert tiny.relative(layer.dense(torch.float32), decode(conv, torch.float32)) < 0.15
    assert torch.equal(decode(conv, torch.float32), conv.weight.t())
    x = matrix(4, 20)
    assert tiny.relative(layer(x), conv(x)) < 0.15  # that of nf4


# --- a model ----------------------------------------------------------------------------------------------------------


def kinds_by_name(model: nn.Module) -> dict[str, str]:
    linear = nn.Linear | Conv1D | QuantizedLinear
    return {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, linear)}


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_everything_linear_in_the_body_is_quantised_and_nothing_else(kind):
    model = tiny.quantized(tiny.llama(), kind)
    kinds = kinds_by_name(model)
    assert len(kinds) == 15
    assert [name for name, layer in kinds.items() if layer != "QuantizedLinear"] == ["lm_head"]
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert all("Norm" not in name for name in tiny.quantized_layers(model))
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_the_head_of_a_classifier_stays_dense():
    config = BertConfig(vocab_size=97, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    model = tiny.quantized(BertForSequenceClassification(config))
    kinds = kinds_by_name(model)
    assert kinds.pop("classifier") == "Linear"
    assert set(kinds.values()) == {"QuantizedLinear"}
    assert model(tiny.tokens()).logits.isfinite().all()


def test_gpt2_is_quantised_through_its_conv1d_and_its_head_stays_tied():
    dense = tiny.gpt2()
    model = tiny.quantized(copy.deepcopy(dense))
    kinds = kinds_by_name(model)
    assert len(kinds) == 9
    assert kinds.pop("lm_head") == "Linear"
    assert set(kinds.values()) == {"QuantizedLinear"}
    assert all(layer.is_transposed for layer in tiny.quantized_layers(model).values())
    assert model.lm_head.weight is model.transformer.wte.weight
    oracle = tiny.read_out(dense, model)
    assert tiny.relative(tiny.logits(model), tiny.logits(oracle)) < 1e-6  # fp32, another order of summing


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_tied_head_stays_tied_and_a_free_one_free(is_tied, tmp_path):
    tiny.llama(tie_word_embeddings=is_tied).save_pretrained(tmp_path)
    model = load_base(tmp_path, compute_dtype="float32", device="cpu")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied


@pytest.mark.parametrize(("kind", "double_quant"), EVERY)
def test_a_quantised_model_says_what_its_decoded_weights_say(kind, double_quant):
    model = tiny.quantized(tiny.llama(), kind, double_quant=double_quant)
    oracle = tiny.read_out(tiny.llama(), model)
    assert (tiny.relative(tiny.logits(model), tiny.logits(tiny.llama())) > 1e-3) == (kind != "none")
    assert tiny.relative(tiny.logits(model), tiny.logits(oracle)) < 1e-6  # fp32, the same products


def test_skip_keeps_a_layer_dense_by_leaf_and_by_whole_name():
    model = tiny.quantized(tiny.llama(), skip=("down_proj", "model.layers.1.self_attn.q_proj"))
    dense = [name for name, layer in kinds_by_name(model).items() if layer == "Linear"]
    assert dense == ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj",
                     "lm_head"]  # fmt: skip


@pytest.mark.parametrize("wrong", ["down_porj", "norm", "layers.0", "", "proj"])
def test_skip_of_a_name_that_is_not_there_lists_those_that_are(wrong):
    with pytest.raises(ModelError, match=r"names '.*'.*: down_proj, gate_proj, k_proj"):
        tiny.quantized(tiny.llama(), skip=(wrong,))


def test_parameters_are_counted_by_their_true_shapes():
    for make in (tiny.llama, tiny.gpt2):
        dense = make()
        wanted = dense.num_parameters()
        model = tiny.quantized(dense)
        assert sum(p.numel() for p in model.parameters()) < wanted, "packed weights hide"
        assert parameter_count(model) == wanted


# --- from a folder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize(("kind", "double_quant"), EVERY)
def test_a_folder_loads_to_the_same_bytes_as_its_dense_model_quantised(kind, double_quant, make, tmp_path):
    make().save_pretrained(tmp_path)
    loaded = load_base(tmp_path, quantization=kind, double_quant=double_quant, compute_dtype="float32", device="cpu")
    wanted = tiny.quantized(make(), kind, double_quant=double_quant)
    assert tiny.stored(loaded) == tiny.stored(wanted)
    assert torch.equal(tiny.logits(loaded), tiny.logits(wanted))


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
def test_the_weights_are_quantised_from_the_checkpoints_dtype_not_from_the_compute_dtype(compute, tmp_path):
    model = tiny.llama()
    model.save_pretrained(tmp_path)
    loaded = load_base(tmp_path, compute_dtype=compute, device="cpu")
    dtype = getattr(torch, compute)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert tiny.logits(loaded).dtype == dtype
    wanted = tiny.quantized_layers(tiny.quantized(model))
    for name, layer in tiny.quantized_layers(loaded).items():
        assert torch.equal(layer.codes, wanted[name].codes)
        assert torch.equal(layer.absmax, wanted[name].absmax)


def test_a_bf16_checkpoint_is_quantised_as_bitsandbytes_quantises_it(tmp_path):
    tiny.llama().to(torch.bfloat16).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    for name, layer in tiny.quantized_layers(load_base(tmp_path, compute_dtype="float32", device="cpu")).items():
        w = weights[f"{name}.weight"]
        packed, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
        assert torch.equal(layer.codes, packed.view(-1))
        assert torch.equal(layer.absmax, state.absmax)


def test_rotary_frequencies_stay_fp32_under_bf16(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    model = load_base(tmp_path, compute_dtype="bfloat16", device="cpu")
    buffers = dict(model.named_buffers())
    assert {t.dtype for name, t in buffers.items() if "inv_freq" in name} == {torch.float32}
    assert {t.dtype for t in model.parameters() if t.is_floating_point()} == {torch.bfloat16}, "nothing else is lifted"


@pytest.mark.parametrize("lost", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_checkpoint_without_one_of_its_tensors_is_refused(lost, tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"no tensor for {lost}"):
        load_base(tmp_path, device="cpu")


def test_a_tensor_of_the_wrong_shape_is_refused(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(175, 48)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError):
        load_base(tmp_path, device="cpu")


def test_memory_that_runs_out_in_loading_is_no_fault_of_the_folder(tmp_path, monkeypatch):
    tiny.llama().save_pretrained(tmp_path)
    asks = lambda *_, **__: torch.empty(2**60, dtype=torch.uint8)  # noqa: E731
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", asks)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        load_base(tmp_path, device="cpu")


def test_a_tensor_that_the_model_has_no_place_for_is_left_out_and_told(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_base(tmp_path, compute_dtype="float32", device="cpu")
    assert add_lora(whole, rank=2).notes == ()
    save_file(load_file(file) | {"vision.tower.weight": torch.ones(3)}, file, metadata={"format": "pt"})
    more = load_base(tmp_path, compute_dtype="float32", device="cpu")
    (note,) = add_lora(more, rank=2).notes
    assert note == "the base's checkpoint holds tensors that the model has no place for, left out: vision.tower.weight"
    assert torch.equal(tiny.logits(more), tiny.logits(whole))


@pytest.mark.parametrize(
    "spoil", [lambda f: shutil.rmtree(f), lambda f: (f / "config.json").write_text("{"),
              lambda f: (f / "config.json").write_text(json.dumps({"model_type": "no-such-family"})),
              lambda f: (f / "model.safetensors").write_bytes(b"\0" * 40)]
)  # fmt: skip
def test_a_folder_that_is_no_model_is_one_error_of_ours(spoil, tmp_path):
    folder = tmp_path / "model"
    tiny.llama().save_pretrained(folder)
    spoil(folder)
    with pytest.raises(ModelError, match="model"):
        load_base(folder, device="cpu")


def test_a_loaded_model_holds_no_page_of_its_checkpoint(tmp_path):
    """On CPU the checkpoint is mapped while it is read; if a page stayed, writing the file would change the model."""
    for number, kind in enumerate(["nf4", "none"]):
        folder = tmp_path / str(number)
        tiny.llama().save_pretrained(folder)
        model = load_base(folder, quantization=kind, compute_dtype="float32", device="cpu")
        wanted = tiny.logits(model)
        file = folder / "model.safetensors"
        with open("/proc/self/maps") as maps:
            assert str(file) not in maps.read()
        with open(file, "r+b") as open_file:
            open_file.write(b"\xff" * file.stat().st_size)
        assert torch.equal(tiny.logits(model), wanted)


def test_on_a_card_an_int8_matrix_is_decoded_in_few_parts():
    """Each is three kernels: in parts of a processor's cache, down_proj of an 8B model took 684 of them."""
    out, width = 4096, 14336
    written, copy = [], Tensor.copy_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "copy_", lambda self, source: written.append(len(self)) or copy(self, source))
        codes = torch.empty(out, width, dtype=torch.int8, device="meta")
        absmax = torch.empty(out, device="meta")
        kernels._decode_int8(codes, absmax, torch.empty(out, width, dtype=torch.bfloat16, device="meta"))
    assert sum(written) == out
    assert len(written) <= 8
    assert max(written) * width * 4 <= 32 * 2**20, "more would pass by the plan"


# --- checkpoints that are quantised already ---------------------------------------------------------------------------

STORED = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(params=[(kind, make) for kind in STORED for make in (tiny.llama, tiny.gpt2)])
def stored_checkpoint(request, tmp_path):
    """A model that transformers and bitsandbytes quantised and saved."""
    kind, make = request.param
    make().save_pretrained(tmp_path / "dense")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=STORED[kind])
    theirs.save_pretrained(tmp_path / "stored")
    return tmp_path, kind


def test_a_checkpoint_that_bitsandbytes_quantised_is_taken_over_as_it_is(stored_checkpoint):
    """The same bytes as the kit's own quantisation of the dense checkpoint, and so the same logits."""
    folder, kind = stored_checkpoint
    settings = {"quantization": kind, "double_quant": kind == "nf4", "compute_dtype": "float32", "device": "cpu"}
    model = load_base(folder / "stored", **settings)
    ours = load_base(folder / "dense", **settings)
    assert tiny.quantized_layers(model).keys() == tiny.quantized_layers(ours).keys()
    assert tiny.stored(model) == tiny.stored(ours)
    assert torch.equal(tiny.logits(model), tiny.logits(ours))
    assert len({layer.workspace for layer in tiny.quantized_layers(model).values()} - {None}) == 1
    assert not hasattr(model.config, "quantization_config")
    before = tiny.stored(model)
    assert tiny.stored(model.to(torch.bfloat16).to(torch.float32)).keys() == before.keys(), "nothing bars `.to`"
    assert all(
        torch.equal(layer.codes, tiny.quantized_layers(ours)[name].codes)
        for name, layer in tiny.quantized_layers(model).items()
    )


def test_a_checkpoint_that_was_stored_quantised_is_not_held_open(stored_checkpoint):
    folder, kind = stored_checkpoint
    model = load_base(folder / "stored", quantization=kind, double_quant=kind == "nf4", device="cpu")
    assert tiny.quantized_layers(model)
    gc.collect()  # bitsandbytes' layers hold each other
    with open("/proc/self/maps") as maps:
        assert str(folder) not in maps.read()


def test_a_merged_export_of_a_stored_checkpoint_is_a_plain_model_of_the_same_logits(stored_checkpoint):
    folder, kind = stored_checkpoint
    model = load_base(
        folder / "stored", quantization=kind, double_quant=kind == "nf4", compute_dtype="float32", device="cpu"
    )
    add_lora(model, rank=2)
    tiny.wake(model)
    wanted = tiny.logits(model)
    export_merged(model, None, folder / "out", dtype="float32")
    names = (set(load_file(folder / which / "model.safetensors")) for which in ("dense", "out"))
    assert next(names) == next(names)
    out = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    assert tiny.relative(tiny.logits(out), wanted) < 1e-5  # fp32, decoded once and decoded at each use


def test_a_checkpoint_that_was_stored_quantised_goes_to_no_other_card_than_the_one_that_is_asked_for(
    stored_checkpoint, monkeypatch
):
    """transformers reads it onto the current card, where there is one and it is told no device: here there would be."""
    folder, kind = stored_checkpoint
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    settings = {"quantization": kind, "double_quant": kind == "nf4", "compute_dtype": "float32", "device": "cpu"}
    assert tiny.logits(load_base(folder / "stored", **settings)).isfinite().all()


def test_a_stored_checkpoint_is_not_called_something_else(stored_checkpoint):
    folder, kind = stored_checkpoint
    other = "int8" if kind != "int8" else "nf4"
    with pytest.raises(ModelError, match=rf"already stored in {kind}.*base.quantization={kind}"):
        load_base(folder / "stored", quantization=other, device="cpu")


def test_a_checkpoint_with_double_quantisation_is_not_called_one_without():
    with pytest.raises(ModelError, match=r"set base\.quantization=nf4 base\.double_quant=true base\.block_size=64"):
        check_agreement(Quantization("nf4", double_quant=True), Quantization("nf4", double_quant=False))
    check_agreement(Quantization("int8"), Quantization("int8", double_quant=False, block_size=128))


def test_a_checkpoint_of_another_quantiser_is_refused(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match=r"by gptq.*16-bit"):
        load_base(tmp_path, device="cpu")


def test_a_checkpoint_that_says_two_formats_is_refused(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    both = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": both}))
    with pytest.raises(ModelError, match="load_in_4bit and load_in_8bit"):
        load_base(tmp_path, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_a_device_error(device, tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    with pytest.raises(DeviceError, match=device):
        load_base(tmp_path, device=device)


def test_a_compute_dtype_is_chosen_for_the_card_that_is_asked_for_and_not_the_current_one(monkeypatch):
    current = [0]

    @contextmanager
    def select(device):
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", select)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: current[0] == 1)  # a newer card beside an older
    for index, wanted in enumerate((torch.float16, torch.bfloat16)):
        assert default_compute_dtype(torch.device("cuda", index)) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_card_that_is_asked_for_bf16_and_does_not_multiply_it_is_told_of(dtype, kind, has_bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    told = emulation_note(dtype, torch.device(kind))
    assert (told is not None) == (dtype == torch.bfloat16 and kind == "cuda" and not has_bf16)
    assert told is None or ("Tesla T4" in told and "base.compute_dtype=auto" in told)


@pytest.mark.filterwarnings("error:CUDA reports that you have")
def test_with_two_cards_loading_leaves_the_random_states_of_both_and_torch_does_not_warn(tmp_path, monkeypatch):
    tiny.llama().save_pretrained(tmp_path)
    states = {0: "first", 1: "second"}
    put_back = dict.fromkeys(states)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: put_back.update({device: state}))
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    load_base(tmp_path, device="cpu")
    assert put_back == states


@pytest.mark.parametrize(
    "wrong",
    [
        {"device": "gpu"},
        {"device": "cuda:x"},
        {"compute_dtype": "bf16"},
        {"quantization": "nf5"},
        {"block_size": 63},
        {"block_size": 0},
    ],
)
def test_a_setting_that_is_none_is_an_error_of_ours_that_names_it(wrong, tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    with pytest.raises(QloraKitError, match=str(next(iter(wrong.values())))):
        load_base(tmp_path, **{"device": "cpu", **wrong})


# --- nothing moves it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize(("kind", "dtype"), [("nf4", torch.bfloat16), ("nf4", torch.float32), ("fp4", torch.bfloat16),
                                             ("int8", torch.bfloat16), ("none", torch.float32)])  # fmt: skip
def test_training_evaluation_and_generation_leave_the_bases_bytes_alone(kind, dtype, make):
    model = tiny.quantized(make(), kind, dtype=dtype)
    before = {name.replace(".base.", "."): held for name, held in tiny.stored(model).items()}
    add_lora(model, rank=4, alpha=8, dtype=torch.float32)
    model.train()
    first = tiny.train_step(model, lr=0.5)
    model.eval()
    tiny.logits(model)
    model.generate(tiny.tokens(rows=1), max_new_tokens=3, do_sample=False)
    with adapters_off(model):
        tiny.logits(model)
    model.train()
    assert tiny.train_step(model, lr=0.5) != first, "training must have moved the adapter"
    assert {name.replace(".base.", "."): held for name, held in tiny.stored(model).items()} == before


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_evaluation_in_between_changes_no_bit_of_the_next_gradients(kind):
    def gradients(with_evaluation: bool) -> list[Tensor]:
        model = tiny.quantized(tiny.llama(), kind, dtype=torch.bfloat16)
        add_lora(model, rank=4, alpha=8)
        tiny.wake(model)
        if with_evaluation:
            tiny.logits(model.eval())
            model.generate(tiny.tokens(rows=1), max_new_tokens=3, do_sample=False)
        model.train()
        tiny.train_step(model)
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain, after = gradients(False), gradients(True)
    assert len(plain) == 28
    assert all(g.norm() > 0 for g in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, after, strict=True))


def test_where_a_processor_multiplies_no_tiles_weights_are_decoded(monkeypatch):
    layer = tiny.quantized_layers(
        tiny.quantized(tiny.llama(hidden_size=128, intermediate_size=192), dtype=torch.bfloat16)
    )["model.layers.0.mlp.up_proj"]
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    monkeypatch.setattr(multiply, "has_tiles", lambda: False)
    assert layer.lent.multiply(x) is None
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.dense(torch.bfloat16)))
    space = torch.empty(192, 128, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="can_multiply says no"):
        multiply.multiply_stored(x, layer._buffers, layer.quantization, space)


CPU = torch.device("cpu")


def tables():
    """Those of all formats, made anew."""
    made = *(kernels.table_4bit.__wrapped__(kind, CPU) for kind in ("nf4", "fp4")), kernels.table_8bit.__wrapped__(CPU)
    return [table.tolist() for table in made]


@pytest.mark.parametrize("defaults", [{"dtype": torch.bfloat16}, {"device": "meta"}], ids=str)
def test_the_tables_of_codes_are_the_same_whatever_torchs_defaults_are(defaults):
    nf4, *_ = usual = tables()
    assert min(value for value in nf4 if value > 0) == pytest.approx(0.07958029955625534, abs=1e-9)  # QLoRA, appendix E
    with tiny.defaults(**defaults):
        assert tables() == usual


@pytest.mark.slow
@pytest.mark.parametrize("default", ["torch.set_default_dtype(torch.bfloat16)", "torch.set_default_device('meta')"])
def test_tables_and_a_processors_tiles_are_the_same_whatever_the_defaults_were_when_the_kit_was_imported(default):
    kit = "from qlora_kit.base.kernels import *; from qlora_kit.base.multiply import has_tiles"
    told = "*(table_4bit(kind, cpu).tolist() for kind in ('nf4', 'fp4')), table_8bit(cpu).tolist(), has_tiles()"
    code = f"import json, torch; {default}; {kit}; cpu = torch.device('cpu'); print(json.dumps([{told}]))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert json.loads(found) == [*tables(), multiply.has_tiles()]
