"""Architecture: what kind of model a folder holds, what it says, and the same model with no weights."""

import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from qlora_kit.base.files import tensor_names
from qlora_kit.base.header import read_object
from qlora_kit.base.prequantized import stored_quantization
from qlora_kit.errors import ModelError, first_line
from qlora_kit.storage import read_json

Head = Literal["causal", "classification"]
"""What a model says: the next token, or which of several labels a text has."""

_AUTO: dict[Head, tuple[Any, ...]] = {
    "causal": (AutoModelForCausalLM, AutoModelForImageTextToText),
    "classification": (AutoModelForSequenceClassification,),
}
"""What transformers makes a model of each head with, the usual one first. Some models that see, too, have the other
alone."""

_MALFORMED = (ValueError, KeyError, OSError, ImportError, AttributeError, TypeError, ArithmeticError, RuntimeError,
              StrictDataclassError)  # fmt: skip
"""What transformers raises over a config.json whose values no model can have."""
_MOST = (
    (re.compile(r"layers?$|blocks?$|depth$"), 1_000),
    (re.compile(r"experts"), 10_000),
    (re.compile(r"vocab"), 10**7),
    (re.compile(r"positions$|position_embeddings$|n_ctx"), 10**8),
    (re.compile(r"size|dim$|embd|inner|d_model|d_ff|heads?$|labels"), 10**6),
)
"""By how families call what is counted: more than any model has, several times over; building it would never end."""


def read_config(
    folder: Path, *, head: Head = "causal", labels: int | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The model's configuration, from its folder alone.

    Args:
        folder: of the model.
        head: that the model is to have.
        labels: of a classification; None takes what the configuration says.
        trust_remote_code: run code that the folder brings.

    Raises:
        ModelError: it cannot be read, describes no model with such a head or one larger than any, or needs code that
            may not run, or there are to be no labels.
    """
    if head not in get_args(Head):
        raise ModelError(f"head {head!r} is not known; choose one of {', '.join(get_args(Head))}")
    _check_sizes(folder / "config.json", read_object(folder / "config.json"))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except _MALFORMED as error:
        raise ModelError(f"{folder / 'config.json'} cannot be used: {first_line(error)}") from error
    _check_config(folder, config, head)
    if labels is not None:
        if labels < 1:
            raise ModelError(f"labels must be at least 1, found {labels}")
        config.num_labels = labels
    return config


def _check_sizes(path: Path, said: dict[str, Any]) -> None:
    """Refuse a model that is larger than any, before lists as long as its layers are made.

    Raises:
        ModelError: names the first such size.
    """
    for key, value in _numbers(said):
        most = next((most for pattern, most in _MOST if pattern.search(key)), value)
        if value > most:
            raise ModelError(f"{path} says {key}={value!r:.20}; no model has more than {most:,}: download it again")


def _numbers(said: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number of a configuration and of the configurations in it, by its key."""
    waiting = [said]
    while waiting:
        for key, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            elif isinstance(value, int | float):
                yield key, value


def _check_config(folder: Path, config: PretrainedConfig, head: Head) -> None:
    """Refuse what would fail late or train wrongly.

    Raises:
        ModelError: the model is quantised by another library, has no such head, is a causal model that reads in both
            directions, an encoder with a decoder, or a model of no size.
    """
    stored_quantization(config)
    text = config.get_text_config()
    if not isinstance(text, PretrainedConfig):
        raise ModelError(f"{folder / 'config.json'} says text_config={text!r}; it must be a mapping")
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        size = getattr(text, name, None)
        if isinstance(size, int) and size < 1:
            raise ModelError(f"{folder / 'config.json'} says {name}={size}; it must be at least 1")
    auto, own = auto_class(config, head), getattr(config, "auto_map", {})
    if type(config) not in auto._model_mapping and auto.__name__ not in own:
        kind = "causal language model" if head == "causal" else "model that transformers can put a classifier on"
        raise ModelError(f"{folder} holds a {config.model_type}, which is not a {kind}")
    sees_all = getattr(text, "use_bidirectional_attention", None) in (True, "all")  # PaliGemma, and Gemmas that embed
    if config.is_encoder_decoder or (head == "causal" and (sees_all or reads_both_ways(config))):
        raise ModelError(f"{folder} holds a {config.model_type} that reads in both directions; give a causal model")


def auto_class(config: PretrainedConfig, head: Head) -> Any:
    """What transformers makes such a model with."""
    usual, *others = _AUTO[head]
    own = getattr(config, "auto_map", {})
    is_made = (auto for auto in (usual, *others) if type(config) in auto._model_mapping or auto.__name__ in own)
    return next(is_made, usual)


def reads_both_ways(config: PretrainedConfig) -> bool:
    """Whether the tokens of such a model see those behind them, too."""
    return type(config) in AutoModelForMaskedLM._model_mapping


def brings_code(made: PretrainedConfig | PreTrainedModel) -> bool:
    """Whether a configuration or a model is of a class from its own folder, and not of one from transformers."""
    return type(made).__module__.startswith("transformers_modules.")


def head_of(model: PreTrainedModel) -> Head:
    """What a model says."""
    classifiers = _AUTO["classification"][0]._model_mapping
    kind = type(model.config)
    return "classification" if kind in classifiers and type(model) is classifiers[kind] else "causal"


def stored_head(folder: Path) -> Head:
    """What the model of a folder was saved to say, by the class that its config.json names.

    Raises:
        RunError: it is missing or damaged.
    """
    named = read_json(folder / "config.json").get("architectures") or ["?"]
    return "classification" if str(named[0]).endswith("ForSequenceClassification") else "causal"


def build_model(
    config: PretrainedConfig, dtype: torch.dtype, attention: str | None, head: Head = "causal"
) -> PreTrainedModel:
    """The same model with no weights read: what the dry run uses under fake tensors.

    Code that the model's folder brings runs only if the configuration is of a class from there, which `read_config`
    makes when it may.

    Raises:
        ModelError: nothing can be built so.
    """
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    try:
        model: PreTrainedModel = auto_class(config, head).from_config(
            config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=brings_code(config),
        )
    except _MALFORMED as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"config.json describes a {config.model_type} that cannot be built ({why})") from error
    model.tie_weights()  # transformers leaves it out where it leaves out the initialisation
    return model


