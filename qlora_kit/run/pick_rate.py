"""The learning rate, picked in short runs of adapters on one base (`race.py`); the lowest loss there is the pick.

Why constant: what a rate has come to after some steps then depends on these steps alone. A schedule that falls over
them would show the rates at their height to the first judgement and at their end to the last, and the warmup of a long
run would fill the first turn, where a rate that is too high is not yet itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kit.base.attention import check_attention
from qlora_kit.base.device import resolve_device, resolve_dtype
from qlora_kit.errors import RecipeError
from qlora_kit.memory import Ledger, Limit
from qlora_kit.recipe import Recipe
from qlora_kit.run.build import learn_marks, load, plan_run, settle
from qlora_kit.run.plan import one_line_if_it_does_not_fit
from qlora_kit.run.prepare import prepare
from qlora_kit.run.race import Race, Tried
from qlora_kit.run.start import as_it_starts
from qlora_kit.train.schedule import LORA_FACTOR, SHORT_FACTOR, SHORT_RUN
from qlora_kit.watch import Watch

FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""Of the automatic rate, the candidates: it is a fit over other models and other rows, and seldom off by more."""
FURTHER = 2
"""Factor to the next candidate where the best is the last on its side."""
MOST_FURTHER = 3
"""Candidates that come so at most."""
MOST_STEPS = SHORT_RUN
"""Of a candidate: below it the best rate is that of short runs, which is known to differ."""


@dataclass(frozen=True, slots=True)
class PickedRate:
    """The outcome of a search.

    Attributes:
        tried: the candidates, lowest rate first.
        best: the pick; None where the search was stopped.
        steps: that the best candidates got.
        run_steps: of the run itself.
        automatic: what `train.lr: auto` means for the run.
        asked: the rate that the recipe has; None where that is auto.
        held_out: rows that they were judged by; 0 where that was the training loss.
    """

    tried: Sequence[Tried]
    best: float | None
    steps: int
    run_steps: int
    automatic: float
    asked: float | None
    held_out: int

    @property
    def in_longer_run(self) -> float | None:
        """What the pick of a short search is worth in the run; None where that is short as well."""
        if self.best is None or not self.steps <= SHORT_RUN < self.run_steps:
            return None
        return _rounded(self.best * LORA_FACTOR / SHORT_FACTOR)

    def as_json(self) -> dict[str, Any]:
        """For a person's table, and for other programs."""
        return {
            "best": self.best,
            "at_end": self.best in (self.tried[0].rate, self.tried[-1].rate),
            "in_longer_run": self.in_longer_run,
            "candidates": [{key: getattr(each, key) for key in Tried.__slots__} for each in self.tried],
            **{key: getattr(self, key) for key in ("steps", "run_steps", "automatic", "asked", "held_out")},
        }


def pick_rate(
    recipe: Recipe, *, most_steps: int = MOST_STEPS, watch: Watch | None = None, trust_remote_code: bool = False
) -> PickedRate:
    """Find the learning rate of a run among multiples of the automatic one. Nothing is written to disk.

    Args:
        recipe: the run; what it says of rate, schedule and warmup has no effect.
        most_steps: that a candidate gets, of a run that has as many.
        watch: is told what happens; a stop that it requests ends the search after the step at hand, without a pick.
        trust_remote_code: let the model folder's own code run.

    Raises:
        RecipeError: the recipe trains every weight, so that no two candidates could share a base.
        TrainingError: all candidates came apart.
        QloraKitError: as `train`.
    """
    if recipe.train.full_finetune:
        raise RecipeError(
            "train.full_finetune changes the base, so rates cannot be tried side by side on one; give them as an axis, "
            "as in train.lr=1e-5,2e-5,4e-5"
        )
    watch, device = watch or Watch(), resolve_device(recipe.base.device)
    check_attention(recipe.base.attention, device, resolve_dtype(recipe.base.compute_dtype, device))
    asked = None if recipe.train.lr == "auto" else recipe.train.lr
    recipe = _with_constant_rate(as_it_starts(recipe))
    prepared = prepare(recipe, watch, weights=True, trust_remote_code=trust_remote_code)
    prepared, plan = plan_run(recipe, prepared, watch)
    limit, steps = Limit(device, plan["budget"]), min(prepared.pace.steps, most_steps)
    with one_line_if_it_does_not_fit(limit, plan, folder=None), limit:
        model = load(settle(recipe, plan), prepared, Ledger(), watch, trust_remote_code)
        recipe, plan = learn_marks(model, settle(recipe, plan), prepared, plan, watch)
        race = Race(recipe, prepared, plan, model, limit, watch, steps)
        best = _search(race, prepared.pace.lr, _side_by_side(plan))
    tried = sorted(race.tried, key=lambda each: each.rate)
    return PickedRate(tried, best, steps, prepared.pace.steps, prepared.pace.lr, asked, len(race.held_out))


def _with_constant_rate(recipe: Recipe) -> Recipe:
    constant = {"lr": "auto", "schedule": "constant", "warmup": 0.0}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=constant)})


def _side_by_side(plan: Mapping[str, Any]) -> int:
    """How many candidates may stand at once: each takes an adapter and an optimizer's state beyond the first's."""
    parts = plan["methods"][plan["method"]]["by_category"]
    room = plan["available_bytes"] if plan["budget"] is None else plan["budget"]
    return 1 + max(0, room - plan["needs_bytes"]) // (parts["adapters"] + parts["optimizer_state"])


def _search(race: Race, automatic: float, side_by_side: int) -> float | None:
    """Race the candidates, as many at once as memory holds, and further ones where the best is the last on its side;
    the best of all, or None where the race was stopped."""
    rates = [_rounded(factor * automatic) for factor in FACTORS]
    for first in range(0, len(rates), side_by_side):
        race.run(rates[first : first + side_by_side])
    for _ in range(MOST_FURTHER):
        further = [] if race.is_stopped else _further(race)
        race.run(further)
    return None if race.is_stopped else race.best


def _further(race: Race) -> list[float]:
    """The next rate on the side on which the best so far is the last; none where it is not."""
    rates = sorted(each.rate for each in race.tried)
    if race.best == rates[0]:
        return [_rounded(race.best / FURTHER)]
    return [_rounded(race.best * FURTHER)] if race.best == rates[-1] else []


def _rounded(rate: float) -> float:
    """To two digits, so that what is told is what was trained."""
    return float(f"{rate:.1e}")
