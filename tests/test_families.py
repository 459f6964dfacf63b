"""Every family by the general rule: quantised, adapted, trained, merged, and in agreement with PEFT."""

import copy
import json
import math

import pytest
import tiny
import torch
from peft import PeftModel
from test_export import LiveBytes, tensors_of
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    Llama4TextConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from qlora_kit.base.dense import QuantizedWeight
from qlora_kit.base.freeze import left_dense
from qlora_kit.export import export_merged, merged_tensors
from qlora_kit.export.published import published
from qlora_kit.lora import adapter_parameters, adapters_off, add_lora, lora_layers, save_adapter

COMMON = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
GATED = COMMON | {"intermediate_size": 80, "num_key_value_heads": 2, "tie_word_embeddings": False}
ATTENTION, MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}

EXPERTS = {"gate_up_proj", "down_proj"}

ROUTERS_AND_BIASES = ("mlp.gate.weight", "mlp.router.weight", "_proj_bias")

FAMILIES = {
    "llama": (tiny.llama, ATTENTION | MLP),
    "gpt2": (tiny.gpt2, {"c_attn", "c_proj", "c_fc"}),
    "mixtral": (tiny.mixtral, ATTENTION | EXPERTS),
    "qwen3_moe": (tiny.qwen3_moe, ATTENTION | EXPERTS),
    "gpt_oss": (tiny.gpt_oss, ATTENTION | EXPERTS),
    "mistral": (MistralConfig(**GATED, sliding_window=8), ATTENTION | MLP),
    "qwen2": (Qwen2Config(**GATED), ATTENTION | MLP),
    "qwen3": (Qwen3Config(**GATED, head_dim=12), ATTENTION | MLP),
    "gemma3": (
        Gemma3TextConfig(**{**GATED, "tie_word_embeddings": True}, head_dim=12, sliding_window=8), ATTENTION | MLP
    ),
    "phi3": (Phi3Config(**GATED), {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "gpt_neox": (
        GPTNeoXConfig(**COMMON, intermediate_size=80),
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    ),
    "falcon": (FalconConfig(**COMMON), {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    "opt": (
        OPTConfig(**COMMON, ffn_dim=80, word_embed_proj_dim=48),
        {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    ),
}  # fmt: skip


def dense_model(family):
    made_of = FAMILIES[family][0]
    if callable(made_of):
        return made_of()
    config = copy.deepcopy(made_of)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny.spread(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()


PARAMS = [pytest.param((family, kind), marks=[pytest.mark.slow] if kind == "int8" else [], id=f"{family}-{kind}")
          for family in FAMILIES for kind in ("nf4", "int8")]  # fmt: skip


@pytest.fixture(params=PARAMS)
def tuned(request):
    """The family's name, a quantised model with an adapter after a step of training, and its logits before."""
    family, kind = request.param
    model = tiny.quantized(dense_model(family), kind)
    add_lora(model, rank=4, alpha=8, dtype=torch.float32)
    base = tiny.logits(model)
    tiny.wake(model)
    tiny.train_step(model.train(), lr=1e-2)
    return family, model.eval(), base


def test_all_linear_layers_of_the_body_are_quantised_and_train(tuned):
    family, model, base = tuned
    leaves = {name.rpartition(".")[2] for name, layer in lora_layers(model) if isinstance(layer.base, QuantizedWeight)}
    assert leaves == FAMILIES[family][1]
    assert all(p.grad is not None and p.grad.norm() > 0 for _, p in adapter_parameters(model))
    assert tiny.relative(tiny.logits(model), base) > 0.01
    with adapters_off(model):
        assert torch.equal(tiny.logits(model), base)


def test_peft_says_the_same(tuned, tmp_path):
    family, model, base = tuned
    save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tiny.read_out(dense_model(family), model), tmp_path / "adapter")
    assert tiny.relative(tiny.logits(model), base) > 0.01
    assert tiny.relative(tiny.logits(model), tiny.logits(theirs)) < 1e-5  # fp32, in another order


@pytest.mark.parametrize(
    ("family", "dora"), [*((family, False) for family in FAMILIES), ("llama", True), ("gpt2", True)]
)
def test_a_merge_holds_one_matrix_of_any_family_at_a_time(family, dora):
    """At this size a matrix leaves in one slice: two of 16 bits, the last and the next, beside what is decoded."""
    model = tiny.quantized(dense_model(family))
    add_lora(model, rank=2, alpha=8, dora=dora)
    tensors = list(merged_tensors(model, torch.bfloat16))
    matrices = [math.prod(tensor.shape[-2:]) for tensor in tensors if len(tensor.shape) > 1]
    with LiveBytes(model) as live:
        for tensor in tensors:
            for part in tensor.slices():
                assert part.dtype == torch.bfloat16
    assert max(matrices) < 0.3 * sum(matrices)
    assert live.peak < 2.5 * 4 * max(matrices)


def test_the_merged_model_says_the_same_in_plain_transformers(tuned, tmp_path):
    _, model, base = tuned
    export_merged(model, None, tmp_path / "out", dtype="float32")
    attention = model.config._attn_implementation
    export, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", attn_implementation=attention, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert tiny.relative(tiny.logits(model), base) > 0.01
    assert tiny.relative(tiny.logits(export), tiny.logits(model)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_export_holds_the_very_tensors_that_transformers_would_save(family, tmp_path):
    """transformers joins experts and renames heads as it reads; other programs know the published names alone."""
    model = tiny.quantized(dense_model(family))
    add_lora(model, rank=2, alpha=4)  # B is zero, so that the export is the decoded base
    twin = tiny.read_out(dense_model(family), model)
    twin.save_pretrained(tmp_path / "plain")
    export_merged(model, None, tmp_path / "out", dtype="float32", shard_bytes=20_000)
    plain, out = (tensors_of(tmp_path / name) for name in ("plain", "out"))
    assert out.keys() == plain.keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in plain.items())
    assert (plain.keys() <= twin.state_dict().keys()) == (family not in ("mixtral", "qwen3_moe", "gpt_neox"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == plain.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in plain.values())


@pytest.mark.parametrize(
    "saved",
    [
        lambda name, rows: {name.replace("up_proj", "gate_up_proj").replace("gate_proj", "gate_up_proj"): rows},
        lambda name, rows: {name: rows.t() if rows.ndim > 1 else rows},
        lambda name, rows: {f"{name}.odd": rows[1::2], f"{name}.even": rows[::2]},
    ],
    ids=["joined of two", "turned", "interleaved"],
)
def test_where_published_tensors_are_more_than_rows_of_one_all_keep_the_names_that_transformers_reads(
    saved, monkeypatch
):
    monkeypatch.setattr(
        "qlora_kit.export.published.revert_weight_conversion",
        lambda model, tensors: {key: part for name, rows in tensors.items() for key, part in saved(name, rows).items()},
    )
    model = tiny.llama()
    tensors = list(merged_tensors(model, torch.bfloat16))
    assert [tensor.parts for tensor in published(model, tensors)] == [((each.name, each.shape),) for each in tensors]


def test_weights_that_no_rule_quantises_are_said():
    config = Llama4TextConfig(
        **GATED, intermediate_size_mlp=80, num_local_experts=4, interleave_moe_layer_step=1, head_dim=12
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    named = dict(model.named_parameters())
    wide = sum(p.numel() for name, p in named.items() if ".experts." in name or ".router." in name)
    report = add_lora(tiny.quantized(model), rank=2)
    share = wide / report.total
    assert share > 0.3
    (note,) = report.notes
    first = "model.layers.0.feed_forward.experts.gate_up_proj"
    assert note.startswith(f"{share:.0%} of the weights are not quantised: {first}")
    assert "Llama4TextExperts" in note


def test_every_family_of_the_list_is_quantised_whole():
    for family in FAMILIES:
        dense = left_dense(tiny.quantized(dense_model(family)))
        assert all(name.endswith(ROUTERS_AND_BIASES) for name in dense), family
