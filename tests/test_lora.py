"""Adapters: with B at zero they are the base to the bit, each setting does what it says, and PEFT agrees both ways."""

import copy
import itertools
import json
import re
from pathlib import Path

import peft
import pytest
import safetensors.torch
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from qlora_kit.base.dense import decode
from qlora_kit.base.record import base_record
from qlora_kit.errors import AdapterError
from qlora_kit.lora import (
    adapter_parameters,
    adapters_off,
    add_lora,
    combine_adapters,
    delete_adapter,
    load_adapter,
    load_start,
    lora_layers,
    peft_config,
    save_adapter,
    use_adapter,
)
from qlora_kit.lora import adapters as adapters_module
from qlora_kit.lora.inject import lora_report
from qlora_kit.recipe import Lora

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAN, INFINITY = float("nan"), float("inf")
MAKERS = [tiny.llama, tiny.gpt2]
PEFT_RTOL = 1e-5  # relative norm, fp32: the two add the same terms in another order


def tuned(make=tiny.llama, kind="nf4", *, dtype=torch.float32, **lora):
    """A quantised model with an fp32 adapter that changes its logits, in evaluation mode."""
    model = tiny.quantized(make(), kind, dtype=dtype)
    add_lora(model, **{"rank": 4, "alpha": 8, "dtype": torch.float32, **lora})
    tiny.wake(model)
    with torch.no_grad():
        for key, parameter in adapter_parameters(model):
            if key.endswith("magnitude_O"):
                parameter.mul_(torch.linspace(0.8, 1.2, len(parameter)))
    return model.eval()


def mark(model):
    return base_record(model).fingerprint


def matrices(model, name="default"):
    return {key: parameter.detach().clone() for key, parameter in adapter_parameters(model, name)}


# --- the base shines through ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "none"])
def test_b_of_zero_leaves_the_logits_of_the_base_bit_for_bit(kind, make, dtype):
    model = tiny.quantized(make(), kind, dtype=dtype)
    base = tiny.logits(model)
    add_lora(model, rank=4, alpha=8)
    assert all(layer.active == "default" for _, layer in lora_layers(model))
    assert torch.equal(tiny.logits(model), base)
    tiny.wake(model)
    assert tiny.relative(tiny.logits(model), base) > 0.01, "B is what was zero"


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_switched_off_after_training_the_base_is_back_bit_for_bit(kind, make):
    model = tiny.quantized(make(), kind, dtype=torch.bfloat16)
    base = tiny.logits(model)
    add_lora(model, rank=4, alpha=8, dtype=torch.float32)
    for step in range(3):
        tiny.train_step(model.train(), lr=1.0, seed=step)
    model.eval()
    trained = tiny.logits(model)
    assert not torch.equal(trained, base)
    with adapters_off(model):
        assert torch.equal(tiny.logits(model), base)
        with adapters_off(model):
            assert torch.equal(tiny.logits(model), base)
        assert torch.equal(tiny.logits(model), base), "the inner block must not switch the adapter on"
    assert torch.equal(tiny.logits(model), trained)


def test_adapters_come_back_on_after_an_error_in_the_block():
    model = tuned()
    wanted = tiny.logits(model)
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert torch.equal(tiny.logits(model), wanted)


def test_only_the_adapter_trains_and_all_of_it():
    model = tuned().train()
    tiny.train_step(model)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if ".adapters." in name}
    assert len(trained) == 2 * 14
    assert all(p.grad.norm() > 0 for p in model.parameters() if p.grad is not None)


def test_with_b_at_zero_only_b_gets_a_gradient_that_is_not_zero():
    model = tiny.quantized(tiny.llama())
    add_lora(model, rank=4, dtype=torch.float32)
    tiny.train_step(model.train())
    norms = {key: parameter.grad.norm().item() for key, parameter in adapter_parameters(model)}
    assert all((norm > 0) == key.endswith("b_OR") for key, norm in norms.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_a_whole_model_changes_no_gradient(reentrant):
    plain = tuned(dtype=torch.bfloat16).train()
    kept = copy.deepcopy(plain)
    kept.gradient_checkpointing_enable({"use_reentrant": reentrant})
    kept.enable_input_require_grads()  # the reentrant kind needs an input that asks for a gradient
    assert tiny.train_step(plain) == tiny.train_step(kept)
    for (key, one), (_, two) in zip(adapter_parameters(plain), adapter_parameters(kept), strict=True):
        assert torch.equal(one.grad, two.grad), key


# --- what the settings do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scaling", "rank", "alpha", "wanted"), [
    ("standard", 8, 16, 2.0), ("standard", 64, 16, 0.25), ("rslora", 64, 16, 2.0), ("rslora", 16, 8, 2.0),
])  # fmt: skip
def test_the_scale_is_alpha_over_rank_or_over_its_root(scaling, rank, alpha, wanted):
    model = tuned(rank=rank, alpha=alpha, scaling=scaling)
    assert lora_report(model, "default").scales == (wanted,)
    for _, layer in lora_layers(model):
        adapter = layer.adapters["default"]
        assert adapter.scale == wanted
        update = wanted * adapter.b_OR.double() @ adapter.a_RI.double()
        assert tiny.relative(adapter.delta(), update) < 1e-6
        x = torch.randn(5, layer.shape[1], generator=torch.Generator().manual_seed(0))
        assert tiny.relative(layer(x) - layer.base(x), x.double() @ update.T) < 1e-5  # a difference of fp32 sums


