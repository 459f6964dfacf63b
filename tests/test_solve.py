"""What fits a budget: the fastest of the settings that the recipe allows, for this device or for a card by its name."""

import dataclasses
import json
import math

import pytest
import tiny
from transformers import LlamaConfig
from typer.testing import CliRunner

from qlora_kit.cli.app import app
from qlora_kit.errors import FitError, RecipeError
from qlora_kit.plan import Workload, dry_run, plan_methods
from qlora_kit.plan.cards import TOTAL_MIB, WITHOUT_BF16, find_card
from qlora_kit.plan.choose import Workloads
from qlora_kit.plan.devices import CUDA_RESERVE_BYTES
from qlora_kit.plan.solve import Choices, Estimate, Setting, _more, solve
from qlora_kit.recipe import read_recipe
from qlora_kit.report.plan_text import plan_text
from qlora_kit.run import check_budget, plan_memory
from qlora_kit.train.activations import Blocks
from qlora_kit.train.pace import Pace
from qlora_kit.units import GIB, format_bytes

MIB = 2**20


LAYERS = 4
LEFT = {"keep": 10, "selective": 6, "recompute": 1, "offload": 0}


def by_hand(setting: Setting) -> dict:
    """A step whose memory is known by hand: 100 of weights; a row leaves 10 in a block that keeps, 6 in one that keeps
    products, 1 (its input) in one that runs again, nothing in one whose input waits elsewhere; running a block takes 12
    more a row, the loss 8."""
    rows, blocks = setting.micro_batch, setting.blocks
    standing, moments = 0, {("load", ""): 90}
    for policy, count in blocks._asdict().items():
        left = LEFT[policy] * rows
        standing += count * left
        if count:
            moments["backward", "last"] = max(moments.get(("backward", "last"), 0), 100 + standing + 12 * rows)
            moments["backward", "first"] = 100 + left + 12 * rows
    moments |= {("forward", "last"): 100 + standing + 5 * rows, ("loss", ""): 100 + standing + 8 * rows}
    peak = max(moments.values())
    block = LEFT.get(blocks.policy, 0) * rows
    return {"peak_bytes": peak, "needs_bytes": 2 * peak, "moments": moments, "block_bytes": block}


def chosen(budget, choices, tokens=512):
    calls = []
    solution = solve(choices, tokens, budget, lambda setting: calls.append(setting) or by_hand(setting))
    return solution, calls


