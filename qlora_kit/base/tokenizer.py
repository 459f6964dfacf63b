"""Reading the tokenizer of a folder that nobody has vouched for.

transformers gives what stands in tokenizer_config.json and in special_tokens_map.json to the tokenizer's class as
arguments. Some of these may be tables or names of files, such as `vocab` and `merges`, and which ones is each class's
own affair. So every text is treated alike, whatever it is for: none may name a file outside the folder.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_kit.base.files import has_tokenizer, is_inside, text_faults
from qlora_kit.base.header import read_object
from qlora_kit.errors import ModelError, tokenizing

_MALFORMED = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError)
"""What transformers raises over files that describe no tokenizer."""
_CONFIG, _SPECIAL, _TABLES = "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"
_PROCESSOR_TEMPLATE = "chat_template.json"
"""Where models that see had their template before all had chat_template.jinja; transformers gives it to the processor
of pictures and text alone."""
_UNREAD = ("name_or_path", "special_tokens_map_file", "tokenizer_file")
"""In tokenizer_config.json: where its writer's files lay. transformers puts the folder's own in their place."""
_OTHER_TABLES = ("fast_tokenizer_files", "gguf_file")
"""Keys that put another file in the place of tokenizer.json, which then nobody has looked at."""


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model or adapter; None where its folder has none.

    Args:
        folder: with tokenizer.json or the like.
        trust_remote_code: run code that the folder brings. Where this is left to transformers, it asks on the terminal.

    Raises:
        ModelError: it cannot be read, needs code that may not run, or a file of it lies elsewhere.
    """
    if not has_tokenizer(folder):
        return None
    for fault in text_faults(folder):
        raise ModelError(fault)
    _check_names(folder)
    unread = f"{folder} has no readable tokenizer"
    with tokenizing(ModelError, unread):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except _MALFORMED as error:
            why = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise ModelError(f"{unread}: {why}") from error
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ModelError(
            f"{folder} has a tokenizer whose model_max_length is {tokenizer.model_max_length!r}, wanted a number"
        )
    if tokenizer.chat_template is None and (folder / _PROCESSOR_TEMPLATE).is_file():
        tokenizer.chat_template = read_object(folder / _PROCESSOR_TEMPLATE).get("chat_template")
    held = tokenizer.chat_template
    sources = held.values() if isinstance(held, dict) else () if held is None else (held,)
    if not all(isinstance(source, str) for source in sources):
        raise ModelError(f"{folder} has a tokenizer whose chat_template is not text; correct it, or remove it")
    return tokenizer


def _check_names(folder: Path) -> None:
    """Refuse a tokenizer that would have files read which are not the folder's own.

    Raises:
        ModelError: names the file and what it says.
    """
    for name in (_CONFIG, _SPECIAL, _TABLES):
        path = folder / name
        said = read_object(path) if path.exists() else {}
        for key in _OTHER_TABLES:
            if said.get(key) is not None:
                raise ModelError(f"{path} says {key}={said[key]!r}, wanted only {_TABLES}: remove it")
        for text in _texts(_arguments(name, said)):
            if _is_foreign_file(folder, text):
                raise ModelError(f"{path} names {text!r}, which is not a file in its folder: refused; remove it")


def _arguments(name: str, said: dict[str, Any]) -> object:
    """Of what such a file says, that which a tokenizer's class may take for the name of a file.

    Texts inside the tables of tokenizer.json are tokens, and a token may be called as a file is.
    """
    if name == _CONFIG:
        return {key: value for key, value in said.items() if key not in _UNREAD}
    if name == _TABLES:
        model = said.get("model")
        return [value for value in model.values() if isinstance(value, str)] if isinstance(model, dict) else model
    return said


def _texts(document: object) -> Iterator[str]:
    """Every text in a JSON document but the keys."""
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _is_foreign_file(folder: Path, text: str) -> bool:
    """Whether a text, read as a path from the folder or from where the program runs, leads to what is not a plain file
    of the folder. Folders do no harm: `/` and `.` are tokens, too."""
    return any(
        os.path.exists(path) and not os.path.isdir(path) and not (os.path.isfile(path) and is_inside(folder, path))
        for path in (folder / text, Path(text))
    )
