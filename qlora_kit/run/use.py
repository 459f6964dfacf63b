"""Using a finished run: load and evaluate it. `ask.py` and `talk.py` generate answers, `export.py` writes weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.base import load_base, locate_model
from qlora_kit.base.architecture import head_of, stored_head
from qlora_kit.base.hub import say_nothing
from qlora_kit.base.load import Watching, stored_as
from qlora_kit.data import Classes
from qlora_kit.errors import ModelError, RunError
from qlora_kit.lora import adapter_constants, adapter_parameters, add_recipe_lora, load_adapter, load_reference
from qlora_kit.recipe import Base, Data, Recipe, Train, base_as_held, read_recipe
from qlora_kit.run.folder import CHECKPOINTS, RECIPE, trained_folder
from qlora_kit.run.recorded import (
    check_adapter,
    exported_way_to_ask,
    recorded_classes,
    recorded_data,
    recorded_date,
    recorded_reference,
)
from qlora_kit.run.rows import eval_batches, held_out_rows, positions_for
from qlora_kit.run.score import of_base, score_rows
from qlora_kit.run.start import check_reference
from qlora_kit.run.tokenizer import added_ids, load_tokenizer, pad_id, rows_needed, set_template
from qlora_kit.storage import check_folder
from qlora_kit.train.checkpoint import load_parameters, verify_checkpoint
from qlora_kit.train.classes import head_for, name_classes
from qlora_kit.train.evaluate import Score
from qlora_kit.train.head import automatic_chunk
from qlora_kit.train.probe import settled_chunk
from qlora_kit.train.tasks import has_reference, task_of
from qlora_kit.watch import Watch

_NO_MODEL = {
    "adapter_config.json": "an adapter without its base, for PEFT",
    "model.gguf": "a GGUF file, for llama.cpp and Ollama",
    "adapter.gguf": "an adapter without its base, for llama.cpp",
}
"""Exports that are no model of their own here, by a file that each has."""

MAX_TOKENS = 2048
"""Longest row on which a model folder without a recipe is evaluated."""


def load_run(
    folder: str | Path,
    *,
    device: str | None = None,
    bare_base: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Recipe]:
    """A finished run as a model to use: its base with its adapter, or the weights that it trained; or its bare base.

    Args:
        folder: the run folder, or one of its checkpoints.
        device: other than the recipe's.
        bare_base: leave away what was trained.
        force: take the adapter although its base's fingerprint differs.
        trust_remote_code: let the model's own code run.

    Raises:
        RunError: the folder is no run, or has no adapter or model yet.
    """
    folder = Path(folder)
    check_folder(folder)
    run = run_of(folder)
    if run is None:
        raise RunError(f"{folder} is not a run folder (it has no recipe.yaml); give the output of a `qlora-kit train`")
    recipe, is_end = read_recipe(run / RECIPE), run == folder
    trained = trained_folder(run, recipe)
    if not bare_base and is_end and not trained.is_dir():
        raise RunError(f"{run} has no {trained.name} yet; let the run finish with `qlora-kit train ... --resume`")
    if not bare_base and is_end and not force:
        check_adapter(run)
    is_whole = recipe.train.full_finetune and not bare_base and is_end
    source = trained if is_whole else _located(recipe.base, run, trust_remote_code)
    tokenizer = load_run_tokenizer(run, source, trust_remote_code=trust_remote_code)
    model = load_recipe_base(
        recipe,
        source,
        tokenizer,
        classes=recorded_classes(run),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if not bare_base and not is_end:
        _go_to_checkpoint(model, tokenizer, recipe, folder)
    elif not bare_base and not is_whole:
        load_adapter(model, trained, force=force)
    return model, tokenizer, recipe


def _located(base: Base, run: Path, trust_remote_code: bool) -> Path:
    """Where the base of a run is.

    Raises:
        ModelError: it is not to be had; of a folder that was moved the line says where the run names it.
    """
    try:
        return locate_model(base.model, base.revision, code=trust_remote_code)
    except ModelError:
        if Path(base.model).is_absolute() and not Path(base.model).exists():
            raise ModelError(
                f"{base.model} is not there; if it was moved, let the run note where to: "
                f"qlora-kit train {run / RECIPE} --resume base.model=PLACE"
            ) from None
        raise


def load_run_tokenizer(
    run: Path, source: Path | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a run, which writes chats as its training did; from `source`, or where its base is."""
    recipe = read_recipe(run / RECIPE)
    base = recipe.base
    source = source or locate_model(base.model, base.revision, weights=False, code=trust_remote_code)
    tokenizer = load_tokenizer(source, recipe, trust_remote_code=trust_remote_code)
    if recorded_data(run).get("chats"):
        set_template(tokenizer, recipe, recorded_date(run))
    return tokenizer


def load_any(
    folder: Path, *, bare_base: bool = False, force: bool = False, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Recipe | None]:
    """A run as `load_run` gives it, or a folder with weights, such as an export, which has no recipe.

    Raises:
        RunError: the folder is neither, or it has weights and no bare base.
    """
    check_folder(folder)
    if run_of(folder) is not None:
        return load_run(folder, bare_base=bare_base, force=force, trust_remote_code=trust_remote_code)
    if not (folder / "config.json").is_file():
        held = next((what for name, what in _NO_MODEL.items() if (folder / name).is_file()), None)
        if held is not None:
            raise RunError(f"{folder} holds {held}; give the run that it belongs to, or the run's export --to merged")
        raise RunError(
            f"{folder} is not a run folder (it has no recipe.yaml) and holds no model (config.json); give the output "
            "of a `qlora-kit train` or of an export"
        )
    if bare_base:
        raise RunError(
            f"--base leaves away what a run trained, and in {folder} base and training are the same weights; give the "
            "run, or leave --base out"
        )
    head = stored_head(folder)
    stored = stored_as(folder, head=head, trust_remote_code=trust_remote_code)
    model = load_base(folder, **stored, head=head, trust_remote_code=trust_remote_code)
    return model, load_tokenizer(folder, trust_remote_code=trust_remote_code), None


