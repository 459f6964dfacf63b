"""The search for a learning rate: a candidate is the run that it would be alone, the pick that of all runs made whole.

What is told of losses that a test makes up needs no steps: `pretended` takes them in no time.
"""

import json
import math
import os
import signal
from collections import defaultdict
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from qlora_kit.cli.app import app
from qlora_kit.data import EncodedSet
from qlora_kit.errors import TrainingError
from qlora_kit.lora import adapter_names, adapter_parameters
from qlora_kit.recipe import read_recipe
from qlora_kit.report import rates_text
from qlora_kit.run import pick_rate, train
from qlora_kit.run.prepare import Prepared
from qlora_kit.train.evaluate import Score
from qlora_kit.watch import Watch

picking, race, build = (import_module(f"qlora_kit.run.{name}") for name in ("pick_rate", "race", "build"))
AUTO = 3.7e-3
"""Of a narrow Llama in a short run."""
PLAN = {
    "method": "qlora", "methods": {"qlora": {"by_category": {"adapters": 1, "optimizer_state": 3}}}, "budget": None,
    "needs_bytes": 0, "available_bytes": 100, "blocks": {"keep": 2}, "loss_chunk": None,
}  # fmt: skip
"""As much of one as a search reads: planning takes longer than a search that is pretended."""
RATES = [float(f"{AUTO * factor:.1e}") for factor in picking.FACTORS]


