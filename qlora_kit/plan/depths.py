"""A deep model told by shallow ones: layers repeat, so what stands while a block runs is a straight line in depth.

    layers = prefix + n periods + rest        run at prefix + rest + 1 period and + 2 periods

A period is what repeats (one layer of a Llama; five local and a global one of Gemma 3), a prefix what does not (the
first dense layers of some mixtures). Where blocks treat their activations differently, each part of them grows by
itself: one run with a few blocks of each part, and one more for every part with a block added.

Each block is followed by itself, counted from the first of its part or from the last: a single peak would jump from
one block to another somewhere between the shallow depths and the real one.
"""

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from qlora_kit.base.architecture import Head, build_model
from qlora_kit.memory import CATEGORIES, whole
from qlora_kit.train.activations import Blocks, Policy, activation_blocks

Held = dict[str, int]
"""Bytes by category."""
Role = tuple[str, int] | None
"""A block by the policy of its part and its number in it, below zero from the last; None outside of blocks."""


@dataclass(frozen=True, slots=True)
class Shallow:
    """Which runs tell a model's own depth.

    Attributes:
        base: the run that is added to.
        steps: others, each with how many times its difference from the base must be added.
    """

    base: Blocks
    steps: tuple[tuple[Blocks, float], ...] = ()


def find_shallow(config: PretrainedConfig, activations: Policy | Blocks, head: Head) -> Shallow:
    """The runs that tell the model's own depth; only itself where that is as cheap."""
    kinds = layer_kinds(config, head)
    if len(kinds) != getattr(config.get_text_config(), "num_hidden_layers", None):
        return Shallow(Blocks.of(activations, len(kinds)))  # its depth is not this number: it cannot be cut
    full = Blocks.of(activations, len(kinds))
    found = shallow_depths(kinds)
    if full.policy is not None and found is not None:
        low, high = (Blocks.alike(full.policy, depth) for depth in found)
        return Shallow(low, ((high, (len(kinds) - found[0]) / (found[1] - found[0])),))
    parts = [policy for policy, count in full._asdict().items() if count]
    base = Blocks(**{policy: min(2 if policy == parts[0] else 1, getattr(full, policy)) for policy in parts})
    steps = [
        (base._replace(**{policy: least + 1}), float(getattr(full, policy) - least))
        for policy, least in base._asdict().items()
        if getattr(full, policy) > least
    ]
    is_worth_it = len(set(kinds)) == 1 and full.all > base.all + sum(run.all for run, _ in steps)
    return Shallow(base, tuple(steps)) if is_worth_it else Shallow(full)


def count_layers(config: PretrainedConfig, head: Head) -> int:
    """Blocks of the model that may have a policy for their activations."""
    return len(layer_kinds(config, head))


def layer_kinds(config: PretrainedConfig, head: Head) -> list[Hashable]:
    """What tells the blocks of a model apart: their class, the shapes of their weights, and their kind of attention."""
    key = head, config.to_json_string(use_diff=False)
    if key not in _KINDS:
        with torch.device("meta"):
            blocks = activation_blocks(build_model(config, torch.bfloat16, "eager", head)).values()
        names = getattr(config.get_text_config(), "layer_types", None) or [None] * len(blocks)
        _KINDS[key] = [
            (type(block), names[index % len(names)], *((name, *p.shape) for name, p in block.named_parameters()))
            for index, block in enumerate(blocks)
        ]
    return _KINDS[key]


_KINDS: dict[tuple[Head, str], list[Hashable]] = {}
"""By head and configuration: a model is built for it, which a plan would do a dozen times."""


def thinned(blocks: Blocks, layers: int) -> Blocks:
    """About `layers` blocks in the same proportions, at least one of each kind that there is."""
    return Blocks(*(max(1, round(layers * count / blocks.all)) if count else 0 for count in blocks))


def shallow_depths(kinds: Sequence[Hashable]) -> tuple[int, int] | None:
    """The least two depths that repeat as all the layers do; the lower has a first and a last layer.

    >>> shallow_depths("LLLLLG" * 4 + "LL")
    (8, 14)
    """
    count = len(kinds)
    found = []
    for period in range(1, count // 2 + 1):
        prefix = next(n for n in range(count) if all(kinds[i] == kinds[i + period] for i in range(n, count - period)))
        low = prefix + (count - prefix) % period + period
        while low < 2 or (prefix and low // 2 <= prefix):  # first and last of what repeats are blocks of their own
            low += period
        found.append((low, low + period))
    best = min(found, key=sum, default=None)
    return best if best is not None and sum(best) < count else None


def with_depth(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    """The same model with its first `depth` layers; lists with an entry a layer are cut alike."""
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    full = text.num_hidden_layers
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == full:
            setattr(text, key, value[:depth])
    text.num_hidden_layers = depth
    return shallow


def role(block: int, blocks: Blocks) -> Role:
    """What a block is called, the same at every depth: those of the first half of a part are counted from its first."""
    for policy, count in blocks._asdict().items():
        if block < count:
            return policy, block if block < count // 2 else block - count
        block -= count
    raise IndexError(block)


def deepen(base: Any, steps: Sequence[tuple[Any, float]]) -> Any:
    """base + sum of factor (run - base), through nested numbers: of places, those that all runs have."""
    if isinstance(base, dict):
        shared = [key for key in base if all(key in run for run, _ in steps)]
        return {key: deepen(base[key], [(run[key], factor) for run, factor in steps]) for key in shared}
    return round(base + sum(factor * (run - base) for run, factor in steps))


def moments(places: dict[tuple[str, Role], Held]) -> dict[tuple[str, str], int]:
    """The peaks of every phase: while a block of the first half runs, or one of the last, or none.

    Args:
        places: bytes by category, by phase and block.
    """
    told: dict[tuple[str, str], int] = {}
    for (phase, block), held in places.items():
        side = "" if block is None else "last" if block[1] < 0 else "first"
        told[phase, side] = max(told.get((phase, side), 0), sum(held.values()))
    return told


def block_bytes(places: dict[tuple[str, Role], Held], blocks: Blocks) -> int:
    """What one block leaves behind for its backward pass: by how much more stands in the last than in the first; 0
    where blocks differ, or none ran forward."""
    first, last = (("forward", (blocks.policy or "", number)) for number in (0, -1))
    if first not in places or last not in places:
        return 0
    begun, ended = places[first]["activations"], places[last]["activations"]
    return round((ended - begun) / (blocks.all - 1))


def peaks(places: dict[tuple[str, Role], Held]) -> tuple[dict[str, int], Held]:
    """The peak of every phase, and whose the bytes were at the highest of all."""
    totals = {place: sum(held.values()) for place, held in places.items()}
    by_phase: dict[str, int] = {}
    for (phase, _), total in totals.items():
        by_phase[whole(phase)] = max(by_phase.get(whole(phase), 0), total)
    highest = max(totals, key=lambda place: totals[place])
    return by_phase, {name: places[highest].get(name, 0) for name in CATEGORIES}
