"""Claims about re-quantised exports: their bytes are what bitsandbytes reads, and codes make up for each other."""

import json
from collections import namedtuple

import numpy as np
import pytest
import torch
from test_export import (
    TABLES,
    VOCAB,
    LiveBytes,
    add_head_adapter,
    dynamic_table,
    files_of,
    held_out,
    logits,
    relative,
    tensors_of,
    tokenizer,
    trained_model,
)  # fmt: skip
from test_families import dense_model as family_of
from tiny import llama, mixtral, quantized, wake
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from qlora_kit.base.dense import QuantizedLinear
from qlora_kit.base.formats import Grid, Quantization, quantize
from qlora_kit.base.freeze import freeze_and_quantize
from qlora_kit.base.load import load_base
from qlora_kit.base.prequantized import packed
from qlora_kit.data import Encoded, collate
from qlora_kit.errors import AdapterError, RunError
from qlora_kit.export import compare, compensate, export_merged, export_quantized, merged_tensors
from qlora_kit.export import quantized as room
from qlora_kit.export.calibrate import PIECE_TOKENS, Compensation, calibration_pieces
from qlora_kit.export.compensate import compensated
from qlora_kit.export.shelf import Shelf
from qlora_kit.lora import add_lora, lora_layers
from qlora_kit.units import MIB

FORMATS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False)]
SHAPES = [(5, 3), (7, 48), (130, 257), (6, 192)]


def numpy_read(tensors, prefix):
    """The weight of a layer, (out, in), float64, by the bytes of a checkpoint alone."""
    if f"{prefix}.SCB" in tensors:
        return (
            tensors[f"{prefix}.weight"].astype(np.float64) * tensors[f"{prefix}.SCB"][:, None].astype(np.float64) / 127
        )
    (key,) = [key for key in tensors if key.startswith(f"{prefix}.weight.quant_state.bitsandbytes__")]
    state = json.loads(bytes(tensors[key].tolist()))
    assert key.endswith(state["quant_type"])
    np.testing.assert_allclose(tensors[f"{prefix}.weight.quant_map"], TABLES[state["quant_type"]], rtol=1e-6)
    absmax = tensors[f"{prefix}.weight.absmax"].astype(np.float64)
    if "nested_offset" in state:
        np.testing.assert_allclose(tensors[f"{prefix}.weight.nested_quant_map"], dynamic_table(), rtol=1e-5, atol=1e-9)
        scale = np.repeat(tensors[f"{prefix}.weight.nested_absmax"].astype(np.float64), state["nested_blocksize"])
        absmax = dynamic_table()[absmax.astype(int)] * scale[: len(absmax)] + state["nested_offset"]
    codes, count = tensors[f"{prefix}.weight"].reshape(-1), int(np.prod(state["shape"]))
    halves = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:count]
    blocks = np.repeat(absmax, state["blocksize"])[:count]
    return (TABLES[state["quant_type"]][halves] * blocks).reshape(state["shape"])


def as_numpy(tensors):
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor.dtype != torch.bfloat16}


def matrix(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(width, rows=400, seed=1):
    """Inputs that go together, as those of real layers do: few directions hold most of them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)[:, None]
    return torch.randn(rows, width, generator=generator) @ mixing


def chosen(weight, inputs, how, folder):
    """Codes and constants of one matrix for these inputs, (rows, in)."""
    (stored,) = compensated(
        [weight], lambda some: inputs[:, some].T @ inputs[:, some], how, Shelf(folder), torch.device("cpu")
    )
    return stored


def calibration(rows=12):
    generator = torch.Generator().manual_seed(5)
    lengths = [7 + row for row in range(rows)]
    encoded = [Encoded(torch.randint(3, VOCAB, (n,), generator=generator).tolist(), [True] * n) for n in lengths]
    return [collate(encoded[: rows // 2], pad_id=0), collate(encoded[rows // 2 :], pad_id=0)]


def wide_model():
    """A base whose widths are multiples of 64, in which alone bitsandbytes' own decoder is right on every processor."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    model = freeze_and_quantize(LlamaForCausalLM(config), Quantization(), torch.float32, torch.device("cpu"))
    add_lora(model, rank=4, alpha=12)
    wake(model)
    return model


# --- the bytes ---


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "double_quant"), FORMATS)
@pytest.mark.parametrize("is_compensated", [False, True])
def test_packed_layers_are_read_by_numpy_as_the_kit_reads_them(tmp_path, shape, kind, double_quant, is_compensated):
    how, weight = Quantization(kind, double_quant), matrix(shape)
    inputs = correlated(shape[1])
    stored = chosen(weight, inputs, how, tmp_path) if is_compensated else quantize(weight, how)
    made = {f"x.{leaf}": part for leaf, part in packed(stored, shape, how, torch.float32).items()}
    found = numpy_read(as_numpy(made), "x")
    assert found.shape == shape
    layer = QuantizedLinear.from_stored(shape, stored, None, how)
    np.testing.assert_allclose(found, layer.dense(torch.float32), rtol=2e-6, atol=1e-7)  # fp32's noise
    # It is the weight, as far as the format goes: nf4 loses 9 % of a normal weight, and compensation trades some.
    assert relative(torch.from_numpy(found), weight.double()) < (0.02 if kind == "int8" else 0.5)


