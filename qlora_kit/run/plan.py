"""Planning a recipe before anything is loaded, and holding plan and run to the budget, in one line each."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from qlora_kit.base import locate_model
from qlora_kit.base.architecture import read_config
from qlora_kit.base.attention import check_attention
from qlora_kit.base.device import resolve_device, resolve_dtype
from qlora_kit.data import bits_to_learn, check_lengths
from qlora_kit.errors import FitError
from qlora_kit.export import rehearse_merge
from qlora_kit.memory import Limit
from qlora_kit.memory.limit import whose_memory_ran_out
from qlora_kit.plan import Workload, plan_methods, weight_bytes
from qlora_kit.plan.cards import Card, find_card
from qlora_kit.plan.choose import may_quantize_head
from qlora_kit.recipe import TASKS, Recipe, base_as_held, with_adapters
from qlora_kit.run.folder import CHECKPOINTS
from qlora_kit.run.full_finetune import check_full_finetune
from qlora_kit.run.prepare import Prepared, note_attention, note_large_steps, prepare
from qlora_kit.run.rows import eval_shapes, eval_shapes_of, positions_of
from qlora_kit.run.start import as_it_starts
from qlora_kit.run.task import check_task
from qlora_kit.train.checkpoint import checkpoints
from qlora_kit.train.classes import head_for
from qlora_kit.train.pace import ROWS_A_STEP, set_pace
from qlora_kit.units import MIB, format_bytes, parse_bytes
from qlora_kit.watch import Watch

_AFTER = {"export": rehearse_merge}
"""What is done with a trained model, by the phase that it makes."""


def plan_memory(
    recipe: Recipe, watch: Watch | None = None, *, gpu: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """What plan.json would hold: nothing is loaded but the model's configuration and, where they are, the rows.

    Without the rows every row is taken to be `data.max_tokens` long, and how many steps they make is not known.

    Args:
        recipe: the run.
        watch: is told what happens.
        gpu: plan for this card, of which none need be here: in what it computes, and within its memory where the recipe
            has no budget.
        trust_remote_code: let the model folder's own code run.

    Raises:
        QloraKitError: as `train`, as far as it gets.
    """
    watch, recipe = watch or Watch(), as_it_starts(recipe)
    card = None if gpu is None else find_card(gpu)
    if card is not None:
        recipe = _for_card(recipe, card)
    else:
        device = resolve_device(recipe.base.device)
        check_attention(recipe.base.attention, device, resolve_dtype(recipe.base.compute_dtype, device))
    name = None if card is None else card.name
    if not _rows_are_missing(recipe):
        prepared = prepare(recipe, watch, weights=False, trust_remote_code=trust_remote_code)
        check_weights(recipe, prepared.config)
        return plan_prepared(recipe, prepared, name)
    watch.note(f"there is no {recipe.data.train}: planned for rows of data.max_tokens={recipe.data.max_tokens}")
    base, tokens = recipe.base, recipe.data.max_tokens
    folder = locate_model(base.model, base.revision, weights=False, code=trust_remote_code, notify=watch.note)
    check_task(recipe)
    config = read_config(folder, head=head_for(recipe.train.task), trust_remote_code=trust_remote_code)
    check_lengths(tokens, positions_of(config))
    check_weights(recipe, config)
    check_full_finetune(recipe, config, watch)
    pace = set_pace(
        recipe.train,
        rows=ROWS_A_STEP,
        longest=tokens * TASKS[recipe.train.task].sequences,
        tokens=ROWS_A_STEP * tokens,
        trained_tokens=ROWS_A_STEP * tokens,
        config=config,
    )
    note_large_steps(recipe, pace, watch)
    note_attention(recipe, config, watch)
    shapes = {} if recipe.data.eval is None else eval_shapes_of(tokens, recipe.memory.eval_tokens)
    planned = plan_methods(recipe, config, pace, tokens, name, eval_shapes=shapes, after=_AFTER)
    return planned | {"steps": None, "hours": None}


def plan_prepared(recipe: Recipe, prepared: Prepared, card: str | None = None) -> dict[str, Any]:
    """The plan of a run whose rows are known."""
    train, pace = prepared.train, prepared.pace
    return plan_methods(
        recipe,
        prepared.config,
        prepared.pace,
        prepared.longest,
        card,
        eval_shapes=eval_shapes(prepared.eval.rows, recipe.memory.eval_tokens),
        after=_AFTER,
        data_bits=bits_to_learn(train, recipe.train.task, pace.steps * pace.rows_a_step / train.epoch.rows),
    )


def _for_card(recipe: Recipe, card: Card) -> Recipe:
    """The recipe as that card would take it: its memory, and what it computes in."""
    base, memory = recipe.base, recipe.memory
    if base.compute_dtype == "auto":
        base = base.model_copy(update={"compute_dtype": card.compute_dtype})
    if memory.budget is None:
        memory = memory.model_copy(update={"budget": f"{card.usable_bytes}B"})
    return recipe.model_copy(update={"base": base, "memory": memory})


def check_weights(recipe: Recipe, config: PretrainedConfig) -> None:
    """Hold the base's weights against the budget, before anything is planned: below them nothing fits.

    Raises:
        FitError: they are above it.
    """
    if recipe.memory.budget is None:
        return
    base, budget = base_as_held(recipe), parse_bytes(recipe.memory.budget)
    work = _least_step(recipe)
    may_be_smaller = may_quantize_head(recipe, config)
    work = replace(work, quantize_head=base.quantize_head is True or (base.quantize_head == "auto" and may_be_smaller))
    weights = weight_bytes(config, work)
    if weights > budget:
        lighter = _lighter(recipe, work, may_be_smaller)
        enough = [f"set {setting}" for setting, less in lighter if weight_bytes(config, less) <= budget]
        raise FitError(
            f"memory.budget is {format_bytes(budget)}, and the weights of {base.model} alone take "
            f"{format_bytes(weights)} (base.quantization={base.quantization}); "
            f"{', '.join(['raise the budget', *enough])}, or take a smaller base"
        )


def _least_step(recipe: Recipe) -> Workload:
    return Workload.of(recipe, micro_batch=1, accumulation=1, tokens=1, activations="recompute")


def _lighter(recipe: Recipe, work: Workload, may_quantize_head: bool) -> Iterator[tuple[str, Workload]]:
    """The next setting with which weights take less, where there is one, and the step under it."""
    if recipe.train.full_finetune:
        yield "train.full_finetune=false", _least_step(with_adapters(recipe))
    elif not work.quantization.is_4bit:
        yield "base.quantization=nf4", replace(work, quantization=replace(work.quantization, kind="nf4"))
    elif may_quantize_head and not work.quantize_head:
        yield "base.quantize_head=true", replace(work, quantize_head=True)


def check_budget(plan: Mapping[str, Any]) -> None:
    """Hold a plan against its budget, or where there is none against the memory that this machine has free.

    Raises:
        FitError: the peak, with what a card's allocator adds, is above it.
    """
    budget, available, peak = plan["budget"], plan["available_bytes"], plan["needs_bytes"]
    room = available if budget is None else budget
    if peak <= room:
        return
    found = f"{format_bytes(room)} is free here" if budget is None else f"memory.budget is {format_bytes(budget)}"
    way_on = "raise the budget" if budget is not None else "plan for another machine with --gpu or --budget"
    setting = f"memory.activations={plan['activations']} train.micro_batch={plan['micro_batch']}"
    least = format_bytes(peak, is_enough=True)
    raise FitError(
        f"{found}; the least that the recipe allows is {least}, with {setting}{_smaller(plan, room)}"
        f"{_without_evaluation(plan)}; "
        f"lower {_largest_part(plan)}, or {way_on}"
    )


def _largest_part(plan: Mapping[str, Any]) -> str:
    """The setting that most of a step's memory goes back to, the weights aside."""
    held = dict(plan["methods"][plan["method"]]["by_category"])
    trained = sum(held.pop(name) for name in ("adapters", "gradients", "optimizer_state"))
    others = sum(held.values()) - held["base_weights"] - held["quantization_state"]
    if plan["method"] == "qlora" and trained > others:
        return f"lora.rank (adapters, gradients and optimizer take {format_bytes(trained)})"
    return f"data.max_tokens (longest row now {plan['tokens']:,})"