def test_dropout_acts_in_training_and_not_in_evaluation():
    plain, dropping = tuned(), tuned(dropout=0.5)
    assert torch.equal(tiny.logits(plain), tiny.logits(dropping))
    torch.manual_seed(0)
    one = tiny.logits(dropping.train())
    two = tiny.logits(dropping)
    torch.manual_seed(0)
    assert torch.equal(tiny.logits(dropping), one)
    assert not torch.equal(one, two)
    with adapters_off(dropping):
        assert torch.equal(tiny.logits(dropping), tiny.logits(dropping))


def test_a_model_in_evaluation_mode_stays_in_it_when_an_adapter_is_added():
    model = tiny.quantized(tiny.llama())
    assert not model.training
    add_lora(model, rank=4, dropout=0.5, dtype=torch.float32)
    tiny.wake(model)
    assert torch.equal(tiny.logits(model), tiny.logits(model))
    assert not any(module.training for module in model.modules())


def test_dropout_keeps_the_mean():
    layer = next(iter(dict(lora_layers(tuned(targets="re:.*0.mlp.up_proj", dropout=0.25))).values()))
    x = torch.randn(1, 48, generator=torch.Generator().manual_seed(0))
    wanted = layer(x) - layer.base(x)
    torch.manual_seed(0)
    found = (layer.train()(x.expand(20_000, -1)) - layer.base(x)).mean(0, keepdim=True)
    # The mean of 20,000 draws is within 1/141 of a single draw's spread, which is about the effect itself.
    assert tiny.relative(found, wanted) < 0.03


def test_rank_and_alpha_patterns_reach_the_layers_that_they_name():
    model = tuned(rank_pattern={"q_proj": 2, "re:.*layers.1.mlp.*": 8}, alpha_pattern={"q_proj": 32})
    adapters = {name: layer.adapters["default"] for name, layer in lora_layers(model)}
    settings = {name: (adapter.rank, adapter.alpha) for name, adapter in adapters.items()}
    for name, found in settings.items():
        rank = 2 if name.endswith("q_proj") else 8 if "1.mlp" in name else 4
        assert found == (rank, 32 if name.endswith("q_proj") else 8), name
    assert len(set(settings.values())) == 3


@pytest.mark.parametrize(("init", "spread"), [("default", lambda width, rank: (3 * width) ** -0.5),
                                              ("gaussian", lambda width, rank: 1 / rank)])  # fmt: skip
def test_a_starts_with_the_spread_that_its_init_says(init, spread):
    model = tiny.quantized(tiny.llama())
    add_lora(model, rank=32, init=init, dtype=torch.float32)
    for _, layer in lora_layers(model):
        a = layer.adapters["default"].a_RI.detach()
        wanted = spread(a.shape[1], 32)
        assert abs(a.std().item() / wanted - 1) < 0.1  # at least 1,536 draws: 4 standard deviations are 0.07
        assert init != "default" or a.abs().max() <= a.shape[1] ** -0.5


def test_a_layer_starts_the_same_whatever_else_is_adapted():
    alone, among = tiny.quantized(tiny.llama()), tiny.quantized(tiny.llama())
    add_lora(alone, targets="down_proj", rank=4)
    add_lora(among, targets="all-linear", rank=4)
    found = matrices(among)
    assert len(found) > len(matrices(alone))
    for key, value in matrices(alone).items():
        assert torch.equal(value, found[key])


def test_the_start_depends_on_the_seed_and_not_on_the_global_random_state():
    starts = []
    for seed, noise in [(0, 1), (0, 2), (1, 1)]:
        model = tiny.quantized(tiny.llama())
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        add_lora(model, rank=4, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        starts.append(matrices(model))
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])
    assert not any(torch.equal(starts[0][key], starts[2][key]) for key in starts[0] if key.endswith("a_RI"))


def test_no_two_layers_start_alike():
    a = [value for key, value in matrices(tuned()).items() if key.endswith("a_RI")]
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(a, 2) if one.shape == two.shape)


