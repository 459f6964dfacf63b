"""Layers that have one input, and so take their low-rank products together: query, key and value; gate and up.

The model's own code calls them one after another. The first that is called takes the products of all, and the others
find theirs. Whether they do have one input is seen as they are called: where one comes with another, each goes alone.
"""

import threading
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_kit.ops import Shared, Update, compute_dtype, share_input

NAMES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Under which families have such layers, beside each other in one module."""


class Sibling(Protocol):
    """A layer that takes its low-rank product with others."""

    def plain_update(self) -> Update | None:
        """The update in use; None where there is none, or it is no plain product of A and B with the input."""


class Siblings:
    """Layers with one input.

    Args:
        layers: in the order in which they are called.
    """

    def __init__(self, layers: Sequence[Sibling]) -> None:
        self.layers = list(layers)
        self._waiting: dict[int, tuple[Tensor, Hashable, dict[Sibling, Shared]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For a copy: a pass that broke off stays here."""
        return {"layers": self.layers, "_waiting": {}}

    def take(self, layer: Sibling, x: Tensor) -> Shared | None:
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

    def _share(self, x: Tensor) -> dict[Sibling, Shared]:
        """The common products; none where an update is no plain one, or has a scale of its own."""
        layers = tuple(self.layers)  # another thread may part them meanwhile
        updates = [layer.plain_update() for layer in layers]
        known = [update for update in updates if update is not None]
        if len(known) < len(updates) or len({update.scale for update in known}) > 1:
            return {}
        return dict(zip(layers, share_input(x, known), strict=True))
