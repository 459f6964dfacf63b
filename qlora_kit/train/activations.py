"""What each block keeps for its backward pass: everything; its input, and the results of its products with frozen
weights, so that the rest runs once more (selective); its input alone, so that all but its last product runs once more;
or not even that, its input waiting in the host's memory.

The blocks that keep are the last ones: their activations are gone before an earlier block runs again, so a part of
them costs nothing at the peak. The first blocks wait longest, so theirs are the inputs that go to the host.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_kit.base.text import text_modules
from qlora_kit.errors import ModelError
from qlora_kit.memory import from_host, to_host
from qlora_kit.ops import KeptProducts

Policy = Literal["keep", "selective", "recompute", "offload"]
"""From what takes most to what takes least."""


class Blocks(NamedTuple):
    """How many blocks do what, from the first to the last."""

    offload: int = 0
    recompute: int = 0
    selective: int = 0
    keep: int = 0

    @classmethod
    def alike(cls, policy: Policy, count: int) -> "Blocks":
        """All of `count` blocks under one policy."""
        return cls(**{policy: count})

    @classmethod
    def of(cls, asked: "Policy | Blocks", count: int) -> "Blocks":
        """What is asked for, as counts."""
        return asked if isinstance(asked, Blocks) else cls.alike(asked, count)

    @property
    def all(self) -> int:
        """All blocks."""
        return sum(self)

    @property
    def policy(self) -> Policy | None:
        """The one that all blocks have; keep where there are none, None for a mixture."""
        if self.all == 0:
            return "keep"
        (policy, count) = max(self._asdict().items(), key=lambda each: each[1])
        return policy if count == self.all else None  # type: ignore[return-value]

    @property
    def words(self) -> str:
        """For a person: `keep`, or `recompute 30, keep 2`."""
        return self.policy or ", ".join(f"{name} {count}" for name, count in self._asdict().items() if count)


def activation_blocks(model: PreTrainedModel) -> dict[str, GradientCheckpointingLayer]:
    """The blocks of a model that text goes through, by their dotted names, in the order in which they run."""
    read = set(text_modules(model))
    blocks = (each for each in model.named_modules() if isinstance(each[1], GradientCheckpointingLayer))
    return {name: block for name, block in blocks if block in read}


def set_activation_policy(model: PreTrainedModel, policy: Policy | Blocks) -> int:
    """Say what each block does until its backward pass; it holds in training mode only.

    Checkpointing is the non-reentrant kind: the reentrant one cuts the graph of a model whose inputs need no gradient.

    Args:
        model: a transformers model.
        policy: of all blocks, or how many have which.

    Returns:
        The number of blocks.

    Raises:
        ModelError: other than keep is asked for and the model has no blocks that can do it, or not as many.
    """
    blocks = activation_blocks(model).values()
    if policy not in ("keep", Blocks()) and not blocks:
        raise ModelError(f"{type(model).__name__} has no blocks that can be recomputed; set memory.activations=keep")
    counts = Blocks.of(policy, len(blocks))
    if counts.all != len(blocks):
        raise ModelError(f"{type(model).__name__} has {len(blocks)} blocks, and {counts.words} are {counts.all}")
    each = [name for name, count in counts._asdict().items() for _ in range(count)]
    for block, name in zip(blocks, each, strict=True):
        block.gradient_checkpointing = name != "keep"
        block._gradient_checkpointing_func = _RUN_AGAIN.get(name)  # type: ignore[assignment]
    return len(blocks)


_recompute = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)


def _select(run: Any, *inputs: Any) -> Any:
    """As `_recompute`, with products kept."""
    return _recompute(run, *inputs, context_fn=KeptProducts().contexts)


def _offload(run: Any, *inputs: Any) -> Any:
    """As `_recompute`, with the inputs in the host's memory until the block runs again.

    The hooks stand outside of the checkpoint's own: they see what it saves of its inputs, and nothing else.
    """
    with saved_tensors_hooks(_pack, _unpack):
        return _recompute(run, *inputs)


def _pack(x: Tensor) -> tuple[Tensor, torch.device]:
    return to_host(x), x.device


def _unpack(packed: tuple[Tensor, torch.device]) -> Tensor:
    return from_host(*packed)


_RUN_AGAIN = {"selective": _select, "recompute": _recompute, "offload": _offload}
