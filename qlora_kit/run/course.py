"""The course of a run: from the first step, or the checkpoint that it goes on from, to what it leaves."""

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qlora_kit.base.device import emulation_note, resolve_dtype
from qlora_kit.errors import RunError
from qlora_kit.interrupt import first_interrupt
from qlora_kit.memory import Ledger, Limit
from qlora_kit.recipe import Recipe
from qlora_kit.report import GradientWatch, LossWatch
from qlora_kit.run.folder import CHECKPOINTS, SAMPLES, write_memory
from qlora_kit.run.prepare import Prepared
from qlora_kit.run.rows import positions_of
from qlora_kit.run.score import questions
from qlora_kit.storage import check_room
from qlora_kit.train.checkpoint import (
    checkpoint_bytes,
    checkpoint_of,
    checkpoints,
    load_checkpoint,
    load_parameters,
    newest_checkpoint,
    verify_checkpoint,
)
from qlora_kit.train.generate import end_tokens
from qlora_kit.train.isolation import check_isolation
from qlora_kit.train.loop import Job, rehearse, train_loop
from qlora_kit.train.metrics import MetricsLog
from qlora_kit.train.samples import Samples
from qlora_kit.train.trackers import Track
from qlora_kit.units import counted
from qlora_kit.watch import Watch


class End(NamedTuple):
    """How training ended.

    Attributes:
        finished: whether it came to its end.
        step: its last.
        left: the step that the model is left at.
        interrupted: whether an interrupt came.
    """

    finished: bool
    step: int
    left: int
    interrupted: bool


def run_course(
    job: Job,
    recipe: Recipe,
    prepared: Prepared,
    planned: Mapping[str, Any],
    ledger: Ledger,
    limit: Limit,
    watch: Watch,
    track: Track,
    describe: Callable[[], None],
    *,
    resume: bool,
) -> End:
    """Rehearse the longest batch, then train to the last step or to a stop, and write down what memory it took.

    Args:
        job: as `make_job` makes it.
        recipe: of the run.
        prepared: rows and pace.
        planned: the run's own method in plan.json.
        ledger: that has seen the model come to be.
        limit: what the run keeps within.
        watch: is told what happens.
        track: gets a row of metrics at a time.
        describe: writes down what the run is made from; where it goes on, once its checkpoint has turned out to fit.
        resume: go on from the newest checkpoint that verifies.
    """
    torch.manual_seed(recipe.train.seed)
    model = job.model
    if not resume:
        describe()
    slow = emulation_note(resolve_dtype(recipe.base.compute_dtype, model.device), model.device)
    if slow is not None:
        watch.note(slow)
    _check_disk(job)
    if job.task.answers:
        end_tokens(model, prepared.tokenizer)  # told now if they are none, and not at the first answer
    if job.packing is not None:
        check_isolation(model, job.packing.sequences)
    if resume:
        _go_on(job, watch)
        describe()
    since = job.progress.step if resume else None
    metrics = MetricsLog(job.folder / "metrics.jsonl", resume_from=since)
    job.watch = _watched(metrics.rows, watch, track)
    samples = _let_sample(job, recipe, prepared, since, watch)
    ledger.own("optimizer_state", (tensor for _, tensor in job.optimizer.state_tensors()))
    ledger.paged_bytes = sum(tensor.nbytes for tensor in job.optimizer.pageable()) if model.device.type == "cuda" else 0
    with names_what_is_kept(job.folder):
        try:
            with ledger:
                untouched = rehearse(job, ledger)
            if untouched:
                watch.note(
                    f"no gradient reaches {len(untouched)} of {len(job.parameters)} tensors, first {untouched[0]}"
                )
            with first_interrupt() as interrupted:
                job.stop_requested = lambda: interrupted() or watch.stop_requested()
                finished = train_loop(job, metrics, limit.counter, ledger)
        finally:
            metrics.close()
            if samples is not None:
                samples.close()
            write_memory(job.folder, planned, ledger, limit.counter)
    left = _left_at(job, watch) if finished else job.progress.step
    return End(finished, job.progress.step, left, interrupted())