def test_adapters_are_bf16_unless_asked_otherwise():
    model = tiny.quantized(tiny.llama(), dtype=torch.float32)
    add_lora(model, rank=4)
    add_lora(model, rank=4, name="wide", dtype=torch.float32)
    assert {p.dtype for _, p in adapter_parameters(model)} == {torch.bfloat16}
    assert {p.dtype for _, p in adapter_parameters(model, "wide")} == {torch.float32}
    use_adapter(model, "default")
    assert tiny.logits(model).dtype == torch.float32
    tiny.train_step(model.train())
    assert {p.grad.dtype for _, p in adapter_parameters(model)} == {torch.bfloat16}


@pytest.mark.parametrize("make", MAKERS)
def test_the_report_counts_by_formula(make):
    dense = make()
    total = dense.num_parameters()
    model = tiny.quantized(dense)
    add_lora(model, rank=2, name="other")
    report = add_lora(model, rank=4)
    assert report.total == total
    assert report.trainable == sum(4 * sum(layer.shape) for _, layer in lora_layers(model))
    assert report.trainable == sum(p.numel() for key, p in model.named_parameters() if ".adapters.default." in key)
    assert report.unmatched == ("lm_head",)


# --- where they go ----------------------------------------------------------------------------------------------------

ATTENTION, MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(("targets", "leaves", "count"), [
    ("all-linear", ATTENTION | MLP, 14), ("attention", ATTENTION, 8), ("mlp", MLP, 6), ("head", {"lm_head"}, 1),
    ("lm_head", {"lm_head"}, 1), (["all-linear", "head"], ATTENTION | MLP | {"lm_head"}, 15),
    (["q_proj", "down_proj"], {"q_proj", "down_proj"}, 4), ("model.layers.1.mlp.up_proj", {"up_proj"}, 1),
    (r"re:.*\.1\..*_proj", ATTENTION | MLP, 7), (["attention", "re:.*gate.*"], ATTENTION | {"gate_proj"}, 10),
])  # fmt: skip
def test_targets_of_a_llama(targets, leaves, count):
    report = add_lora(tiny.quantized(tiny.llama()), rank=2, targets=targets)
    assert {name.rpartition(".")[2] for name in report.matched} == leaves
    assert len(report.matched) == count
    assert len(report.matched) + len(report.unmatched) == 15
    assert not set(report.matched) & set(report.unmatched)


@pytest.mark.parametrize(("targets", "count"), [("all-linear", 8), ("attention", 4), ("mlp", 4), ("c_proj", 4)])
def test_targets_of_a_gpt2(targets, count):
    report = add_lora(tiny.quantized(tiny.gpt2()), rank=2, targets=targets)
    assert len(report.matched) == count
    assert targets != "attention" or all(".attn." in name for name in report.matched)


@pytest.mark.parametrize("targets", ["head", "lm_head"])
def test_a_tied_head_is_refused_and_says_why(targets):
    for model in (tiny.gpt2(), tiny.llama(tie_word_embeddings=True)):
        with pytest.raises(AdapterError, match=r"tied in this model.*untie_head=true"):
            add_lora(tiny.quantized(model), targets=targets)


def test_an_adapter_on_the_head_changes_only_the_logits():
    model = tiny.quantized(tiny.llama())
    ids = tiny.tokens()
    hidden, base = model.model(ids).last_hidden_state, tiny.logits(model)
    add_lora(model, rank=4, targets="head", dtype=torch.float32)
    tiny.wake(model)
    assert not torch.equal(tiny.logits(model), base)
    assert torch.equal(model.model(ids).last_hidden_state, hidden)


@pytest.mark.parametrize(("targets", "message"), [
    ("q_porj", "'q_porj'.*did you mean q_proj"),
    (["q_proj", "up_prj"], "'up_prj'.*did you mean up_proj"),
    ("all_linear", "did you mean all-linear"),
    ("re:.*nothing.*", r"'re:\.\*nothing\.\*'.*it has: down_proj"),
    ("zzz", "it has: down_proj, gate_proj"),
    ("embed_tokens", "not a linear layer"),
    ("norm", "not a linear layer"),
    ([], "targets is empty"),
    ("re:(", "regular expression"),
])  # fmt: skip
def test_a_pattern_that_matches_nothing_is_one_error_that_names_the_nearest(targets, message):
    model = tiny.quantized(tiny.llama())
    with pytest.raises(AdapterError, match=message) as caught:
        add_lora(model, targets=targets)
    assert "\n" not in str(caught.value)
    assert not list(lora_layers(model)), "a refusal leaves the model as it was"


def test_all_wrong_targets_are_told_at_once():
    with pytest.raises(AdapterError, match=r"q_porj.*up_prj"):
        add_lora(tiny.quantized(tiny.llama()), targets=["q_porj", "down_proj", "up_prj"])