def every_setting(choices):
    for batch in choices.batches:
        yield from (Setting(blocks, batch, choices.rows // batch) for blocks in choices.mixtures())


@pytest.mark.parametrize(
    ("changes", "ways"),
    [
        ([], [(False, 1344), (False, 64)]),
        (["base.quantize_head=true"], [(True, 1344)]),
        (["base.quantize_head=auto"], [(False, 1344), (False, 64), (True, 1344)]),
        (["base.quantize_head=true", "lora.added_tokens=[<a>]"], [(True, 1344), (True, 64)]),
        (["base.quantize_head=true", "lora.targets=[all-linear, head]"], [(True, 1344), (True, 64)]),
        (["base.quantize_head=true", "memory.loss_chunk=300"], [(True, 300)]),
        (["base.quantize_head=auto", "base.quantization=none"], [(False, 1344), (False, 64)]),
    ],
)
def test_small_chunks_are_tried_wherever_they_matter_and_a_quantised_head_last(changes, ways):
    """A quantised head is read by slices, whatever the chunk, but where an adapter is on it."""
    recipe = read_recipe("default", ["base.model=somewhere", "data.train=rows.jsonl", *changes])
    config = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=32_000)
    made = Workloads(recipe, config, 16, on_card=True, eval_shapes={}, after={}).ways()
    assert [(way.quantize_head, way.loss_chunk) for way in made] == ways


def test_the_choices_make_the_same_step():
    choices = Choices.of("auto", 12, 12, layers=LAYERS, may_split=True, has_host=True)
    assert choices.batches == (12, 6, 4, 3, 2, 1)
    found = list(every_setting(choices))
    assert {each.micro_batch * each.accumulation for each in found} == {12}
    # Every count of kept beside selective ones, and of selective and of offloaded ones.
    assert len(set(found)) == len(found) == 6 * (LAYERS + sum(range(1, LAYERS + 2)))
    assert {each.blocks.all for each in found} == {LAYERS}


def test_what_the_recipe_asks_for_is_what_all_blocks_do_and_a_cpu_offloads_nothing():
    asked = Choices.of("offload", 5, 15, layers=LAYERS, may_split=False, has_host=False)
    assert list(every_setting(asked)) == [Setting(Blocks(offload=LAYERS), 5, 3)]
    on_cpu = Choices.of("auto", 5, 15, layers=LAYERS, may_split=False, has_host=False)
    assert {each.blocks.offload for each in every_setting(on_cpu)} == {0}
    assert list(every_setting(Choices.of("auto", 1, 1, layers=0, may_split=True, has_host=True))) == [
        Setting(Blocks(), 1, 1)
    ]


@pytest.mark.parametrize("has_host", [False, True])
@pytest.mark.parametrize("budget", range(210, 920, 18))
def test_it_is_the_fastest_that_fits_by_trying_all(budget, has_host):
    choices = Choices.of("auto", 8, 8, layers=LAYERS, may_split=True, has_host=has_host)
    solution, _ = chosen(budget, choices)
    fitting = [each for each in every_setting(choices) if by_hand(each)["needs_bytes"] <= budget]
    assert solution.fits == bool(fitting)
    if fitting:
        assert solution.setting.cost(512) == min(each.cost(512) for each in fitting)
        assert solution.planned["needs_bytes"] <= budget
        least = choices.smallest(), by_hand(choices.smallest())["needs_bytes"]
        assert solution.least == (least if least[1] < solution.planned["needs_bytes"] else None)
    else:
        assert solution.setting == choices.smallest()
    assert solution.planned == by_hand(solution.setting)


def test_a_mixture_is_estimated_from_runs_in_which_all_blocks_are_alike():
    choices = Choices.of("auto", 8, 8, layers=LAYERS, may_split=True, has_host=True)
    for setting, needs in Estimate(choices, by_hand).candidates(512):
        assert needs == by_hand(setting)["needs_bytes"], setting


def test_a_mixture_is_estimated_with_the_largest_share_that_comes_on_top_of_the_peak_of_any_run():
    """What a card's libraries take is the same for all, and so the larger a share the smaller a peak."""
    choices = Choices.of("auto", 8, 8, layers=LAYERS, may_split=False, has_host=False)

    def on_card(setting):
        told = by_hand(setting)
        return told | {"needs_bytes": told["peak_bytes"] * (3 if setting.blocks.policy == "recompute" else 2)}

    for setting, needs in Estimate(choices, on_card).candidates(512):
        assert needs == 3 * by_hand(setting)["peak_bytes"], setting


def test_what_was_given_up_and_what_the_next_gib_buys_are_told():
    choices = Choices.of("auto", 8, 8, layers=LAYERS, may_split=True, has_host=True)
    solution, _ = chosen(400, choices)
    setting, needs = solution.fastest
    assert setting == Setting(Blocks(keep=LAYERS), 8, 1)
    assert needs == by_hand(setting)["needs_bytes"] > 400
    assert solution.more == solution.fastest, "all of it is less than a GiB away"
    assert (chosen(10**6, choices)[0].fastest, chosen(10**6, choices)[0].more) == (None, None)
    far, bytes_of = chosen(400, choices)[0].setting, GIB  # where a GiB buys nothing, the least that buys something
    costly = [
        (choices.fastest(512), 200 + 9 * bytes_of),
        (Setting(Blocks(recompute=1, keep=3), 8, 1), 200 + 2 * bytes_of),
    ]
    assert _more(costly, far, 512, 200) == costly[1]
    near = [(costly[0][0], 200 + bytes_of + 1), (costly[1][0], 200 + bytes_of)]
    assert _more(near, far, 512, 200) == near[1], "what a GiB more has room for, though another is faster"
    assert _more([(near[0][0], 200 + bytes_of), near[1]], far, 512, 200)[0] == near[0][0]
    assert _more([(near[0][0], 200)], far, 512, 200) is None, "what was thought to fit and did not is no advice"


def test_where_memory_is_ample_or_nothing_fits_two_dry_runs_are_made_and_where_it_is_short_a_few():
    choices = Choices.of("auto", 16, 16, layers=LAYERS, may_split=True, has_host=True)
    assert len(chosen(10**6, choices)[1]) == 2
    assert len(chosen(200, choices)[1]) == 2
    assert len(chosen(280, choices)[1]) <= 11  # least, fastest, four policies at two numbers of rows, a try


def test_one_row_at_a_time_is_not_taken_for_the_least_where_gradients_stand_between_micro_batches():
    """Whole gradients that stand through a step outweigh the activations of short rows."""
    choices = Choices.of("auto", 16, 16, layers=LAYERS, may_split=True, has_host=False, trains_weights=True)

    def with_gradients(setting):
        told = by_hand(setting)
        return told | {"needs_bytes": told["needs_bytes"] + (5000 if setting.accumulation > 1 else 0)}

    fastest = choices.fastest(512)
    needs = with_gradients(fastest)["needs_bytes"]
    assert needs < with_gradients(choices.smallest())["needs_bytes"]
    assert solve(choices, 512, needs, with_gradients).setting == fastest
    too_little = solve(choices, 512, needs - 1, with_gradients)
    assert not too_little.fits
    assert too_little.setting == fastest, "the least that there is"


def test_an_estimate_that_was_too_low_is_mended_by_the_run_itself():
    choices = Choices.of("auto", 8, 8, layers=LAYERS, may_split=True, has_host=False)

    def worse(setting):
        told = by_hand(setting)
        return told | {"needs_bytes": told["needs_bytes"] + (0 if setting.blocks.policy else 7)}

    budgets = range(260, 840, 22)
    for budget in budgets:
        solution = solve(choices, 512, budget, worse)
        assert worse(solution.setting)["needs_bytes"] <= budget
    assert any(solve(choices, 512, budget, worse).setting.blocks.policy is None for budget in budgets)


def test_an_estimate_that_was_far_too_low_moves_the_aim_by_what_it_had_too_much():
    choices = Choices.of("auto", 8, 8, layers=LAYERS, may_split=True, has_host=False)

    def far_worse(setting):
        told = by_hand(setting)
        return told | {"needs_bytes": told["needs_bytes"] + (0 if setting.blocks.policy else 60)}

    for budget in range(304, 840, 22):
        fastest = min(e.cost(512) for e in every_setting(choices) if far_worse(e)["needs_bytes"] <= budget)
        assert choices.smallest().cost(512) >= 1.5 * fastest
        assert solve(choices, 512, budget, far_worse).setting.cost(512) <= 1.1 * fastest


def test_short_rows_would_rather_run_again_than_be_cut_up():
    """At 32 tokens decoding costs more than computing: whole micro-batches that recompute beat single kept rows."""
    whole, cut = Setting(Blocks(recompute=LAYERS), 16, 1), Setting(Blocks(keep=LAYERS), 1, 16)
    assert whole.cost(32) < cut.cost(32)
    assert whole.cost(2048) > cut.cost(2048)


# --- on a real dry run ---

SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 176}
PACE = Pace(10, 8, 1, 1, None, 1e-3, "the test", 1000, 1000)