@pytest.mark.parametrize(
    ("kind", "double_quant", "is_calibrated"),
    [("nf4", True, False), ("int8", False, False), *((*each, True) for each in FORMATS)],
)
def test_plain_transformers_loads_the_folder_and_says_what_its_bytes_say(tmp_path, kind, double_quant, is_calibrated):
    model = wide_model()
    content = export_quantized(
        model, tokenizer(), tmp_path / "out", quantization=Quantization(kind, double_quant), dtype="float32",
        calibration=calibration() if is_calibrated else (),
    )  # fmt: skip
    assert "caution" not in content["quantization"]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    layer = loaded.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == ("Linear8bitLt" if kind == "int8" else "Linear4bit")
    tensors, twin = as_numpy(tensors_of(tmp_path / "out")), LlamaForCausalLM(model.config).eval()
    for name, parameter in twin.named_parameters():
        prefix = name.removesuffix(".weight")
        is_packed = any(key.startswith((f"{prefix}.weight.", f"{prefix}.SCB")) for key in tensors)
        assert is_packed == ("_proj" in name)
        parameter.data = torch.from_numpy(numpy_read(tensors, prefix) if is_packed else tensors[name]).float()
    expected = logits(twin)
    # int8 layers round their inputs as well: what is compared is their weight. In training mode, which changes nothing
    # else here, 4-bit ones do not repack theirs for bf16 on the processors that have it.
    loaded = loaded.dequantize() if kind == "int8" else loaded.train()
    assert relative(logits(loaded), expected) < 1e-5
    if not is_calibrated:  # nf4 on nf4: the second rounding moves far more than that
        assert relative(logits(model), expected) > (1e-3 if kind == "int8" else 1e-2)


@pytest.mark.parametrize("is_calibrated", [False, True])
def test_conv1d_layers_of_odd_widths_are_stored_the_way_round_that_transformers_reads(tmp_path, is_calibrated):
    model = trained_model("gpt2")
    export_quantized(model, None, tmp_path / "out", calibration=calibration() if is_calibrated else ())
    tensors = as_numpy(tensors_of(tmp_path / "out"))
    exact = {tensor.name: tensor.read().double().numpy() for tensor in merged_tensors(model, torch.float32)}
    found = numpy_read(tensors, "transformer.h.1.mlp.c_fc")
    assert found.shape == (240, 60)
    assert np.linalg.norm(found - exact["transformer.h.1.mlp.c_fc.weight"].T) < 0.3 * np.linalg.norm(found)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded.transformer.h[1].mlp.c_fc).__name__ == "Linear4bit"
    again = load_base(tmp_path / "out", compute_dtype="float32", device="cpu")
    np.testing.assert_allclose(
        again.transformer.h[1].mlp.c_fc.dense(torch.float32), found, rtol=2e-6, atol=1e-7
    )  # fp32's noise


def test_generating_between_two_exports_changes_no_byte_and_calibration_leaves_the_model_as_it_was(tmp_path):
    model = trained_model()
    model.train()
    modules, state = dict(model.named_modules()), {name: each.clone() for name, each in model.state_dict().items()}
    more = {"calibration": calibration(), "audit_batches": held_out()}
    export_quantized(model, tokenizer(), tmp_path / "one", **more)
    assert model.training
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in modules.values())
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False, pad_token_id=0).shape[1] > 3
    model.train()
    export_quantized(model, tokenizer(), tmp_path / "two", **more)
    export_quantized(model, tokenizer(), tmp_path / "plain", audit_batches=held_out())
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert files_of(tmp_path / "one")["model.safetensors"] != files_of(tmp_path / "plain")["model.safetensors"]