def _smaller(plan: Mapping[str, Any], room: int) -> str:
    """What else would take less, of what the recipe rules out."""
    if plan["method"] != "qlora":
        adapters = plan["methods"]["qlora"]["peak_bytes"]
        return f", or {format_bytes(adapters, is_enough=True)} with train.full_finetune=false"
    small = plan["with_quantized_head"]
    head = ""
    if small is not None:
        still = "" if small <= room else ", still too much"
        head = f" ({format_bytes(small, is_enough=True)} with base.quantize_head=true{still})"
    kept = plan["blocks"]["keep"] or plan["blocks"]["selective"]
    return f"{head}; memory.activations=recompute takes less" if kept else head


def _without_evaluation(plan: Mapping[str, Any]) -> str:
    """What would do without held-out rows, where their batches are what takes most."""
    method = plan["methods"][plan["method"]]
    phases = method["peak_by_phase"]
    others = max(peak for phase, peak in phases.items() if phase != "evaluate")
    if phases.get("evaluate", 0) <= 1.01 * others:  # what does no more than that is no way out
        return ""
    least = others + plan["needs_bytes"] - method["peak_bytes"]
    mend = "hold out shorter rows, leave memory.eval_tokens at auto, or set data.eval=null"
    return f"; evaluation needs that, training {format_bytes(least, is_enough=True)}: {mend}"


