"""Which names in a recipe are paths, and what a relative one is relative to."""

import os
from pathlib import Path

_DATA = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
_ALWAYS = ("",)  # every text ends so

_SUFFIXES = {
    "base.model": (),
    "lora.from": (),
    "data.train": _DATA,
    "data.train[]": _DATA,
    "data.train[].path": _DATA,
    "data.eval": _DATA,
    "data.eval[]": _DATA,
    "data.eval[].path": _DATA,
    "data.template": (".jinja", ".jinja2", ".j2"),
    "output": _ALWAYS,
}
"""The keys that can hold a path, and the endings that make one of a name that need not exist."""


def absolute(key: str, text: str, folder: Path) -> str:
    """`text` as an absolute path, if the key `key` holds one; as it is if it is a hub id, a name, or no path at all.

    A name is a path if it begins with `.`, `/` or `~/`, has an ending of a file for this key, or exists. A relative one
    is relative to `folder`; the run folder always to the working directory.
    """
    if key not in _SUFFIXES or not text.strip() or (key in ("data.eval", "data.template") and text == "auto"):
        return text
    start = Path.cwd() if key == "output" else folder
    full = os.path.abspath(start / os.path.expanduser(text))
    is_path = text.startswith((".", "/", "~/")) or text.lower().endswith(_SUFFIXES[key]) or os.path.exists(full)
    return full if is_path else text
