"""A run that classifies texts: how well its model tells them apart."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from qlora_kit.data import Batch, Classes
from qlora_kit.train.evaluate import evaluation_mode
from qlora_kit.train.forward import whole_logits
from qlora_kit.train.tasks import said_classes


def predictions(model: PreTrainedModel, batches: Sequence[Batch]) -> torch.Tensor:
    """What a model says of the texts of all batches: (texts,), or (texts, classes) of 1 and 0, on the CPU."""
    with evaluation_mode(model):
        said = [
            said_classes(whole_logits(model, batch), is_multi=batch.labels.is_floating_point()).cpu()
            for batch in batches
        ]
    return torch.cat(said)


def f1_score(said: torch.Tensor, wanted: torch.Tensor, classes: int) -> float:
    """Mean over the classes that are wanted or said of the harmonic mean of precision and recall: macro F1.

    Args:
        said: as `predictions` gives it.
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
