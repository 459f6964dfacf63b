"""What an adapter was trained against: how its base was stored, as words in the metadata of the adapter's file.

An adapter corrects one particular set of weights. The same checkpoint in another format is another set, so whoever
merges must quantise as training did; that is why the settings travel with the adapter.
"""

import json
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel

from qlora_kit.base.architecture import Head, head_of
from qlora_kit.base.dense import QuantizedLinear
from qlora_kit.base.device import DTYPES
from qlora_kit.base.formats import Kind
from qlora_kit.base.record import base_record
from qlora_kit.base.vocabulary import QuantizedEmbedding
from qlora_kit.data.classes import Classes
from qlora_kit.errors import AdapterError
from qlora_kit.lora.adapters import WEIGHTS
from qlora_kit.lora.layer import bare
from qlora_kit.lora.targets import adaptable_linears
from qlora_kit.lora.vocabulary import head_name
from qlora_kit.train.classes import classes_in, known_classes, name_classes

PREFIX = "qlora_kit."
ADDED_TOKENS = "added_tokens"
CLASSES = "classes"


def trained_against(model: PreTrainedModel) -> dict[str, str]:
    """How the base of this model is stored, as metadata: `qlora_kit.quantization` and its settings."""
    record, embedding, head = base_record(model), model.get_input_embeddings(), head_name(model)
    how = record.quantization
    linears = {name: module for name, module in adaptable_linears(model).items() if name != head}
    facts = {"quantization": how.kind, "compute_dtype": str(record.dtype).removeprefix("torch.")}
    if isinstance(bare(embedding), QuantizedEmbedding):
        facts["quantize_head"] = "true"
    if record.vocabulary:
        facts["vocabulary"] = str(record.vocabulary)
    if head_of(model) == "classification":
        facts |= {"head": "classification", "labels": str(model.config.num_labels)}
    if head_of(model) == "classification" and known_classes(model.config):
        classes, pad = classes_in(model.config), model.config.get_text_config().pad_token_id
        facts |= {CLASSES: json.dumps(classes.names), "is_multi": str(classes.is_multi).lower()}
        facts["pad_token_id"] = "" if pad is None else str(pad)
    if how.is_4bit:
        facts |= {"double_quant": str(how.double_quant).lower(), "block_size": str(how.block_size)}
    if how.kind != "none":
        facts["skip"] = ",".join(name for name, module in linears.items() if not isinstance(module, QuantizedLinear))
    return {f"{PREFIX}{key}": value for key, value in facts.items() if value}


def read_trained_against(adapter: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings with which `load_base` makes the base that an adapter was trained against.

    Args:
        adapter: folder with the adapter's two files.
        defaults: settings for what the file does not say; adapters saved by other programs say nothing.

    Raises:
        AdapterError: the file is missing or damaged, or one of its settings is none that the kit knows.
    """
    said = {key.removeprefix(PREFIX): value for key, value in _metadata(adapter / WEIGHTS).items()}
    settings = dict(defaults)
    for key, known in {
        "quantization": {kind: kind for kind in get_args(Kind)},
        "double_quant": {"true": True, "false": False},
        "quantize_head": {"true": True, "false": False},
        "head": {head: head for head in get_args(Head)},
        "block_size": {str(2**power): 2**power for power in range(5, 13)},
        "compute_dtype": {name: name for name in DTYPES},
    }.items():
        if key in said:
            if said[key].lower() not in known:
                raise AdapterError(
                    f"{adapter / WEIGHTS} says {PREFIX}{key}={said[key]!r}; known are {', '.join(known)}"
                )
            settings[key] = known[said[key].lower()]
    if "skip" in said:
        settings["skip"] = said["skip"].split(",")
    for key in {"vocabulary", "labels"} & said.keys():
        if not said[key].isdecimal():
            raise AdapterError(f"{adapter / WEIGHTS} says {PREFIX}{key}={said[key]!r}; wanted a whole number")
        settings[key] = int(said[key])
    return settings


def read_added_tokens(adapter: Path) -> list[str]:
    """The tokens that the tokenizer of an adapter's base must be given, as `run` noted them.

    Raises:
        AdapterError: the file is missing or damaged, or holds something else than a list of words there.
    """
    return _words(adapter, ADDED_TOKENS)


def read_classes(adapter: Path) -> Classes | None:
    """The classes that an adapter tells apart; None where it learnt to say something, or does not say which.

    Raises:
        AdapterError: the file is missing or damaged, or holds something else than a list of words there.
    """
    names = _words(adapter, f"{PREFIX}{CLASSES}")
    return Classes(tuple(names), _metadata(adapter / WEIGHTS).get(f"{PREFIX}is_multi") == "true") if names else None


def name_trained_classes(config: PretrainedConfig, adapter: Path) -> None:
    """Say in the configuration of an adapter's base which classes the adapter tells apart, and what it was padded with.

    Raises:
        AdapterError: as `read_classes`.
    """
    classes, pad = read_classes(adapter), _metadata(adapter / WEIGHTS).get(f"{PREFIX}pad_token_id", "")
    if classes is not None:
        name_classes(config, classes, int(pad) if pad.isdecimal() else None)


def _words(adapter: Path, key: str) -> list[str]:
    """What the metadata of an adapter's file lists under a key; nothing where it has no such key."""
    said = _metadata(adapter / WEIGHTS).get(key, "[]")
    try:
        words = json.loads(said)
    except ValueError:
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise AdapterError(f"{adapter / WEIGHTS} says {key}={said!r}; wanted a JSON list of words")
    return words


def _metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise AdapterError(f"{path} is missing: {path.parent} is not an adapter")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} ({path.stat().st_size} bytes) is damaged: {error}") from error
