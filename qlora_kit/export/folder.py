"""The files around the weights, so that another program needs nothing but the folder: config, tokenizer, model card.

The card holds what somebody who finds the folder in a year wants to know: which base, which adapter, trained against
what, merged how, how far from what was trained, made with which versions.
"""

import copy
import json
import re
from collections.abc import Container, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlora_kit import __version__
from qlora_kit.base.header import read_object
from qlora_kit.base.record import base_record
from qlora_kit.base.text import unread_parameters
from qlora_kit.lora.vocabulary import head_name
from qlora_kit.storage import write_text
from qlora_kit.train.generate import end_tokens

_LIBRARIES = ("torch", "transformers", "bitsandbytes", "safetensors")
"""Whose versions an export records beside the kit's own."""

_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""What else a model that sees is read with: how pictures become numbers."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def write_model_files(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    dtype: torch.dtype,
    tensor_names: Container[str],
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json, generation_config.json and the tokenizer's files, its chat template among them, and of a model
    that sees, too, those of its base for pictures.

    Args:
        model: whose configuration is written; it is not changed.
        tokenizer: or None where the base has none.
        folder: of the export.
        dtype: of the exported weights.
        tensor_names: of the exported weights; a head among them stands on its own.
        quantization: how the weights are stored, as transformers says it; None where they are dense.
    """
    config = dense_config(model, dtype, tensor_names)
    if quantization is not None:
        config.quantization_config = dict(quantization)
    write_text(folder / "config.json", config.to_json_string())
    write_generation_config(model, tokenizer, folder)
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder)
    base = base_record(model).folder
    if base is not None and unread_parameters(model):
        for path in [base / name for name in _PROCESSORS if (base / name).is_file()]:
            write_text(folder / path.name, json.dumps(read_object(path), indent=2) + "\n")


def write_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write generation_config.json for a model that generates: the base's, with every token that ends an answer."""
    if not model.can_generate() or model.generation_config is None:
        return
    config = copy.deepcopy(model.generation_config)
    ends = end_tokens(model, tokenizer)
    config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    # Written as it is: `save_pretrained` refuses the contradictory settings that some published models carry. Only what
    # marks a config made of config.json goes: releases of transformers make such a one again, without these end tokens.
    idle = ["compile_config", "_from_model_config"]
    write_text(folder / "generation_config.json", config.to_json_string(keys_to_pop=idle))


def dense_config(model: PreTrainedModel, dtype: torch.dtype, tensor_names: Container[str]) -> PretrainedConfig:
    """The model's configuration as that of a plain dense checkpoint.

    A head that is written out although the configuration ties it has changed in training: the tie is cut, because a
    program that ties it again would put the embedding in its place.
    """
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    head = head_name(model)
    if head is not None and f"{head}.weight" in tensor_names:
        config.tie_word_embeddings = False
    return config


def library_versions() -> dict[str, str]:
    """Versions of what made the export."""
    return {"qlora-kit": __version__, **{name: version(name) for name in _LIBRARIES}}


def model_card(
    title: str, base: str, library: str, tags: list[str], sections: Mapping[str, Mapping[str, object]]
) -> str:
    """README.md: a front matter that hubs read, and one list of facts a section.

    Args:
        title: first heading.
        base: hub id or folder of the base model. Only an id goes into the front matter: hubs refuse a card that names a
            folder of somebody's disk.
        library: that loads the folder.
        tags: for the front matter.
        sections: heading -> name -> value. Every value is shown as code, on one line, so none can act as markup.
    """
    front: dict[str, object] = {"library_name": library, "tags": tags}
    if _HUB_ID.fullmatch(base) and not Path(base).exists():
        front = {"base_model": base, **front}
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", "", f"# {title}"]
    for heading, facts in sections.items():
        lines += ["", f"## {heading}", "", *(f"- {name}: {_code(value)}" for name, value in facts.items())]
    return "\n".join(lines) + "\n"


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer without the padding and truncation of its last call, which its file would impose on all."""
    tokenizer = copy.deepcopy(tokenizer)
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)


def _code(value: object) -> str:
    """A value as inline code: whitespace and control characters become single spaces, backticks become apostrophes."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    plain = "".join(character if character.isprintable() else " " for character in text.replace("`", "'"))
    return f"`{' '.join(plain.split()) or '-'}`"
