"""The main job: plan, load, adapt, train, score, report; each arrow is one function."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_kit.base.attention import check_attention
from qlora_kit.base.dense import parameter_count
from qlora_kit.base.device import resolve_device, resolve_dtype
from qlora_kit.base.record import BaseRecord, base_record
from qlora_kit.base.text import text_parameters, unread_parameters
from qlora_kit.export import save_model, trained_against
from qlora_kit.lora import save_adapter
from qlora_kit.memory import Ledger, Limit
from qlora_kit.plan.devices import busy_note
from qlora_kit.recipe import Recipe, base_as_held, read_recipe
from qlora_kit.run.build import (
    as_planned,
    learn_marks,
    load,
    loss_of,
    make_job,
    plan_run,
    put_adapter,
    settle,
    take_base,
)
from qlora_kit.run.common import Common
from qlora_kit.run.course import End, check_not_passed, names_what_is_kept, run_course
from qlora_kit.run.folder import (
    RECIPE,
    RESULT,
    SCORES,
    check_run_folder,
    clear_run_folder,
    describe_run,
    files_of_run,
    provenance_of,
    reported,
    run_folder,
    seal_records,
    settings_of,
    trained_folder,
)
from qlora_kit.run.plan import one_line_if_it_does_not_fit
from qlora_kit.run.prepare import Prepared, prepare
from qlora_kit.run.recorded import (
    check_adapter,
    check_unchanged,
    recorded_data,
    recorded_date,
    recorded_plan,
    recorded_rate,
    recorded_reference,
)
from qlora_kit.run.score import Scored, score, score_base
from qlora_kit.run.start import as_it_starts, check_reference
from qlora_kit.storage import checksums, write_json
from qlora_kit.train.activations import Blocks, activation_blocks, set_activation_policy
from qlora_kit.train.tasks import Task
from qlora_kit.train.trackers import Track, check_trackers, tracking
from qlora_kit.watch import Watch


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended.

    Attributes:
        folder: the run folder.
        finished: False where a stop was requested before the last step.
        step: optimizer steps done.
        scores: as in scores.json; None where the run did not finish or has no held-out rows.
        seconds: wall-clock time of the whole run.
    """

    folder: Path
    finished: bool
    step: int
    scores: dict[str, Any] | None
    seconds: float


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    watch: Watch | None = None,
    trust_remote_code: bool = False,
    common: Common | None = None,
) -> Result:
    """Run a recipe and fill its run folder.

    Args:
        recipe: from `read_recipe`.
        resume: go on from the newest checkpoint that verifies.
        overwrite: remove a run that stands in the folder.
        force: resume though the recipe, the rows or the base are others than the run was begun with.
        watch: is told what happens.
        trust_remote_code: let the model folder's own code run.
        common: where runs of one process leave their rows and their base for each other.

    Raises:
        QloraKitError: anything that the user can mend, one line each; a `FitError` if the plan is above the budget.
        KeyboardInterrupt: Ctrl-C, or a notebook's interrupt, once the step at hand is done and saved; the second one
            at once. Where the program has a handler of its own for SIGINT, that one is left in charge.
    """
    started, watch, common, folder = time.monotonic(), watch or Watch(), common or Common(), Path(recipe.output)
    device = resolve_device(recipe.base.device)
    if recipe.lora.from_ is not None and not resume:
        check_adapter(Path(recipe.lora.from_))
    recipe = as_it_starts(recipe)
    check_attention(recipe.base.attention, device, resolve_dtype(recipe.base.compute_dtype, device))
    check_trackers(recipe.train.trackers)
    check_run_folder(folder, recipe, resume, overwrite, force)
    prepared, plan = _prepared(recipe, resume, force, watch, trust_remote_code, common)
    recipe = settle(recipe, plan)
    limit = Limit(device, plan["budget"])
    if not limit.can_be_kept:
        watch.note("this system does not report how much memory a process holds: memory.budget is not enforced")
    busy = busy_note(device)
    if busy is not None:
        watch.note(busy)
    with run_folder(folder), one_line_if_it_does_not_fit(limit, plan, folder), limit:
        check_run_folder(folder, recipe, resume, overwrite, force)  # planning takes its time
        ledger = Ledger(host_apart=device.type == "cuda")
        model = take_base(recipe, prepared, ledger, watch, trust_remote_code, common)
        base = {"base": base_record(model).mark}
        if resume and not force:
            _check_base(folder, base_record(model), recipe)
        recipe, plan = learn_marks(model, recipe, prepared, plan, watch)
        _make_trainable(model, recipe, prepared, plan, ledger, watch)
        task, loss_chunk = loss_of(recipe, prepared, plan, model, watch)
        earlier = [] if resume else files_of_run(folder)

        def describe() -> None:
            with names_what_is_kept(folder):
                clear_run_folder(folder, earlier)
                describe_run(recipe, prepared, plan, _fingerprints(prepared) | base, folder)

        with reported(folder):
            with _tracking(recipe, prepared, folder, device, watch) as track:
                job = make_job(recipe, prepared, model, task, loss_chunk, limit)
                planned = plan["methods"][plan["method"]]
                end = run_course(job, recipe, prepared, planned, ledger, limit, watch, track, describe, resume=resume)
            del job  # with the optimizer's state, in whose place a base may be read again
            with names_what_is_kept(folder):
                _save(model, recipe, prepared, folder, end)
            scores = None
            if end.finished and prepared.eval.rows:
                scores = _scored(model, recipe, prepared, task, loss_chunk, base, watch, trust_remote_code, common)
                watch.scored(scores)
            with names_what_is_kept(folder):
                if scores is not None:
                    write_json(folder / SCORES, scores)
                seal_records(folder)
    if end.interrupted and not end.finished:  # what stands behind this call in a program is not to go on
        raise KeyboardInterrupt(f"step {end.step} is done and saved; train(recipe, resume=True) continues from there")
    return Result(folder, end.finished, end.step, scores, time.monotonic() - started)