def lacks_sdpa(config: PretrainedConfig, head: Head) -> bool:
    """Whether transformers has no sdpa for such a model, so that eager stands in for it."""
    with torch.device("meta"):
        return build_model(config, torch.bfloat16, None, head).config._attn_implementation == "eager"


def untrained_modules(model: PreTrainedModel, missing: Sequence[str]) -> tuple[str, ...]:
    """The parts of a classifier that the checkpoint has not, by the names of the tensors that loading missed."""
    return tuple(name for name in _classifier_parts(model) if any(key.startswith(f"{name}.") for key in missing))


def expected_untrained(model: PreTrainedModel) -> tuple[str, ...]:
    """The modules for which loading will find no weights, told by a model built from its configuration.

    Where no weights are at hand yet, what the model was saved to say tells it, and a pooler is taken to be there.
    """
    if head_of(model) != "classification":
        return ()
    body, source = f"{model.base_model_prefix}.", model.config._name_or_path
    stored = tensor_names(Path(source)) if source else set()
    if not stored:
        is_saved = type(model).__name__ in (model.config.architectures or ())
        return () if is_saved else tuple(name for name in _classifier_parts(model) if not name.startswith(body))
    found = {name.removeprefix(body) for name in stored}
    parts = _classifier_parts(model)
    return tuple(part for part in parts if not any(name.startswith(f"{part.removeprefix(body)}.") for name in found))


def _classifier_parts(model: PreTrainedModel) -> list[str]:
    """The children with weights of a classification model beside its body, and a pooler in it."""
    parts = [name for name, module in model.named_children() if module is not model.base_model]
    own = [name for name, _ in model.named_parameters()]
    parts.append(f"{model.base_model_prefix}.pooler")
    return [part for part in parts if any(name.startswith(f"{part}.") for name in own)]