# --- the codes ---


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "double_quant"), FORMATS)
def test_a_grid_finds_the_nearest_of_all_values(shape, kind, double_quant):
    how, weight = Quantization(kind, double_quant), matrix(shape)
    stored = quantize(weight, how)
    grid = Grid(stored, shape, how)
    columns = [grid.nearest(weight[:, column], column) for column in range(shape[1])]
    read = QuantizedLinear.from_stored(
        shape, {**stored, "codes": grid.packed(torch.stack([codes for codes, _ in columns], 1))}, None, how
    ).dense(torch.float32)
    values = torch.stack([value for _, value in columns], 1)
    torch.testing.assert_close(read, values, rtol=1e-6, atol=0)  # one product in another order
    levels = np.arange(-127, 128) / 127 if kind == "int8" else TABLES[kind]
    constants = np.array([[float(v) for v in row] for row in (grid.constants[:, None] if kind == "int8" else
        grid.constants[torch.arange(weight.numel()).view(shape) // 64])])  # fmt: skip
    best = np.abs(levels[None, None] * constants[..., None] - weight.double().numpy()[..., None]).min(-1)
    np.testing.assert_allclose((values - weight).abs(), best, rtol=1e-4, atol=1e-6)  # fp32 beside fp64


@pytest.mark.parametrize(("kind", "double_quant"), FORMATS)
@pytest.mark.parametrize("width", [128, 130])
def test_inputs_that_do_not_go_together_leave_every_weight_at_its_nearest(tmp_path, kind, double_quant, width):
    how, weight = Quantization(kind, double_quant), matrix((9, width))
    stored = chosen(weight, torch.diag(torch.linspace(1, 2, width)), how, tmp_path)
    grid = Grid(stored, weight.shape, how)
    codes = torch.stack([grid.nearest(weight[:, column], column)[0] for column in range(width)], 1)
    assert torch.equal(stored["codes"], grid.packed(codes))


@pytest.mark.parametrize("part", [compensate.PART, 128])
@pytest.mark.parametrize(("kind", "double_quant"), FORMATS)
def test_chosen_constants_keep_outputs_better_than_those_of_plain_rounding(
    tmp_path, monkeypatch, kind, double_quant, part
):
    how, inputs = Quantization(kind, double_quant), correlated(256).double()
    weight = matrix((96, 256)).pow(3)  # a few large ones among many small, or there is nothing to cut off
    wanted = inputs @ weight.T.double()
    monkeypatch.setattr(compensate, "PART", part)
    both = chosen(weight, inputs.float(), how, tmp_path)
    monkeypatch.setattr(compensate, "RANGES", [])
    with_codes = chosen(weight, inputs.float(), how, tmp_path)
    assert torch.equal(with_codes["absmax"], quantize(weight, how)["absmax"])
    if kind == "int8" and part < 256:  # a row is in two parts
        assert torch.equal(both["absmax"], with_codes["absmax"])
        return
    assert (both["absmax"] != with_codes["absmax"]).any()
    if kind == "int8":  # for three rows of 96, whose losses are small
        return
    errors = [
        relative(inputs @ QuantizedLinear.from_stored((96, 256), each, None, how).dense(torch.float64).T, wanted)
        for each in (with_codes, both)
    ]
    assert errors[1] < 0.99 * errors[0]


def test_a_loss_costs_what_is_left_of_it_once_later_inputs_have_taken_up_what_they_can():
    """In float64: H_ii - H_il H_ll^-1 H_li, with the later inputs l."""
    x = correlated(24).double()
    gram = x.T @ x
    order, _, costs = compensate._shares(gram.float())
    gram.diagonal().add_(compensate.DAMPING * gram.diagonal().mean())
    wanted = torch.empty(24, dtype=torch.float64)
    for place, at in enumerate(order):
        later = order[place + 1 :]
        wanted[at] = gram[at, at] - gram[at, later] @ torch.linalg.solve(gram[later][:, later], gram[later, at])
    assert relative(costs, wanted) < 1e-5  # H is rounded to fp32
    assert relative(costs, gram.diagonal()) > 0.1


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_what_weights_are_about_read_as_is_what_they_are_read_as_but_in_the_middle_of_two_levels(kind):
    how, weight = Quantization(kind, double_quant=False), matrix((64, 64))
    grid = Grid(quantize(weight, how), weight.shape, how)
    grid.put(0.8 * grid.constants, torch.arange(64))  # some weights lie beyond
    exact = torch.stack([grid.nearest(weight[:, column], column)[1] for column in range(64)], 1)
    found = grid.about(weight, grid.constants[:, None])
    assert (found != exact).float().mean() < 0.02
    middle = (found - weight).abs() - (exact - weight).abs()
    assert (middle <= 2 * 2**-12 * grid.constants[:, None]).all()


def test_blocks_that_reach_into_the_next_row_keep_their_constants(tmp_path):
    how, weight = Quantization(), matrix((8, 96))
    stored = chosen(weight, correlated(96), how, tmp_path)
    assert torch.equal(stored["absmax"], quantize(weight, how)["absmax"])


@pytest.mark.parametrize(("kind", "double_quant"), FORMATS)
def test_compensated_codes_keep_the_outputs_where_nearest_ones_do_not(tmp_path, kind, double_quant):
    how, weight, inputs = Quantization(kind, double_quant), matrix((96, 200)), correlated(200)
    wanted = inputs @ weight.T
    errors = [
        relative(inputs @ QuantizedLinear.from_stored((96, 200), stored, None, how).dense(torch.float32).T, wanted)
        for stored in (quantize(weight, how), chosen(weight, inputs, how, tmp_path))
    ]
    assert errors[0] > 1e-3
    assert errors[1] < 0.5 * errors[0]


def test_an_update_below_the_steps_of_the_format_is_lost_to_nearest_codes_and_most_of_it_kept_by_chosen_ones(tmp_path):
    """Each weight is nearest to the code that it had: what a short training did is undone, not blurred."""
    how, inputs = Quantization(), correlated(256)
    before = quantize(matrix((96, 256)), how)
    base = QuantizedLinear.from_stored((96, 256), before, None, how).dense(torch.float32)
    update = matrix((96, 4), seed=2) @ matrix((4, 256), seed=3)
    update *= 0.02 * base.norm() / update.norm()
    kept = {}
    for name, stored in (
        ("nearest", quantize(base + update, how)), ("chosen", chosen(base + update, inputs, how, tmp_path))
    ):  # fmt: skip
        moved = QuantizedLinear.from_stored((96, 256), stored, None, how).dense(torch.float32) - base
        wanted, found = inputs @ update.T, inputs @ moved.T
        kept[name] = ((wanted * found).sum() / wanted.square().sum()).item()
    assert (quantize(base + update, how)["codes"] == before["codes"]).float().mean() > 0.9
    assert kept["nearest"] < 0.3
    assert 0.5 < kept["chosen"] < 1.2


def test_inputs_that_nothing_comes_into_are_rounded_to_the_nearest(tmp_path):
    how, weight = Quantization(double_quant=False), matrix((8, 64))
    assert torch.equal(chosen(weight, torch.zeros(3, 64), how, tmp_path)["codes"], quantize(weight, how)["codes"])


def test_later_layers_see_what_earlier_ones_were_rounded_to(tmp_path):
    """With a first block that is rounded to nothing, the second gets what nothing makes of its inputs."""
    model, seen = trained_model(), {}
    exact = {tensor.name: tensor for tensor in merged_tensors(model, torch.float32)}
    names = [name for name, _ in lora_layers(model)]
    run = Compensation(
        model, lambda name: exact[f"{name}.weight"].read(), names, Quantization(), calibration_pieces(calibration()),
        Shelf(tmp_path),
    )  # fmt: skip
    true = [each.clone() for each in run._inputs]
    for name in names:
        seen[name] = run(name)
    drift = [relative(now, then) for now, then in zip(run._inputs, true, strict=True)]
    assert all(each > 0 for each in drift)
    plain = trained_model()
    for name, layer in lora_layers(plain):
        stored = seen[name]
        twin = QuantizedLinear.from_stored(layer.shape, stored, layer.base.bias, Quantization())
        plain.set_submodule(name, twin)
    last = {}
    plain.model.layers[1].register_forward_hook(lambda _, __, output: last.setdefault("x", output))
    with torch.no_grad():
        plain(calibration()[0].input_ids, use_cache=False)
    found = last["x"][0] if isinstance(last["x"], tuple) else last["x"]
    assert relative(run._inputs[0], found) < 1e-5  # the blocks alone are the model, in fp32


def test_calibration_brings_an_export_nearer_to_what_was_trained(tmp_path):
    model = trained_model()
    found = [
        export_quantized(model, None, tmp_path / name, calibration=rows, audit_batches=held_out(12), dtype="float32")[
            "comparisons"
        ]["quantized"]["mean_kl"]
        for name, rows in (("plain", ()), ("calibrated", calibration(24)))
    ]
    assert found[0] > 1e-4
    assert found[1] < 0.8 * found[0]  # random weights on random tokens: what real ones gain is benchmarks/requantize.py


def test_what_waits_on_a_shelf_is_memory_of_files_that_no_folder_shows(tmp_path):
    shelf, values = Shelf(tmp_path), matrix((300, 200)).bfloat16()
    kept = shelf.keep(values)
    assert torch.equal(kept, values)
    assert kept.data_ptr() != values.data_ptr()
    assert list(tmp_path.iterdir()) == []
    assert shelf.keep(values[0]).data_ptr() == values.data_ptr()
    assert not shelf.empty((3, 0), torch.uint8).numel()


# --- the folder ---


def test_the_folder_says_what_it_is_and_what_was_lost(tmp_path):
    model = trained_model()
    content = export_quantized(
        model, tokenizer(), tmp_path / "out", calibration=calibration(), audit_batches=held_out(),
        provenance={"base": "acme/tiny", "revision": "abc"},
    )  # fmt: skip
    assert (content["kind"], content["onto"], content["dtype"]) == ("quantized", "dequantized", "bfloat16")
    assert content["quantization"] == {
        "format": "nf4", "double_quant": True, "block_size": 64, "calibration_rows": 12,
        "codes": "chosen with constants for the layers' outputs on calibration rows",
        "calibration_tokens": sum(range(7, 19)),
        "caution": "layers with 72 inputs, no multiple of 64, are decoded wrongly by bitsandbytes on CPUs with AVX-512",
    }  # fmt: skip
    assert set(content["files"]) == {path.name for path in (tmp_path / "out").iterdir()} - {"export.json"}
    audit = content["comparisons"]["quantized"]
    again = load_base(tmp_path / "out", compute_dtype="bfloat16", device="cpu")
    assert compare(model, again, held_out()) == audit
    card = (tmp_path / "out/README.md").read_text()
    assert "# Merged model, in nf4" in card
    assert "mean_kl: `" in card
    assert "caution: `layers with 72 inputs" in card
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (config["load_in_4bit"], config["bnb_4bit_compute_dtype"]) == (True, "bfloat16")
    assert config["llm_int8_skip_modules"] == ["lm_head"]


def test_a_changed_tied_head_stands_alone_and_dense(tmp_path):
    model = trained_model(tied=True)
    donor = add_head_adapter(model)
    export_quantized(model, None, tmp_path / "head", dtype="float32")
    tensors = tensors_of(tmp_path / "head")
    assert torch.equal(tensors["model.embed_tokens.weight"], donor)
    assert tensors["lm_head.weight"].dtype == torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "head")
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_layers_that_training_skipped_stay_dense(tmp_path):
    model = quantized(llama(), skip=("k_proj",))
    add_lora(model, rank=4, alpha=12)
    wake(model)
    export_quantized(model, None, tmp_path / "out")
    assert tensors_of(tmp_path / "out")["model.layers.0.self_attn.k_proj.weight"].dtype == torch.bfloat16
    layer = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].self_attn
    assert type(layer.k_proj) is torch.nn.Linear
    assert type(layer.q_proj).__name__ == "Linear4bit"


def test_files_are_cut_and_only_one_is_held(tmp_path):
    peaks = {}
    for name, shard_bytes in (("whole", 10**9), ("cut", 8000)):
        model = trained_model()
        with LiveBytes(model) as live:
            export_quantized(model, None, tmp_path / name, shard_bytes=shard_bytes)
        peaks[name] = live.peak
    whole, cut = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "cut")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 5
    assert not list((tmp_path / "cut").glob("*.part"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    packed_bytes = sum(tensor.nbytes for name, tensor in whole.items() if name.endswith("_proj.weight"))
    assert peaks["cut"] < peaks["whole"] - (packed_bytes - 8000) / 2
    assert peaks["cut"] < 3 * 4 * 72 * 100 + 8000 + 8000, "thrice the largest in fp32, a file, and constants"


@pytest.mark.parametrize("is_calibrated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_memory_beside_the_model_is_bounded_by_its_largest_tensor_and_not_by_its_rows(tmp_path, is_calibrated):
    width, inner = 128, 3072  # X^T X of the widest layer takes 36 MiB, and was held several times over
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=width, intermediate_size=inner, num_hidden_layers=1,
                         num_attention_heads=4, max_position_embeddings=1024)  # fmt: skip
    model = freeze_and_quantize(LlamaForCausalLM(config), Quantization(), torch.bfloat16, torch.device("cpu"))
    add_lora(model, rank=4, alpha=12)
    wake(model)
    rows = [Encoded([3 + (row + token) % (VOCAB - 3) for token in range(1000)], [True] * 1000) for row in range(4)]
    with LiveBytes(model) as live:
        content = export_quantized(
            model, None, tmp_path / "out", calibration=[collate(rows, pad_id=0)] if is_calibrated else ()
        )
    assert content["quantization"]["calibration_tokens"] == (4 * PIECE_TOKENS if is_calibrated else 0)
    assert live.peak < 2 * (2 * width * inner) + 64 * MIB
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".md", ".safetensors"}


def test_the_room_that_is_asked_for_is_what_is_needed(tmp_path, monkeypatch):
    model = trained_model()
    free = {"bytes": 5000}
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 0, free["bytes"]))
    with pytest.raises(RunError, match=r"needs 64\.\d MiB on the disk of .* has 4\.88 KiB free"):
        export_quantized(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    asked = []
    monkeypatch.setattr(room, "check_disk", lambda out, needed: asked.append(needed))
    export_quantized(model, None, tmp_path / "out")
    taken, largest = (tmp_path / "out/model.safetensors").stat().st_size, 72 * 100
    # What is packed waits until its file is written, and a layer in fp32, twice if it is turned.
    assert 2 * taken < asked[0] - 8 * largest < 2 * (taken + 14 * 4096 + MIB // 100)


def test_what_cannot_be_is_refused_in_one_line_with_nothing_left(tmp_path):
    experts = quantized(mixtral())
    add_lora(experts, rank=4, alpha=12)
    wake(experts)
    with pytest.raises(RunError, match=r"has experts, which .* cannot hold; export --to merged"):
        export_quantized(experts, None, tmp_path / "out")
    model = trained_model()
    model.model.layers[1].mlp.up_proj.adapters["default"].b_OR.data[0, 0] = float("nan")
    for rows in ((), calibration()):
        with pytest.raises((AdapterError, RunError), match=r"layers\.1\.mlp\.(up|down)_proj.* NaN or inf"):
            export_quantized(model, None, tmp_path / "out", calibration=rows)
        assert list(tmp_path.iterdir()) == []
    assert dict(model.named_modules())["model.layers.0.self_attn.q_proj"].active == "default"
    with pytest.raises(RunError, match="above 1e-12, and is not kept"):
        export_quantized(trained_model(), None, tmp_path / "out", audit_batches=held_out(), max_kl=1e-12)
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_transformers_renames_bears_its_published_name(tmp_path):
    model = quantized(family_of("gpt_neox"))
    add_lora(model, rank=2, alpha=4)
    export_quantized(model, None, tmp_path / "out", audit_batches=held_out(12))
    names = tensors_of(tmp_path / "out").keys()
    assert "embed_out.weight" in names
    assert "gpt_neox.layers.1.mlp.dense_4h_to_h.weight.absmax" in names
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded.lm_head.weight.float(), model.lm_head.weight.to(torch.bfloat16).float())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_base_that_bitsandbytes_stored_is_exported_under_the_names_of_the_dense_one(tmp_path, family, kind):
    more = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    how = BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else BitsAndBytesConfig(load_in_4bit=True, **more)
    family_of(family).save_pretrained(tmp_path / "dense")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=how)
    stored.save_pretrained(tmp_path / "base")
    model = load_base(tmp_path / "base", quantization=kind, compute_dtype="float32", device="cpu")
    add_lora(model, rank=4, alpha=8)
    wake(model)
    export_merged(model, None, tmp_path / "out", dtype="float32")
    assert tensors_of(tmp_path / "out").keys() == tensors_of(tmp_path / "dense").keys()
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model)) < 1e-5
    export_quantized(model, None, tmp_path / "again", dtype="float32", audit_batches=held_out())
    assert tensors_of(tmp_path / "again").keys() == tensors_of(tmp_path / "base").keys()


