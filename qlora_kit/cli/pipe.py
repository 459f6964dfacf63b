"""Pipes whose reader has gone, as after `| head`."""

import os
from typing import IO


def leave(stream: IO[str]) -> None:
    """Let what else is written to a stream go nowhere; without it even its last flush would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
