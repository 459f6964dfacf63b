"""The command line: the only room that prints. `--help` needs neither torch nor transformers."""

import signal
import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of `qlora-kit`: Ctrl-C ends it in one way, from its first imports on."""
    try:
        from qlora_kit.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
