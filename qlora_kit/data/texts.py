"""Texts: what a trained classifier is asked, formatted as its rows were in training.

As a prompt is given a placeholder answer, a text is given a placeholder label, and is encoded like a row of training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from qlora_kit.data.classes import Classes
from qlora_kit.data.columns import read_row
from qlora_kit.data.examples import Classified, Text
from qlora_kit.data.faults import Faults
from qlora_kit.data.prompts import asked_rows, renamed
from qlora_kit.errors import DataError


@dataclass(frozen=True, slots=True)
class Unlabelled:
    """A text whose class is asked.

    Attributes:
        example: the row that is encoded, with a label that stands for the one to be told.
        reference: the label that the row has, or labels; None where it has none.
    """

    example: Classified
    reference: str | list[str] | None = None


def unlabelled(text: str, classes: Classes) -> Unlabelled:
    """A text to be told apart.

    Raises:
        DataError: it is empty, or holds half of a surrogate pair.
    """
    return _asked({"text": text}, "the text", classes)


def read_texts(path: Path, classes: Classes, *, columns: Sequence[Mapping[str, str]] = ()) -> list[Unlabelled]:
    """The texts of a file.

    Args:
        path: .txt with a text a line, or rows with a column `text` in a file that training reads; `label` may be
            missing, and where it is there it is the reference.
        classes: of the model.
        columns: as for `read_prompts`.

    Raises:
        DataError: there is no such file, or no text in it, or there are bad rows: the first 20, with their lines.
    """
    faults, texts = Faults(), []
    for where, raw in asked_rows(path, "text", faults):
        try:
            texts.append(_asked(renamed(raw, columns), where, classes))
        except DataError as error:
            faults.add(str(error))
    faults.stop(may_skip=False)
    if not texts:
        raise DataError(f"{path} holds no texts")
    return texts


def _asked(raw: Any, where: str, classes: Classes) -> Unlabelled:
    if isinstance(raw, Mapping) and isinstance(raw.get("text"), str) and not raw["text"].strip():
        raise DataError(f"{where}: the text is empty")
    text = cast(Text, read_row(raw, where, format="text", task="pretrain")).text
    example = Classified(text, classes.names[:1], classes.is_multi, where)
    if raw.get("label") is None:
        return Unlabelled(example)
    known = cast(Classified, read_row(raw, where, format="classification", task="classify"))
    return Unlabelled(example, list(known.labels) if known.is_multi else known.labels[0])