@pytest.mark.parametrize(("settings", "message"), [
    ({"rank": 0}, "rank"), ({"rank": -1}, "rank"), ({"rank": 8.0}, "rank.*8.0"), ({"rank": True}, "rank"),
    ({"alpha": 0}, "alpha"), ({"alpha": -1}, "alpha"), ({"alpha": NAN}, "alpha"), ({"alpha": INFINITY}, "alpha"),
    ({"dropout": -0.1}, "dropout"), ({"dropout": 1.0}, "dropout"), ({"dropout": NAN}, "dropout"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"), ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern"), ({"alpha_pattern": {"q_proj": NAN}}, "alpha_pattern"),
    ({"rank_pattern": {"q_porj": 4}}, "rank_pattern names 'q_porj'.*did you mean q_proj"),
    ({"name": "a.b"}, "name"), ({"name": ""}, "name"), ({"name": "keys"}, "name"),
    ({"scaling": "rs"}, "scaling"), ({"init": "zeros"}, "init"),
])  # fmt: skip
def test_an_impossible_setting_is_refused_and_leaves_the_model_as_it_was(settings, message):
    model = tiny.quantized(tiny.llama())
    with pytest.raises(AdapterError, match=message):
        add_lora(model, **settings)
    assert not list(lora_layers(model))


# --- several on one base ----------------------------------------------------------------------------------------------


def test_two_adapters_live_on_one_base_and_are_switched_between():
    model = tiny.quantized(tiny.llama())
    base = tiny.logits(model)
    add_lora(model, name="french", targets="attention", rank=4, dtype=torch.float32)
    tiny.wake(model, name="french", seed=1)
    french = tiny.logits(model)
    add_lora(model, name="german", targets=["mlp", "q_proj"], rank=2, alpha=16, dtype=torch.float32)
    assert torch.equal(tiny.logits(model), base), "the new one starts at zero, and alone"
    tiny.wake(model, name="german", seed=2)
    german = tiny.logits(model)
    assert not torch.equal(french, german)
    for _ in range(2):
        use_adapter(model, "french")
        assert torch.equal(tiny.logits(model), french)
        use_adapter(model, "german")
        assert torch.equal(tiny.logits(model), german)
    with adapters_off(model):
        assert torch.equal(tiny.logits(model), base)


def test_training_one_adapter_leaves_the_other_alone():
    model = tuned(name="first")
    add_lora(model, name="second", rank=4, dtype=torch.float32)
    before = matrices(model, "first")
    tiny.train_step(model.train(), lr=1.0)
    assert any(p.grad.norm() > 0 for _, p in adapter_parameters(model, "second"))
    assert all(torch.equal(value, before[key]) for key, value in matrices(model, "first").items())
    assert all(p.grad is None for _, p in adapter_parameters(model, "first"))


def test_a_name_that_is_taken_or_not_there_is_refused(tmp_path):
    model = tuned()
    with pytest.raises(AdapterError, match="already"):
        add_lora(model)
    with pytest.raises(AdapterError, match=r"no adapter 'french'.*default"):
        use_adapter(model, "french")
    with pytest.raises(AdapterError, match=r"no adapter 'french'.*default"):
        save_adapter(model, tmp_path / "x", name="french")
    save_adapter(model, tmp_path / "a")
    with pytest.raises(AdapterError, match="already"):
        load_adapter(model, tmp_path / "a")
    with pytest.raises(AdapterError, match="name"):
        load_adapter(model, tmp_path / "a", name="a.b")
    with pytest.raises(AdapterError, match="there are: none"):
        use_adapter(tiny.quantized(tiny.llama()), "default")


def test_a_deleted_adapter_is_gone_and_the_others_stay():
    model = tuned(name="first")
    tiny.wake(model, name="first", seed=1)
    first = tiny.logits(model)
    add_lora(model, name="second", rank=4, dtype=torch.float32)
    tiny.wake(model, name="second", seed=3)
    use_adapter(model, "first")
    delete_adapter(model, "second")
    assert torch.equal(tiny.logits(model), first)
    assert {name for _, layer in lora_layers(model) for name in layer.adapters} == {"first"}
    delete_adapter(model, "first")
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.quantized(tiny.llama())))
    with pytest.raises(AdapterError, match=r"no adapter 'first'.*none"):
        delete_adapter(model, "first")


def test_a_combination_is_the_weighted_sum_of_the_updates(tmp_path):
    """Against the sum of the dense updates, in the layers that one, the other or both of them cover."""
    model = tuned(name="one", targets="attention", rank=4)
    tiny.wake(model, name="one", seed=1)
    add_lora(model, name="two", targets=["mlp", "q_proj"], rank=2, alpha=16, scaling="rslora", dtype=torch.float32)
    tiny.wake(model, name="two", seed=2)
    combine_adapters(model, {"one": 0.5, "two": -2.0}, "both")
    for _, layer in lora_layers(model):
        wanted = sum(w * layer.adapter(n).delta() for n, w in (("one", 0.5), ("two", -2.0)) if n in layer.adapters)
        assert tiny.relative(layer.adapter("both").delta(), wanted) < 1e-6
    mixed = tiny.logits(model)
    use_adapter(model, "one")
    assert tiny.relative(mixed, tiny.logits(model)) > 0.01
    save_adapter(model, tmp_path / "both", name="both")
    again = tiny.quantized(tiny.llama())
    load_adapter(again, tmp_path / "both")
    assert torch.equal(tiny.logits(again), mixed)


