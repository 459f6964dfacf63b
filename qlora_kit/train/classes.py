"""Which classes a model tells apart, as its configuration says it to every program."""

from collections import Counter
from collections.abc import Mapping

from transformers import PretrainedConfig

from qlora_kit.base.architecture import Head, reads_both_ways
from qlora_kit.data.classes import Classes
from qlora_kit.errors import ModelError


def head_for(task: str) -> Head:
    """What a model says that learns a task of `train.task`."""
    return "classification" if task == "classify" else "causal"


def name_classes(config: PretrainedConfig, classes: Classes, pad: int | None) -> None:
    """Say in a configuration which classes there are, in place; every program reads them off an export so.

    Args:
        config: of the model.
        classes: of the rows.
        pad: the token that texts are filled with; None leaves what is said of it. A causal model takes the last token
            that is another for the end of a text. One that reads both ways is told by a mask, and may count positions
            from its own: that stays.
    """
    config.num_labels = len(classes.names)
    config.id2label = dict(enumerate(classes.names))
    config.label2id = {name: number for number, name in enumerate(classes.names)}
    config.problem_type = "multi_label_classification" if classes.is_multi else "single_label_classification"
    text = config.get_text_config()
    if pad is not None and (text.pad_token_id is None or not reads_both_ways(config)):
        text.pad_token_id = pad


def known_classes(config: PretrainedConfig) -> list[str]:
    """The names that a model's outputs have already, in their order; none where they are numbered.

    Raises:
        ModelError: a name is no text, or two outputs have the same.
    """
    named: Mapping[int, str] = config.id2label  # type: ignore[assignment]  # JSON's keys are made numbers when it is read
    names = [named[number] for number in sorted(named)]
    odd = [name for name in names if not isinstance(name, str) or name != name.encode(errors="ignore").decode()]
    odd = odd or [name for name, count in Counter(names).items() if count > 1]
    if odd:
        raise ModelError(
            f"config.json names a class {odd[0]!a:.60} (id2label), wanted valid text, different for each class; "
            "correct it there"
        )
    return [] if names == [f"LABEL_{number}" for number in range(len(names))] else names


def classes_in(config: PretrainedConfig) -> Classes:
    """The classes that `name_classes` wrote; those that have no names are called by their numbers, as rows do."""
    names = tuple(known_classes(config)) or tuple(map(str, range(len(config.id2label or ()))))
    return Classes(names, config.problem_type == "multi_label_classification")
