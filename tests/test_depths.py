"""Shallow runs tell a deep model: what repeats in its layers is found, and every number lies on its straight line."""

import sys
from dataclasses import replace

import pytest
import tiny
import torch
from test_plan import SHAPE, WORK
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OpenAIGPTConfig,
    Qwen3MoeConfig,
)

from qlora_kit.base.architecture import build_model
from qlora_kit.base.formats import Quantization
from qlora_kit.data import Encoded, collate
from qlora_kit.errors import ModelError
from qlora_kit.memory import CATEGORIES, Ledger
from qlora_kit.plan import dry_run, plan_methods
from qlora_kit.plan.depths import Shallow, count_layers, find_shallow, peaks, role, shallow_depths, with_depth
from qlora_kit.plan.fake import fake_run, train_once
from qlora_kit.recipe import Lora, Memory, read_recipe
from qlora_kit.train.activations import Blocks
from qlora_kit.train.evaluate import rehearse_evaluation
from qlora_kit.train.pace import Pace

dry_run_room = sys.modules["qlora_kit.plan.dry_run"]  # its function bears the same name
DEEP = {**tiny.LLAMA, **SHAPE, "num_hidden_layers": 12}
LLAMA = LlamaConfig(**DEEP)
GEMMA = Gemma3TextConfig(
    **{**DEEP, "num_hidden_layers": 14}, head_dim=16, sliding_window=16,
    layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 4 + ["sliding_attention"] * 2,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=512, n_positions=64, n_embd=128, n_layer=12, n_head=4)
MIXTRAL = MixtralConfig(**{**tiny.EXPERTS, "num_hidden_layers": 10}, intermediate_size=32, num_local_experts=4)
MOE = Qwen3MoeConfig(
    **{**tiny.EXPERTS, "num_hidden_layers": 12}, moe_intermediate_size=40, num_experts=5, mlp_only_layers=[0]
)
DEEPSEEK = DeepseekV3Config(
    **{**DEEP, "num_hidden_layers": 20, "num_key_value_heads": 4}, first_k_dense_replace=3, n_routed_experts=4,
    n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=32, kv_lora_rank=16, q_lora_rank=16,
    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
)  # fmt: skip


@pytest.mark.parametrize(("kinds", "wanted"), [
    ("L" * 32, (2, 3)), ("LLLLLG" * 8, (6, 12)), ("LLLLLG" * 4 + "LL", (8, 14)), ("DDD" + "M" * 40, (8, 9)),
    ("LG" * 13, (2, 4)), ("D" + "LG" * 6, (5, 7)), ("ABCD", None), ("L" * 5, None), ("", None), ("L", None),
])  # fmt: skip
def test_what_repeats_is_found(kinds, wanted):
    assert shallow_depths(kinds) == wanted


def test_layers_of_several_kinds_under_several_policies_are_run_in_full():
    """Which kinds would repeat under which policy is told by no two depths."""
    mixed = Blocks(0, 7, keep=7)
    assert find_shallow(GEMMA, mixed, "causal") == Shallow(mixed)
    assert find_shallow(LlamaConfig(**{**DEEP, "num_hidden_layers": 14}), mixed, "causal").steps


def test_a_model_is_cut_with_its_lists_and_the_callers_own_is_left_alone():
    cut = with_depth(GEMMA, 5)
    assert (cut.num_hidden_layers, len(cut.layer_types)) == (5, 5)
    assert (GEMMA.num_hidden_layers, len(GEMMA.layer_types)) == (14, 14)


def test_blocks_have_the_same_role_at_every_depth():
    few, many = Blocks(0, 2, keep=3), Blocks(0, 5, keep=4)
    names = [[role(index, blocks) for index in range(blocks.all)] for blocks in (few, many)]
    assert names[0] == [("recompute", 0), ("recompute", -1), ("keep", 0), ("keep", -2), ("keep", -1)]
    assert set(names[0]) <= set(names[1])
    assert len(set(names[1])) == many.all


def full_run(config, work, monkeypatch):
    with monkeypatch.context() as patch:
        whole = Shallow(Blocks.of(work.activations, count_layers(config, "causal")))
        patch.setattr(dry_run_room, "find_shallow", lambda *_: whole)
        patch.setattr(dry_run_room, "_REMEMBERED", {})  # or the shallow runs would be held against themselves
        return dry_run(config, work)


FULL = {"quantization": Quantization("none"), "lora": None, "optimizer": "adamw_32bit", "master_weights": "none",
        "dtype": torch.bfloat16}  # fmt: skip


