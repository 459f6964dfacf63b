"""Mixture-of-experts bases: their experts are quantised like every other matrix, and compute what they computed."""

import copy
import inspect

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_export import LiveBytes
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.integrations import moe

from qlora_kit.base import Quantization, load_base
from qlora_kit.base.dense import QuantizedWeight, parameter_count
from qlora_kit.base.experts import ExpertStack, _tokens_of_experts
from qlora_kit.base.formats import quantize
from qlora_kit.data import Encoded, collate
from qlora_kit.errors import AdapterError
from qlora_kit.export import export_merged, merged_tensors
from qlora_kit.lora import adapter_parameters, adapters_off, add_lora, load_adapter, lora_layers, save_adapter
from qlora_kit.memory import Ledger
from qlora_kit.plan import Workload, dry_run
from qlora_kit.recipe import Lora
from qlora_kit.storage import sha256_file

KNOWS_NORMS = "has_post_expert_norm" in inspect.signature(moe.use_experts_implementation).parameters
MAKERS = [tiny.mixtral, tiny.qwen3_moe, tiny.gpt_oss]


def dense_twin(model):
    """The model with every quantised weight read out into transformers' own modules and their own computation."""
    return tiny.read_out(copy.deepcopy(model.dense), model)


def quantized(make, kind="nf4", dtype=torch.float32):
    """A quantised model that remembers the dense one that it was made from."""
    dense = make()
    model = tiny.quantized(copy.deepcopy(dense), kind, dtype=dtype)
    object.__setattr__(model, "dense", dense)
    return model


def tuned(make, kind="nf4", **lora):
    """The same with an fp32 adapter on everything linear, experts too, that changes what it says."""
    model = quantized(make, kind)
    add_lora(model, **{"rank": 4, "alpha": 8, "dtype": torch.float32, **lora})
    tiny.wake(model)
    return model.eval()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("make", MAKERS)
def test_quantised_experts_compute_what_their_decoded_weights_compute(make, kind):
    model = quantized(make, kind)
    assert tiny.relative(tiny.logits(model), tiny.logits(model.dense)) > 1e-4, "quantisation is there"
    assert tiny.relative(tiny.logits(model), tiny.logits(dense_twin(model))) < 1e-6


@pytest.mark.parametrize("make", MAKERS)
def test_experts_are_those_of_older_releases_too_which_know_of_no_norm_behind_them(make):
    model = quantized(make)
    wanted = tiny.logits(model)
    layers = [module for module in model.modules() if vars(module).pop("has_post_expert_norm", None) is not None]
    assert layers or not KNOWS_NORMS
    assert torch.equal(tiny.logits(model), wanted)


@pytest.mark.parametrize("make", MAKERS)
def test_gradients_reach_the_attention_through_the_experts_as_in_the_dense_model(make):
    grads = []
    model = quantized(make)
    for each in (model, dense_twin(model)):
        each.requires_grad_(False)
        embedding = each.get_input_embeddings().weight.requires_grad_()
        tiny.train_step(each)
        grads.append(embedding.grad)
    assert grads[1].norm() > 0
    assert tiny.relative(grads[0], grads[1]) < 1e-5


@pytest.mark.parametrize("make", MAKERS)
def test_all_but_embeddings_norms_and_routers_is_quantised(make):
    model = quantized(make)
    packed = sum(module.weight_count for module in model.modules() if isinstance(module, QuantizedWeight))
    assert all(p.ndim < 3 for p in model.parameters())
    dense = {name for name, p in model.named_parameters() if p.ndim == 2 and "bias" not in name}
    assert {name.split(".")[-2] for name in dense} <= {"embed_tokens", "lm_head", "gate", "router"}
    assert packed > 0.6 * parameter_count(model) == 0.6 * sum(p.numel() for p in model.dense.parameters())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_each_expert_has_the_codes_of_its_own_matrix(kind):
    weights = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    for stored, is_transposed in ((weights, False), (weights.transpose(1, 2), True)):
        stack = ExpertStack(stored, Quantization(kind), torch.float32, torch.device("cpu"), is_transposed=is_transposed)
        for expert in range(3):
            for name, wanted in quantize(weights[expert].contiguous(), Quantization(kind)).items():
                assert torch.equal(stack.get_buffer(name)[expert], wanted)


