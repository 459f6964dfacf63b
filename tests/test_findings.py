"""What docs/without-regret.md says is so in the experiments' rows, and in those that `make regret` makes anew."""

import re
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).parent.parent
REGRET = ROOT / "benchmarks" / "regret"
PAGE = ROOT / "docs" / "without-regret.md"


def tables(text):
    """What stands under each mark of a table."""
    return dict(re.findall(r"<!-- table (\w+) -->\n(.*?)<!-- end -->", text, re.DOTALL))


@pytest.fixture(scope="module")
def draw():
    """`draw.py`, which knows the best arms of rows."""
    sys.path.insert(0, str(REGRET))
    try:
        yield import_module("draw")
    finally:
        sys.path.remove(str(REGRET))
        for name in ("draw", "common"):
            sys.modules.pop(name, None)


def test_tables_and_drawings_are_made_of_the_rows(draw, monkeypatch, tmp_path):
    text, drawings = PAGE.read_text(encoding="utf-8"), PAGE.with_suffix("")
    monkeypatch.setattr(draw, "PAGE", tmp_path / PAGE.name)
    monkeypatch.setattr(draw, "DRAWINGS", tmp_path / "drawings")
    draw.PAGE.write_text(re.sub(r"(?m)^\|.*\d.*\n", "", text), encoding="utf-8")
    assert tables(draw.PAGE.read_text(encoding="utf-8")) != tables(text)
    draw.main()
    assert tables(draw.PAGE.read_text(encoding="utf-8")) == tables(text)
    assert tables(text).keys() == draw.TABLES.keys()
    drawn = {path.name: path.read_bytes() for path in draw.DRAWINGS.iterdir()}
    assert {path.name: path.read_bytes() for path in drawings.iterdir()} == drawn != {}