def _scored(
    model: PreTrainedModel,
    recipe: Recipe,
    prepared: Prepared,
    task: Task,
    loss_chunk: int | None,
    base: Mapping[str, str],
    watch: Watch,
    trust_remote_code: bool,
    common: Common,
) -> dict[str, Any]:
    """What scores.json holds; a base that is known already is not asked again."""

    def of_its_base() -> Scored:
        is_changed = recipe.train.full_finetune  # then it is read again, where the optimizer's state stood
        its = load(recipe, prepared, Ledger(), watch, trust_remote_code) if is_changed else model
        return score_base(its, prepared, task, loss_chunk)

    batched = loss_chunk, prepared.pace.eval_tokens  # on which roundings depend
    which = (base, base_as_held(recipe), recipe.lora.from_, prepared.eval.fingerprint, task, *batched)
    return score(model, prepared, task, loss_chunk, common.take("score of the base", which, of_its_base))


def _prepared(
    recipe: Recipe, resume: bool, force: bool, watch: Watch, trust_remote_code: bool, common: Common
) -> tuple[Prepared, dict[str, Any]]:
    """Rows and plan, before any weight is read; those of a resumed run are as it began."""
    folder, today, rate = Path(recipe.output), None, None
    if resume:
        check_reference(recipe, recorded_reference(folder))
        recipe, today = as_planned(recipe, recorded_plan(folder)), recorded_date(folder)
        if recipe.train.lr == read_recipe(folder / RECIPE).train.lr == "auto":
            rate = recorded_rate(folder)
    prepared = prepare(
        recipe, watch, weights=True, today=today, rate=rate, trust_remote_code=trust_remote_code, common=common
    )
    if resume and not force:
        check_unchanged(folder, _fingerprints(prepared))
    if resume:
        check_not_passed(folder, prepared.pace.steps)
    return plan_run(recipe, prepared, watch)


def _check_base(folder: Path, record: BaseRecord, recipe: Recipe) -> None:
    """See that a run goes on with its base, as far as the version that began it told which one that was; one from
    another place must be told as fully.

    Raises:
        RunError: it is another.
    """
    recorded = recorded_data(folder).get("fingerprints", {}).get("base", "")
    before = read_recipe(folder / RECIPE).base
    has_moved = (before.model, before.revision) != (recipe.base.model, recipe.base.revision)
    if record.differences(recorded) or (has_moved and not record.is_told_by(recorded)):
        check_unchanged(folder, {"base": record.mark})


def _fingerprints(prepared: Prepared) -> dict[str, str]:
    """Which rows a run has."""
    return {"train": prepared.train.fingerprint, "eval": prepared.eval.fingerprint}


def _make_trainable(
    model: PreTrainedModel,
    recipe: Recipe,
    prepared: Prepared,
    plan: Mapping[str, Any],
    ledger: Ledger,
    watch: Watch,
) -> None:
    """Put the adapter on the base, or let every weight train."""
    if recipe.train.full_finetune:
        for parameter in text_parameters(model).values():
            parameter.requires_grad_(True)
        watch.loaded_whole(parameter_count(model))
    else:
        watch.adapted(put_adapter(model, recipe, prepared, ledger))
    ledger.ignore(unread_parameters(model))
    ledger.adopt(model, activation_blocks(model))
    set_activation_policy(model, Blocks(**plan["blocks"]))


def _save(model: PreTrainedModel, recipe: Recipe, prepared: Prepared, folder: Path, end: End) -> None:
    """Write what was trained, adapter/ or model/, and of which step it is; scores of an earlier one go before."""
    trained = trained_folder(folder, recipe)
    for name in (SCORES, RESULT):
        (folder / name).unlink(missing_ok=True)
    if recipe.train.full_finetune:
        files = save_model(model, prepared.tokenizer, trained)
    else:
        files = checksums(save_adapter(model, trained, provenance=trained_against(model) | provenance_of(recipe)))
    ended = {"folder": trained.name, "step": end.left, "finished": end.finished}
    write_json(folder / RESULT, {**ended, "files": files})


def _tracking(
    recipe: Recipe, prepared: Prepared, folder: Path, device: torch.device, watch: Watch
) -> AbstractContextManager[Track]:
    """The recipe's trackers, which are told its settings with the rate and the steps that it came to."""
    settled = {"train.lr": prepared.pace.lr, "train.steps": prepared.pace.steps}
    return tracking(recipe.train.trackers, folder, settings_of(recipe) | settled, device, watch.note)
