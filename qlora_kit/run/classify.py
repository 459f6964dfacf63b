"""A run that classifies texts: what its model's configuration says of the classes, and how well it tells them apart."""

from collections.abc import Mapping, Sequence

import torch
from transformers import PretrainedConfig

from qlora_kit.base.load import Head
from qlora_kit.data import Classes
from qlora_kit.recipe import Recipe


def head_for(recipe: Recipe) -> Head:
    """What the model of a recipe says."""
    return "classification" if recipe.train.task == "classify" else "causal"


def name_classes(config: PretrainedConfig, classes: Classes, pad: int) -> PretrainedConfig:
    """Say in a configuration which classes there are, in place; every program reads them off an export so.

    Args:
        config: of the model.
        classes: of the rows.
        pad: the token that texts are filled with: a causal model looks for the last that is none.
    """
    config.num_labels = len(classes.names)
    config.id2label = dict(enumerate(classes.names))
    config.label2id = {name: number for number, name in enumerate(classes.names)}
    config.problem_type = "multi_label_classification" if classes.is_multi else "single_label_classification"
    text = config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = pad
    return config


def known_classes(config: PretrainedConfig) -> list[str]:
    """The names that a model's outputs have already, in their order; none where they are numbered."""
    names = list(_names(config))
    return [] if names == [f"LABEL_{number}" for number in range(len(names))] else names


def classes_in(config: PretrainedConfig) -> Classes:
    """The classes that `name_classes` wrote."""
    return Classes(_names(config), config.problem_type == "multi_label_classification")


def _names(config: PretrainedConfig) -> tuple[str, ...]:
    named: Mapping[int, str] = config.id2label  # type: ignore[assignment]  # JSON's keys are made numbers when it is read
    return tuple(named[number] for number in sorted(named))


def f1_score(said: torch.Tensor, wanted: torch.Tensor, classes: int) -> float:
    """Mean over the classes that are wanted or said of the harmonic mean of precision and recall: macro F1.

    Args:
        said: of all texts, (texts,), or (texts, classes) of 1 and 0.
        wanted: labels of the same texts.
        classes: how many there are.
    """
    if said.ndim == 1:
        said, wanted = (torch.nn.functional.one_hot(each, classes) for each in (said, wanted))
    hits = (said * wanted).sum(0).double()
    total = (said.sum(0) + wanted.sum(0)).double()
    return (2 * hits[total > 0] / total[total > 0]).mean().item()


def words_of(target: int | Sequence[float], classes: Classes) -> str:
    """The names of a target or of what was said."""
    if isinstance(target, int):
        return classes.names[target]
    return ", ".join(name for name, is_one in zip(classes.names, target, strict=True) if is_one) or "none"
