"""Learning rates side by side on one base, in turns, of which the better half goes on each time.

    all rates train for n/4 steps, the better half for n/2, its better half for n

Each candidate is, bit for bit, the beginning of the run that `train` makes of the recipe at its rate, with a constant
rate and without warmup: it has an adapter, an optimizer and random states of its own, and sees the same rows in the
same order.

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

from qlora_kit.errors import TrainingError
from qlora_kit.lora import delete_adapter, use_adapter
from qlora_kit.memory import Ledger, Limit
from qlora_kit.recipe import Recipe
from qlora_kit.run.build import loss_of, make_job, put_adapter
from qlora_kit.run.prepare import Prepared
from qlora_kit.run.sweep import Outcome
from qlora_kit.train.activations import Blocks, set_activation_policy
from qlora_kit.train.checkpoint import random_states, set_random_states
from qlora_kit.train.evaluate import evaluate_loss
from qlora_kit.train.isolation import check_isolation
from qlora_kit.train.loop import Job, Steps, rehearse
from qlora_kit.train.tasks import Task
from qlora_kit.watch import Watch

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


class Race:
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
                f"all {len(self.tried)} learning rates diverged; at {self.tried[0].rate:g} "
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
        if candidate.job.packing is not None:
            check_isolation(self._model, candidate.job.packing.sequences)
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
