"""Whole modules that an adapter trains: each adapter has a copy, run in the place of the base's own.

A new classifier is such a module. In PEFT's files they are `modules_to_save`.
"""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qlora_kit.base.dense import QuantizedWeight
from qlora_kit.base.vocabulary import QuantizedEmbedding
from qlora_kit.errors import AdapterError
from qlora_kit.lora.layer import Carrier


class WholeModule(Carrier):
    """A module of which adapters train copies."""

    @property
    def weight(self) -> Any:
        """The frozen weight, which some models ask for its dtype."""
        return self.base.weight

    @property
    def in_use(self) -> nn.Module:
        """The module, or the copy in its place."""
        module: nn.Module = self.base if self.active is None else self.adapters[self.active]
        return module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module or the copy in use gives."""
        return self.in_use(*args, **kwargs)


def module_names(model: nn.Module) -> list[str]:
    """Dotted names of a model's own modules, of which those of an adapter are none."""
    return [name for name, _ in model.named_modules() if not {"base", "adapters"} & set(name.split("."))]


def modules_named(model: nn.Module, entry: str) -> list[str]:
    """Dotted names of the modules that `entry` names: in full, or by the end of the name."""
    return [name for name in module_names(model) if name == entry or name.endswith(f".{entry}")]


def train_module(model: PreTrainedModel, module_name: str, name: str) -> nn.Module:
    """Let the adapter `name` train a copy of a module, which starts as the base's, and return that copy.

    Raises:
        AdapterError: as `check_module`.
    """
    check_module(model, module_name)
    module: Any = model.get_submodule(module_name)
    if not isinstance(module, WholeModule):
        module = WholeModule(module).train(module.training)
        model.set_submodule(module_name, module)
    # A tensor copies itself by its address, which one in a dry run has not: all are cloned before.
    tensors: dict[int, Any] = {id(parameter): nn.Parameter(parameter.clone()) for parameter in module.base.parameters()}
    tensors |= {id(buffer): buffer.clone() for buffer in module.base.buffers()}
    trained = copy.deepcopy(module.base, tensors).requires_grad_(True).train(module.training)
    module.adapters[name] = trained
    return trained


def check_module(model: PreTrainedModel, module_name: str) -> None:
    """Refuse what cannot be trained whole.

    Raises:
        AdapterError: the module is quantised, has no weights, or carries something else already.
    """
    module = model.get_submodule(module_name)
    parts = list(module.modules())
    if any(isinstance(part, Carrier) for part in parts) and not isinstance(module, WholeModule):
        raise AdapterError(
            f"{module_name} is already trained by another part of an adapter; it cannot be trained whole as well"
        )
    if any(isinstance(part, QuantizedWeight | QuantizedEmbedding) for part in parts):
        raise AdapterError(f"{module_name} is quantised, so it cannot be trained whole; keep it dense (base.skip)")
    if next(module.parameters(), None) is None:
        raise AdapterError(f"{module_name} has no weights to train")
