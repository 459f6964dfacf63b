"""What a plan's own fake mode recalls is what torch makes, and a plan plays no more than it needs."""

import sys
from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Gemma3TextConfig, LlamaConfig

from qlora_kit.memory import Ledger
from qlora_kit.plan import Workload, fake, plan_methods
from qlora_kit.plan.recall import RecallingMode
from qlora_kit.recipe import Base, Data, Lora, Memory, Recipe
from qlora_kit.train.activations import Blocks
from qlora_kit.train.pace import Pace

DRY_RUN = sys.modules["qlora_kit.plan.dry_run"]
PACE = Pace(200, 2, 2, 20, None, 2e-4, "the test", 5000, 1000)
SHAPE = {**tiny.LLAMA, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 7}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "gemma3": Gemma3TextConfig(
        **SHAPE, head_dim=32, layer_types=["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]
    ),
}


BUDGETS = {"llama": "37MiB", "gemma3": "37MiB"}


def recipe(**sections):
    base = Base(model="./nowhere", device="cpu", compute_dtype="bfloat16")
    return Recipe(base=base, data=Data(train="rows.jsonl"), lora=Lora(rank=8), **sections)


def events(family, activations):
    work = Workload.of(recipe(), micro_batch=2, accumulation=2, tokens=48, activations=activations)
    history = fake.fake_run(CONFIGS[family], replace(work, on_card=True), fake.train_once)["history"]
    return [(sign, each.is_apart, each.owner(), each.as_json()) for each, sign in history.events()]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("activations", [Blocks(keep=2), Blocks(1, 1, 1, 1)])
def test_a_run_of_recalled_operators_is_the_run_of_torchs_own(family, activations, monkeypatch):
    recalled = [events(family, activations) for _ in range(2)]
    monkeypatch.setattr(fake, "RecallingMode", lambda: FakeTensorMode(allow_non_fake_inputs=True))
    assert [events(family, activations)] * 2 == recalled


def test_an_operator_is_asked_of_torch_once_for_all_that_look_alike(monkeypatch):
    asked = Counter()
    ask = FakeTensorMode.dispatch

    def counted(mode, func, *rest):
        asked[func] += 1
        return ask(mode, func, *rest)

    monkeypatch.setattr(FakeTensorMode, "dispatch", counted)
    for _ in range(3):
        with RecallingMode():
            x = torch.zeros(7, 33)
            made = x.t(), torch.mm(x, x.t()), x.add_(1), x.add_(1.0)
        assert [each.shape for each in made] == [(33, 7), (7, 7), (7, 33), (7, 33)]
        assert made[0].untyped_storage()._cdata == x.untyped_storage()._cdata
        assert made[1].untyped_storage()._cdata != x.untyped_storage()._cdata
        assert made[2] is x
    assert asked[torch.ops.aten.mm.default] == 1
    assert asked[torch.ops.aten.add_.Tensor] == 2  # 1 and 1.0 are not the same


def test_what_depends_on_values_is_left_to_torch():
    with RecallingMode():
        for value in (3, 4):
            assert torch.tensor(value).item() == value


def test_what_is_made_by_default_follows_torchs_default_dtype():
    before = torch.get_default_dtype()
    with RecallingMode():
        for dtype in (torch.float32, torch.bfloat16):
            torch.set_default_dtype(dtype)
            try:
                made = [torch.zeros(5, 11) for _ in range(2)]
            finally:
                torch.set_default_dtype(before)
            assert [each.dtype for each in made] == [dtype] * 2


def test_an_operator_that_changes_what_its_argument_looks_like_is_never_recalled():
    with RecallingMode():
        for _ in range(2):
            x = torch.zeros(3, 13)
            x.t_()
            assert x.shape == (13, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "most_runs", "most_operators"),
    [("llama", 30, 90_000), ("gemma3", 20, 90_000)],
)
def test_a_plan_under_a_budget_that_binds_plays_no_more_than_it_needs(family, most_runs, most_operators, monkeypatch):
    played, operators = [], Counter()
    play, see = DRY_RUN.fake_run, Ledger._enter

    def counted_play(*args):
        played.append(play(*args))
        return played[-1]

    def counted_see(ledger, tensor, operator):
        operators[operator] += 1
        return see(ledger, tensor, operator)

    monkeypatch.setattr(DRY_RUN, "fake_run", counted_play)
    monkeypatch.setattr(Ledger, "_enter", counted_see)
    DRY_RUN._REMEMBERED.clear()
    tight = recipe(memory=Memory(budget=BUDGETS[family]))
    plan = plan_methods(tight, CONFIGS[family], PACE, 48, "RTX 4060")
    assert plan["traded"] is not None  # the budget binds
    assert len(played) <= most_runs
    assert operators.total() <= most_operators
