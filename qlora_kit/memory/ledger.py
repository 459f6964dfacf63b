"""The ledger of live tensors: how many bytes stand at each moment, whose they are, and in which phase they came.

A dispatch mode sees every tensor that an operator returns, on fake, CPU and CUDA tensors alike. Each storage counts
once, from the operator that returns it first to the moment it is freed; views share their storage. What an operator
allocates and frees inside itself is not seen.

Whose a storage is follows from who holds it: the model's parameters and buffers, their gradients, the optimizer's
state. The rest is decided with hindsight: what the forward pass leaves behind for the backward pass is an activation,
what is gone before is workspace. So the ledger keeps the whole history and is asked at its end (`history.py`).

Where a storage was made follows from hooks: the module whose forward pass runs, and in the backward pass the block
whose output's gradient has come. They stand only while the ledger watches.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qlora_kit.memory.history import CATEGORIES, PHASES, Allocation, History
from qlora_kit.memory.host import TO_HOST

__all__ = ["CATEGORIES", "PHASES", "Ledger"]

_DEVICE = torch.ops.prim.device.default
"""What torch asks of a fake tensor several times an operator; it makes nothing."""


class Ledger(TorchDispatchMode):
    """Counts live bytes while the block runs.

    Args:
        model: its parameters and buffers are entered at the start, each under its category.
        host_apart: count what `to_host` makes by itself, as where the device is a card; on a CPU it is the same memory.

    Attributes:
        history: what happened.
        paged_bytes: of the optimizer's state, those that may leave the device for the host.
    """

    def __init__(self, model: nn.Module | None = None, *, host_apart: bool = False) -> None:
        super().__init__()
        self.history = History()
        self.paged_bytes = 0
        self._live: dict[weakref.ref[Any], Allocation] = {}
        self._phase: str | None = None
        self._host_apart = host_apart
        self._model: nn.Module | None = None
        self._blocks: set[str] = set()
        self._running: list[str] = []
        self._backward_block = ""
        self._watching = 0
        self._hooks = ExitStack()
        if model is not None:
            self.adopt(model)

    def adopt(self, model: nn.Module, blocks: Iterable[str] = ()) -> None:
        """Enter the parameters and buffers of `model`, and tell from now on in which of its modules things are made.

        Args:
            model: to follow.
            blocks: names of its modules that are places of their own, forward and backward.
        """
        self._model, self._blocks = model, set(blocks)
        for category, name, tensor in _owned_by(model):
            self.own(category, [tensor], module=name)

    def own(self, category: str, tensors: Iterable[Tensor], *, module: str = "") -> None:
        """Say whose these tensors are; storages not seen before are entered."""
        for tensor in tensors:
            allocation = self._enter(tensor, "")
            allocation.category = category
            allocation.module = module or allocation.module

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Count these storages never: they are pages of a file, which the system may drop."""
        for tensor in tensors:
            self._live[weakref.ref(tensor.untyped_storage(), self._live.pop)] = Allocation(0, None, False)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens in the block belongs to `name`, one of `PHASES` or a part of one (`evaluate/answer`)."""
        before, self._phase = self._phase, name
        self.history.mark(name, self._place())
        try:
            yield
        finally:
            if name == "backward":
                self._own_gradients()
                self._backward_block = ""
            self._phase = before

    @contextmanager
    def watch(self, phase: str) -> Iterator[None]:
        """Count what happens in the block, all of it in one phase."""
        with self, self.phase(phase):
            yield

    def current(self) -> int:
        """Bytes alive now."""
        return sum(each.nbytes for each in self._live.values() if not each.is_apart)

    def peak(self) -> int:
        """The most bytes that were alive at one moment."""
        return self.history.peak_bytes()

    def peak_by_phase(self) -> dict[str, int]:
        """The most bytes that were alive at one moment of each phase that there was."""
        return self.history.peak_by_phase()

    def by_category(self) -> dict[str, int]:
        """Whose the bytes at the peak were; they sum to `peak()`."""
        return self.history.by_category()

    def summary(self) -> dict[str, Any]:
        """What run folders store: `peak_bytes`, `resident_bytes` (alive now), `by_category`, `peak_by_phase`,
        `host_peak_bytes` (counted apart) and `paged_bytes` (of the optimizer's state)."""
        return {
            "peak_bytes": self.peak(),
            "resident_bytes": self.current(),
            "by_category": self.by_category(),
            "peak_by_phase": self.peak_by_phase(),
            "host_peak_bytes": max(self.history.host_peak_by_phase().values(), default=0),
            "paged_bytes": self.paged_bytes,
        }

    def __enter__(self) -> "Ledger":
        if self._watching == 0:
            self._follow_modules()
        self._watching += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._watching -= 1
        if self._watching == 0:
            self._hooks.close()
            self._running.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].device
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else tree_iter(result):
            if isinstance(leaf, Tensor):
                self._enter(leaf, func)
        return result

    def _enter(self, tensor: Tensor, operator: Any) -> Allocation:
        storage = tensor.untyped_storage()
        key = weakref.ref(storage, self._leave)
        found = self._live.get(key)
        if found is None:
            # Autograd records only where gradients are on, so inside a backward pass this marks what is recomputed.
            found = Allocation(storage.nbytes(), self._phase, torch.is_grad_enabled())
            found.is_apart = self._host_apart and operator is TO_HOST
            found.module = self._running[-1] if self._running else self._backward_block
            found.operator, found.shape, found.dtype = operator, tensor.shape, tensor.dtype
            self._live[key] = found
            self.history.add(found, 1, self._phase, self._place())
        return found

    def _leave(self, key: "weakref.ref[Any]") -> None:
        allocation = self._live.pop(key)
        allocation.outlives_forward = self._phase not in ("forward", "loss", None)
        self.history.add(allocation, -1, self._phase, self._place())

    def _place(self) -> str:
        """The block that runs, forward or backward; "" outside of blocks."""
        if self._backward_block:
            return self._backward_block
        return next((name for name in reversed(self._running) if name in self._blocks), "")

    def _follow_modules(self) -> None:
        for name, module in [] if self._model is None else self._model.named_modules():
            begin = module.register_forward_pre_hook(partial(self._begin_module, name))
            end = module.register_forward_hook(partial(self._end_module, name), always_call=True)
            self._hooks.callback(begin.remove)
            self._hooks.callback(end.remove)

    def _begin_module(self, name: str, *_: Any) -> None:
        self._running.append(name)

    def _end_module(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if name in self._running:  # a recomputation that ends early leaves through an exception
            del self._running[self._running.index(name) :]
        if name in self._blocks and not self._backward_block:
            for leaf in tree_iter(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(partial(self._begin_backward_of, name))
                    break

    def _begin_backward_of(self, block: str, grad: Tensor) -> None:
        self._backward_block = block
        self.history.mark(self._phase, block)

    def _own_gradients(self) -> None:
        if self._model is not None:
            for name, parameter in self._model.named_parameters():
                if parameter.grad is not None:
                    self.own("gradients", [parameter.grad], module=name)


def _owned_by(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """The model's tensors by the names that the kit gives them: `.adapters.` in a path, `absmax` for constants."""
    for name, parameter in model.named_parameters():
        yield ("adapters" if ".adapters." in name else "base_weights"), name, parameter
    for name, buffer in model.named_buffers():
        is_constant = name.rpartition(".")[2].startswith("absmax")
        yield ("quantization_state" if is_constant else "base_weights"), name, buffer
