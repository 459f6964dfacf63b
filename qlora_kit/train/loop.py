"""The training loop, on accelerate: rows to micro-batches to steps, with evaluation, metrics and checkpoints between.

The rows of a step are a function of the seed and of how many rows were consumed, so a resumed run sees what it would
have seen. Within a step rows may share a sequence, and sequences share a micro-batch (`data/pack.py`); since a step's
loss is weighted by tokens, that changes nothing but the padding.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from qlora_kit.data import (
    Batch,
    Deck,
    Encoded,
    Packing,
    Room,
    Sampler,
    as_stepped,
    collate_rows,
    full_packs,
    lay_out,
    lengths_of,
)
from qlora_kit.errors import DeviceError, TrainingError, listed
from qlora_kit.memory import Ledger, PeakCounter
from qlora_kit.recipe import Train
from qlora_kit.train.checkpoint import Progress, checkpoints, not_finite, rehearse_checkpoint, save_checkpoint
from qlora_kit.train.evaluate import evaluate_loss, rehearse_evaluation
from qlora_kit.train.forward import no_phase
from qlora_kit.train.metrics import MetricsLog
from qlora_kit.train.optim import AdapterOptimizer
from qlora_kit.train.pace import Pace, gradients_stand, room_of
from qlora_kit.train.schedule import learning_rate
from qlora_kit.train.step import accumulate_gradients
from qlora_kit.train.tasks import LIKELIHOOD, Task

SAVE_INTERVAL_S = 15 * 60
"""Seconds between checkpoints under `save_every: auto`."""


@dataclass
class Job:
    """All that a loop works on.

    Attributes:
        model: its trained parameters, an adapter's or all, ask for gradients.
        parameters: the trained ones by name.
        constants: what else of the adapter a checkpoint must hold.
        optimizer: of these parameters.
        rows: to train on.
        decks: the sources of the rows, in order; none stands for one, each row of which an epoch sees once.
        eval_batches: held out; may be empty.
        pad_id: fills rows on the right.
        pace: steps and batch sizes.
        train: section of the recipe.
        task: what is minimised.
        loss_chunk: tokens whose logits stand at one time; None for whole logits.
        folder: of the run.
        progress: where to start.
        watch: is given every row of metrics.
        stop_requested: asked after every step; a true answer saves and ends the run.
        packing: where sequences hold several rows; None leaves every row its own.
        sample: is told every step when it is done; it may ask the model, and leaves training as it was.
        check_memory: is told the step before each of its micro-batches; it may end the run, which then saves nothing.
    """

    model: PreTrainedModel
    parameters: dict[str, torch.nn.Parameter]
    optimizer: AdapterOptimizer
    rows: Sequence[Encoded]
    eval_batches: Sequence[Batch]
    pad_id: int
    pace: Pace
    train: Train
    folder: Path
    task: Task = LIKELIHOOD
    loss_chunk: int | None = None
    decks: Sequence[Deck] = ()
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    watch: Callable[[dict[str, Any]], None] = lambda row: None
    stop_requested: Callable[[], bool] = lambda: False
    packing: Packing | None = None
    sample: Callable[[int], None] = lambda step: None
    check_memory: Callable[[int], None] = lambda step: None

    @property
    def kept(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of what is trained."""
        return {**self.parameters, **self.constants}

    @cached_property
    def room(self) -> Room:
        """What a forward pass may take, where every row is a sequence."""
        return room_of(self.train, self.pace, max(row.longest for row in self.rows), self.device)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to train: all steps are done, or the last evaluations were no better."""
        patience = self.train.early_stopping
        is_stale = patience is not None and self.progress.stale >= patience
        return self.progress.step >= self.pace.steps or is_stale

    @property
    def device(self) -> torch.device:
        """Where the batches go."""
        return self.model.device


def make_accelerator(device: torch.device, **logging: Any) -> Accelerator:
    """Accelerate with its own precision, accumulation and loaders switched off: these are the kit's.

    Its `backward` divides by the accumulation count, its mixed precision casts outputs up, its loader reads ahead.

    Args:
        device: that trains.
        logging: what accelerate is told of trackers.

    Raises:
        DeviceError: several processes were launched.
    """
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=1, cpu=device.type == "cpu", **logging)
    if accelerator.num_processes > 1:
        raise DeviceError(
            f"{accelerator.num_processes} processes were launched, and this version trains on one device; "
            "start qlora-kit by itself"
        )
    return accelerator


def rehearse(job: Job, ledger: Ledger) -> list[str]:
    """Do once, with the longest rows, all that the run will do, and forget it: what does not fit fails now.

    That is a step but for the optimizer's, an evaluation, and what a checkpoint holds. Parameters, optimizer and random
    states stay as they were.

    Returns:
        names of the parameters that no gradient reached: the model does not use them on these rows.
    """
    devices = [job.device] if job.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        _rehearse_step(job, ledger)
        untouched = [name for name, parameter in job.parameters.items() if parameter.grad is None]
        for parameter in job.parameters.values():
            parameter.grad = None
        if job.eval_batches:
            largest = max(job.eval_batches, key=lambda each: each.input_ids.numel())
            rehearse_evaluation(job.model, largest, job.task, phase=ledger.phase, loss_chunk=job.loss_chunk)
    with ledger.phase("save"):
        rehearse_checkpoint(job.kept, job.optimizer, on_card=job.device.type == "cuda")
    return untouched


def _rehearse_step(job: Job, ledger: Ledger) -> None:
    pace, longest = job.pace, _longest(job)
    # All of a step are there from its start.
    batches = [collate_rows(longest, job.pad_id).to(job.device) for _ in range(pace.accumulation)]
    stand = gradients_stand(pace.micro_batch, pace.accumulation, is_packed=job.packing is not None)
    job.model.train()
    accumulate_gradients(
        job.model,
        (batches * 2)[: 2 if stand else 1],
        batches[0].count,
        job.task,
        phase=ledger.phase,
        loss_chunk=job.loss_chunk,
        before=partial(job.check_memory, job.progress.step + 1),
    )


def _longest(job: Job) -> list[list[Encoded]]:
    """The packs of a micro-batch that none of the run exceeds."""
    if job.packing is not None:
        return full_packs(job.rows, job.packing.sequences, job.packing.tokens)
    by_length = sorted(range(len(job.rows)), key=lengths_of(job.rows).__getitem__, reverse=True)
    rows = [job.rows[row] for row in islice(cycle(by_length), job.pace.micro_batch)]  # few rows come round again
    return [[row] for row in as_stepped(rows)]


def train_loop(job: Job, metrics: MetricsLog, counter: PeakCounter, ledger: Ledger | None = None) -> bool:
    """Train until the last step, until held-out losses have long been no better, or until a stop is requested.

    There is a checkpoint of every evaluation that was the best so far; the last of them is kept.

    Args:
        job: what to train, from `job.progress` on.
        metrics: gets a row a step and one an evaluation.
        counter: of the device's memory.
        ledger: watches the first step taken, with the accounts of that step's phases.

    Returns:
        Whether the run came to its end.

    Raises:
        TrainingError: a loss or gradient is not finite, and the parameters are those of the step before; or a step left
            parameters that are not. Neither comes into a checkpoint.
    """
    steps = Steps(job)
    saved_at, first = time.monotonic(), job.progress.step + 1
    job.model.train()
    for step in range(first, job.pace.steps + 1):
        if job.is_over:  # it was already where it is resumed from
            break
        if ledger is not None and step == first:
            with ledger:
                row = steps.take(step, ledger)
        else:
            row = steps.take(step)
        row["peak_bytes"] = counter.peak_bytes
        _record(job, metrics, row)
        is_best = False
        if job.eval_batches and (step % job.pace.eval_every == 0 or step == job.pace.steps):
            evaluated = {"step": step, **_evaluate(job)}
            _record(job, metrics, evaluated)
            is_best = job.progress.judge(evaluated["eval_loss"])
        job.sample(step)
        is_stopping = job.stop_requested()
        if job.is_over or is_best or is_stopping or _is_due(job.pace, step, saved_at):
            _save(job)
            saved_at = time.monotonic()
        if is_stopping:
            break
    return job.is_over


class Steps:
    """The optimizer steps of a job, each with the rows that come next; the job's progress tells how far they are.

    Args:
        job: its model is in training mode whenever a step is taken.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._accelerator = make_accelerator(job.device)
        self._model = self._accelerator.prepare_model(job.model, device_placement=False)
        self._sampler = Sampler(job.decks or len(job.rows), job.train.seed)
        self._sampler.position = job.progress.rows

    def take(self, step: int, ledger: Ledger | None = None) -> dict[str, Any]:
        """One step; the row of metrics that tells of it.

        Where its loss or gradient is not finite, the parameters stay as they were, and the row names the step's rows.
        """
        job, started = self._job, time.perf_counter()
        phase = no_phase if ledger is None else ledger.phase
        epoch = self._sampler.position / self._sampler.epoch_rows
        indices = self._sampler.next_rows(job.pace.rows_a_step)
        batches = list(_micro_batches(job, indices))
        mean, measures, _ = accumulate_gradients(
            self._model,
            batches,
            sum(batch.count for batch in batches),
            job.task,
            backward=self._accelerator.backward,
            phase=phase,
            loss_chunk=job.loss_chunk,
            before=partial(job.check_memory, step),
        )
        with phase("optimizer"):
            norm = self._accelerator.clip_grad_norm_(list(job.parameters.values()), job.train.max_grad_norm)
        loss, grad_norm = mean.item(), float(norm)
        lr = learning_rate(step, job.pace.steps, job.pace.lr, job.train.schedule, job.train.warmup)
        culprits = {}
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            culprits["rows"] = [job.rows[index].where for index in indices]
        else:
            with phase("optimizer"):
                job.optimizer.step(lr)
            job.progress.step, job.progress.rows = step, self._sampler.position
            job.progress.tokens += sum(batch.trained_tokens for batch in batches)
        return {
            "step": step,
            "loss": loss,
            **{name: measure.item() for name, measure in measures.items()},
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": job.progress.tokens,
            "tokens_per_s": sum(batch.tokens for batch in batches) / (time.perf_counter() - started),
            "epoch": epoch,
            **culprits,
        }