@pytest.fixture
def recipe(tmp_path, model_folder):
    rows = [{"text": f"say {word} {word}"} for word in ("cat", "dog", "owl", "bee", "ant", "elk", "hen")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "base": {"model": str(model_folder), "compute_dtype": "float32", "device": "cpu"},
        "lora": {"rank": 2, "dropout": 0.2},
        "data": {"train": "rows.jsonl", "eval": "rows.jsonl", "max_tokens": 32},
        "train": {"steps": 8, "micro_batch": 2, "accumulation": 1, "eval_every": 8, "optimizer": "adamw"},
        "memory": {"activations": "keep"},  # planned in less time
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


class Seen(Watch):
    """What a search tells, by rate, and what it does to its adapters."""

    def __init__(self):
        self.rows, self.most, self.left, self.rate = defaultdict(list), 0, {}, 0.0

    def run_begins(self, name, number, runs):
        self.rate = float(name.removeprefix("lr=").split()[0])

    def row(self, row):
        self.rows[self.rate].append((row["step"], row.get("loss"), row.get("grad_norm"), row.get("eval_loss")))

    def follow(self, monkeypatch):
        """Keep what each adapter was when it went; count how many stood at once."""
        real = race.delete_adapter

        def delete(model, name):
            self.most = max(self.most, len(adapter_names(model)))
            self.left[name] = {key: each.detach().clone() for key, each in adapter_parameters(model, name)}
            real(model, name)

        monkeypatch.setattr(race, "delete_adapter", delete)
        return self


@pytest.fixture
def pretended(monkeypatch):
    """Steps that take no time, and losses that are a function of rate and step."""

    def pretend(loss_of):
        class Pretended:
            def __init__(self, job):
                self.rate = job.pace.lr

            def take(self, step):
                at["rate"], at["step"] = self.rate, step
                return {"step": step, "loss": loss_of(self.rate, step), "grad_norm": 1.0}

        at = {}
        monkeypatch.setattr(picking, "plan_run", lambda recipe, prepared, watch: (prepared, PLAN))
        monkeypatch.setattr(race, "Steps", Pretended)
        monkeypatch.setattr(race, "rehearse", lambda *_: [])
        monkeypatch.setattr(race, "evaluate_loss", lambda *_, **__: Score(loss_of(at["rate"], at["step"]), 1, 1))

    return pretend


def near(best):
    """A loss that is lowest at a rate, at every step."""
    return lambda rate, step: 1 / step + abs(math.log(rate / best))


def cache_one(make):
    """A function that gives every caller what it gave the first."""
    made = []
    return lambda *given: made[0] if made else made.append(make(*given)) or made[0]


@pytest.mark.slow
def test_a_candidate_is_bit_for_bit_the_run_that_it_would_be_alone(recipe, tmp_path, monkeypatch):
    files, loads, real = sorted(tmp_path.rglob("*")), [], build.load_recipe_base
    monkeypatch.setattr(build, "load_recipe_base", lambda *given, **named: loads.append(1) or real(*given, **named))
    monkeypatch.setattr(build, "plan_prepared", cache_one(build.plan_prepared))
    seen = Seen().follow(monkeypatch)
    picked = pick_rate(read_recipe(recipe), watch=seen)
    assert len(loads) == 1
    assert seen.most == len(RATES), "they stood side by side"
    assert sorted(tmp_path.rglob("*")) == files, "nothing is left on disk"

    alone, best = tmp_path / "alone", picked.best
    settings = [f"train.lr={best}", "train.schedule=constant", "train.warmup=0", f"output={alone}"]
    train(read_recipe(recipe, settings))
    metrics = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    own = [(row["step"], row["loss"], row["grad_norm"], None) for row in metrics if "loss" in row]
    assert [row for row in seen.rows[best] if row[1] is not None] == own
    assert next(tried.loss for tried in picked.tried if tried.rate == best) == metrics[-1]["eval_loss"]
    trained = load_file(alone / "adapter" / "adapter_model.safetensors")
    left = {key: each for key, each in seen.left[f"rate-{RATES.index(best)}"].items() if key.endswith("b_OR")}
    assert len(left) == 14
    for key, b_OR in left.items():
        assert torch.equal(b_OR, trained[f"base_model.model.{key.removesuffix('.b_OR')}.lora_B.weight"])


@pytest.mark.slow
def test_the_pick_is_that_of_all_rates_trained_to_the_end_in_half_of_their_steps(recipe, monkeypatch):
    checked = read_recipe(recipe)
    picked = pick_rate(checked)
    assert [tried.rate for tried in picked.tried] == RATES
    assert sorted(tried.steps for tried in picked.tried) == [2, 2, 2, 4, 4, 8, 8]
    monkeypatch.setattr(picking, "_side_by_side", lambda plan: 1)
    seen = Seen().follow(monkeypatch)
    whole = pick_rate(checked, watch=seen)
    assert seen.most == 1, "one after another, where memory holds no two"
    assert {tried.steps for tried in whole.tried} == {8}
    assert picked.best == whole.best == min(whole.tried, key=lambda tried: tried.loss).rate


def test_each_turn_but_the_first_is_for_the_better_half_and_twice_as_long():
    assert race._turns(60, 7) == [(15, 7), (30, 4), (60, 2)]
    assert race._turns(2, 3) == [(1, 3), (2, 2)], "a turn has a step at least"


def test_the_best_is_the_lowest_loss_of_those_that_got_all_steps_and_of_equals_the_lowest_rate():
    raced = object.__new__(race.Race)
    raced._steps, lost = 8, race.Tried(0.4, 8, None, "loss is not finite")
    raced.tried = [race.Tried(0.1, 4, 1.0), race.Tried(0.3, 8, 2.0), race.Tried(0.2, 8, 2.0), lost]
    assert raced.best == 0.2


def test_candidates_are_judged_by_rows_from_all_over_the_held_out_set(monkeypatch):
    monkeypatch.setattr(race, "set_activation_policy", lambda *_: None)
    prepared = Prepared(None, None, EncodedSet(), EncodedSet(rows=list(range(200))), None, "apart", 1)
    held_out = race.Race(None, prepared, PLAN, None, None, None, 8).held_out
    assert len(held_out) == race.MOST_ROWS
    assert held_out[0] == 0
    assert {after - before for before, after in pairwise([*held_out, 200])} == {3, 4}


def test_a_pick_of_a_short_search_is_told_for_the_longer_run_that_it_is_for():
    def told(steps, run_steps):
        return picking.PickedRate([], 3e-3, steps, run_steps, 1e-3, None, 0).in_longer_run

    assert [told(100, 101), told(100, 100), told(101, 400), told(20, 400)] == [2e-3, None, None, 2e-3]


def test_memory_says_how_many_stand_side_by_side():
    counts = [
        picking._side_by_side({**PLAN, "needs_bytes": 20, "budget": 20 + more, "available_bytes": 0})
        for more in (0, 3, 4, 23)
    ]
    assert counts == [1, 1, 2, 6]
    assert picking._side_by_side({**PLAN, "needs_bytes": 20, "available_bytes": 44}) == 7


def test_a_rate_that_comes_apart_is_out_and_a_best_at_the_end_is_looked_beyond(recipe, pretended):
    pretended(lambda rate, step: math.inf if rate > AUTO and step == 2 else near(RATES[0] / 2)(rate, step))
    picked = pick_rate(read_recipe(recipe))
    further = [float(f"{RATES[0] / 2:.1e}"), float(f"{RATES[0] / 4:.1e}")]
    assert [tried.rate for tried in picked.tried] == [*reversed(further), *RATES]
    assert picked.best == further[0]
    assert [(tried.steps, tried.failed) for tried in picked.tried[-3:]] == [(1, "loss is not finite at step 2")] * 3
    text = rates_text(picked.as_json())
    assert "out: loss is not finite at step 2" in text
    assert "That is the end" not in text
    assert text.splitlines()[-1] == f"train.lr={further[0]:g}"


def test_a_search_that_finds_no_end_or_no_rate_says_so(recipe, pretended):
    pretended(near(1e-9))
    picked = pick_rate(read_recipe(recipe, ["train.steps=400", "train.lr=0.01", "data.eval=null"]), most_steps=4)
    assert len(picked.tried) == len(RATES) + picking.MOST_FURTHER
    assert picked.best == picked.tried[0].rate
    assert picked.tried[0].loss == near(1e-9)(picked.best, 4), "the mean of the last quarter of the training losses"
    text = " ".join(rates_text(picked.as_json()).split())
    assert "has the lowest training loss after 4 steps" in text
    assert "auto means 0.0025, and the recipe has 0.01." in text
    assert "That is the end of the rates tried: lower ones may be better still." in text
    assert "about 1.5 times that of longer ones (LoRA Without Regret), and this run has 400" in text
    pretended(lambda rate, step: math.nan)
    with pytest.raises(TrainingError, match="all 7 learning rates diverged"):
        pick_rate(read_recipe(recipe))


def test_a_rate_whose_held_out_loss_is_no_number_is_out(recipe, pretended, monkeypatch):
    pretended(near(AUTO))
    monkeypatch.setattr(race, "evaluate_loss", lambda *_, **__: Score(math.nan, 1, 1))
    with pytest.raises(TrainingError, match=r"all 7 .* diverged; at .* the held-out loss is not finite after step 2"):
        pick_rate(read_recipe(recipe))


def test_ctrl_c_ends_a_search_after_the_step_with_what_it_has_and_no_pick(recipe, pretended):
    def interrupted(rate, step):
        if (rate, step) == (RATES[2], 1):
            os.kill(os.getpid(), signal.SIGINT)
        return near(AUTO)(rate, step)

    pretended(interrupted)
    shown = CliRunner().invoke(app, ["sweep", str(recipe)])
    assert shown.exit_code == 130, shown.output
    assert "The search was stopped before its end: no rate is picked." in shown.output
    assert "train.lr=" not in shown.output
    assert [line.split()[1] for line in shown.output.splitlines() if line.endswith("stopped")] == [*"2210000"]


def test_the_verb_prints_a_setting_to_paste_or_one_json_object(recipe, pretended):
    pretended(near(AUTO))
    shown = CliRunner().invoke(app, ["sweep", str(recipe)])
    assert shown.exit_code == 0, shown.output
    assert shown.output.endswith("\ntrain.lr=0.0037\n")
    facts = json.loads(CliRunner().invoke(app, ["sweep", str(recipe), "--json"]).stdout)
    assert (facts["best"], facts["at_end"], len(facts["candidates"])) == (AUTO, False, 7)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resume"], "error: --resume is for a sweep over an axis"),
        (["--overwrite"], "error: --overwrite is for a sweep over an axis"),
        (["train.full_finetune=true", "base.quantization=none"], "error: train.full_finetune changes the base"),
    ],
)
def test_what_a_search_cannot_do_is_one_line(recipe, words, said):
    refused = CliRunner().invoke(app, ["sweep", str(recipe), *words])
    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[-1].startswith(said)