@pytest.mark.parametrize("family", ["gemma3", "opt", "phi3"])
def test_families_are_calibrated_block_by_block_and_loaded_whole(tmp_path, family):
    """Two kinds of attention mask, positions that are learnt, layers that are one."""
    model = quantized(family_of(family))
    add_lora(model, rank=4, alpha=8, dtype=torch.float32)
    wake(model)
    found = [
        export_quantized(model, None, tmp_path / name, calibration=rows, audit_batches=held_out(12), dtype="float32")
        for name, rows in (("plain", ()), ("calibrated", calibration(24)))
    ]
    plain, calibrated = (each["comparisons"]["quantized"]["mean_kl"] for each in found)
    assert plain > 1e-5
    assert calibrated < 0.6 * plain  # 0.06 to 0.38 of it was seen
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "calibrated", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    kinds = [type(layer).__name__ for layer in loaded.modules()]
    assert kinds.count("Linear4bit") == len(list(lora_layers(model)))


def test_a_family_whose_layers_transformers_does_not_quantise_is_refused(tmp_path):
    model = quantized(family_of("falcon"))
    add_lora(model, rank=4, alpha=8)
    with pytest.raises(RunError, match="no linear layer that transformers quantises; export --to merged"):
        export_quantized(model, None, tmp_path / "out")


