"""What fits a budget: the fastest of the settings that the recipe allows, for this device or for a card by its name."""

import dataclasses
import json

import pytest
import tiny
from transformers import LlamaConfig
from typer.testing import CliRunner

from qlora_kit.cli.app import app
from qlora_kit.errors import RecipeError
from qlora_kit.plan import Workload, dry_run, plan_methods
from qlora_kit.plan.cards import TOTAL_MIB, find_card
from qlora_kit.plan.devices import CUDA_RESERVE_BYTES
from qlora_kit.plan.solve import DECODE_TOKENS, Setting, settings, solve
from qlora_kit.recipe import read_recipe
from qlora_kit.train.pace import Pace

MIB = 2**20


def linear(setting: Setting) -> dict:
    """A step whose memory is known by hand: 100 of weights, and rows times 10 where blocks keep, 2 where not."""
    rows = setting.micro_batch * (10 if setting.activations == "keep" else 2)
    phases = {"forward": 100 + rows, "loss": 90 + 3 * setting.micro_batch, "backward": 105 + rows}
    return {"peak_bytes": max(phases.values()), "peak_by_phase": phases}


def chosen(budget, choices, tokens=512):
    calls = []
    solution = solve(choices, tokens, budget, lambda setting: calls.append(setting) or linear(setting))
    return solution, calls


def test_the_choices_make_the_same_step():
    choices = settings("auto", 12, 12, may_split=True)
    assert {choice.micro_batch for choice in choices} == {12, 6, 4, 3, 2, 1}
    assert {choice.micro_batch * choice.accumulation for choice in choices} == {12}
    assert {choice.activations for choice in choices} == {"keep", "recompute"}
    assert settings("keep", 5, 15, may_split=False) == [Setting("keep", 5, 3)]


@pytest.mark.parametrize("budget", range(100, 280, 7))
def test_it_is_the_fastest_that_fits_by_trying_all(budget):
    choices = settings("auto", 16, 16, may_split=True)
    solution, _ = chosen(budget, choices)
    fitting = [choice for choice in choices if linear(choice)["peak_bytes"] <= budget]
    if fitting:
        assert solution.setting == min(fitting, key=lambda choice: choice.cost(512))
    else:
        assert solution.setting == Setting("recompute", 1, 16)
    assert solution.planned == linear(solution.setting)


def test_what_more_memory_would_buy_is_the_nearest_faster_setting():
    choices = settings("auto", 16, 16, may_split=True)
    solution, _ = chosen(150, choices)
    assert solution.setting == Setting("keep", 4, 4)
    assert solution.faster == (Setting("keep", 8, 2), 185)
    assert solution.gain == pytest.approx(4 * (4 * 512 + DECODE_TOKENS) / (2 * (8 * 512 + DECODE_TOKENS)))
    assert chosen(10**6, choices)[0].faster is None


def test_where_memory_is_ample_one_dry_run_is_made_and_where_it_is_short_a_few():
    choices = settings("auto", 16, 16, may_split=True)
    assert len(chosen(10**6, choices)[1]) == 1
    assert len(chosen(100, choices)[1]) == 2
    assert len(chosen(140, choices)[1]) <= 7


def test_short_rows_would_rather_run_again_than_be_cut_up():
    """At 32 tokens decoding costs more than computing: whole micro-batches that recompute beat single kept rows."""
    whole, cut = Setting("recompute", 16, 1), Setting("keep", 1, 16)
    assert whole.cost(32) < cut.cost(32)
    assert whole.cost(2048) > cut.cost(2048)


# --- on a real dry run ---

SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 176}
PACE = Pace(10, 8, 1, 1, None, 1e-3, "the test", 1000, 1000)


CONFIG = LlamaConfig(**{**tiny.LLAMA, **SIZES})


def asked(*overrides):
    return read_recipe("default", ["base.model=x", "data.train=x", "base.device=cpu", *overrides])


def planned(*overrides):
    return plan_methods(asked(*overrides), CONFIG, PACE, 32)


def test_a_plan_within_its_budget_is_the_fastest_of_the_recipe():
    whole = Workload.of(asked(), micro_batch=8, accumulation=1, tokens=32, activations="keep")
    peak = dry_run(CONFIG, whole)["peak_bytes"]
    short = planned(f"memory.budget={round(peak * 0.7 / MIB, 3)}MiB", "memory.activations=keep")
    assert short["methods"]["qlora"]["peak_bytes"] <= 0.7 * peak + MIB / 100
    assert short["micro_batch"] * short["accumulation"] == 8
    assert short["micro_batch"] < 8
    assert short["next"]["times_as_fast"] > 1
    assert short["next"]["peak_bytes"] > short["budget"]


def test_what_the_recipe_says_is_not_changed():
    fixed = planned("train.micro_batch=8", "memory.activations=keep", "memory.budget=64KiB")
    assert (fixed["activations"], fixed["micro_batch"]) == ("keep", 8)
    assert fixed["methods"]["qlora"]["peak_bytes"] > fixed["budget"]
    assert fixed["with_quantized_head"] < fixed["methods"]["qlora"]["peak_bytes"]


# --- cards ---


@pytest.mark.parametrize(("name", "card"), [
    ("4090", "RTX 4090"), ("rtx4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("4060ti", "RTX 4060 Ti"),
    ("4060 Ti 16gb", "RTX 4060 Ti 16GB"), ("A100-SXM4-80GB", "A100 80GB"), ("h100", "H100 80GB"), ("t4", "T4"),
    ("Tesla T4", "T4"), ("RTX 3090", "RTX 3090"), ("3090 ti", "RTX 3090 Ti"), ("l40s", "L40S"),
])  # fmt: skip
def test_a_card_is_known_by_any_of_its_names(name, card):
    found = find_card(name)
    assert found.name == card
    assert found.usable_bytes == TOTAL_MIB[card] * MIB - CUDA_RESERVE_BYTES
    assert found.compute_dtype == ("float16" if card == "T4" else "bfloat16")


@pytest.mark.parametrize(("name", "message"), [
    ("A100", "A100 40GB, A100 80GB; write which"), ("RTX 9990", "nearest: RTX"), ("", "nearest"), ("gpu", "nearest"),
])  # fmt: skip
def test_a_card_that_is_none_names_the_nearest(name, message):
    with pytest.raises(RecipeError, match=message):
        find_card(name)


def test_every_card_of_the_table_finds_itself():
    for name in TOTAL_MIB:
        assert dataclasses.astuple(find_card(name))[0] == name


def test_plan_for_a_card_that_is_not_here(tmp_path):
    tiny.llama(**SIZES).config.save_pretrained(tmp_path)
    command = ["plan", "default", f"base.model={tmp_path}", f"data.train={tmp_path / 'none.jsonl'}",
               "data.max_tokens=32", "--json"]  # fmt: skip
    result = CliRunner().invoke(app, [*command, "--gpu", "rtx 4060"])
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["device_profile"] == "RTX 4060"
    assert plan["budget"] == 8188 * MIB - CUDA_RESERVE_BYTES
    assert plan["computed_in"] == "bfloat16"
    assert plan["tokens_per_s"] is None
    fixed = ["memory.activations=recompute", "train.micro_batch=1"]
    result = CliRunner().invoke(app, [*command, *fixed, "--gpu", "rtx 4060", "--budget", "100KiB"])
    assert result.exit_code == 3
    assert "the least that the recipe allows is" in result.stderr
    assert "base.quantize_head=true" in result.stderr
    result = CliRunner().invoke(app, [*command, "--gpu", "voodoo 2"])
    assert result.exit_code == 2
    assert "'voodoo 2' is not in the table" in result.stderr
