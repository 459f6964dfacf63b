"""Claims about merging into the original weights: they are the checkpoint's plus the update, and the audit says so."""

import json

import numpy as np
import pytest
import torch
from test_export import LiveBytes, dense_model, half_unit, held_out, logits, relative, tensors_of, tokenizer
from tiny import mixtral, wake
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.base.load import load_base, original_weights
from qlora_kit.errors import ModelError, RunError
from qlora_kit.export import export_adapter, export_merged, merge, merged_tensors
from qlora_kit.lora import add_lora, lora_layers
from qlora_kit.units import MIB


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def case(request, tmp_path_factory):
    """A checkpoint in bf16, and an NF4 base of it with an adapter that says something."""
    folder = tmp_path_factory.mktemp("original") / "base"
    dense_model(request.param).to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder, adapted(folder)


def adapted(folder, **lora):
    model = load_base(folder, compute_dtype="float32", device="cpu")
    add_lora(model, rank=4, alpha=12, **lora)
    wake(model)
    return model


def test_every_weight_is_that_of_the_checkpoint_plus_the_update_rounded_once(case, tmp_path):
    folder, model = case
    export_merged(model, None, tmp_path / "out", onto="original", dtype="bfloat16")
    export_merged(model, None, tmp_path / "dequantized", dtype="bfloat16")
    found, base, other = tensors_of(tmp_path / "out"), tensors_of(folder), tensors_of(tmp_path / "dequantized")
    assert found.keys() == base.keys()
    layers = dict(lora_layers(model))
    for name, weight in found.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None or name.endswith(".bias"):
            assert torch.equal(weight, base[name]), name
            continue
        a, b = (p.detach().double() for p in (layer.adapters["default"].a_RI, layer.adapters["default"].b_OR))
        update = 3.0 * (b @ a)  # alpha 12 / rank 4
        exact = (base[name].double() + (update.T if layer.base.is_transposed else update)).numpy()
        assert np.all(np.abs(weight.double().numpy() - exact) <= half_unit(exact) + 2e-7), name  # 2e-7 is fp32's noise
        # Rounding to bf16 is 0.002 of a weight at most: this is what quantising lost, and is back.
        assert relative(other[name].float(), weight.float()) > 0.005


def test_the_audit_says_what_the_original_costs_and_is_no_reason_to_refuse_it(case, tmp_path):
    _, model = case
    content = export_merged(model, None, tmp_path / "out", onto="original", audit_batches=held_out())
    audit = content["comparisons"]["merged"]
    assert audit["mean_kl"] > 1e-6, "another model"
    assert content["onto"] == "original"
    assert "W' = W + scale B A" in (tmp_path / "out/README.md").read_text()


def test_merge_from_files_gives_the_weights_of_the_export(case, tmp_path):
    folder, model = case
    export_adapter(model, tmp_path / "adapter")
    export_merged(model, None, tmp_path / "direct", onto="original")
    merge(tmp_path / "adapter", folder, tmp_path / "merged", onto="original", device="cpu")
    direct, merged = tensors_of(tmp_path / "direct"), tensors_of(tmp_path / "merged")
    assert direct.keys() == merged.keys()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in direct.items())


@torch.no_grad()
def test_a_dora_takes_the_norms_of_the_original(tmp_path):
    dense_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base", dora=True, targets=["q_proj"])
    layer = model.model.layers[0].self_attn.q_proj
    adapter = layer.adapters["default"]
    adapter.magnitude_O.mul_(torch.linspace(0.5, 2, 72))
    made = {t.name: t for t in merged_tensors(model, torch.float32, original_weights(model))}
    found = made["model.layers.0.self_attn.q_proj.weight"].read()
    # The rows have exactly the norms that were trained, whatever they are put on; 1e-5 is fp32's noise in a norm of 72.
    assert torch.allclose(found.norm(dim=1), adapter.magnitude_O, rtol=1e-5)


@torch.no_grad()
def test_experts_are_those_of_the_checkpoint_plus_their_updates(tmp_path):
    mixtral().save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base", targets="experts")
    export_merged(model, None, tmp_path / "out", onto="original", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    bare = logits(plain)
    for name, layer in lora_layers(model):
        plain.get_parameter(name).add_(layer.adapters["default"].delta())
    export = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative(bare, logits(plain)) > 1e-2
    assert relative(logits(export), logits(plain)) < 1e-6  # the same sums in fp32


def test_only_slices_of_the_original_are_in_memory(tmp_path):
    width = 2048
    linear = torch.nn.Linear(width, width, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    twin = torch.nn.Linear(width, width, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    pair = torch.nn.Sequential(linear), torch.nn.Sequential(twin)
    (tensor,) = merged_tensors(pair[0], torch.float16, pair[1])
    with LiveBytes(pair[1]) as live:
        counts = [part.numel() for part in tensor.slices()]
    assert sum(counts) == width * width
    assert 4 * MIB <= live.peak < 4 * MIB + 1024  # a slice as it leaves, the one before it, and a few bytes of checks
    assert torch.equal(tensor.read(), twin.weight.half())


def test_an_original_that_is_not_at_hand_is_refused_in_one_line(tmp_path):
    dense_model().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    stored = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    )
    stored.save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base")
    with pytest.raises(ModelError, match=r"holds quantised weights, .*; export --onto dequantized") as caught:
        export_merged(model, None, tmp_path / "out", onto="original")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match="every weight was trained"):
        export_merged(dense_model(), None, tmp_path / "out", onto="original", is_whole=True)


def test_an_export_above_its_limit_is_not_kept_unless_that_is_forced(case, tmp_path):
    _, model = case
    more = {"audit_batches": held_out(), "max_kl": 1e-12}
    with pytest.raises(RunError, match=r"nats a token .* above 1e-12, and is not kept; .* --force"):
        export_merged(model, None, tmp_path / "out", **more)
    assert list(tmp_path.iterdir()) == []
    export_merged(model, None, tmp_path / "out", **more, force=True)
    assert json.loads((tmp_path / "out/export.json").read_text())["comparisons"]["merged"]["mean_kl"] > 1e-12