def test_a_step_of_training_changes_no_byte_of_the_experts():
    model = tuned(tiny.mixtral)
    before = tiny.stored(model)
    tiny.train_step(model, lr=1e-2)
    model.eval()
    model.generate(tiny.tokens(1, 5), max_new_tokens=4, do_sample=False)
    assert tiny.stored(model) == before


@pytest.mark.parametrize("make", MAKERS)
def test_a_merged_export_of_experts_loads_in_transformers_with_the_same_logits(make, tmp_path):
    model = tuned(make)
    export_merged(model, None, tmp_path / "out", dtype="float32")
    assert "qlora_kit" not in (tmp_path / "out" / "config.json").read_text()
    export, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", attn_implementation=model.config._attn_implementation, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert tiny.relative(tiny.logits(export), tiny.logits(model)) < 1e-5


@pytest.mark.parametrize("make", [tiny.mixtral, tiny.qwen3_moe])
def test_an_audit_of_experts_reads_them_where_they_lie_and_joins_none_in_memory(make, tmp_path):
    model = tuned(make)
    rows = [Encoded(row, [place > 2 for place in range(len(row))]) for row in tiny.tokens(2, 7).tolist()]
    audited = [collate(rows, pad_id=0)]
    with LiveBytes(model) as live:
        content = export_merged(model, None, tmp_path / "out", dtype="float32", audit_batches=audited)
    assert content["comparisons"]["merged"]["max_kl"] < 1e-6
    assert content["comparisons"]["merged"]["loss_as_trained"] > 1
    joined = sum(4 * stack.weight_count for stack in model.modules() if isinstance(stack, ExpertStack))
    assert live.peak < joined / 2  # transformers alone takes 0.8 to 0.9 of it
    assert content["files"].keys() == {path.name for path in (tmp_path / "out").iterdir()} - {"export.json"}
    assert all(sha256_file(tmp_path / "out" / name) == sha for name, sha in content["files"].items())


# --- adapters on experts ---


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
@pytest.mark.parametrize("make", MAKERS)
def test_expert_adapters_start_as_the_base_and_come_off_bit_for_bit(make, kind):
    model = quantized(make, kind)
    dense = tiny.logits(model)
    report = add_lora(model, rank=4, targets="experts")
    base = tiny.logits(model)
    assert torch.equal(base, dense)
    assert len(report.matched) == 4
    tiny.wake(model)
    tiny.train_step(model.train(), lr=1e-2)
    assert all(p.grad is not None and p.grad.norm() > 0 for _, p in adapter_parameters(model))
    assert tiny.relative(tiny.logits(model.eval()), base) > 1e-3
    with adapters_off(model):
        assert torch.equal(tiny.logits(model), base)


@pytest.mark.parametrize(("rank", "each"), [(1, 1), (2, 1), (3, 2), (16, 8)])
def test_the_rank_of_an_expert_is_shared_by_those_that_a_token_takes(rank, each):
    model = quantized(tiny.mixtral)
    report = add_lora(model, rank=rank, targets="all-linear")
    ranks = {name.rpartition(".")[2]: layer.adapter("default").rank for name, layer in lora_layers(model)}
    assert (ranks["gate_up_proj"], ranks["down_proj"], ranks["q_proj"]) == (each, each, rank)
    assert report.unmatched == ("lm_head",)


def test_targets_find_experts():
    names = {target: add_lora(quantized(tiny.mixtral), targets=target).matched
             for target in ("experts", "mlp", "attention", "gate_up_proj", "re:.*1.*down_proj")}  # fmt: skip
    assert {name.rpartition(".")[2] for name in names["experts"]} == {"gate_up_proj", "down_proj"}
    assert names["experts"] == names["mlp"]
    assert not set(names["attention"]) & set(names["experts"])
    assert (len(names["gate_up_proj"]), len(names["re:.*1.*down_proj"])) == (2, 1)


def test_dora_on_experts_is_refused():
    with pytest.raises(AdapterError, match=r"dora is not possible on experts.*gate_up_proj|down_proj"):
        add_lora(quantized(tiny.mixtral), dora=True)