def test_no_experiment_took_more_than_twenty_minutes(draw):
    (named,) = re.findall(r"^EXPERIMENTS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    minutes = {row["experiment"]: row["minutes"] for row in draw.read("minutes")}
    assert minutes.keys() == set(named.split())
    assert {name: took for name, took in minutes.items() if not 0 < took <= 20} == {}


def above(higher, lower):
    """Whether every seed of one arm lost more than every seed of another."""
    return min(higher) > max(lower)


def test_one_rate_is_the_best_of_all_ranks_and_above_that_of_full_fine_tuning(draw):
    rows = draw.read("rate")
    rates = {rank: draw.best(rows, method="lora", rank=rank)[0] for rank in (1, 4, 16, 128)}
    assert max(rates.values()) <= 2 * min(rates.values())
    assert 1 < rates[16] / draw.best(rows, method="full")[0] < 10


def test_ranks_end_in_their_order_and_full_fine_tuning_below(draw):
    rows = draw.read("capacity")
    ends = [draw.best(rows, method="lora", rank=rank)[1] for rank in (1, 16, 128)]
    ends.append(draw.best(rows, method="full")[1])
    assert all(above(higher, lower) for higher, lower in pairwise(ends))


def test_a_trained_embedding_is_most_of_what_adapters_leave(draw):
    rows = draw.read("embedding")
    full = fmean(draw.best(rows, method="full")[1])
    left = [fmean(draw.best(rows, method="lora", rank=128, embedding=has)[1]) - full for has in (False, True)]
    assert 0 < left[1] < 0.5 * left[0]


def test_attention_alone_is_worse_than_the_mlp_and_than_all_layers(draw):
    rows = draw.read("layers")
    at = {targets: draw.best(rows, targets=targets)[1] for targets in ("attention", "mlp", "all-linear")}
    assert above(at["attention"], [1.05 * loss for loss in at["mlp"]])
    assert above(at["attention"], [1.05 * loss for loss in at["all-linear"]])


def test_the_gap_to_full_fine_tuning_is_there_at_every_batch_and_largest_at_the_largest(draw):
    rows = draw.read("batch")
    gaps = [
        fmean(draw.best(rows, method="lora", batch=batch)[1]) - fmean(draw.best(rows, method="full", batch=batch)[1])
        for batch in (8, 32, 128)
    ]
    assert min(gaps) > 0
    assert gaps[-1] > max(gaps[:-1]) + 0.03  # twice what seeds are apart


@pytest.mark.parametrize(("base", "percent"), [("nf4", 1), ("fp4", 2), ("int8", 1)])
def test_a_quantised_base_costs_little_of_the_loss(draw, base, percent):
    rows = draw.read("quantised")
    dense, quantised = (fmean(draw.losses(rows, method="lora", base=each)) for each in ("none", base))
    assert abs(quantised / dense - 1) < percent / 100


def test_operations_are_those_of_the_formula(draw):
    assert all(row["share"] == pytest.approx(row["formula"], abs=1e-4) for row in draw.read("flops"))


def test_merged_weights_cost_nothing_and_unmerged_ones_little_for_a_token(draw):
    ms = {(row["what"], row.get("tokens")): row["ms"] for row in draw.read("adapters")}
    assert ms["merged", 1] < 1.1 * ms["base", 1] < 1.1 * ms["adapter", 1]
    assert ms["adapter", 1] < 1.5 * ms["base", 1]


def test_small_updates_are_lost_in_16_bits_alone(draw):
    moved = {(row["kind"], row["lr"]): row["moved"] for row in draw.read("masters")}
    assert moved["bf16 alone", 1e-5] < 0.7
    assert min(moved[kind, 1e-5] for kind in ("fp32 adapter", "bf16, fp32 copies", "bf16, rounded at random")) > 0.9


def test_an_adapter_that_goes_on_forgets_and_one_for_each_task_does_not(draw):
    rows = draw.read("continual")
    near = {row["how"]: [own["near"] for own in rows if own["how"] == row["how"]] for row in rows}
    learnt, kept = fmean(near["base"]) - fmean(near["A alone"]), fmean(near["base"]) - fmean(near["same adapter"])
    assert learnt > 0.3
    assert kept < 0.2 * learnt
    of_all = [fmean(near["base"]) - fmean(near[how]) for how in ("A alone, all weights", "all weights")]
    assert kept / learnt < of_all[1] / of_all[0]


def test_rank_1_learns_more_than_ia3_and_a_prompt(draw):
    rows = draw.read("methods")
    at = {method: draw.best(rows, method=method)[1] for method in ("IA3", "prompt of 20 tokens", "LoRA, rank 1")}
    assert above(at["prompt of 20 tokens"], at["IA3"])
    assert above(at["IA3"], at["LoRA, rank 1"])


def test_on_a_wider_base_too_the_best_rate_is_above_that_of_full_fine_tuning(draw):
    rows = draw.read("larger_rate")
    assert 1 < draw.best(rows, method="lora", rank=16)[0] / draw.best(rows, method="full")[0] < 10


def test_a_larger_base_says_the_same_but_for_high_ranks_which_end_level(draw):
    rows = draw.read("larger")
    at = {arm: draw.losses(rows, arm=arm) for arm in dict.fromkeys(row["arm"] for row in rows)}
    for rank in ("rank 16", "rank 128"):
        assert above(at["rank 1"], at[rank])
        assert above(at[rank], at["full fine-tuning"])
    assert abs(fmean(at["rank 128"]) / fmean(at["rank 16"]) - 1) < 0.01
    assert above(at["attention alone, rank 77"], [1.05 * loss for loss in at["MLP alone, rank 55"]])
    assert abs(fmean(at["rank 16 on nf4"]) / fmean(at["rank 16"]) - 1) < 0.01


def test_a_base_that_has_learnt_little_gives_adapters_little(draw):
    rows = draw.read("kinds")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        ends = [draw.best(rows, kind=kind, method=method)[1] for method in ("lora", "full")]
        assert above([loss / 1.1 for loss in ends[0]], ends[1])


@pytest.mark.parametrize("name", ["kinds", "classes"])
def test_the_best_rates_of_kinds_of_models_lie_inside_those_tried(draw, name):
    rows = draw.read(name)
    for kind, method in dict.fromkeys((row["kind"], row["method"]) for row in rows):
        tried = sorted({row["lr"] for row in rows if (row["kind"], row["method"]) == (kind, method)})
        assert draw.best(rows, kind=kind, method=method)[0] in tried[1:-1], (kind, method)


def test_on_a_base_that_knows_its_language_adapters_tell_texts_apart_as_full_fine_tuning_does(draw):
    rows = draw.read("classes")
    (lora_lr, lora), (full_lr, full) = (draw.best(rows, method=method) for method in ("lora", "full"))
    assert min(lora) < max(full), "seeds overlap"
    assert lora_lr > 2 * full_lr
    right = {
        method: fmean(row["accuracy"] for row in rows if (row["method"], row["lr"]) == (method, lr))
        for method, lr in (("lora", lora_lr), ("full", full_lr))
    }
    assert min(right.values()) > 0.7
    assert abs(right["lora"] - right["full"]) < 0.05


def test_ten_passes_over_a_hundred_rows_lose_some_of_what_fewer_gained_and_all_of_it_on_near_text(draw):
    rows = [row for row in draw.read("data") if row["rows"] == 100 and not {"dropout", "weight_decay"} & row.keys()]
    assert {(row["kind"], row.get("rank")) for row in rows} == {
        (kind, r) for kind in ("near", "far") for r in (4, 64, None)
    }
    for row in rows:
        step, lowest = min(row["curve"], key=lambda point: point[1])
        assert lowest < 0.95 * row["base_loss"]
        assert step < row["steps"] * 0.7
        assert row["held_out_loss"] > 1.05 * lowest
        assert row["kind"] == "far" or row["held_out_loss"] > row["base_loss"]


def test_dropout_keeps_some_of_what_ten_passes_lose_and_weight_decay_little(draw):
    rows = [row for row in draw.read("data") if (row["kind"], row["rows"], row.get("rank")) == ("near", 100, 64)]
    plain = fmean(row["held_out_loss"] for row in rows if not {"dropout", "weight_decay"} & row.keys())
    lowest = min(min(loss for _, loss in row["curve"]) for row in rows)
    ends = {(row.get("dropout"), row.get("weight_decay")): row["held_out_loss"] for row in rows}
    assert ends[0.3, None] - lowest < 0.8 * (plain - lowest)
    assert ends[None, 1.0] - lowest > 0.9 * (plain - lowest)


@pytest.mark.parametrize("kind", ["near", "far"])
def test_a_thousand_rows_twice_are_not_too_many_passes_and_more_numbers_learn_more(draw, kind):
    rows = [row for row in draw.read("data") if (row["kind"], row["rows"]) == (kind, 1000)]
    ends = {row.get("rank"): row["held_out_loss"] for row in rows}
    assert all(row["curve"][-1][1] == min(loss for _, loss in row["curve"]) for row in rows)
    assert ends[None] < ends[64] / 1.02 < ends[4] / 1.02


@pytest.mark.parametrize("kind", ["near", "far"])
def test_adapters_fall_further_behind_with_more_rows(draw, kind):
    gaps = []
    for name, count in (("data", 1000), ("rows", 10_000)):
        rows = [row for row in draw.read(name) if (row["kind"], row["rows"]) == (kind, count)]
        ends = {row.get("rank"): row["held_out_loss"] for row in rows}
        gaps.append(ends[64] / ends[None] - 1)
    assert 0 < gaps[0] < gaps[1] / 1.5