@pytest.mark.parametrize(("weights", "name", "message"), [
    ({"first": 1.0, "thrid": 1.0}, "new", "no adapter 'thrid'"), ({"first": 1.0}, "first", "already"),
    ({}, "new", "nothing to combine"), ({"norms": 1.0}, "new", "DoRA"),
])  # fmt: skip
def test_an_impossible_combination_is_refused(weights, name, message):
    model = tuned(name="first", targets="attention")
    add_lora(model, name="norms", targets="attention", rank=2, dora=True)
    with pytest.raises(AdapterError, match=message):
        combine_adapters(model, weights, name)
    assert "new" not in {known for _, layer in lora_layers(model) for known in layer.adapters}


def test_a_rank_above_both_widths_is_noted_and_not_refused():
    assert add_lora(tiny.quantized(tiny.llama()), rank=48, targets="q_proj").notes == ()
    (note,) = add_lora(tiny.quantized(tiny.llama()), rank=49, targets="q_proj").notes
    assert "rank 49 is above the smaller width of model.layers.0.self_attn.q_proj (and of 1 more layer)" in note


# --- DoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_dora_starts_as_the_base_bit_for_bit_and_trains_its_norms(kind):
    """A model without biases: a bias is added after the norms, which costs a rounding."""
    model = tiny.quantized(tiny.llama(), kind)
    base = tiny.logits(model)
    report = add_lora(model, rank=4, alpha=8, dora=True, dtype=torch.bfloat16)
    assert torch.equal(tiny.logits(model), base)
    norms = {key: p for key, p in adapter_parameters(model) if key.endswith("magnitude_O")}
    assert len(norms) == len(report.matched)
    assert {p.dtype for p in norms.values()} == {torch.float32}
    tiny.wake(model)
    tiny.train_step(model, lr=1e-2)
    assert all(p.grad is not None and p.grad.norm() > 0 for p in norms.values())
    assert tiny.relative(tiny.logits(model), base) > 0.01
    with adapters_off(model):
        assert torch.equal(tiny.logits(model), base)


@pytest.mark.parametrize("make", MAKERS)
def test_the_merged_weight_of_a_dora_has_the_norms_that_were_trained(make):
    model = tuned(make, dora=True)
    for _, layer in lora_layers(model):
        adapter, weight = layer.adapter("default"), decode(layer.base, torch.float32)
        merged = (weight + adapter.delta()) * adapter.row_factors(weight)[:, None]
        assert tiny.relative(merged.norm(dim=1), adapter.magnitude_O) < 1e-6


# --- PEFT, both ways --------------------------------------------------------------------------------------------------

VARIANTS = [
    {},
    {"scaling": "rslora", "rank": 9, "alpha": 6},
    {"rank_pattern": {"q_proj": 2, "re:.*1.*down_proj": 8}, "alpha_pattern": {"re:.*0.*": 3}, "targets": "all-linear"},
    {"targets": ["re:.*1.self_attn.*", "model.layers.0.mlp.up_proj"], "scaling": "rslora"},
    {"targets": ["head", "v_proj"]},
    {"dora": True},
    {"dora": True, "scaling": "rslora", "rank_pattern": {"q_proj": 2}},
]
GPT2_VARIANTS = [{}, {"rank_pattern": {"c_attn": 2}, "alpha_pattern": {"re:.*0.mlp.*": 3}, "scaling": "rslora"},
                 {"targets": "attention"}, {"dora": True}]  # fmt: skip
