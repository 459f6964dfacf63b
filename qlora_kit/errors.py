"""The one hierarchy of errors: each says what was found, what was wanted and what to do, on one line. Where several
rows are bad, that line has their number and the first, and each further one has a line below it.

Every error that a user can cause is a `QloraKitError`; the command line prints it as `error: ...` on standard error and
exits with `exit_code`. Each class is also the nearest class of the standard library, so that callers of the Python
interface can catch what they already know.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def listed(names: Sequence[str]) -> str:
    """Names for a sentence, the first five and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, and the next where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


class QloraKitError(Exception):
    """Something that the user can mend. `exit_code` is what the command line exits with."""

    exit_code = 2


class RecipeError(QloraKitError, ValueError):
    """The recipe, or an override of it, is wrong."""


class ModelError(QloraKitError, ValueError):
    """The base model cannot be read or used."""


class AdapterError(QloraKitError, ValueError):
    """An adapter does not fit the model, or its files are damaged."""


class DataError(QloraKitError, ValueError):
    """The training or evaluation data cannot be used."""


class DeviceError(QloraKitError, RuntimeError):
    """The device asked for is not there, or cannot do what was asked."""


class RunError(QloraKitError, OSError):
    """A run folder, checkpoint or export cannot be read or written."""


class TrainingError(QloraKitError, ArithmeticError):
    """Training cannot go on: a loss, a gradient or what is trained is not finite."""


class FitError(QloraKitError, MemoryError):
    """The plan does not fit the memory budget, or the run did not keep to it."""

    exit_code = 3


@contextmanager
def tokenizing(kind: type[QloraKitError], what: str) -> Iterator[None]:
    """A block that asks the library beneath fast tokenizers: where it fails, `kind` tells it, `what` and the reason.

    It raises an `Exception` and none of its kinds; or, where it breaks off, a panic, which is no `Exception` at all and
    cannot be imported. What else is raised goes on.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {first_line(error)}") from error