WIDE = LlamaConfig(**{**DEEP, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16})
"""Of two layers all parameters are 5 M, of all 40 M."""
MASTERS = {"master_weights": "fp32", "dtype": torch.bfloat16}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        slow(LLAMA, {"activations": "keep"}),
        (LLAMA, {"activations": "keep", **FULL}),
        (LLAMA, {"activations": "recompute", **FULL, "micro_batch": 8}),
        slow(LLAMA, {"activations": Blocks(0, 7, keep=5)}),
        slow(GEMMA, {"activations": "recompute"}),
        slow(MOE, {"activations": "recompute", **FULL}),
        (WIDE, {"activations": "recompute", **FULL, **MASTERS}),
        slow(WIDE, {"activations": "recompute", **FULL, "master_weights": "stochastic"}),
        long(WIDE, {"activations": "recompute", "lora": Lora(rank=256), **MASTERS}),
        long(LLAMA, {"activations": "recompute", "accumulation": 2}),
        slow(LLAMA, {"activations": "offload", "on_card": True}),
        long(LLAMA, {"activations": "recompute", **FULL}),
        slow(LlamaConfig(**{**DEEP, "num_hidden_layers": 30}), {"activations": Blocks(0, 10, keep=20), **FULL}),
        long(LlamaConfig(**{**DEEP, "num_hidden_layers": 40}), {"activations": Blocks(9, 20, 6, 5), "on_card": True}),
        long(GEMMA, {"activations": "keep"}),
        slow(GPT2, {"activations": "recompute"}),
        slow(MIXTRAL, {"activations": "keep"}),
        long(DEEPSEEK, {"activations": "recompute"}),
    ],
    ids=lambda each: type(each).__name__ if not isinstance(each, dict) else str(each["activations"]),
)
def test_shallow_runs_tell_what_the_full_depth_takes(config, changes, monkeypatch):
    """Asked are 0.5 %; where the line is exact, what is left is the rounding of a byte a category and run."""
    work = replace(WORK, quantization=Quantization("nf4"), micro_batch=1, eval_shape=(1, 40))
    work = replace(work, **changes)
    assert find_shallow(config, work.activations, "causal").steps, "the claim is about models that are not run in full"
    told = dry_run(config, work)
    whole = full_run(config, work, monkeypatch)
    peak = whole["peak_bytes"]
    assert told["peak_bytes"] == pytest.approx(peak, rel=0.005)
    assert told["peak_by_phase"] == pytest.approx(whole["peak_by_phase"], abs=0.005 * peak)
    assert told["resident_bytes"] == pytest.approx(whole["resident_bytes"], rel=0.005)
    assert told["host_peak_bytes"] == pytest.approx(whole["host_peak_bytes"], rel=0.005)
    assert told["parameters"] == whole["parameters"]
    for name in CATEGORIES:
        assert told["by_category"][name] == pytest.approx(whole["by_category"][name], abs=0.005 * peak), name


def test_held_out_rows_as_long_as_the_models_positions_are_rehearsed():
    config = GPT2Config(vocab_size=97, n_positions=24, n_embd=48, n_layer=2, n_head=4)
    model = build_model(config, torch.float32, "sdpa")
    rows = collate([Encoded(list(range(3, 27)), [True] * 24)], 0)
    with Ledger(model) as ledger:
        rehearse_evaluation(model, rows, phase=ledger.phase)
    assert ledger.peak_by_phase()["evaluate"] > Ledger(model).peak()


@pytest.mark.parametrize("activations", ["recompute", pytest.param("offload", marks=pytest.mark.slow)])
def test_a_model_without_blocks_is_planned_as_it_is_and_told_so(activations):
    config = OpenAIGPTConfig(vocab_size=97, n_positions=24, n_embd=48, n_layer=2, n_head=4)
    assert count_layers(config, "causal") == 0
    recipe = read_recipe("default", ["base.model=x", "data.train=x", "base.device=cpu", "base.attention=eager"])
    pace = Pace(10, 2, 1, 1, None, 1e-3, "the test", 1000, 1000)
    plan = plan_methods(recipe, config, pace, 12, eval_shapes={1: (1, 12)})
    assert (plan["activations"], plan["blocks"]) == (
        "keep",
        dict.fromkeys(("offload", "recompute", "selective", "keep"), 0),
    )
    asked = recipe.model_copy(update={"memory": Memory(activations=activations)})
    with pytest.raises(ModelError, match="has no blocks that can be recomputed"):
        plan_methods(asked, config, pace, 12)


@pytest.mark.parametrize("config", [
    OpenAIGPTConfig(vocab_size=97, n_positions=48, n_embd=48, n_layer=4, n_head=4), LlamaConfig(**tiny.LLAMA), GPT2,
], ids=lambda config: config.model_type)  # fmt: skip
def test_no_peak_is_lost_between_blocks_whatever_the_model_calls_them(config):
    work = replace(WORK, attention="eager", micro_batch=1, tokens=24, eval_shape=None)
    run = fake_run(config, work, train_once)
    assert len(run["history"].peaks_by_place()) > 2, "it is cut into places"
    assert sum(peaks(run["places"])[1].values()) == run["history"].peak_bytes()


@pytest.mark.parametrize(("at_4", "at_8", "at_12"), [(87, 95, 103), (87, 72, 87)])
def test_an_allocator_is_never_said_to_hold_less_than_the_tensors_in_it(at_4, at_8, at_12, monkeypatch):
    """A deeper run may fit into ends of segments that a shallower one left; that line would end below zero."""
    monkeypatch.setattr(dry_run_room, "_history", lambda config, work, blocks: blocks.all)
    monkeypatch.setattr(dry_run_room, "_added", {4: at_4, 8: at_8}.__getitem__)
    assert dry_run_room.added_by_allocator(LLAMA, replace(WORK, activations="recompute")) == at_12
