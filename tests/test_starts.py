"""Starts of A and B that come from the weight: PiSSA and LoftQ, on a base that stays as it is."""

import pytest
import tiny
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer as PeftLoraLayer

from qlora_kit.base.dense import decode
from qlora_kit.base.load import load_base
from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.export import export_merged
from qlora_kit.lora import (
    adapter_constants,
    adapter_parameters,
    adapters_off,
    add_lora,
    combine_adapters,
    load_adapter,
    lora_layers,
    save_adapter,
)
from qlora_kit.lora.init import approximation

FP32 = {"rank": 4, "alpha": 8, "dtype": torch.float32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense Llama and a dense mixture on disk."""
    root = tmp_path_factory.mktemp("models")
    for name, make in (("llama", tiny.llama), ("mixtral", tiny.mixtral), ("gpt2", tiny.gpt2)):
        make().save_pretrained(root / name)
    return root


def load(folder, kind="nf4", skip=()):
    return load_base(folder, quantization=kind, compute_dtype="float32", device="cpu", skip=skip)


def residual(weight, rank):
    """Norm of what the best approximation of that rank leaves, by LAPACK in float64."""
    return torch.linalg.svdvals(weight.double())[rank:].norm().item()


@pytest.mark.parametrize(("shape", "rank"), [((48, 176), 4), ((300, 64), 16), ((33, 33), 33), ((40, 7), 1)])
def test_the_approximation_is_the_best_there_is(shape, rank):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    left, right = approximation(weight, rank, generator)
    assert left.shape == (shape[0], rank)
    assert right.shape == (rank, shape[1])
    left_over, best = (weight - left @ right).norm().item(), residual(weight, rank)
    # 1 %: the spectrum of random numbers hardly decays, the hardest case for subspace iteration.
    assert left_over <= 1.01 * best + 1e-5 * weight.norm().item()
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_pissa_starts_as_the_base_bit_for_bit_with_the_weights_largest_directions(name, folders):
    model = load(folders / name)
    before, plain = tiny.stored(model), tiny.logits(model)
    targets = ["all-linear", "experts"] if name == "mixtral" else "all-linear"
    add_lora(model, **FP32, targets=targets, init="pissa")
    assert torch.equal(tiny.logits(model), plain)
    for _, layer in lora_layers(model):
        adapter = layer.adapter("default")
        assert adapter.b_OR.norm() > 0
        if adapter.a_RI.ndim == 2:
            weight, product = decode(layer.base, torch.float32), adapter.scale * adapter.b_OR @ adapter.a_RI
            assert (weight - product).norm().item() <= 1.01 * residual(weight, adapter.rank)
    tiny.train_step(model.train(), lr=1e-2)
    assert all(p.grad.norm() > 0 for _, p in adapter_parameters(model))
    assert tiny.relative(tiny.logits(model.eval()), plain) > 1e-4
    with adapters_off(model):
        assert torch.equal(tiny.logits(model), plain)
    after = tiny.stored(model)
    assert all(value in after.values() for value in before.values())


def test_the_gradients_of_pissa_are_those_of_the_papers_split():
    """The paper trains (W - scale B0 A0) + scale B A: another base and the same function, so the same gradients."""
    model = tiny.quantized(tiny.llama(), "none")
    add_lora(model, **FP32, init="pissa", targets=["q_proj", "down_proj"])
    split = tiny.llama()
    for name, layer in lora_layers(model):
        adapter = layer.adapter("default")
        module = split.get_submodule(name)
        with torch.no_grad():
            module.weight.sub_(adapter.scale * adapter.b_OR @ adapter.a_RI)
    split = tiny.quantized(split, "none")
    add_lora(split, **FP32, targets=["q_proj", "down_proj"])
    twins = dict(adapter_parameters(split))
    with torch.no_grad():
        for key, parameter in adapter_parameters(model):
            twins[key].copy_(parameter)
    losses = [tiny.train_step(each) for each in (model, split)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for key, parameter in adapter_parameters(model):
        assert tiny.relative(parameter.grad, twins[key].grad) < 1e-5, key


@pytest.mark.parametrize("settings", [{}, {"scaling": "rslora"}, {"dora": True}, {"rank_pattern": {"q_proj": 7}}])
def test_a_trained_pissa_is_saved_as_a_plain_adapter_that_peft_runs(settings, folders, tmp_path):
    model = load(folders / "llama")
    plain = tiny.logits(model)
    add_lora(model, **FP32, init="pissa", **settings)
    tiny.wake(model)
    save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tiny.read_out(tiny.llama(), model), tmp_path / "adapter")
    ranks = {layer.r["default"] for layer in theirs.modules() if isinstance(layer, PeftLoraLayer)}
    assert ranks == ({8, 14} if "rank_pattern" in settings else {8})
    assert tiny.relative(tiny.logits(model), plain) > 0.01
    assert tiny.relative(tiny.logits(theirs), tiny.logits(model)) < 1e-5
    again = load(folders / "llama")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    assert not list(adapter_constants(again))


def test_a_pissa_adapter_is_merged_and_combined_as_what_it_computes(folders, tmp_path):
    model = load(folders / "mixtral")
    add_lora(model, **FP32, targets=["all-linear", "experts"], init="pissa")
    tiny.wake(model)
    wanted = tiny.logits(model)
    export_merged(model, None, tmp_path / "out", dtype="float32")
    export = load(tmp_path / "out", "none")
    assert tiny.relative(tiny.logits(export), wanted) < 1e-5
    combine_adapters(model, {"default": 1.0}, "same")
    assert tiny.relative(tiny.logits(model), wanted) < 1e-5


@pytest.mark.parametrize(("name", "kind"), [("llama", "nf4"), ("llama", "int8"), ("gpt2", "nf4"), ("mixtral", "nf4")])
def test_loftq_brings_the_model_nearer_to_the_dense_one(name, kind, folders):
    model, dense = load(folders / name, kind), load(folders / name, "none")
    before = tiny.stored(model)
    wanted, plain = tiny.logits(dense), tiny.logits(model)
    targets = ["all-linear", "experts"] if name == "mixtral" else "all-linear"
    add_lora(model, rank=24, alpha=24, dtype=torch.float32, targets=targets, init="loftq")
    for layer_name, layer in lora_layers(model):
        adapter = layer.adapter("default")
        if adapter.a_RI.ndim == 2:
            lost = decode(dense.get_submodule(layer_name), torch.float32) - decode(layer.base, torch.float32)
            assert lost.norm() > 0
            assert (lost - adapter.delta()).norm().item() <= 1.01 * residual(lost, 24) + 1e-5 * lost.norm().item()
    assert tiny.relative(tiny.logits(model), wanted) < 0.8 * tiny.relative(plain, wanted)
    with adapters_off(model):
        assert torch.equal(tiny.logits(model), plain)
    after = tiny.stored(model)
    assert all(value in after.values() for value in before.values())


def test_a_layer_that_stayed_dense_has_lost_nothing_and_starts_as_by_default(folders):
    found = []
    for init in ("default", "loftq"):
        model = load(folders / "llama", skip=["down_proj"])
        add_lora(model, **FP32, init=init)
        found.append({name: layer.adapter("default") for name, layer in lora_layers(model)})
    for name, adapter in found[1].items():
        is_dense = name.endswith("down_proj")
        assert torch.equal(adapter.a_RI, found[0][name].a_RI) == is_dense
        assert bool(adapter.b_OR.any()) != is_dense


def test_loftq_with_dora_starts_at_the_same_place(folders):
    plain, dora = (load(folders / "llama") for _ in range(2))
    for model, is_dora in ((plain, False), (dora, True)):
        add_lora(model, **FP32, init="loftq", dora=is_dora)
    assert tiny.relative(tiny.logits(dora), tiny.logits(plain)) < 1e-5


def test_what_a_start_cannot_have_is_refused(folders):
    with pytest.raises(AdapterError, match=r"rank of at most 24 on model\.layers\.0\.self_attn\.k_proj, found 30"):
        add_lora(load(folders / "llama"), rank=30, init="pissa")
    with pytest.raises(AdapterError, match="not quantised"):
        add_lora(load(folders / "llama", "none"), init="loftq")
    with pytest.raises(ModelError, match="load it from their folder"):
        add_lora(tiny.quantized(tiny.llama()), init="loftq")


def test_starts_are_the_same_for_the_same_seed_and_leave_the_global_random_state_alone(folders):
    state = torch.get_rng_state()
    first, again, other = ({}, {}, {})
    for kept, seed in ((first, 0), (again, 0), (other, 1)):
        model = load(folders / "llama")
        add_lora(model, **FP32, init="loftq", seed=seed)
        kept.update({key: p.detach().clone() for key, p in adapter_parameters(model)})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