PAIRS = [(tiny.llama, v) for v in VARIANTS] + [(tiny.gpt2, v) for v in GPT2_VARIANTS]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(("make", "lora"), PAIRS)
def test_what_we_save_peft_loads_with_the_same_logits(make, lora, kind, tmp_path):
    model = tuned(make, kind, **lora)
    save_adapter(model, tmp_path / "adapter")
    dense = tiny.read_out(make(), model)
    base = tiny.logits(dense)
    theirs = PeftModel.from_pretrained(dense, tmp_path / "adapter")
    assert tiny.relative(tiny.logits(theirs), base) > 0.01
    assert tiny.relative(tiny.logits(model), tiny.logits(theirs)) < PEFT_RTOL
    adapted = [name for name, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    covered = {name.removeprefix("base_model.model.") for name in adapted}
    assert covered == {name for name, _ in lora_layers(model)}


PEFT_CONFIGS = [
    (tiny.llama, {"target_modules": "all-linear"}),
    (tiny.llama, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "r": 9}),
    (tiny.llama, {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2},
                  "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3}}),
    (tiny.llama, {"target_modules": r".*\.1\..*proj"}),
    (tiny.llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    (tiny.llama, {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    (tiny.llama, {"target_modules": ["lm_head", "q_proj"]}),
    (tiny.gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    (tiny.gpt2, {"target_modules": "all-linear", "fan_in_fan_out": True, "use_rslora": True}),
    (tiny.llama, {"target_modules": "all-linear", "use_dora": True}),
    (tiny.gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
]  # fmt: skip


@pytest.mark.parametrize(("make", "settings"), PEFT_CONFIGS)
def test_what_peft_saves_we_load_with_the_same_logits(make, settings, tmp_path):
    base = tiny.quantized(make())
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "init_lora_weights": False, **settings})
    theirs = get_peft_model(tiny.read_out(make(), base), config).eval()
    tiny.wake_peft(theirs)
    theirs.save_pretrained(tmp_path)
    plain = tiny.logits(base)
    report = load_adapter(base, tmp_path)
    ours = tiny.logits(base)
    assert report.trainable == sum(p.numel() for key, p in theirs.named_parameters() if ".lora_" in key)
    assert tiny.relative(ours, plain) > 0.003
    assert tiny.relative(ours, tiny.logits(theirs)) < PEFT_RTOL


@pytest.mark.parametrize(("make", "lora"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_we_save_we_load_bit_for_bit(make, lora, dtype, tmp_path):
    model = tuned(make, **{"dropout": 0.1, **lora, "dtype": torch.float32})
    for key, parameter in adapter_parameters(model):
        if not key.endswith("magnitude_O"):  # DoRA's norms are fp32 whatever A and B are
            parameter.data = parameter.data.to(dtype)
    save_adapter(model, tmp_path / "adapter")
    again = tiny.quantized(make())
    load_adapter(again, tmp_path / "adapter", name="other")
    assert {p.dtype for key, p in adapter_parameters(again, "other") if not key.endswith("magnitude_O")} == {dtype}
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    first = {name: layer.adapters["default"] for name, layer in lora_layers(model)}
    for name, layer in lora_layers(again):
        found, wanted = layer.adapters["other"], first[name]
        assert (found.rank, found.alpha, found.scale, found.dropout) == (wanted.rank, wanted.alpha, wanted.scale, 0.1)


def test_one_of_two_adapters_is_saved_and_not_the_other(tmp_path):
    model = tuned(name="french", targets="attention")
    french = tiny.logits(model)
    add_lora(model, name="german", rank=2)
    save_adapter(model, tmp_path / "french", name="french")
    again = tiny.quantized(tiny.llama())
    report = load_adapter(again, tmp_path / "french")
    assert len(report.matched) == 8
    assert torch.equal(tiny.logits(again), french)


# --- which base -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_the_fingerprint_is_of_the_checkpoint_and_not_of_how_it_is_held(make):
    prints = {mark(make())}
    for kind in ("nf4", "fp4", "int8", "none"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            prints.add(mark(tiny.quantized(make(), kind, dtype=dtype)))
    prints.add(mark(tuned(make, dtype=torch.bfloat16)))
    assert len(prints) == 1
    assert mark(make(seed=1)) not in prints


def test_an_adapter_of_another_base_of_the_same_shape_is_refused_unless_forced(tmp_path):
    save_adapter(tuned(), tmp_path / "adapter")
    stranger = tiny.quantized(tiny.llama(seed=1))
    with pytest.raises(AdapterError, match=r"another base.*force"):
        load_adapter(stranger, tmp_path / "adapter")
    for has_reference in (False, True):
        with pytest.raises(AdapterError, match=r"another base.*set base\.model .* or lora\.from") as caught:
            load_start(stranger, Lora.model_validate({"from": str(tmp_path / "adapter")}), has_reference=has_reference)
        assert "force" not in str(caught.value), "a recipe has no such word"
    assert not list(lora_layers(stranger))
    assert len(load_adapter(stranger, tmp_path / "adapter", force=True).matched) == 14


def test_the_same_base_in_another_quantization_is_accepted(tmp_path):
    save_adapter(tuned(), tmp_path / "adapter")
    for kind in ("fp4", "int8", "none"):
        assert load_adapter(tiny.quantized(tiny.llama(), kind, dtype=torch.bfloat16), tmp_path / "adapter").matched


def test_the_file_says_what_it_was_trained_on_and_what_else_it_was_told(tmp_path):
    model = tuned()
    save_adapter(model, tmp_path / "adapter", provenance={"note": "of the tests"})
    with safetensors.safe_open(tmp_path / "adapter" / FILE, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["qlora_kit.base_fingerprint"] == mark(model)
    assert metadata["note"] == "of the tests"


def test_the_file_says_the_very_alphas_that_were_asked_for(tmp_path):
    assert 1 / 49 * 49 != 1, "a scale times its rank is another number"
    save_adapter(tuned(rank=49, alpha=1, rank_pattern={"q_proj": 2}), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (repr(config["lora_alpha"]), config["alpha_pattern"]) == ("1", {})
    assert set(config["rank_pattern"].values()) == {2}


# --- files that are wrong ---------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path) -> Path:
    return save_adapter(tuned(), tmp_path / "adapter")


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


LAYER = "base_model.model.model.layers.1.mlp.up_proj.lora_"
A, B = LAYER + "A.weight", LAYER + "B.weight"
STRANGE = LAYER.replace("1", "7")


def put(**tensors):
    """Replace or add tensors, named by the variables above."""
    names = {
        "a": A,
        "b": B,
        "strange_a": STRANGE + "A.weight",
        "strange_b": STRANGE + "B.weight",
        "other": "base_model.model.x",
    }
    return lambda folder: change_tensors(
        folder, lambda t: t.update({names[key]: value for key, value in tensors.items()})
    )


def poison(value):
    def change(tensors):
        tensors[A][1, 2] = value

    return change


SPOILED = {
    "missing layer": (lambda f: change_tensors(f, lambda t: [t.pop(A), t.pop(B)]),
                      "no matrices for model.layers.1.mlp.up_proj"),
    "half a layer": (lambda f: change_tensors(f, lambda t: t.pop(B)), "lora_B.weight is missing.*layers.1.mlp.up_proj"),
    "extra layer": (put(strange_a=torch.ones(4, 48), strange_b=torch.ones(176, 4)),
                    "no linear layer model.layers.7.mlp.up_proj"),
    "no layer at all": (lambda f: change_tensors(f, lambda t: t.clear()), "no matrices for"),
    "wrong width": (put(a=torch.ones(4, 49)), r"\(4, 49\).*wanted \(4, 48\)"),
    "wrong rank": (lambda f: change_config(f, r=8), r"wanted \(8, 48\)"),
    "a vector": (put(a=torch.ones(48)), r"\(48,\).*wanted \(4, 48\)"),
    "whole numbers": (put(a=torch.ones(4, 48, dtype=torch.int64)), "not a dtype of weights$"),
    "another tensor": (put(other=torch.ones(4, 48)), "not a LoRA matrix"),
    "nan": (lambda f: change_tensors(f, poison(NAN)), "lora_[AB].weight holds NaN or infinity$"),
    "infinity": (lambda f: change_tensors(f, poison(INFINITY)), "infinity"),
    "dora without its norms": (lambda f: change_config(f, use_dora=True), "lora_magnitude_vector is missing"),
    "trained biases": (lambda f: change_config(f, bias="all"), "bias='all'"),
    "whole modules": (lambda f: change_config(f, modules_to_save=["lm_head"]), "no tensors for lm_head"),
    "rows of tokens": (lambda f: change_config(f, trainable_token_indices=[5]), "no tensors for model.embed_tokens"),
    "rows of nothing": (lambda f: change_config(f, trainable_token_indices={"q_proj": [5]}),
                        "q_proj, neither embedding nor head"),
    "a token that is none": (lambda f: change_config(f, trainable_token_indices=[-1]), "trainable_token_indices"),
    "a field of the future": (lambda f: change_config(f, turbo=3), "turbo=3"),
    "half of a PiSSA": (lambda f: change_config(f, init_lora_weights="pissa_niter_16"), "start that changes the base"),
    "another method": (lambda f: change_config(f, peft_type="IA3"), "peft_type"),
    "alpha of a wrong type": (lambda f: change_config(f, lora_alpha="8"), "lora_alpha"),
    "rank of zero": (lambda f: change_config(f, r=0), "r"),
    "rank pattern of zero": (lambda f: change_config(f, rank_pattern={"up_proj": 0}), "rank_pattern"),
    "alpha pattern of a wrong type": (lambda f: change_config(f, alpha_pattern={"up_proj": "x"}), "alpha_pattern"),
    "a pattern that is none": (lambda f: change_config(f, alpha_pattern={"(": 1}), "alpha_pattern"),
    "dropout of a wrong type": (lambda f: change_config(f, lora_dropout="x"), "lora_dropout"),
    "dropout above one": (lambda f: change_config(f, lora_dropout=1.5), "lora_dropout"),
    "cut short": (lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-7]), "damaged"),
    "empty file": (lambda f: (f / FILE).write_bytes(b""), "damaged"),
    "no file": (lambda f: (f / FILE).unlink(), "missing"),
    "no config": (lambda f: (f / CONFIG).unlink(), "missing"),
    "invalid json": (lambda f: (f / CONFIG).write_text('{"r": 4,'), f"{CONFIG} cannot be read as JSON"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "LoRA"),
    "not utf-8": (lambda f: (f / CONFIG).write_bytes(b'{"r": "\xff"}'), f"{CONFIG} cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_adapter_is_one_error_and_leaves_the_model_as_it_was(adapter, case):
    model = tiny.quantized(tiny.llama())
    load_adapter(copy.deepcopy(model), adapter)
    spoil, message = SPOILED[case]
    spoil(adapter)
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(model, adapter)
    assert str(adapter) in str(caught.value)
    assert not list(lora_layers(model))


def test_fields_that_are_off_and_fields_that_change_nothing_are_let_through(adapter):
    change_config(adapter, turbo=None, trainable_token_indices=None, use_dora=False, revision="main", loftq_config={})
    report = load_adapter(tiny.quantized(tiny.llama()), adapter)
    assert report.matched
    assert report.notes == ()


def test_a_field_that_changes_nothing_is_noted_where_it_says_something(adapter):
    change_config(adapter, layers_pattern="h", megatron_core="mine", revision="main", inference_mode=False)
    (note,) = load_adapter(tiny.quantized(tiny.llama()), adapter).notes
    assert "layers_pattern='h', megatron_core='mine'" in note
    assert "revision" not in note


def test_all_faults_of_a_file_are_told_at_once(adapter):
    change_tensors(adapter, poison(NAN))
    for case in ("extra layer", "wrong rank"):
        SPOILED[case][0](adapter)
    with pytest.raises(AdapterError, match=r"NaN.*no linear layer.*wanted \(8"):
        load_adapter(tiny.quantized(tiny.llama()), adapter)


def test_a_pickled_adapter_is_not_read(adapter):
    torch.save(load_file(adapter / FILE), adapter / "adapter_model.bin")
    (adapter / FILE).unlink()
    with pytest.raises(AdapterError, match="pickled"):
        load_adapter(tiny.quantized(tiny.llama()), adapter)


def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path):
    model = tuned()
    with torch.no_grad():
        next(adapter_parameters(model))[1][0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"NaN.*layers\.0"):
        save_adapter(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


# --- complete or absent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["write_tensors", "peft_config"])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_save_that_fails_leaves_the_old_folder_or_none(failing, is_there, tmp_path, monkeypatch):
    folder, model = tmp_path / "adapter", tuned()
    if is_there:
        save_adapter(model, folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*arguments, **keywords):
        raise OSError("no space left")

    smaller = tuned(rank=2)
    with monkeypatch.context() as patch:
        patch.setattr(adapters_module, failing, fail)
        with pytest.raises(OSError, match="no space left"):
            save_adapter(smaller, folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == (["adapter"] if is_there else [])
    save_adapter(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, FILE]


def test_an_adapter_is_saved_in_the_same_bytes_each_time_whatever_its_metadata_says(tmp_path):
    said = {"base": 'a "b" \\ ü', "new\nline": "\x1f\x7f\U0001f600", "": "", "z": "a", "y": "b", "x": "c"}
    model, written = tuned(), set()
    for number in range(8):
        save_adapter(model, tmp_path / str(number), provenance=said)
        written.add((tmp_path / str(number) / FILE).read_bytes())
    assert len(written) == 1
    with safetensors.safe_open(tmp_path / "0" / FILE, "pt") as file:
        assert {key: file.metadata()[key] for key in said} == said


def test_saving_again_replaces_the_adapter(tmp_path):
    save_adapter(tuned(rank=4), tmp_path / "adapter")
    save_adapter(tuned(rank=2), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["r"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "adapter").iterdir()} <= {
        "0o644",
        "0o664",
        "0o600",
    }


def test_saving_deletes_no_file_that_is_not_an_adapters(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years")
    with pytest.raises(AdapterError, match=r"thesis\.tex.*folder of its own"):
        save_adapter(tuned(), folder)
    with pytest.raises(AdapterError, match="is a file"):
        save_adapter(tuned(), folder / "thesis.tex")
    assert (folder / "thesis.tex").read_text() == "years"


def test_peft_knows_every_field_that_we_write(adapter):
    known = set(LoraConfig.__dataclass_fields__)
    assert set(json.loads((adapter / CONFIG).read_text())) - known == set()
    assert re.match(r"0\.\d+", peft.__version__)


def test_every_field_of_peft_has_been_judged():
    """A field that this PEFT has and we do not know would be let through when off and refused when on."""
    judged = set(peft_config._NEUTRAL) | peft_config._READ | set(peft_config._INERT)
    assert set(LoraConfig.__dataclass_fields__) - judged == set()