CONFIG = LlamaConfig(**{**tiny.LLAMA, **SIZES})


def asked(*overrides):
    return read_recipe("default", ["base.model=x", "data.train=x", "base.device=cpu", *overrides])


def planned(*overrides, config=CONFIG):
    return plan_methods(asked(*overrides), config, PACE, 32)


def test_a_plan_within_its_budget_is_the_fastest_of_the_recipe():
    whole = Workload.of(asked(), micro_batch=8, accumulation=1, tokens=32, activations="keep")
    peak = dry_run(CONFIG, whole)["peak_bytes"]
    short = planned(f"memory.budget={round(peak * 0.7 / MIB, 3)}MiB", "memory.activations=keep")
    assert short["methods"]["qlora"]["peak_bytes"] <= 0.7 * peak + MIB / 100
    assert short["micro_batch"] * short["accumulation"] == 8
    assert short["micro_batch"] < 8
    assert short["next"]["times_as_fast"] > 1
    assert short["next"]["peak_bytes"] > short["budget"]


@pytest.mark.slow
def test_what_the_recipe_says_is_not_changed():
    for size, helps in (({"vocab_size": 97}, False), ({"vocab_size": 16384, "hidden_size": 1024}, True)):
        config = LlamaConfig(**{**tiny.LLAMA, **SIZES, **size})
        fixed = planned("train.micro_batch=8", "memory.activations=keep", "memory.budget=64KiB", config=config)
        assert (fixed["activations"], fixed["micro_batch"]) == ("keep", 8)
        assert fixed["methods"]["qlora"]["peak_bytes"] > fixed["budget"]
        # A head of 97 rows takes less dense than the loss takes more where it is quantised.
        assert (fixed["with_quantized_head"] is not None) == helps
        assert not helps or fixed["with_quantized_head"] < fixed["methods"]["qlora"]["peak_bytes"]


