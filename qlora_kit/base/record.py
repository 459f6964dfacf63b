"""What is known of a base when it is loaded and cannot be read off it later."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from qlora_kit.base.fingerprint import fingerprint, weights_mark
from qlora_kit.base.formats import Quantization

_KEY = "_qlora_kit_base"


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """Facts about a base, kept on the model.

    Attributes:
        quantization: of its linear layers.
        dtype: of everything that stays dense.
        fingerprint: which checkpoint it is; empty in a dry run.
        folder: where it was read from, or None if it was made in memory.
        untrained: modules that the checkpoint has no weights for, such as a new classifier.
        vocabulary: rows that embedding and head were asked to have, 0 where they are the checkpoint's.
        weights_mark: which weights its linear layers have; empty in a dry run, and where they were stored quantised.
        unused: tensors of the checkpoint that the model has no place for.
    """

    quantization: Quantization
    dtype: torch.dtype
    fingerprint: str
    folder: Path | None = None
    untrained: tuple[str, ...] = ()
    vocabulary: int = 0
    weights_mark: str = ""
    unused: tuple[str, ...] = ()

    @property
    def mark(self) -> str:
        """Which checkpoint it is, its linear layers included."""
        return " ".join(filter(None, (self.fingerprint, self.weights_mark)))


def keep_record(
    model: PreTrainedModel,
    quantization: Quantization,
    dtype: torch.dtype,
    folder: Path | None = None,
    untrained: tuple[str, ...] = (),
    vocabulary: int = 0,
    unused: tuple[str, ...] = (),
) -> None:
    """Note the facts while the model is still as it was read; a record that stands is kept.

    Args:
        model: before it is quantised, or as bitsandbytes stored it.
        quantization: as below, like the rest, in `BaseRecord`.
        dtype: likewise.
        folder: likewise.
        untrained: likewise.
        vocabulary: likewise.
        unused: likewise.
    """
    if _KEY not in vars(model):
        is_fake = isinstance(next(model.parameters()), FakeTensor)
        marks = ("", "") if is_fake else (fingerprint(model), weights_mark(model))
        record = BaseRecord(quantization, dtype, marks[0], folder, untrained, vocabulary, marks[1], unused)
        setattr(model, _KEY, record)


def base_record(model: PreTrainedModel) -> BaseRecord:
    """The facts about the base of a model; of a plain transformers model they are read off it at the first call."""
    keep_record(model, Quantization("none"), model.dtype)
    record: BaseRecord = vars(model)[_KEY]
    return record