@contextmanager
def names_what_is_kept(folder: Path) -> Iterator[None]:
    """A block in which a run writes what it has come to: where the disk ends it, the line says the way on.

    Raises:
        RunError: in place of the disk's own error.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, RunError):
            found = str(error)
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            found = f"{error.filename or folder} cannot be written: {error.strerror}"
        else:
            raise
        kept = checkpoints(folder / CHECKPOINTS)
        way_on = f"{kept[-1].name} is kept: continue with --resume" if kept else "there is no checkpoint: start again"
        raise RunError(f"{found}; {way_on} once that is fixed (output={folder})") from error


def _check_disk(job: Job) -> None:
    """See that the checkpoints to come have room: those kept, the best, and the one that is being written."""
    folder = job.folder / CHECKPOINTS
    more = job.train.keep_checkpoints + 2 - len(checkpoints(folder))
    if more > 0:
        what = f"keeping {job.train.keep_checkpoints} checkpoints (train.keep_checkpoints)"
        check_room(folder, more * checkpoint_bytes(job.kept, job.optimizer), what)


def _watched(rows: Sequence[Mapping[str, Any]], watch: Watch, track: Track = lambda row: None) -> Track:
    """Shows and tracks each row, and says once if the training loss explodes, and if gradients become zero; `rows` are
    those before a resume."""
    losses, gradients = LossWatch(), GradientWatch()

    def see(row: Mapping[str, Any]) -> str:
        loss, norm = row.get("loss"), row.get("grad_norm")
        exploded = None if loss is None else losses.see(row["step"], loss)
        silent = "" if norm is None else gradients.see(row["step"], norm)
        return silent if exploded is None else f"{exploded} {silent}".rstrip()

    for row in rows:
        see(row)

    def show(row: Mapping[str, Any]) -> None:
        watch.row(row)
        track(row)
        if told := see(row):
            watch.note(told)

    return show


def _let_sample(job: Job, recipe: Recipe, prepared: Prepared, since: int | None, watch: Watch) -> MetricsLog | None:
    """Have held-out prompts answered on the way, if the recipe asks for it and there are any; the log of it."""
    every, asked = recipe.train.sample_every, questions(prepared.tokenizer, prepared.eval.rows)
    if every is None:
        return None
    if not asked:
        watch.note("train.sample_every has no effect: no held-out row has a prompt and an answer; set data.eval")
        return None
    log = MetricsLog(job.folder / SAMPLES, resume_from=since)
    most = max(batch.input_ids.numel() for batch in job.eval_batches)
    positions = positions_of(prepared.config)
    job.sample = Samples(job.model, prepared.tokenizer, asked, every, most, positions, log, watch.sampled)
    return log


def check_not_passed(folder: Path, steps: int) -> None:
    """See that a run that is resumed has not taken more steps than it is asked for.

    Raises:
        RunError: it has, or no checkpoint of it is sound.
    """
    newest, _ = newest_checkpoint(folder / CHECKPOINTS)
    done = int(newest.name.rpartition("-")[2])
    if done > steps:
        raise RunError(
            f"{newest} has taken {counted(done, 'step')}, and the recipe comes to {steps:,}: give train.steps={done} "
            "or more, or set output to another folder and start there"
        )


def _go_on(job: Job, watch: Watch) -> None:
    """Put a job where its newest sound checkpoint was written."""
    folder = job.folder / CHECKPOINTS
    newest, faults = newest_checkpoint(folder)
    for fault in faults:
        watch.note(f"left out a damaged checkpoint: {fault}")
    job.progress = load_checkpoint(newest, job.kept, job.optimizer)
    watch.note(f"continuing from {newest.name}")
    best = job.progress.best_step
    if best and verify_checkpoint(checkpoint_of(folder, best)):
        watch.note(
            f"the checkpoint of the lowest held-out loss, step {best}, is lost: the search for the best starts over"
        )
        job.progress.forget_best()


def _left_at(job: Job, watch: Watch) -> int:
    """Give the model what it was at its lowest held-out loss; the step of which it is then."""
    progress, steps = job.progress, job.pace.steps
    if progress.step < steps:
        stale = counted(progress.stale, "evaluation")
        watch.note(f"ended early, at step {progress.step} of {steps}: no improvement in {stale} (train.early_stopping)")
    if progress.best_step in (0, progress.step):
        return progress.step
    checkpoint = checkpoint_of(job.folder / CHECKPOINTS, progress.best_step)
    lowest = f"the held-out loss was lowest at step {progress.best_step} ({progress.best_loss:.3f})"
    if faults := verify_checkpoint(checkpoint):
        watch.note(f"{lowest}, but {faults[0]}: the run's result is its last step, {progress.step}")
        return progress.step
    load_parameters(checkpoint, job.kept)
    watch.note(f"{lowest}, and that is the run's result; the last step, {progress.step}, is kept as a checkpoint")
    return progress.best_step