def run_of(folder: Path) -> Path | None:
    """The run folder that a folder is, or is a checkpoint of; None where it is neither."""
    if (folder / RECIPE).is_file():
        return folder
    above = folder.absolute().parents
    is_checkpoint = len(above) > 1 and above[0].name == CHECKPOINTS and (above[1] / RECIPE).is_file()
    return above[1] if is_checkpoint else None


def tells_apart(folder: Path) -> bool | None:
    """Whether the model of a run, of its checkpoint, or of a folder with weights is a classifier; None without one."""
    if (run := run_of(folder)) is not None:
        return recorded_classes(run) is not None
    return stored_head(folder) == "classification" if (folder / "config.json").is_file() else None


def _go_to_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, folder: Path) -> None:
    """Give a base what its run had trained when the checkpoint was written."""
    if faults := verify_checkpoint(folder):
        raise RunError(f"{faults[0]}; give another checkpoint of the run, or the run itself")
    if recipe.train.full_finetune:
        load_parameters(folder, dict(model.named_parameters()))
        return
    add_recipe_lora(model, recipe.lora, seed=recipe.train.seed, token_ids=added_ids(tokenizer, recipe))
    load_parameters(folder, dict(adapter_parameters(model)) | dict(adapter_constants(model)))


def evaluate(
    folder: Path,
    *,
    data: Path | None,
    bare_base: bool,
    force: bool,
    watch: Watch | None = None,
    trust_remote_code: bool = False,
) -> Score:
    """Loss, perplexity and, where answers are short, exact match: of a run, its bare base, or a folder with weights.

    Args:
        folder: a run folder, or a model folder (then `data` must be given).
        data: rows in any format that training reads; None takes the run's held-out rows.
        bare_base: leave away what was trained.
        force: take the adapter although its base's fingerprint differs.
        watch: is told what is left out.
        trust_remote_code: let the model's own code run.
    """
    check_folder(folder)
    watch, run = watch or Watch(), run_of(folder)
    if data is None and run is None:
        raise RunError(f"{folder} is not a run folder; to evaluate a model folder give the rows with --data FILE")
    if run is not None:
        check_reference(read_recipe(run / RECIPE), recorded_reference(run))
    model, tokenizer, recipe = load_any(folder, bare_base=bare_base, force=force, trust_remote_code=trust_remote_code)
    if recipe is None:
        recipe = _recipe_for(model, tokenizer, folder, str(data))
    rows = held_out_rows(recipe, tokenizer, model.config, data)
    if not rows.rows:
        raise RunError(f"{folder} has no held-out rows (data.json says why); give rows with --data FILE")
    batches = eval_batches(rows.rows, pad_id(tokenizer), model.device, recipe.memory.eval_tokens)
    task = task_of(recipe.train, has_reference=has_reference(recipe))
    chunk = automatic_chunk(model.config.get_text_config().vocab_size) if task.answers else None
    loss_chunk, _ = settled_chunk(model, rows.rows[0].input_ids, chunk)
    if has_reference(recipe):
        load_reference(model, recipe.lora)
    measured, _ = score_rows(model, tokenizer, rows.rows, batches, task, loss_chunk)
    if not bare_base:
        return measured
    if (told := of_base(measured)) != measured:
        watch.note("rewards are left out: they say how far a model has moved, and the base has not")
    return told


def _recipe_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, data: str) -> Recipe:
    """What a folder with weights, which has no recipe, is evaluated by."""
    task: Literal["classify", "sft"] = "classify" if head_of(model) == "classification" else "sft"
    most = min(MAX_TOKENS, positions_for(task, tokenizer, model.config) or MAX_TOKENS)
    _, thinking = exported_way_to_ask(folder)
    rows = Data(train=data, max_tokens=most, thinking=thinking)
    recipe = Recipe(base=Base(model=str(folder)), data=rows, train=Train(task=task))
    if task == "sft":
        set_template(tokenizer, recipe, None)
    return recipe


def load_recipe_base(
    recipe: Recipe,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    classes: Classes | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    watching: Watching | None = None,
    notify: Callable[[str], None] = say_nothing,
) -> PreTrainedModel:
    """The base that a recipe names, held as its run holds it.

    Args:
        recipe: the run.
        folder: where `locate_model` found the base, or a run's model/.
        tokenizer: with the tokens that the recipe adds.
        classes: that a run tells apart.
        device: other than the recipe's.
        trust_remote_code: let the model folder's own code run.
        watching: as `load_base` takes it.
        notify: likewise.
    """
    base = base_as_held(recipe)
    model = load_base(
        folder,
        quantization=base.quantization,
        double_quant=base.double_quant,
        block_size=base.block_size,
        compute_dtype=base.compute_dtype,
        device=device or base.device,
        skip=base.skip,
        quantize_head=base.quantize_head is True,  # a run's folder holds auto as it was settled
        attention=base.attention,
        vocabulary=rows_needed(tokenizer, recipe),
        trust_remote_code=trust_remote_code,
        head=head_for(recipe.train.task),
        labels=None if classes is None else len(classes.names),
        watching=watching,
        cache=base.cache,
        notify=notify,
    )
    model.config._name_or_path = base.model  # a hub id, where transformers would keep the cache's path
    if classes is not None:
        name_classes(model.config, classes, pad_id(tokenizer))
    return model
