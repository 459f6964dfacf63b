"""The ledger of live tensors: how many bytes stand at each moment, whose they are, and in which phase they came.

A dispatch mode sees every tensor that an operator returns, on fake, CPU and CUDA tensors alike. Each storage counts
once, from the operator that returns it first to the moment it is freed; views share their storage. What an operator
allocates and frees inside itself is not seen.

Whose a storage is follows from who holds it: the model's parameters and buffers, their gradients, the optimizer's
state. The rest is decided with hindsight: what the forward pass leaves behind for the backward pass is an activation,
what is gone before is workspace. So the ledger keeps the whole history of a step and is asked at its end.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

CATEGORIES = (
    "base_weights",
    "quantization_state",
    "adapters",
    "gradients",
    "optimizer_state",
    "activations",
    "workspace",
    "other",
)
PHASES = ("load", "forward", "loss", "backward", "optimizer", "evaluate", "save", "export")


@dataclass(slots=True, eq=False)
class _Allocation:
    nbytes: int
    phase: str | None
    is_recorded: bool
    category: str | None = None
    outlives_forward: bool = True


class Ledger(TorchDispatchMode):
    """Counts live bytes while the block runs.

    Args:
        model: its parameters and buffers are entered at the start, each under its category.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self._live: dict[weakref.ref[Any], _Allocation] = {}
        self._events: list[tuple[_Allocation, int, str | None]] = []
        self._phase: str | None = None
        self._model = model
        if model is not None:
            for category, tensor in _owned_by(model):
                self.own(category, [tensor])

    def own(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Say whose these tensors are; storages not seen before are entered."""
        for tensor in tensors:
            allocation = self._enter(tensor)
            allocation.category = category

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens in the block belongs to the phase `name`, one of `PHASES`."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            if name == "backward":
                self._own_gradients()
            self._phase = before

    def current(self) -> int:
        """Bytes alive now."""
        return sum(allocation.nbytes for allocation in self._live.values())

    def peak(self) -> int:
        """The most bytes that were alive at one moment."""
        return max(self._totals(), default=0)

    def peak_by_phase(self) -> dict[str, int]:
        """The most bytes that were alive at one moment of each phase that there was."""
        peaks: dict[str, int] = {}
        for (_, _, phase), total in zip(self._events, self._totals(), strict=True):
            if phase is not None:
                peaks[phase] = max(peaks.get(phase, 0), total)
        return peaks

    def by_category(self) -> dict[str, int]:
        """Whose the bytes at the peak were; they sum to `peak()`."""
        totals = list(self._totals())
        counts = dict.fromkeys(CATEGORIES, 0)
        if totals:
            for allocation, sign, _ in self._events[: totals.index(max(totals)) + 1]:
                counts[_category(allocation)] += sign * allocation.nbytes
        return counts

    def summary(self) -> dict[str, Any]:
        """`peak_bytes`, `resident_bytes` (alive now), `by_category` and `peak_by_phase`, as run folders store them."""
        return {
            "peak_bytes": self.peak(),
            "resident_bytes": self.current(),
            "by_category": self.by_category(),
            "peak_by_phase": self.peak_by_phase(),
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._enter(leaf)
        return result

    def _enter(self, tensor: Tensor) -> _Allocation:
        storage = tensor.untyped_storage()
        key = weakref.ref(storage, self._leave)
        found = self._live.get(key)
        if found is None:
            # Autograd records only where gradients are on, so inside a backward pass this marks what is recomputed.
            found = _Allocation(storage.nbytes(), self._phase, torch.is_grad_enabled())
            self._live[key] = found
            self._events.append((found, 1, self._phase))
        return found

    def _leave(self, key: "weakref.ref[Any]") -> None:
        allocation = self._live.pop(key)
        allocation.outlives_forward = self._phase not in ("forward", "loss", None)
        self._events.append((allocation, -1, self._phase))

    def _own_gradients(self) -> None:
        if self._model is not None:
            self.own("gradients", [p.grad for p in self._model.parameters() if p.grad is not None])

    def _totals(self) -> Iterator[int]:
        total = 0
        for allocation, sign, _ in self._events:
            total += sign * allocation.nbytes
            yield total


def _category(allocation: _Allocation) -> str:
    if allocation.category is not None:
        return allocation.category
    if allocation.phase in ("forward", "loss"):
        return "activations" if allocation.outlives_forward else "workspace"
    if allocation.phase == "backward":
        return "activations" if allocation.is_recorded else "workspace"
    return "workspace" if allocation.phase is not None else "other"


def _owned_by(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors by the names that the kit gives them: `.adapters.` in a path, `absmax` for constants."""
    for name, parameter in model.named_parameters():
        yield ("adapters" if ".adapters." in name else "base_weights"), parameter
    for name, buffer in model.named_buffers():
        is_constant = name.rpartition(".")[2].startswith("absmax")
        yield ("quantization_state" if is_constant else "base_weights"), buffer
