"""The learning rate, picked in short runs: adapters side by side on one base, of which the better half goes on.

    all rates train for n/4 steps, the better half for n/2, its better half for n; the lowest loss there is the pick

Each candidate is, bit for bit, the beginning of the run that `train` makes of the recipe at its rate, with a constant
rate and without warmup: it has an adapter, an optimizer and random states of its own, and sees the same rows in the
same order. They take turns on the base, which is loaded once.

Why constant: what a rate has come to after some steps then depends on these steps alone. A schedule that falls over
them would show the rates at their height to the first judgement and at their end to the last, and the warmup of a long
run would fill the first turn, where a rate that is too high is not yet itself.

Successive halving: Jamieson and Talwalkar, arXiv 1502.07943.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.base.attention import check_attention
from qlora_kit.base.device import resolve_device, resolve_dtype
from qlora_kit.errors import RecipeError, TrainingError
from qlora_kit.lora import delete_adapter, use_adapter
from qlora_kit.memory import Ledger, Limit
from qlora_kit.recipe import Recipe
from qlora_kit.run.build import load, loss_of, make_job, plan_run, put_adapter, settle
from qlora_kit.run.plan import one_line_if_it_does_not_fit
from qlora_kit.run.prepare import Prepared, prepare
from qlora_kit.run.start import as_it_starts
from qlora_kit.run.sweep import Outcome
from qlora_kit.train.activations import Blocks, set_activation_policy
from qlora_kit.train.checkpoint import random_states, set_random_states
from qlora_kit.train.evaluate import evaluate_loss
from qlora_kit.train.isolation import check_isolation
from qlora_kit.train.loop import Job, Steps, rehearse
from qlora_kit.train.schedule import LORA_FACTOR, SHORT_FACTOR, SHORT_RUN
from qlora_kit.train.tasks import Task
from qlora_kit.watch import Watch

FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""Of the automatic rate, the candidates: it is a fit over other models and other rows, and seldom off by more."""
FURTHER = 2
"""Factor to the next candidate where the best is the last on its side."""
MOST_FURTHER = 3
"""Candidates that come so at most."""
MOST_STEPS = SHORT_RUN
"""Of a candidate: below it the best rate is that of short runs, which is known to differ."""
MOST_ROWS = 64
"""Held out, by which candidates are judged: all by the same, so that they need not be many."""


@dataclass(slots=True)
class Tried:
    """What became of one candidate.

    Attributes:
        rate: the learning rate.
        steps: that it got.
        loss: held-out loss after them, or without held-out rows the mean of its last training losses; None before it
            was judged, or where it came apart.
        failed: why it came apart; None where it did not.
    """

    rate: float
    steps: int = 0
    loss: float | None = None
    failed: str | None = None


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
        race = _Race(settle(recipe, plan), prepared, plan, model, limit, watch, steps)
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


def _search(race: "_Race", automatic: float, side_by_side: int) -> float | None:
    """Race the candidates, as many at once as memory holds, and further ones where the best is the last on its side;
    the best of all, or None where the race was stopped."""
    rates = [_rounded(factor * automatic) for factor in FACTORS]
    for first in range(0, len(rates), side_by_side):
        race.run(rates[first : first + side_by_side])
    for _ in range(MOST_FURTHER):
        further = [] if race.is_stopped else _further(race)
        race.run(further)
    return None if race.is_stopped else race.best


def _further(race: "_Race") -> list[float]:
    """The next rate on the side on which the best so far is the last; none where it is not."""
    rates = sorted(each.rate for each in race.tried)
    if race.best == rates[0]:
        return [_rounded(race.best / FURTHER)]
    return [_rounded(race.best * FURTHER)] if race.best == rates[-1] else []


def _rounded(rate: float) -> float:
    """To two digits, so that what is told is what was trained."""
    return float(f"{rate:.1e}")


