"""The fastest setting that fits a budget: what blocks keep for the backward pass, and how many rows go at a time.

    time of a step ~ passes x (tokens + micro-batches x DECODE_TOKENS)        passes: 2, or 3 where blocks run again
                                                                                  (one more where weights train)

since every pass over a micro-batch decodes every weight once. Memory is planned by running the step; where that would
be done often, two micro-batches tell the rest, each phase of the step being a straight line in the rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qlora_kit.train.activations import Policy

DECODE_TOKENS = 200
"""Tokens whose products take as long as decoding all weights once: 1.26 x FLOP/s over bytes/s, an estimate. It is 206
on an RTX 4090 (165 TFLOP/s and 1,008 GB/s by its data sheet), and 190 to 230 on the cards around it."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What may be chosen.

    Attributes:
        activations: keep or recompute.
        micro_batch: rows in one forward pass.
        accumulation: micro-batches in a step.
        trains_weights: whether the base wants gradients, too.
    """

    activations: Policy
    micro_batch: int
    accumulation: int
    trains_weights: bool = False

    def cost(self, tokens: int) -> float:
        """Time of a step, in tokens going through the model once; `tokens` are those of a row."""
        passes = (2 if self.activations == "keep" else 3) + self.trains_weights
        return passes * self.accumulation * (self.micro_batch * tokens + DECODE_TOKENS)

    def words(self) -> str:
        """As it is written on the command line."""
        return f"memory.activations={self.activations} train.micro_batch={self.micro_batch}"


@dataclass(frozen=True, slots=True)
class Solution:
    """What fits, and what was given up for it.

    Attributes:
        setting: the fastest that fits; the smallest there is where none does.
        planned: its dry run.
        faster: of the faster ones that do not fit the smallest, with its peak in bytes (an estimate). None where there
            is none, or nothing fits.
        gain: how many times as fast that would be, an estimate.
    """

    setting: Setting
    planned: dict[str, Any]
    faster: tuple[Setting, int] | None = None
    gain: float = 1.0


def settings(
    asked: str, micro_batch: int, rows: int, *, may_split: bool, trains_weights: bool = False
) -> list[Setting]:
    """All that may be chosen.

    Args:
        asked: memory.activations of the recipe: auto, keep or recompute.
        micro_batch: rows at a time, at most.
        rows: of a step.
        may_split: whether fewer rows at a time are allowed.
        trains_weights: whether the base wants gradients, too.
    """
    policies: tuple[Policy, ...] = ("keep", "recompute") if asked == "auto" else (asked,)  # type: ignore[assignment]
    fewer = range(micro_batch, 0, -1) if may_split else [micro_batch]
    batches = [batch for batch in fewer if rows % batch == 0]
    return [Setting(policy, batch, rows // batch, trains_weights) for policy in policies for batch in batches]


def solve(choices: list[Setting], tokens: int, budget: int, plan: Callable[[Setting], dict[str, Any]]) -> Solution:
    """The fastest of the choices whose step fits.

    Args:
        choices: from `settings`.
        tokens: of the longest row.
        budget: in bytes.
        plan: makes a dry run of a setting.
    """
    fastest, *others = sorted(choices, key=lambda choice: choice.cost(tokens))
    planned = plan(fastest)
    if planned["peak_bytes"] <= budget:
        return Solution(fastest, planned)
    smallest = min(choices, key=lambda choice: (choice.activations == "keep", choice.micro_batch))
    least = plan(smallest)
    if least["peak_bytes"] > budget:
        return Solution(smallest, least)
    estimate = _estimates(choices, plan)
    too_large = [(fastest, planned["peak_bytes"])]
    for choice in others:
        expected = estimate(choice)
        if expected <= budget:
            planned = plan(choice)
            if planned["peak_bytes"] <= budget:
                nearest = min(too_large, key=lambda each: each[1])
                return Solution(choice, planned, nearest, choice.cost(tokens) / nearest[0].cost(tokens))
            expected = planned["peak_bytes"]
        too_large.append((choice, expected))
    return Solution(smallest, least)  # which was among them, but for a line that is not quite straight


def _estimates(choices: list[Setting], plan: Callable[[Setting], dict[str, Any]]) -> Callable[[Setting], int]:
    """Peaks of settings from two dry runs a policy: those with the fewest rows at a time, and the next."""
    lines: dict[Policy, list[tuple[int, dict[str, int]]]] = {}

    def estimate(choice: Setting) -> int:
        policy = choice.activations
        if policy not in lines:
            alike = sorted((each for each in choices if each.activations == policy), key=lambda each: each.micro_batch)
            lines[policy] = [(each.micro_batch, plan(each)["peak_by_phase"]) for each in alike[:2]]
        return max(_on_lines(lines[policy], choice.micro_batch))

    return estimate


def _on_lines(points: list[tuple[int, dict[str, int]]], rows: int) -> Iterator[int]:
    """Each phase's peak at `rows`, on the straight line through one or two points."""
    (few, low), (more, high) = points[0], points[-1]
    for phase, peak in low.items():
        slope = (high[phase] - peak) / (more - few) if more > few else 0.0
        yield round(peak + slope * (rows - few))
