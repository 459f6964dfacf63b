"""The part of a model that reads text: all of most; of one that sees or hears, too, the language model in it.

Rows are text alone, so a vision tower never runs. It stays as it was read: in its own dtype, on the pages of its file,
which take no memory of a card, and none of a process that the system could not take back. Exports write it from there.
"""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel


def text_body(model: PreTrainedModel) -> nn.Module:
    """The body of a model, without its head; where it is made of several models, the one that reads text."""
    return model.get_submodule(text_body_name(model))


def text_body_name(model: PreTrainedModel) -> str:
    """Its dotted name; empty where a model is its own body."""
    body, text = model.base_model, model.config.get_text_config()
    name = "" if body is model else model.base_model_prefix
    if text is model.config:
        return name
    for inner, module in body.named_modules():
        if inner and isinstance(module, PreTrainedModel) and module.config is text:
            return f"{name}.{inner}" if name else inner
    return name


def text_modules(model: PreTrainedModel) -> Iterator[nn.Module]:
    """All modules but those of other senses: the text's body, those that it is a part of, and heads."""
    other_senses = [part for owner, name in _way_to_text(model) for part in _others(owner, name)]
    apart = {module for part in other_senses for module in part.modules()}
    return (module for module in model.modules() if module not in apart)


def text_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Those of `text_modules`, by dotted name, tied ones once."""
    read = {parameter for module in text_modules(model) for parameter in module.parameters(recurse=False)}
    return {name: parameter for name, parameter in model.named_parameters() if parameter in read}


def unread_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters of other senses."""
    read = set(text_parameters(model).values())
    return [parameter for parameter in model.parameters() if parameter not in read]


def put_text_first(model: PreTrainedModel) -> None:
    """Move the language model to the front of the parts that it stands among: transformers takes the device and the
    dtype of a model's first parameter for those of the model."""
    for owner, name in _way_to_text(model):
        parts = {name: owner._modules[name], **owner._modules}
        owner._modules.clear()
        owner._modules.update(parts)


def _way_to_text(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str]]:
    """From the whole body down to that of text: each module, and the part of it that leads on."""
    owner: nn.Module = model.base_model
    name, whole = text_body_name(model), "" if owner is model else model.base_model_prefix
    for part in name.removeprefix(whole).split("."):
        if part:
            yield owner, part
            owner = owner.get_submodule(part)


def _others(owner: nn.Module, name: str) -> list[nn.Module]:
    return [part for other, part in owner.named_children() if other != name]