@pytest.mark.slow
def test_candidates_that_hold_to_a_frozen_adapter_share_it(recipe, tmp_path, monkeypatch):
    train(read_recipe(recipe, ["train.steps=2"]))
    pairs = [{"prompt": f"say {word} ", "chosen": word, "rejected": word[::-1]} for word in ("cat", "dog", "owl")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    content = yaml.safe_load(recipe.read_text())
    content["lora"] = {"from": str(tmp_path / "run"), "dropout": 0.2}
    content["data"] = {"train": "pairs.jsonl", "eval": "pairs.jsonl", "max_tokens": 32}
    content["train"] |= {"task": "dpo", "steps": 4, "eval_every": 4}
    recipe.write_text(yaml.safe_dump(content))
    seen = Seen().follow(monkeypatch)
    picked = pick_rate(read_recipe(recipe), watch=seen)
    assert seen.most == len(picking.FACTORS) + 1, "and one that all hold to"
    alone = tmp_path / "alone"
    settings = [f"train.lr={picked.best}", "train.schedule=constant", "train.warmup=0", f"output={alone}"]
    train(read_recipe(recipe, settings))
    metrics = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    assert next(tried.loss for tried in picked.tried if tried.rate == picked.best) == metrics[-1]["eval_loss"]


@pytest.mark.long
def test_on_the_quickstart_the_pick_is_within_twice_of_the_best_of_the_measured_grid():
    grid = Path(__file__).parents[1] / "benchmarks" / "results" / "learning_rate.jsonl"
    rows = [row for row in map(json.loads, grid.read_text().splitlines()) if row["steps"] == 60]
    best = min(rows, key=lambda row: row["held_out_loss"])["lr"]
    picked = pick_rate(read_recipe("quickstart", ["train.steps=60"]))
    assert 0.5 <= picked.best / best <= 2
