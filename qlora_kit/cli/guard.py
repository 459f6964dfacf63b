"""Around every verb: an error that the user can mend becomes one line and its exit code."""

import errno
import functools
import signal
import sys
from collections.abc import Callable
from typing import Any

import typer

from qlora_kit.cli.pipe import leave
from qlora_kit.cli.visible import visible
from qlora_kit.errors import FitError, QloraKitError

DEBUG = {"on": False}
"""Whether errors show their traceback."""
_DISK_FAULTS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG,
    errno.EBUSY, errno.EEXIST,
)  # fmt: skip


def reports_errors(verb: Callable[..., None]) -> Callable[..., None]:
    """An error that the user can mend becomes one line and its exit code."""

    @functools.wraps(verb)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except QloraKitError as error:
            if DEBUG["on"]:
                raise
            typer.echo(visible(f"error: {error}", keep="\n"), err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(128 + signal.SIGINT) from None
        except BrokenPipeError:  # whoever read it has seen enough
            leave(sys.stdout)
        except typer.Exit:
            raise
        except (MemoryError, RuntimeError) as error:
            from qlora_kit.memory.limit import whose_memory_ran_out

            whose = whose_memory_ran_out(error)
            if DEBUG["on"] or whose is None:
                raise
            typer.echo(
                f"error: the {whose} ran out of memory; free some, or use a smaller model or another device", err=True
            )
            raise typer.Exit(FitError.exit_code) from None
        except OSError as error:
            if DEBUG["on"] or error.errno not in _DISK_FAULTS:
                raise
            way_on = "; free some, and run it again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            typer.echo(visible(f"error: {error.filename or 'writing to the disk'}: {error.strerror}{way_on}"), err=True)
            raise typer.Exit(QloraKitError.exit_code) from None

    return guarded