def _rows_are_missing(recipe: Recipe) -> bool:
    """Whether the rows are a local file that is not there (a hub id is looked for when it is read)."""
    path = recipe.data.train
    return isinstance(path, str) and Path(path).is_absolute() and not Path(path).exists()


@contextmanager
def one_line_if_it_does_not_fit(limit: Limit, plan: Mapping[str, Any], folder: Path | None) -> Iterator[None]:
    """Say what a run that met its limit had taken, and the way on; `folder` holds its checkpoints, if it keeps any."""
    try:
        yield
    except FitError as error:
        raise FitError(f"{error}; {_way_on(limit, plan, folder)}") from error
    except (MemoryError, RuntimeError, OSError) as error:
        ran_out = whose_memory_ran_out(error)
        if ran_out is None:
            raise
        whose = limit.device if ran_out == "device" else "the host"
        when = f"in step {limit.step}" if limit.step else "while loading"
        budget = limit.budget_bytes if ran_out == "device" else None
        room = "" if budget is None else f" of {format_bytes(budget)}"
        raise FitError(f"{whose} ran out of memory{room} {when}; {_way_on(limit, plan, folder)}") from error


def _way_on(limit: Limit, plan: Mapping[str, Any], folder: Path | None) -> str:
    """The settings that would take less, and how a run that has come so far is given them."""
    least = "recompute" if limit.device.type == "cpu" else "offload"  # on a CPU the host is the device
    changes = [] if plan["activations"] in (least, "offload") else [f"memory.activations={least}"]
    if limit.is_passed:
        enough = math.ceil(1.05 * limit.needed_bytes / MIB)  # what was seen may not have been the most
        changes.insert(0, f"memory.budget={enough}MiB")
    smaller = f"a lower train.micro_batch (now {plan['micro_batch']}) or data.max_tokens"
    if least := plan["least"]:
        planned = format_bytes(least["peak_bytes"])
        smaller = f"{least['settings']}, which is planned for {planned}, or a lower data.max_tokens"
    # Before the first step, checkpoints are those of an earlier run.
    kept = checkpoints(folder / CHECKPOINTS) if folder is not None and limit.step else []
    if not kept:
        return f"start again with {', '.join([*(change for change in changes if change not in smaller), smaller])}"
    how = f"and {' or '.join(changes)}" if changes else "where more is free"
    return f"{kept[-1].name} is kept: continue with --resume {how}, or start again with --overwrite and {smaller}"
