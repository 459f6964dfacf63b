"""What a whole run takes, from parts that are played on fake tensors (`fake.py`).

Layers are alike, so a deep model is planned from two shallow ones (`depths.py`). Parts that were played are remembered.
"""

from collections.abc import Callable, Hashable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PretrainedConfig

from qlora_kit.memory import PHASES, History
from qlora_kit.memory.caching import replay
from qlora_kit.plan.depths import (
    block_bytes,
    count_layers,
    deepen,
    find_shallow,
    moments,
    peaks,
    thinned,
)
from qlora_kit.plan.fake import After, FakeRun, fake_run, train_once, use_it
from qlora_kit.plan.workload import Workload
from qlora_kit.train.activations import Blocks
from qlora_kit.train.classes import head_for

PLAYED_LAYERS = (4, 8)
"""Depths at which a card's allocator is played through."""

MOST_REMEMBERED = 256
"""Parts of runs whose needs are remembered, of a few KB each."""

_REMEMBERED: dict[Hashable, dict[str, Any]] = {}


def dry_run(config: PretrainedConfig, work: Workload, after: Mapping[str, After] | None = None) -> dict[str, Any]:
    """Load, train, evaluate and save on fake tensors, and tell what that took.

    Args:
        config: of the model; all that is needed of it.
        work: what the step works on.
        after: what else is done with the trained model, by the phase that it makes, such as an export.

    Returns:
        `peak_bytes`, `resident_bytes` (after the step), `by_category`, `peak_by_phase`, `host_peak_bytes`,
        `paged_bytes` as plan.json has them, and `parameters`: `total` of the base, without any adapter, `trainable`,
        and `quantized`, those of the base that are held as codes; for the solver `layers`, `moments` (peaks by phase
        and side of the model), `block_bytes` (what a block leaves for its backward pass) and `added_bytes`
        (`added_by_allocator`, where the model's own depth was played).

    Raises:
        ModelError: rows are packed, and the model does not keep them apart.
    """
    return together(dry_step(config, work), dry_rest(config, work, after))


def dry_step(config: PretrainedConfig, work: Workload) -> dict[str, Any]:
    """Load and train; as `dry_run`."""
    return _told(config, replace(work, eval_shape=None), None)


def dry_rest(config: PretrainedConfig, work: Workload, after: Mapping[str, After] | None = None) -> dict[str, Any]:
    """Load, evaluate, save, and what comes after: the same whatever a step keeps and however many rows it has."""
    return _told(config, replace(work, activations="keep", micro_batch=1), after or {})


def together(step: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """A whole run, from its two parts."""
    fuller = max(step, rest, key=lambda part: part["peak_bytes"])
    by_phase = {**rest["peak_by_phase"], **step["peak_by_phase"]}
    return {
        **step,
        "peak_bytes": fuller["peak_bytes"],
        "by_category": fuller["by_category"],
        "peak_by_phase": {phase: by_phase[phase] for phase in PHASES if phase in by_phase},
        "host_peak_bytes": max(step["host_peak_bytes"], rest["host_peak_bytes"]),
        "moments": {**rest["moments"], **step["moments"]},
    }


def added_by_allocator(config: PretrainedConfig, work: Workload) -> int:
    """Bytes that a card's allocator holds beyond the peak of the tensors: rounding and fragmentation, an estimate.

    The requests of loading and of a step are played to it. Most of what it adds are ends of segments, as many in every
    layer, so two depths tell the rest here too, if not to the byte. Where the deeper one fits into ends that the other
    left, no line goes on: segments are never smaller than what lies in them. A step that no shallow ones tell was
    played whole.
    """
    blocks = Blocks.of(work.activations, count_layers(config, head_for(work.task)))
    if not find_shallow(config, blocks, head_for(work.task)).steps:
        added: int = dry_step(config, work)["added_bytes"]
        return added
    few, more = (thinned(blocks, layers) for layers in PLAYED_LAYERS)
    if more.all >= blocks.all:
        return _added(_history(config, work, blocks))
    low, high = (_added(_history(config, work, part)) for part in (few, more))
    return low + max(0, round((high - low) * (blocks.all - few.all) / (more.all - few.all)))


def _history(config: PretrainedConfig, work: Workload, blocks: Blocks) -> History:
    """Of loading and a step at the depth of `blocks`."""
    history: History = fake_run(config, replace(work, activations=blocks), train_once)["history"]
    return history


def _added(history: History) -> int:
    played = replay((allocation, allocation.nbytes, sign > 0) for allocation, sign in history.events())
    return played.reserved_peak_bytes - history.peak_bytes()


def _told(config: PretrainedConfig, work: Workload, after: Mapping[str, After] | None) -> dict[str, Any]:
    """What a part of a run takes: its step, or where `after` is given the rest. Whoever plans, then runs, or runs one
    model many times, asks for the same parts again: they are remembered."""
    described = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    key = type(config), repr(described), repr(work), None if after is None else tuple(after.items())
    if key not in _REMEMBERED:
        if len(_REMEMBERED) == MOST_REMEMBERED:
            del _REMEMBERED[next(iter(_REMEMBERED))]  # the oldest
        _REMEMBERED[key] = _played(config, work, train_once if after is None else partial(use_it, after))
    return deepcopy(_REMEMBERED[key])


def _played(config: PretrainedConfig, work: Workload, does: Callable[[FakeRun], None]) -> dict[str, Any]:
    """What a part of a run takes at the model's depth, by as few layers as tell it."""
    shallow = find_shallow(config, work.activations, head_for(work.task))
    depths = [shallow.base, *(blocks for blocks, _ in shallow.steps)]
    base, *runs = (fake_run(config, replace(work, activations=blocks), does) for blocks in depths)
    histories = [run.pop("history") for run in (base, *runs)]
    told = deepen(base, [(run, factor) for run, (_, factor) in zip(runs, shallow.steps, strict=True)])
    places = told.pop("places")
    by_phase, by_category = peaks(places)
    return {
        **told,
        "host_peak_bytes": max(told["host_peak_bytes"].values(), default=0),
        "peak_bytes": sum(by_category.values()),
        "by_category": by_category,
        "peak_by_phase": by_phase,
        "moments": moments(places),
        "block_bytes": block_bytes(places, Blocks.of(work.activations, told["layers"])),
        "added_bytes": None if runs else _added(histories[0]),
    }