def test_a_quantised_head_is_planned_where_the_recipe_asks_for_it():
    dense, quantised = (planned("memory.activations=keep", f"base.quantize_head={word}") for word in ("false", "true"))
    ends = 2 * CONFIG.vocab_size * CONFIG.hidden_size
    assert quantised["quantize_head"]
    assert quantised["parameters"]["quantized"] - dense["parameters"]["quantized"] == ends
    assert quantised["floor"]["bytes"] < dense["floor"]["bytes"]


# --- cards ---


@pytest.mark.parametrize(("name", "card"), [
    ("4090", "RTX 4090"), ("rtx4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("4060ti", "RTX 4060 Ti"),
    ("4060 Ti 16gb", "RTX 4060 Ti 16GB"), ("A100-SXM4-80GB", "A100 80GB"), ("h100", "H100 80GB"), ("t4", "T4"),
    ("Tesla T4", "T4"), ("RTX 3090", "RTX 3090"), ("3090 ti", "RTX 3090 Ti"), ("l40s", "L40S"), ("a10g", "A10G"),
    ("RTX 4060 Ti 16 GB", "RTX 4060 Ti 16GB"), ("4060ti16gb", "RTX 4060 Ti 16GB"), ("4060-ti-8gib", "RTX 4060 Ti"),
    ("4070tisuper", "RTX 4070 Ti Super"), ("a100-80g", "A100 80GB"), ("RTX 4090 24GB", "RTX 4090"), ("A10 24GB", "A10"),
    ("NVIDIA H100 80GB HBM3", "H100 80GB"), ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
    ("Tesla V100-SXM2-32GB", "V100 32GB"), ("H200 141 GB HBM3e", "H200"), ("gtx 1080", "GTX 1080"),
    ("quadro rtx 6000", "Quadro RTX 6000"), ("rtx4090laptop", "RTX 4090 Laptop"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
    ("NVIDIA GeForce RTX 5070 Ti Laptop GPU", "RTX 5070 Ti Laptop"),
    ("NVIDIA GeForce RTX 3050 6GB Laptop GPU", "RTX 3050 Laptop 6GB"), ("3050 laptop", "RTX 3050 Laptop"),
])  # fmt: skip
def test_a_card_is_known_by_any_of_its_names(name, card):
    found = find_card(name)
    assert found.name == card
    assert found.usable_bytes == TOTAL_MIB[card] * MIB - CUDA_RESERVE_BYTES
    assert found.compute_dtype == ("float16" if card in WITHOUT_BF16 else "bfloat16")


@pytest.mark.parametrize(("name", "message"), [
    ("A100", "A100 40GB, A100 80GB; specify which one"), ("RTX 9990", "nearest: RTX"), ("", "nearest"),
    ("gpu", "nearest"),
    ("3080 laptop", "RTX 3080 Laptop 8GB, RTX 3080 Laptop 16GB; specify which one"), ("24GB", "nearest"),
    ("RTX 6000", "nearest: Quadro RTX 6000, RTX 6000 Ada;"), ("4050", "nearest: RTX 4050 Laptop;"),
    ("RTX 4090 16GB", "nearest: RTX 4090, RTX 4090 Laptop;"), ("RTX 4090 Mobile", "nearest: .*RTX 4090"),
    ("H100 NVL", "nearest: H100"),
])  # fmt: skip
def test_a_card_that_is_none_names_the_nearest(name, message):
    with pytest.raises(RecipeError, match=message):
        find_card(name)


def test_a_card_of_a_laptop_has_no_more_than_its_namesake():
    laptops = [name for name in TOTAL_MIB if "Laptop" in name]
    assert len(laptops) > 10
    for name in laptops:
        desktop = TOTAL_MIB.get(name.partition(" Laptop")[0])
        assert desktop is None or TOTAL_MIB[name] <= desktop or name in ("RTX 3080 Laptop 16GB", "RTX 3080 Ti Laptop")


def test_every_card_of_the_table_finds_itself():
    for name in TOTAL_MIB:
        assert dataclasses.astuple(find_card(name))[0] == name


def test_a_budget_below_the_evaluation_says_what_training_alone_takes(tmp_path):
    tiny.llama(**SIZES).config.save_pretrained(tmp_path)
    words = [f"base.model={tmp_path}", f"data.train={tmp_path / 'none.jsonl'}", "data.max_tokens=32",
             "train.micro_batch=1", "memory.activations=recompute"]  # fmt: skip
    held, none = (plan_memory(read_recipe("default", [*words, *more])) for more in ((), ["data.eval=null"]))
    phases = held["methods"]["qlora"]["peak_by_phase"]
    others = max(peak for phase, peak in phases.items() if phase != "evaluate")
    assert phases["evaluate"] > others, "16 held-out rows stand side by side"
    with pytest.raises(FitError, match=f"training {format_bytes(others, is_enough=True)}: .*set data.eval=null"):
        check_budget({**held, "budget": 1000})
    with pytest.raises(FitError) as told:
        check_budget({**none, "budget": 1000})
    assert "data.eval" not in str(told.value)


def test_held_out_rows_go_in_smaller_batches_where_the_budget_wants_it(tmp_path):
    tiny.llama(**SIZES).config.save_pretrained(tmp_path)
    words = [f"base.model={tmp_path}", f"data.train={tmp_path / 'none.jsonl'}", "data.max_tokens=32",
             "train.micro_batch=1", "memory.activations=recompute"]  # fmt: skip

    def phases(*more):
        plan = plan_memory(read_recipe("default", [*words, *more]))
        return plan, plan["methods"]["qlora"]["peak_by_phase"]

    usual, usually = phases()
    alone, least = phases("memory.eval_tokens=1")
    assert (usual["eval_tokens"], alone["eval_tokens"]) == (2048, 1)
    assert usually["evaluate"] > 1.5 * max(least.values()), "16 held-out rows stand side by side"
    for room in (usually["evaluate"] * 0.8, max(least.values()) + 1):
        plan, within = phases(f"memory.budget={math.ceil(room)}B")
        assert least["evaluate"] <= within["evaluate"] <= room
        assert plan["eval_tokens"] == plan["pace"]["eval_tokens"] < 2048
        step = ("load", "forward", "loss", "backward", "optimizer")
        assert [within[phase] for phase in step] == [usually[phase] for phase in step]
        check_budget(plan)
        assert f"held-out rows {'one' if plan['eval_tokens'] == 1 else 'of'}" in plan_text(plan)


@pytest.mark.slow
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