SETTINGS = [{}, {"scaling": "rslora", "rank": 6}, {"targets": "experts"}, {"targets": ["down_proj", "q_proj"]},
            {"rank_pattern": {"gate_up_proj": 3}, "alpha_pattern": {"re:.*0.*down_proj": 3}}]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("make", MAKERS)
def test_peft_loads_expert_adapters_with_the_same_logits(make, settings, tmp_path):
    model = tuned(make, **settings)
    save_adapter(model, tmp_path / "adapter")
    twin = dense_twin(model)
    base = tiny.logits(twin)
    theirs = PeftModel.from_pretrained(twin, tmp_path / "adapter")
    assert tiny.relative(tiny.logits(theirs), base) > 1e-3
    assert tiny.relative(tiny.logits(model), tiny.logits(theirs)) < 1e-5


@pytest.mark.parametrize("parameters", [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"]])
@pytest.mark.parametrize("make", MAKERS)
def test_what_peft_saves_for_experts_we_load_with_the_same_logits(make, parameters, tmp_path):
    model = quantized(make)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters)
    theirs = get_peft_model(dense_twin(model), config).eval()
    tiny.wake_peft(theirs)
    theirs.save_pretrained(tmp_path)
    base = tiny.logits(model)
    report = load_adapter(model, tmp_path)
    assert len(report.matched) == 2 + 2 * len(parameters)
    assert tiny.relative(tiny.logits(model), base) > 1e-3
    assert tiny.relative(tiny.logits(model), tiny.logits(theirs)) < 1e-5


def test_expert_adapters_come_back_bit_for_bit(tmp_path):
    model = tuned(tiny.qwen3_moe)
    save_adapter(model, tmp_path / "adapter")
    again = quantized(tiny.qwen3_moe)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_the_plan_of_a_mixture_holds_the_bytes_of_the_real_model():
    lora = Lora(rank=4)
    planned = dry_run(
        tiny.mixtral().config,
        Workload(Quantization("nf4"), lora, torch.float32, "sdpa", 2, 16, 1, "keep", "adamw_32bit", "fp32"),
    )
    model = quantized(tiny.mixtral)
    add_lora(model, rank=4)
    with Ledger(model) as ledger:
        tiny.train_step(model.train())
    held = ledger.summary()["by_category"]
    for category in ("base_weights", "quantization_state", "adapters"):
        assert planned["by_category"][category] == held[category] > 0
    packed = sum(module.weight_count for module in model.modules() if isinstance(module, QuantizedWeight))
    assert planned["parameters"]["quantized"] == packed


def test_a_plan_loses_no_token_among_experts_that_get_alike():
    with FakeTensorMode():
        assert _tokens_of_experts(torch.zeros(10, 2, dtype=torch.int64), 6) == [4, 4, 3, 3, 3, 3]


@pytest.mark.parametrize("make", [tiny.mixtral, tiny.gpt_oss])
def test_full_fine_tuning_of_a_mixture_is_planned_with_all_its_experts(make):
    dense = make()
    attention, total = dense.config._attn_implementation, sum(p.numel() for p in dense.parameters())
    work = Workload(Quantization("none"), None, torch.float32, attention, 2, 16, 1, "keep", "adamw_32bit", "none")
    planned = dry_run(dense.config, work)
    assert planned["parameters"] == {"total": total, "trainable": total, "quantized": 0}
    assert planned["by_category"]["optimizer_state"] == 8 * total


@pytest.mark.parametrize("mixture", [tiny.mixtral, tiny.qwen3_moe, tiny.gpt_oss])
def test_a_merged_export_has_the_tensors_of_its_family_s_files(mixture, tmp_path):
    mixture().save_pretrained(tmp_path / "base")
    model = load_base(tmp_path / "base", compute_dtype="float32", device="cpu")
    add_lora(model, rank=4)
    tiny.wake(model)
    merged = {tensor.name: tensor.read() for tensor in merged_tensors(model, torch.float32)}
    export_merged(model, None, tmp_path / "out", dtype="float32")
    base, out = (load_file(tmp_path / which / "model.safetensors") for which in ("base", "out"))
    assert {name: each.shape for name, each in out.items()} == {name: each.shape for name, each in base.items()}
    assert (out.keys() == merged.keys()) == (mixture is tiny.gpt_oss)  # whose files hold stacks, too
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], each) for name, each in merged.items())