def test_blocks_that_hand_on_something_else_are_refused_with_a_way_on(tmp_path):
    model = trained_model()
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 1.0, *args[1:]))
    with pytest.raises(RunError, match=r"do not pass their output to the next block.* --calibration-rows 0"):
        export_quantized(model, None, tmp_path / "out", calibration=calibration())
    assert list(tmp_path.iterdir()) == []
    export_quantized(model, None, tmp_path / "out")


@torch.no_grad()
def test_layers_that_share_an_input_still_do_after_one_of_them_stayed_dense(tmp_path):
    model = quantized(llama(), skip=("k_proj",))
    add_lora(model, rank=4, alpha=12)
    wake(model)
    joined = model.model.layers[0].self_attn.q_proj.siblings
    before = logits(model)
    assert len(joined.layers) == 3
    export_quantized(model, None, tmp_path / "out", calibration=calibration())
    assert torch.equal(logits(model), before)
    assert len(joined.layers) == 3
    assert model.model.layers[0].self_attn.k_proj.siblings is joined


def test_weights_that_were_all_trained_and_a_16_bit_base_become_nf4(tmp_path):
    whole = llama()
    adapted = quantized(llama(), "none")
    add_lora(adapted, rank=4, alpha=12)
    wake(adapted)
    for name, model, is_whole in (("whole", whole, True), ("adapted", adapted, False)):
        content = export_quantized(
            model, None, tmp_path / name, is_whole=is_whole, calibration=calibration(), audit_batches=held_out()
        )
        assert content["quantization"]["format"] == "nf4"
        assert 1e-5 < content["comparisons"]["quantized"]["mean_kl"] < 0.1
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert sum(type(each).__name__ == "Linear4bit" for each in loaded.modules()) == 14


def test_the_original_can_be_what_is_quantised(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = load_base(tmp_path / "base", compute_dtype="float32", device="cpu")
    add_lora(model, rank=4, alpha=12)
    wake(model)
    content = export_quantized(model, None, tmp_path / "out", onto="original")
    layer = model.model.layers[1].mlp.down_proj
    exact = llama().model.layers[1].mlp.down_proj.weight.detach() + layer.adapters["default"].delta()
    how = Quantization()
    wanted = QuantizedLinear.from_stored(exact.shape, quantize(exact, how), None, how).dense(torch.float32)
    found = numpy_read(as_numpy(tensors_of(tmp_path / "out")), "model.layers.1.mlp.down_proj")
    assert content["onto"] == "original"
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-7)  # fp32's noise
