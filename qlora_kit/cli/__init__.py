"""The command line: the only room that prints. `--help` needs neither torch nor transformers."""

from qlora_kit.cli.app import main

__all__ = ["main"]