def _micro_batches(job: Job, indices: Sequence[int]) -> Iterator[Batch]:
    """The rows of a step, cut into micro-batches."""
    rows = as_stepped([job.rows[index] for index in indices])
    for packs in lay_out([row.longest for row in rows], job.packing or job.room):
        yield collate_rows([[rows[row] for row in pack] for pack in packs], job.pad_id).to(job.device)


def _evaluate(job: Job) -> dict[str, Any]:
    score = evaluate_loss(job.model, job.eval_batches, job.task, loss_chunk=job.loss_chunk)
    return {"eval_loss": score.loss, **{f"eval_{name}": value for name, value in score.measures.items()}}


def _record(job: Job, metrics: MetricsLog, row: dict[str, Any]) -> None:
    """Put a row on disk, show it, and stop the run at the first number that is not finite."""
    metrics.add(row)
    job.watch(metrics.rows[-1])
    broken = [key for key, value in metrics.rows[-1].items() if value is None]
    if broken:
        rows = f" on the rows {listed(row['rows'])}" if "rows" in row else ""
        raise _broken_off(job, f"{broken[0]} is not finite at step {row['step']}{rows}")


def _save(job: Job) -> None:
    """Write a checkpoint, unless the step has spoiled what it would hold: the one before is then what is left."""
    spoiled = not_finite(job.kept, job.optimizer)
    if spoiled:
        raise _broken_off(job, f"NaN or infinity in {listed(spoiled)} after step {job.progress.step}")
    save_checkpoint(job.folder / "checkpoints", job.kept, job.optimizer, job.progress, job.train.keep_checkpoints)


def _broken_off(job: Job, why: str) -> TrainingError:
    """The end of a run whose numbers are none, and the way on."""
    kept = checkpoints(job.folder / "checkpoints")
    way_on = f"; {kept[-1].name} is kept: continue with --resume, and --force for another rate" if kept else ""
    return TrainingError(
        f"{why}; that step left no checkpoint{way_on}; lower train.lr, or use base.compute_dtype=bfloat16 or float32 "
        "where it was float16"
    )


def _is_due(pace: Pace, step: int, saved_at: float) -> bool:
    if pace.save_every is not None:
        return step % pace.save_every == 0
    return time.monotonic() - saved_at > SAVE_INTERVAL_S
