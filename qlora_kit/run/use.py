"""What a finished run is good for: evaluate it, ask it, export it."""

from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.base import load_base, locate_model
from qlora_kit.base.load import Watching
from qlora_kit.errors import RunError
from qlora_kit.export import check_request, export_adapter, export_merged
from qlora_kit.lora import load_adapter, load_reference
from qlora_kit.recipe import Base, Data, Recipe, base_as_held, read_recipe
from qlora_kit.run.folder import DATA, RECIPE, provenance_of, recorded_date, trained_folder
from qlora_kit.run.prepare import eval_batches, held_out_rows, load_tokenizer, pad_id, rows_needed, set_template
from qlora_kit.run.score import score_rows
from qlora_kit.storage import read_json
from qlora_kit.train.evaluate import Score, generate_texts
from qlora_kit.train.head import automatic_chunk
from qlora_kit.train.probe import settled_chunk
from qlora_kit.train.tasks import has_reference, task_of

MAX_TOKENS = 2048
"""Longest row on which a model folder without a recipe is evaluated."""

EXPORTS = ("merged", "adapter", "gguf", "gguf-adapter")
"""What `--to` may be."""


def load_run(
    folder: Path,
    *,
    device: str | None = None,
    bare_base: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Recipe]:
    """A finished run as a model to use: its base with its adapter, or the weights that it trained; or its bare base.

    Args:
        folder: the run folder.
        device: other than the recipe's.
        bare_base: leave away what was trained.
        force: take the adapter although its base's fingerprint differs.
        trust_remote_code: let the model's own code run.

    Raises:
        RunError: the folder is no run, or has no adapter or model yet.
    """
    if not (folder / RECIPE).is_file():
        raise RunError(f"{folder} is no run folder (it has no recipe.yaml); give the output of a `qlora-kit train`")
    recipe = read_recipe(folder / RECIPE)
    trained = trained_folder(folder, recipe)
    if not bare_base and not trained.is_dir():
        raise RunError(f"{folder} has no {trained.name} yet; let the run finish with `qlora-kit train ... --resume`")
    is_whole = recipe.train.full_finetune and not bare_base
    source = trained if is_whole else locate_model(recipe.base.model, recipe.base.revision, code=trust_remote_code)
    tokenizer = load_tokenizer(source, recipe, trust_remote_code=trust_remote_code)
    if read_json(folder / DATA).get("chats"):
        set_template(tokenizer, recipe, recorded_date(folder))
    model = load_recipe_base(recipe, source, tokenizer, device=device, trust_remote_code=trust_remote_code)
    if not bare_base and not is_whole:
        load_adapter(model, trained, force=force)
    return model, tokenizer, recipe


