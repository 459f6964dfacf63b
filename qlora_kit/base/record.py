"""What is known of a base when it is loaded and cannot be read off it later."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from qlora_kit.base.fingerprint import base_marks
from qlora_kit.base.formats import Quantization

_KEY = "_qlora_kit_base"
_UNNAMED = ("fingerprint", "weights")


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """Facts about a base, kept on the model.

    Attributes:
        quantization: of its linear layers.
        dtype: of everything that stays dense.
        marks: which checkpoint it is, as `base_marks` tells; empty in a dry run.
        folder: where it was read from, or None if it was made in memory.
        untrained: modules that the checkpoint has no weights for, such as a new classifier.
        vocabulary: rows that embedding and head were asked to have, 0 where they are the checkpoint's.
        unused: tensors of the checkpoint that the model has no place for.
    """

    quantization: Quantization
    dtype: torch.dtype
    marks: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    untrained: tuple[str, ...] = ()
    vocabulary: int = 0
    unused: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Of what every format leaves dense."""
        return self.marks.get("fingerprint", "")

    @property
    def mark(self) -> str:
        """All its marks in a line, which `differences` reads: the two that older versions know come first, unnamed."""
        named = (f"{name}={mark}" for name, mark in self.marks.items() if name not in _UNNAMED)
        return " ".join([*(self.marks[name] for name in _UNNAMED if name in self.marks), *named])

    def differences(self, told: str) -> list[str]:
        """By which marks this is another base than the one that a line tells of; what only one knows does not count.

        Args:
            told: `mark` of a base, from this version or an older one; it may be empty.

        Returns:
            What differs of fingerprint, weights, body, head and config.
        """
        known = _read(told)
        odd = [name for name, mark in known.items() if self.marks.get(name, mark) != mark]
        return list(dict.fromkeys(name.partition("-")[0] for name in odd))

    def is_told_by(self, told: str) -> bool:
        """Whether a line, as for `differences`, has all the marks of this base: one that is stored in another form has
        others, and what only one knows cannot differ."""
        return self.marks.keys() <= _read(told).keys()


def _read(told: str) -> dict[str, str]:
    """The marks in a line, by their names."""
    words = told.split()
    known = dict(zip(_UNNAMED, (word for word in words if "=" not in word), strict=False))
    return known | dict(word.split("=", 1) for word in words if "=" in word)


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
        marks = {} if is_fake else base_marks(model, quantization.kind)
        record = BaseRecord(quantization, dtype, marks, folder, untrained, vocabulary, unused)
        setattr(model, _KEY, record)


def base_record(model: PreTrainedModel) -> BaseRecord:
    """The facts about the base of a model; of a plain transformers model they are read off it at the first call."""
    keep_record(model, Quantization("none"), model.dtype)
    record: BaseRecord = vars(model)[_KEY]
    return record
