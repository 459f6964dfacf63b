"""qlora_kit: QLoRA fine-tuning that plans its memory, keeps to it, and ships what was trained.

The names below are imported when they are first used, so that `import qlora_kit` costs nothing.
"""

import importlib
import os
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    # On a CPU products in bf16 are oneDNN's, which keeps code and places for each form that it has met, 1,024 of them
    # and up to 1.5 MiB each: every other number of tokens is a form of its own, so that memory would grow over the
    # steps. The products of one length are some 30. Read once, at the first; a value that is set already stands.
    os.environ.setdefault(_name, "64")

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    # Threads that wait for others look so often whether they are ready before they sleep. libgomp's own number, some ms
    # of it, costs a run nothing while it is alone; beside another program the others cannot run for as long.
    os.environ["GOMP_SPINCOUNT"] = "10000"

_HOMES = {
    "Ledger": "qlora_kit.memory",
    "adapters_off": "qlora_kit.lora",
    "add_lora": "qlora_kit.lora",
    "combine_adapters": "qlora_kit.lora",
    "delete_adapter": "qlora_kit.lora",
    "load_adapter": "qlora_kit.lora",
    "load_base": "qlora_kit.base",
    "load_run": "qlora_kit.run",
    "merge": "qlora_kit.export",
    "plan_memory": "qlora_kit.run",
    "read_recipe": "qlora_kit.recipe",
    "save_adapter": "qlora_kit.lora",
    "train": "qlora_kit.run",
    "use_adapter": "qlora_kit.lora",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qlora_kit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Room(ModuleType):
    """A room that has the name of a verb, `train`: called, it is the verb."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module(_HOMES[name]), name)(*args, **kwargs)


class _Face(ModuleType):
    """This module: a room that is imported becomes an attribute of it, and would hide the verb of its name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