def evaluate(
    folder: Path, *, data: Path | None, bare_base: bool, force: bool, trust_remote_code: bool = False
) -> Score:
    """Loss, perplexity and, where answers are short, exact match: of a run, its bare base, or a folder with weights.

    Args:
        folder: a run folder, or a model folder (then `data` must be given).
        data: rows in any format that training reads; None takes the run's held-out rows.
        bare_base: leave away what was trained.
        force: take the adapter although its base's fingerprint differs.
        trust_remote_code: let the model's own code run.
    """
    if (folder / RECIPE).is_file():
        model, tokenizer, recipe = load_run(
            folder, bare_base=bare_base, force=force, trust_remote_code=trust_remote_code
        )
        rows = held_out_rows(recipe, tokenizer, model.config, data)
    else:
        if data is None:
            raise RunError(f"{folder} is no run folder; to evaluate a model folder give the rows with --data FILE")
        model = load_base(folder, quantization="none", trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or MAX_TOKENS
        recipe = Recipe(base=Base(model=str(folder)), data=Data(train=str(data), max_tokens=min(MAX_TOKENS, positions)))
        set_template(tokenizer, recipe, None)
        rows = held_out_rows(recipe, tokenizer, model.config, data)
    if not rows.rows:
        raise RunError(f"{folder} has no held-out rows (data.json says why); give rows with --data FILE")
    batches = eval_batches(rows.rows, pad_id(tokenizer), model.device)
    chunk = automatic_chunk(model.config.get_text_config().vocab_size)
    loss_chunk, _ = settled_chunk(model, rows.rows[0].input_ids, chunk)
    if has_reference(recipe):
        load_reference(model, recipe.lora)
    task = task_of(recipe.train, has_reference=has_reference(recipe))
    measured, _ = score_rows(model, tokenizer, rows.rows, batches, task, loss_chunk)
    return measured


def answer(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    raw: bool,
    bare_base: bool,
    force: bool,
    trust_remote_code: bool = False,
) -> str:
    """What a run's model says to a prompt.

    The prompt goes through the chat template if the run was trained on chats, unless `raw` is asked for: it is put to
    the model in the form in which training put its prompts.
    """
    model, tokenizer, _ = load_run(folder, bare_base=bare_base, force=force, trust_remote_code=trust_remote_code)
    if read_json(folder / DATA).get("chats") and not raw:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    return generate_texts(model, tokenizer, [ids], max_new_tokens=max_new_tokens, temperature=temperature)[0]


def export_run(
    folder: Path, out: Path, *, to: str, onto: str, dtype: str | None, force: bool, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Write a run's weights for other programs.

    Args:
        folder: of the run.
        out: the new folder.
        to: merged, adapter, gguf or gguf-adapter.
        onto: what the adapter is merged into; dequantized is built.
        dtype: of merged weights, or of a GGUF file; None takes bfloat16, or q4_k_m.
        force: take the adapter although its base's fingerprint differs.
        trust_remote_code: let the model's own code run.

    Returns:
        What export.json holds.
    """
    if to not in EXPORTS:
        raise RunError(f"--to {to} is not built yet in this version; built: {', '.join(EXPORTS)}")
    if onto != "dequantized":
        raise RunError(f"--onto {onto} is not built yet in this version; built: dequantized")
    is_gguf, is_adapter = to.startswith("gguf"), to.endswith("adapter")
    dtype = dtype or ("q4_k_m" if is_gguf else "bfloat16")
    (_gguf().check_gguf_request if is_gguf else check_request)(out, dtype)
    if is_adapter and (folder / RECIPE).is_file() and read_recipe(folder / RECIPE).train.full_finetune:
        raise RunError(f"{folder} trained every weight and has no adapter; export --to merged")
    model, tokenizer, recipe = load_run(folder, force=force, trust_remote_code=trust_remote_code)
    if to == "adapter":
        return export_adapter(model, out, tokenizer=tokenizer, provenance=provenance_of(recipe))
    if to == "gguf-adapter":
        return _gguf().export_gguf_adapter(model, out, provenance=provenance_of(recipe))
    rows = held_out_rows(recipe, tokenizer, model.config, None).rows
    return (_gguf().export_gguf if is_gguf else export_merged)(
        model,
        tokenizer,
        out,
        dtype=dtype,
        audit_batches=eval_batches(rows, pad_id(tokenizer), model.device) if rows else None,
        provenance=provenance_of(recipe),
        is_whole=recipe.train.full_finetune,
    )


def _gguf() -> ModuleType:
    """The room that needs the package `gguf`, which not everybody has."""
    from qlora_kit.export import gguf

    return gguf


def load_recipe_base(
    recipe: Recipe,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    watching: Watching | None = None,
) -> PreTrainedModel:
    """The base that a recipe names, held as its run holds it.

    Args:
        recipe: the run.
        folder: where `locate_model` found the base, or a run's model/.
        tokenizer: with the tokens that the recipe adds.
        device: other than the recipe's.
        trust_remote_code: let the model folder's own code run.
        watching: as `load_base` takes it.
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
        watching=watching,
    )
    model.config._name_or_path = base.model  # a hub id, where transformers would keep the cache's path
    return model
