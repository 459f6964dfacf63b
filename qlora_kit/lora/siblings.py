"""Layers that have one input, and so take their low-rank products together: query, key and value; gate and up.

The model's own code calls them one after another. The first that is called takes the products of all, and the others
find theirs. Whether they do have one input is seen as they are called: where one comes with another, each goes alone.
"""

import threading
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.lora.layer import LoraLinear
from qlora_kit.ops import Shared, compute_dtype, share_input

NAMES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Under which families have such layers, beside each other in one module."""


class Siblings:
    """Layers with one input.

    Args:
        layers: in the order in which they are called.
    """

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self.layers = list(layers)
        self._waiting: dict[int, tuple[Tensor, Hashable, dict[LoraLinear, Shared]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For a copy: a pass that broke off stays here."""
        return {"layers": self.layers, "_waiting": {}}

    def take(self, layer: LoraLinear, x: Tensor) -> Shared | None:
        """What `layer` needs of the common products with its input `x`; None where it has to take its own."""
        if torch.compiler.is_compiling() or layer not in self.layers:
            return None
        thread = threading.get_ident()
        state = None if x.is_inference() else x._version, compute_dtype(x), torch.is_grad_enabled()
        known, then, waiting = self._waiting.pop(thread, (None, None, {}))
        if layer in waiting and (known is not x or then != state):
            self.layers = []
            return None
        if layer not in waiting:
            waiting = self._share(x)
        mine = waiting.pop(layer, None)
        if waiting:
            self._waiting[thread] = (x, state, waiting)
        return mine

    def _share(self, x: Tensor) -> dict[LoraLinear, Shared]:
        """The common products; none where an update is no plain one, or has a scale of its own."""
        layers = tuple(self.layers)  # another thread may part them meanwhile
        updates = [layer.plain_update() for layer in layers]
        known = [update for update in updates if update is not None]
        if len(known) < len(updates) or len({update.scale for update in known}) > 1:
            return {}
        return dict(zip(layers, share_input(x, known), strict=True))


def join_siblings(model: nn.Module) -> None:
    """Let the layers of a model that have one input know of each other."""
    for parent in model.modules():
        for names in NAMES:
            children = (parent._modules.get(name) for name in names)
            layers = [child for child in children if isinstance(child, LoraLinear)]
            siblings = Siblings(layers) if len(layers) > 1 else None
            for layer in layers:
                layer.siblings = siblings
