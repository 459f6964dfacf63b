"""A run put together: its plan, its base, an adapter on it, and the job that a loop works on."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qlora_kit.base import locate_model
from qlora_kit.base.load import original_weights
from qlora_kit.base.text import text_parameters
from qlora_kit.lora import LoraReport, adapter_constants, adapter_parameters, add_recipe_lora, load_start
from qlora_kit.memory import Ledger, Limit
from qlora_kit.recipe import Recipe
from qlora_kit.run.common import Common
from qlora_kit.run.plan import check_budget, check_weights, plan_prepared
from qlora_kit.run.prepare import Prepared
from qlora_kit.run.rows import eval_batches
from qlora_kit.run.tokenizer import added_ids, pad_id
from qlora_kit.run.unlearnt import tokens_to_learn
from qlora_kit.run.use import load_recipe_base
from qlora_kit.train.classes import classes_in
from qlora_kit.train.loop import Job
from qlora_kit.train.optim import AdapterOptimizer, definite_masters
from qlora_kit.train.probe import settled_chunk
from qlora_kit.train.tasks import Task, has_reference, task_of
from qlora_kit.watch import Watch


def plan_run(recipe: Recipe, prepared: Prepared, watch: Watch) -> tuple[Prepared, dict[str, Any]]:
    """The plan of a run, told and held to its budget; what is prepared, in the micro-batches that it chose.

    Raises:
        FitError: the plan is above the budget.
    """
    check_weights(recipe, prepared.config)
    plan = plan_prepared(recipe, prepared)
    watch.planned(plan)
    check_budget(plan)
    chosen = {key: plan["pace"][key] for key in ("micro_batch", "accumulation", "eval_tokens")}
    return replace(prepared, pace=replace(prepared.pace, **chosen)), plan


def settle(recipe: Recipe, plan: Mapping[str, Any]) -> Recipe:
    """The recipe with `base.quantize_head: auto` and `lora.rank: auto` as the plan settled them, and with the tokens
    whose rows the run trains unasked."""
    base, lora = recipe.base, recipe.lora
    if base.quantize_head == "auto":
        base = base.model_copy(update={"quantize_head": plan["quantize_head"]})
    if lora.rank == "auto":
        lora = lora.model_copy(update={"rank": plan["rank"]})
    if not lora.added_tokens:
        lora = lora.model_copy(update={"added_tokens": plan.get("added_tokens", [])})
    return recipe.model_copy(update={"base": base, "lora": lora})


def as_planned(recipe: Recipe, plan: Mapping[str, Any]) -> Recipe:
    """The recipe with the rank, the head, the batches and the loss that a plan chose: in others the same sums would be
    rounded otherwise. Plans before rows lay end to end do not say how they lay."""
    train, data, memory = recipe.train, recipe.data, recipe.memory
    if train.micro_batch == "auto" and train.accumulation == "auto":
        train = train.model_copy(update={key: plan[key] for key in ("micro_batch", "accumulation")})
    if data.packing == "auto" and plan.get("layout", "apart") == "apart":
        data = data.model_copy(update={"packing": False})
    if memory.loss_chunk == "auto" and plan.get("loss_chunk") is not None:
        memory = memory.model_copy(update={"loss_chunk": plan["loss_chunk"]})
    if memory.eval_tokens == "auto" and plan.get("eval_tokens") is not None:
        memory = memory.model_copy(update={"eval_tokens": plan["eval_tokens"]})
    return settle(recipe, plan).model_copy(update={"train": train, "data": data, "memory": memory})


def learn_marks(
    model: PreTrainedModel, recipe: Recipe, prepared: Prepared, plan: dict[str, Any], watch: Watch
) -> tuple[Recipe, dict[str, Any]]:
    """Have rows trained of tokens that chats are written in and the base has not learnt; the plan with them."""
    names, told = tokens_to_learn(model, prepared.tokenizer, recipe) if prepared.train.has_chats else ([], None)
    if told is not None:
        watch.note(told)
    if names:
        recipe = settle(recipe, {"added_tokens": names})
        # The budget stays what it was before the base took some of it.
        budget = None if plan["budget"] is None else f"{plan['budget']}B"
        same = as_planned(recipe, plan)
        same = same.model_copy(update={"memory": same.memory.model_copy(update={"budget": budget})})
        _, plan = plan_run(same, prepared, Watch())
    return recipe, plan | {"added_tokens": recipe.lora.added_tokens}


def take_base(
    recipe: Recipe, prepared: Prepared, ledger: Ledger, watch: Watch, trust_remote_code: bool, common: Common
) -> PreTrainedModel:
    """The base; where it stays as it was, it is there for the next run."""
    if recipe.train.full_finetune:
        common.clear("base")
        return load(recipe, prepared, ledger, watch, trust_remote_code)
    mark = (recipe.base, recipe.lora.added_tokens, recipe.train.task == "classify" and classes_in(prepared.config))
    return common.take_base(mark, lambda: load(recipe, prepared, ledger, watch, trust_remote_code))


def load(recipe: Recipe, prepared: Prepared, ledger: Ledger, watch: Watch, trust_remote_code: bool) -> PreTrainedModel:
    """The base, frozen."""

    def loading(dense: PreTrainedModel) -> AbstractContextManager[None]:
        ledger.ignore(dense.parameters())
        return ledger.watch("load")

    folder = locate_model(recipe.base.model, recipe.base.revision, code=trust_remote_code, notify=watch.note)
    return load_recipe_base(
        recipe,
        folder,
        prepared.tokenizer,
        classes=classes_in(prepared.config) if recipe.train.task == "classify" else None,
        trust_remote_code=trust_remote_code,
        watching=loading,
        notify=watch.note,
    )


def put_adapter(
    model: PreTrainedModel, recipe: Recipe, prepared: Prepared, ledger: Ledger, name: str = "default"
) -> LoraReport:
    """Put the adapter of a run on its base under `name`, and switch to it: a new one, or that of `lora.from`."""
    lora, originals = recipe.lora, None
    if lora.from_ is None and lora.init == "loftq":
        originals = original_weights(model)
        ledger.ignore(originals.parameters())  # pages of the checkpoint, as where it is loaded
    with ledger.watch("load"):
        if lora.from_ is not None:
            return load_start(model, lora, has_reference=has_reference(recipe), name=name)
        ids = added_ids(prepared.tokenizer, recipe)
        return add_recipe_lora(model, lora, seed=recipe.train.seed, token_ids=ids, name=name, originals=originals)


def loss_of(
    recipe: Recipe, prepared: Prepared, plan: Mapping[str, Any], model: PreTrainedModel, watch: Watch
) -> tuple[Task, int | None]:
    """What a run minimises, and the tokens whose logits stand at one time; None for whole logits."""
    task = task_of(recipe.train, has_reference=has_reference(recipe))
    asked = plan["loss_chunk"] if task.answers else None
    loss_chunk, why_whole = settled_chunk(model, prepared.train.rows[0].input_ids, asked)
    if why_whole is not None:
        watch.note(why_whole)
    return task, loss_chunk


def make_job(
    recipe: Recipe,
    prepared: Prepared,
    model: PreTrainedModel,
    task: Task,
    loss_chunk: int | None,
    limit: Limit,
    name: str = "default",
) -> Job:
    """A job at its beginning: the adapter `name`, or every weight in full fine-tuning, with an optimizer of its own."""
    is_full = recipe.train.full_finetune
    parameters = text_parameters(model) if is_full else dict(adapter_parameters(model, name))
    optimizer = AdapterOptimizer(
        list(parameters.items()),
        recipe.train.optimizer,
        master_weights=definite_masters(recipe.train.master_weights, full_finetune=is_full),
        lr_ratio=recipe.lora.lr_ratio,
        weight_decay=recipe.train.weight_decay,
        seed=recipe.train.seed,
    )
    return Job(
        model=model,
        parameters=parameters,
        constants=dict(adapter_constants(model, name)),
        optimizer=optimizer,
        rows=prepared.train.rows,
        decks=prepared.train.decks,
        eval_batches=eval_batches(
            prepared.eval.rows, pad_id(prepared.tokenizer), model.device, prepared.pace.eval_tokens
        ),
        pad_id=pad_id(prepared.tokenizer),
        pace=prepared.pace,
        train=recipe.train,
        task=task,
        loss_chunk=loss_chunk,
        folder=Path(recipe.output),
        packing=prepared.packing,
        check_memory=limit.check,
    )
