"""`lora.from`: an adapter to go on from. It brings its own shape, which takes the place of the recipe's settings, so
that the plan sees it; with a task that holds to where it started, a frozen copy stands beside it on the same base.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_kit.base.record import base_record
from qlora_kit.errors import AdapterError, RecipeError
from qlora_kit.lora.adapters import CONFIG, load_adapter
from qlora_kit.lora.inject import LoraReport, lora_report
from qlora_kit.lora.layer import adapter_parameters, lora_layers
from qlora_kit.lora.peft_config import read_config
from qlora_kit.lora.several import adapter_names, adapter_used, use_adapter
from qlora_kit.lora.whole import WholeModule, train_module
from qlora_kit.recipe import Lora

REFERENCE = "reference"
"""Name of the frozen copy."""
_WAY_ON = "set base.model to the base that it was trained on, or lora.from to an adapter of this one"
_OF_THE_RUN = ("from_", "dropout", "lr_ratio", "added_tokens")
"""Keys that are no shape of an adapter: how it is trained, and tokens, which it names itself."""


def adapter_folder(path: str) -> Path:
    """The folder of an adapter's files: `path` itself, or a run's adapter/.

    Raises:
        AdapterError: there is no adapter.
    """
    for folder in (Path(path), Path(path) / "adapter"):
        if (folder / CONFIG).is_file():
            return folder
    raise AdapterError(f"lora.from={path} is neither an adapter (it has no {CONFIG}) nor a run that has one")


def shaped(lora: Lora, added_tokens: Sequence[str] = ()) -> Lora:
    """A recipe's section with the shape of the adapter that it goes on from; as it is where it starts new ones.

    Args:
        lora: that section.
        added_tokens: whose rows the adapter holds.

    Raises:
        AdapterError: there is no adapter, or its shape cannot be told from its config.
        RecipeError: the recipe asks for another shape.
    """
    if lora.from_ is None:
        return lora
    config = read_config(adapter_folder(lora.from_) / CONFIG)
    if config.get("trainable_token_indices") and not added_tokens:
        raise AdapterError(f"the adapter of lora.from={lora.from_} trains rows of tokens and does not say which tokens")
    brought: dict[str, Any] = _shape(config) | {"added_tokens": list(added_tokens)}
    if "dropout" not in lora.model_fields_set:
        brought["dropout"] = config.get("lora_dropout") or 0.0
    asked = {key for key in lora.model_fields_set - set(_OF_THE_RUN) if getattr(lora, key) != "auto"}
    other = sorted(key for key in asked if getattr(lora, key) != brought.get(key, getattr(lora, key)))
    if other:
        key = other[0]
        raise RecipeError(
            f"lora.from={lora.from_} brings lora.{key}={brought[key]}, and the recipe sets {getattr(lora, key)}: leave "
            f"out {', '.join(f'lora.{each}' for each in other)}"
        )
    return lora.model_copy(update=brought)


def load_start(model: PreTrainedModel, lora: Lora, *, has_reference: bool, name: str = "default") -> LoraReport:
    """Put the adapter of `lora.from` on a model, to be trained, and where asked for a frozen copy beside it.

    Args:
        model: the frozen base.
        lora: as `shaped` gave it.
        has_reference: whether the start is held to; its name is `REFERENCE`, and there is one for all that start there.
        name: of the adapter that is trained.

    Raises:
        AdapterError: as `load_adapter`.
    """
    if has_reference and REFERENCE not in adapter_names(model):
        load_reference(model, lora)
    notes = load_adapter(model, adapter_folder(str(lora.from_)), name=name, dtype=torch.bfloat16, way_on=_WAY_ON).notes
    for module_name in base_record(model).untrained:  # a new classifier, which an adapter of another task has not
        module = model.get_submodule(module_name)
        if not isinstance(module, WholeModule) or name not in module.adapters:
            train_module(model, module_name, name)
    use_adapter(model, name)
    for _, layer in lora_layers(model):
        if name in layer.adapters:
            layer.adapter(name).dropout = lora.dropout
    return replace(lora_report(model, name), notes=notes)


def load_reference(model: PreTrainedModel, lora: Lora) -> None:
    """Put the frozen copy on a model, and leave in use what is.

    Raises:
        AdapterError: as `load_adapter`.
    """
    with adapter_used(model, None):
        load_adapter(model, adapter_folder(str(lora.from_)), name=REFERENCE, dtype=torch.bfloat16, way_on=_WAY_ON)
    for _, parameter in adapter_parameters(model, REFERENCE):
        parameter.requires_grad_(False)


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's fields in the words of a recipe."""
    for field in ("exclude_modules", "layers_to_transform"):
        if config.get(field):
            raise AdapterError(
                f"lora.from cannot continue from an adapter with {field}={config[field]!r} in its config"
            )
    modules, parameters = config.get("target_modules") or [], config.get("target_parameters") or []
    is_leaves = isinstance(modules, list) and not parameters and all("." not in entry for entry in modules)
    named = parameters if isinstance(modules, str) else [*modules, *parameters]
    ends = [_any_end([re.escape(entry) for entry in named])] if named else []
    pattern = "|".join([f"({modules})", *ends] if isinstance(modules, str) else ends)
    ranks = {f"re:{_any_end([re.escape(entry)])}": config["r"] for entry in parameters}
    return {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "targets": modules if is_leaves else f"re:{pattern}",
        "scaling": "rslora" if config.get("use_rslora") else "standard",
        "init": "default",
        "dora": bool(config.get("use_dora")),
        "rank_pattern": ranks | _patterns(config.get("rank_pattern")),
        "alpha_pattern": _patterns(config.get("alpha_pattern")),
        "also_train": list(config.get("modules_to_save") or ()),
        "untie_head": True,
    }


def _any_end(entries: Sequence[str]) -> str:
    return rf"(.*\.)?({'|'.join(entries)})"


def _patterns(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """PEFT looks a key up as the end of a layer's name."""
    return {f"re:{_any_end([key])}": value for key, value in (given or {}).items()}
