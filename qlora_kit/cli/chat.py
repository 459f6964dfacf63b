"""`qlora-kit chat`: a conversation in the terminal. Answers go to standard output, all else to standard error."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.cli.options import (
    Force,
    MaxNewTokens,
    MinP,
    Penalty,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
    TrustRemoteCode,
    sampling_of,
)
from qlora_kit.cli.visible import visible
from qlora_kit.errors import QloraKitError, RunError
from qlora_kit.interrupt import first_interrupt
from qlora_kit.storage import write_text

if TYPE_CHECKING:
    from qlora_kit.run import Conversation


def chat(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="One or several runs on the same base; the first one answers until you switch."
        ),
    ],
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    force: Force = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat with a run, or switch between several. /help lists the commands of a chat."""
    from qlora_kit.cli.show import import_libraries

    import_libraries()
    from qlora_kit.run import Conversation

    conversation = Conversation(
        runs,
        max_new_tokens=max_new_tokens,
        sampling=sampling_of(temperature, top_p, top_k, min_p, repetition_penalty, seed),
        force=force,
        trust_remote_code=trust_remote_code,
    )
    if system is not None:
        conversation.set_system(system)
    _Terminal(conversation).run()


class _Terminal:
    """Reads lines until there are no more, and answers each."""

    def __init__(self, conversation: "Conversation") -> None:
        self._conversation = conversation
        self._commands: dict[str, Callable[[str], None]] = {
            "new": self._new,
            "undo": self._undo,
            "system": self._system,
            "base": self._base,
            "adapter": self._adapter,
            "save": self._save,
            "help": self._help,
        }

    def run(self) -> None:
        """Until /quit or the end of the input."""
        with suppress(ImportError):  # where there is one, lines can be edited and called back
            import readline  # noqa: F401
        _say("type a message; /help lists commands, Ctrl-C stops an answer, /quit or Ctrl-D exits")
        self._say_who()
        while (line := _read()) is not None:
            if line.strip() == "/quit":
                return
            try:
                self._take(line)
            except QloraKitError as error:
                _say(f"error: {error}")

    def _take(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].strip().partition(" ")
            if name not in self._commands:
                raise RunError(f"there is no /{name}; /help lists commands, and //{name} says /{name}")
            self._commands[name](rest.strip())
        elif line.strip():
            with first_interrupt() as stopped:
                self._conversation.answer(line.removeprefix("/"), tell=_show, note=_note, stopped=stopped)
            typer.echo("\n" if sys.stdin.isatty() else "")

    def _new(self, _: str) -> None:
        """forget all turns except the system prompt"""
        self._conversation.start_anew()

    def _undo(self, _: str) -> None:
        """undo the last question and its answer"""
        _say("undone" if self._conversation.undo() else "there is nothing to undo")

    def _system(self, text: str) -> None:
        """TEXT: the system prompt that the conversation opens with"""
        self._conversation.set_system(text)

    def _base(self, _: str) -> None:
        """let the base answer, without an adapter"""
        self._conversation.use(None)
        self._say_who()

    def _adapter(self, name: str) -> None:
        """NAME or PATH: let this adapter answer; without a name: list them"""
        if name:
            self._conversation.use(name)
        self._say_who()

    def _save(self, name: str) -> None:
        """FILE: write the conversation as training data"""
        if not name:
            raise RunError("/save needs the name of a new file")
        path, rows = Path(os.path.expanduser(name)), self._conversation.rows
        if not rows:
            raise RunError("nothing has been said yet, so there is nothing to save")
        if path.exists():
            raise RunError(f"{path} already exists; name a new file")
        try:
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error.strerror}") from error
        _say(f"saved to {path}")

    def _help(self, _: str) -> None:
        """this list"""
        for name, command in self._commands.items():
            _say(f"  /{name:8} {command.__doc__}")
        _say("  /quit     leave the chat")

    def _say_who(self) -> None:
        names, speaks = self._conversation.names, self._conversation.speaks
        said = ", ".join(f"{name} (active)" if name == speaks else name for name in names)
        _say(f"adapters: {said}{'; the base is active' if speaks is None else ''}")
        if not self._conversation.is_chat:
            _note(
                "it was trained on prompts and completions: it answers each line on its own, without the earlier ones"
            )


def _read() -> str | None:
    """A line; None where there are no more, or no input at all. Ctrl-C takes back what was typed."""
    if sys.stdin is None:
        return None
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except KeyboardInterrupt:
            _say("\n/quit or Ctrl-D exits")
        except EOFError:
            return None


def _show(piece: str) -> None:
    typer.echo(visible(piece, keep="\n\t"), nl=False)


def _note(text: str) -> None:
    _say(f"note: {text}")


def _say(text: str) -> None:
    typer.echo(visible(text, keep="\n"), err=True)