def _turns(steps: int, candidates: int) -> list[tuple[int, int]]:
    """Up to which step candidates train in each turn, and how many of them.

    >>> _turns(60, 7)
    [(15, 7), (30, 4), (60, 2)]
    """
    ends = sorted({math.ceil(steps / 4), math.ceil(steps / 2), steps})
    return [(end, -(-candidates // 2**turn)) for turn, end in enumerate(ends)]


@dataclass(slots=True)
class _Candidate:
    """What is a candidate's own.

    Attributes:
        name: of its adapter.
        tried: what becomes of it.
        job: its adapter and optimizer, and how far they are.
        steps: of the job.
        random: states of the generators that it draws from next.
        losses: of its training steps.
    """

    name: str
    tried: Tried
    job: Job
    steps: Steps
    random: Mapping[str, Tensor]
    losses: list[float] = field(default_factory=list)


class _Race:
    """Candidates that train in turns on one base.

    Attributes:
        tried: all that ran so far.
        held_out: rows that they are judged by.
        is_stopped: whether a stop was requested.
    """

    def __init__(
        self,
        recipe: Recipe,
        prepared: Prepared,
        plan: Mapping[str, Any],
        model: PreTrainedModel,
        limit: Limit,
        watch: Watch,
        steps: int,
    ) -> None:
        rows = prepared.eval.rows
        some = min(len(rows), MOST_ROWS)
        self.held_out = [rows[place * len(rows) // some] for place in range(some)]  # from all of their sources
        self.tried, self.is_stopped = list[Tried](), False
        self._recipe, self._plan, self._model = recipe, plan, model
        self._prepared = replace(prepared, eval=replace(prepared.eval, rows=self.held_out))
        self._limit, self._watch, self._steps = limit, watch, steps
        self._turns_taken = 0
        set_activation_policy(model, Blocks(**plan["blocks"]))

    @property
    def best(self) -> float:
        """The rate of the lowest loss of those that got all steps."""
        losses = {each.rate: each.loss for each in self.tried if each.loss is not None and each.steps == self._steps}
        if not losses:
            raise TrainingError(
                f"all of {len(self.tried)} learning rates came apart; at {self.tried[0].rate:g} "
                f"{self.tried[0].failed}; look at the rows (qlora-kit preview), or use base.compute_dtype=float32"
            )
        return min(losses, key=lambda rate: (losses[rate], rate))

    def run(self, rates: Sequence[float]) -> None:
        """Train candidates side by side; after each turn but the last the better half goes on."""
        if self.is_stopped or not rates:
            return
        running = [self._enter(f"rate-{number}", rate) for number, rate in enumerate(rates, start=len(self.tried))]
        self.tried += [candidate.tried for candidate in running]
        if self._turns_taken == 0:
            self._check(running[0])
        turns = _turns(self._steps, len(rates))
        last = self._turns_taken + sum(candidates for _, candidates in turns)
        for (end, _), (_, kept) in pairwise([*turns, (0, 0)]):
            for candidate in running:
                self._take_turn(candidate, end, last)
                if self.is_stopped:
                    return
            sound = [candidate for candidate in running if candidate.tried.loss is not None]
            going_on = sorted(sound, key=lambda candidate: (candidate.tried.loss, candidate.tried.rate))[:kept]
            for candidate in running:
                if candidate not in going_on:
                    delete_adapter(self._model, candidate.name)
            running = going_on

    def _enter(self, name: str, rate: float) -> _Candidate:
        """A candidate at its beginning."""
        report = put_adapter(self._model, self._recipe, self._prepared, Ledger(), name)
        if not self.tried:
            self._watch.adapted(report)
        prepared = replace(self._prepared, pace=replace(self._prepared.pace, steps=self._steps, lr=rate))
        job = make_job(self._recipe, prepared, self._model, *self._loss, self._limit, name)
        torch.manual_seed(self._recipe.train.seed)
        return _Candidate(name, Tried(rate), job, Steps(job), random_states(job.device))

    @cached_property
    def _loss(self) -> tuple[Task, int | None]:
        """What all minimise; to be asked once an adapter is there, which may change how."""
        return loss_of(self._recipe, self._prepared, self._plan, self._model, self._watch)

    def _check(self, candidate: _Candidate) -> None:
        """See before the first step that all that will stand at once fits, and that rows in a pack are apart."""
        use_adapter(self._model, candidate.name)
        if candidate.job.packed_tokens is not None:
            check_isolation(self._model, candidate.job.pace.micro_batch)
        rehearse(candidate.job, Ledger())

    def _take_turn(self, candidate: _Candidate, end: int, last: int) -> None:
        """Train a candidate up to step `end` and judge it; `last` counts the turns of the race."""
        self._turns_taken += 1
        tried, started = candidate.tried, time.monotonic()
        name = f"lr={tried.rate:g} to step {end}"
        self._watch.run_begins(name, self._turns_taken, last)
        use_adapter(self._model, candidate.name)
        set_random_states(candidate.random, candidate.job.device)
        self._train(candidate, end)
        candidate.random = random_states(candidate.job.device)
        if self.is_stopped:
            return
        if tried.failed is None:
            self._judge(candidate)
        self._watch.run_ended(Outcome(name, {"train.lr": f"{tried.rate:g}"}, tried.failed, time.monotonic() - started))

    def _train(self, candidate: _Candidate, end: int) -> None:
        """Take its steps up to `end`, or to where it comes apart."""
        tried = candidate.tried
        self._model.train()
        for step in range(tried.steps + 1, end + 1):
            row = candidate.steps.take(step)
            broken = [key for key in ("loss", "grad_norm") if not math.isfinite(row[key])]
            if broken:
                tried.loss, tried.failed = None, f"{broken[0]} is not finite at step {step}"
                return
            tried.steps = step
            candidate.losses.append(row["loss"])
            self._watch.row({**row, "peak_bytes": self._limit.counter.peak_bytes})
            self.is_stopped = self._watch.stop_requested()
            if self.is_stopped:
                return

    def _judge(self, candidate: _Candidate) -> None:
        """Its held-out loss, or where no rows are held out the mean of the last of its training losses."""
        tried, job = candidate.tried, candidate.job
        if job.eval_batches:
            loss = evaluate_loss(self._model, job.eval_batches, job.task, loss_chunk=job.loss_chunk).loss
            self._watch.row({"step": tried.steps, "eval_loss": loss})
        else:
            loss = fmean(candidate.losses[-math.ceil(self._steps / 4) :])
        if math.isfinite(loss):
            tried.loss = loss
        else:
            tried.loss, tried.failed = None, f"the held-out loss is not finite after step {tried.steps}"
