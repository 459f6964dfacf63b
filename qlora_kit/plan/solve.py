"""The fastest setting that fits a budget: what each block keeps for the backward pass, and how many rows go at a time.

    time of a step ~ passes x (tokens + micro-batches x DECODE_TOKENS)
    passes: 2, 1 more for the share of the blocks that run again, a part of it where they keep products, and 1 more
            where weights train

since every pass over a micro-batch decodes every weight once. Memory is planned by running the step. Settings are many
and runs are few, so a mixture of blocks is estimated from runs in which all blocks are alike, at two numbers of rows:
what stands at a moment of the step is a sum over the blocks, and every term a straight line in the rows. What is
chosen is then run itself.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from qlora_kit.train.activations import Blocks, Policy
from qlora_kit.units import GIB

DECODE_TOKENS = 200
"""Tokens whose products take as long as decoding all weights once: 1.26 x FLOP/s over bytes/s, an estimate. It is 206
on an RTX 4090 (165 TFLOP/s and 1,008 GB/s by its data sheet), and 190 to 230 on the cards around it."""
SELECTIVE_PASSES = 0.15
"""Of a pass what runs again of blocks that keep their products: attention, norms and gates, an estimate. On a CPU it is
0.09 at a 7B model's layers, 0.13 at 1.1 B and 0.24 at 134 M (benchmarks/results/step.jsonl)."""
OFFLOAD_PASSES = 0.06
"""Passes that moving the inputs of all blocks to the host and back costs: 2 % of three passes, an estimate (published
measurements range from a gain to 2.8 %)."""
TRIES = 4
"""Dry runs of chosen settings: each that does not fit moves the aim down by what it had too much."""

Moment = tuple[str, str]
"""A phase, and in it the side of the model: first block, last block, or outside of blocks."""


def run_again(blocks: Blocks) -> float:
    """The part of a forward pass that is run a second time."""
    return (blocks.recompute + blocks.offload + SELECTIVE_PASSES * blocks.selective) / max(1, blocks.all)


@dataclass(frozen=True, slots=True)
class Setting:
    """What may be chosen.

    Attributes:
        blocks: how many do what.
        micro_batch: rows in one forward pass.
        accumulation: micro-batches in a step.
        trains_weights: whether the base wants gradients, too.
    """

    blocks: Blocks
    micro_batch: int
    accumulation: int
    trains_weights: bool = False

    def cost(self, tokens: int) -> float:
        """Time of a step, in tokens going through the model once; `tokens` are those of a row."""
        moved = OFFLOAD_PASSES * self.blocks.offload / max(1, self.blocks.all)
        passes = 2 + self.trains_weights + run_again(self.blocks) + moved
        return passes * self.accumulation * (self.micro_batch * tokens + DECODE_TOKENS)

    def words(self) -> str:
        """As it is written on the command line, a mixture aside, which only the kit itself chooses."""
        policy = self.blocks.policy
        activations = f"memory.activations={policy}" if policy else f"activations {self.blocks.words}"
        return f"{activations} train.micro_batch={self.micro_batch}"


@dataclass(frozen=True, slots=True)
class Choices:
    """What the recipe leaves open.

    Attributes:
        layers: blocks of the model.
        policies: that a block may have.
        batches: rows at a time that may be chosen.
        rows: of a step.
        may_mix: whether blocks may differ.
        trains_weights: whether the base wants gradients, too.
    """

    layers: int
    policies: tuple[Policy, ...]
    batches: tuple[int, ...]
    rows: int
    may_mix: bool
    trains_weights: bool = False

    @classmethod
    def of(
        cls,
        asked: str,
        micro_batch: int,
        rows: int,
        *,
        layers: int,
        may_split: bool,
        has_host: bool,
        trains_weights: bool = False,
    ) -> "Choices":
        """The choices under a recipe.

        Args:
            asked: memory.activations: auto, keep, selective, recompute or offload.
            micro_batch: rows at a time, at most.
            rows: of a step.
            layers: blocks of the model.
            may_split: whether fewer rows at a time are allowed.
            has_host: whether the host has memory of its own, so that something is won by moving there.
            trains_weights: whether the base wants gradients, too.
        """
        automatic: list[Policy] = ["keep"]
        if layers:
            # Products with trained weights are not the kit's own, and are not kept.
            automatic += ["recompute"] if trains_weights else ["selective", "recompute"]
            automatic += ["offload"] if has_host else []
        policies = tuple(automatic) if asked == "auto" else (asked,)
        fewer = range(micro_batch, 0, -1) if may_split else [micro_batch]
        batches = tuple(batch for batch in fewer if rows % batch == 0)
        return cls(layers, policies, batches, rows, asked == "auto", trains_weights)  # type: ignore[arg-type]

    def alike(self, policy: Policy, batch: int) -> Setting:
        """All blocks under one policy."""
        return self.setting(Blocks.alike(policy, self.layers), batch)

    def setting(self, blocks: Blocks, batch: int) -> Setting:
        """These blocks, and `batch` rows at a time."""
        return Setting(blocks, batch, self.rows // batch, self.trains_weights)

    def fastest(self, tokens: int) -> Setting:
        """Of all, whatever it takes."""
        return min((self.alike(p, b) for p in self.policies for b in self.batches), key=lambda each: each.cost(tokens))

    def smallest(self) -> Setting:
        """Of all, the one that takes least."""
        return self.alike(self.policies[-1], self.batches[-1])

    def mixtures(self) -> Iterator[Blocks]:
        """Ways to spread the policies over the blocks, those that run again least often first; offloading by steps.

        Blocks that keep all stand beside such that keep products, if those are possible, and these beside such that
        keep nothing: whatever else takes the same bytes runs more again.
        """
        if not self.may_mix:
            yield from (Blocks.alike(policy, self.layers) for policy in self.policies)
            return
        has_selective, step = "selective" in self.policies, max(1, self.layers // 16)
        if has_selective:
            yield from (Blocks(selective=self.layers - keep, keep=keep) for keep in range(self.layers, 0, -1))
        for most in range(self.layers, -1, -1):
            again = self.layers - most
            for offload in range(0, again + 1 if "offload" in self.policies else 1, step):
                kept = {"selective" if has_selective else "keep": most}
                yield Blocks(offload, again - offload, **kept)


@dataclass(frozen=True, slots=True)
class Solution:
    """What fits, and what was given up for it.

    Attributes:
        setting: the fastest that fits; the smallest there is where none does.
        planned: its dry run.
        fits: whether it does.
        fastest: of all, with the bytes that it needs; None where that is the setting itself, and where none fits.
        more: what the next GiB would buy, or else the least that buys anything, with what it needs (an estimate).
        least: the smallest there is, with what it needs; None where that is the setting itself, or takes no less.
    """

    setting: Setting
    planned: dict[str, Any]
    fits: bool
    fastest: tuple[Setting, int] | None = None
    more: tuple[Setting, int] | None = None
    least: tuple[Setting, int] | None = None


def solve(choices: Choices, tokens: int, budget: int, plan: Callable[[Setting], dict[str, Any]]) -> Solution:
    """The fastest of the choices whose step fits.

    Args:
        choices: what may be chosen.
        tokens: of the longest row.
        budget: in bytes.
        plan: makes a dry run of a setting: a dict with `needs_bytes`, and for settings with blocks alike also `moments`
            and `block_bytes`.
    """
    smallest, fastest = choices.smallest(), choices.fastest(tokens)
    least = plan(smallest)
    if least["needs_bytes"] > budget and smallest.accumulation == fastest.accumulation:
        return Solution(smallest, least, fits=False)
    planned = plan(fastest)
    below = smallest, least["needs_bytes"]
    if planned["needs_bytes"] <= budget:
        return Solution(fastest, planned, fits=True, least=below if below[1] < planned["needs_bytes"] else None)
    if least["needs_bytes"] > budget:  # and gradients that stand from one micro-batch to the next may be the reason
        least, smallest = min((least, smallest), (planned, fastest), key=lambda each: each[0]["needs_bytes"])
        return Solution(smallest, least, fits=False)
    above = fastest, planned["needs_bytes"]
    estimate = Estimate(choices, plan)
    candidates = list(estimate.candidates(tokens))
    aim = budget
    for _ in range(TRIES):
        chosen = _quickest(candidates, tokens, aim)
        if chosen is None:
            break
        planned = plan(chosen)
        if planned["needs_bytes"] <= budget:
            more = _more(candidates, chosen, tokens, budget)
            smaller = below if below[1] < planned["needs_bytes"] else None
            return Solution(chosen, planned, fits=True, fastest=above, more=more, least=smaller)
        aim -= planned["needs_bytes"] - budget
    return Solution(smallest, least, fits=True, fastest=above, more=_more(candidates, smallest, tokens, budget))


Candidates = list[tuple[Setting, int]]


def _quickest(candidates: Candidates, tokens: int, budget: int) -> Setting | None:
    fitting = (setting for setting, needs in candidates if needs <= budget)
    return min(fitting, key=lambda setting: setting.cost(tokens), default=None)


def _more(candidates: Candidates, chosen: Setting, tokens: int, budget: int) -> tuple[Setting, int] | None:
    """What the next GiB would buy; where it buys less than a fiftieth, the least that buys that."""
    faster = [(s, needs) for s, needs in candidates if s.cost(tokens) < 0.98 * chosen.cost(tokens) and needs > budget]
    near = [each for each in faster if each[1] <= budget + GIB]
    if near:
        return min(near, key=lambda each: (each[0].cost(tokens), each[1]))
    return min(faster, key=lambda each: each[1], default=None)


@dataclass(slots=True)
class Estimate:
    """What any setting takes, from dry runs in which all blocks are alike.

    Attributes:
        choices: of the recipe.
        plan: makes the dry runs.
    """

    choices: Choices
    plan: Callable[[Setting], dict[str, Any]]
    _runs: dict[tuple[Policy, int], dict[str, Any]] = field(default_factory=dict)

    def candidates(self, tokens: int) -> Iterator[tuple[Setting, int]]:
        """Every setting, with what it takes."""
        for batch in self.choices.batches:
            told = {policy: self._at(policy, batch) for policy in self.choices.policies}
            for blocks in self.choices.mixtures():
                yield self.choices.setting(blocks, batch), _needs(blocks, told)

    def _at(self, policy: Policy, batch: int) -> dict[str, Any]:
        """Moments and bytes a block at `batch` rows, on the line through the two smallest numbers of rows."""
        few, *others = sorted(self.choices.batches)[:2]
        low = self._run(policy, few)
        if batch == few:
            return low
        return _on_line(low, self._run(policy, others[0]), (batch - few) / (others[0] - few))

    def _run(self, policy: Policy, batch: int) -> dict[str, Any]:
        if (policy, batch) not in self._runs:
            planned = self.plan(self.choices.alike(policy, batch))
            self._runs[policy, batch] = {
                "moments": planned["moments"],
                "block": planned["block_bytes"],
                "share": planned["needs_bytes"] / planned["peak_bytes"],
            }
        return self._runs[policy, batch]


def _needs(blocks: Blocks, told: Mapping[Policy, dict[str, Any]]) -> int:
    """The peak of a mixture: at each moment of a run with blocks alike, their activations replaced by the mixture's."""
    counts: dict[Policy, int] = {policy: getattr(blocks, policy) for policy in told}
    standing = sum(count * told[policy]["block"] for policy, count in counts.items())
    earlier = 0
    highest = 0
    layers = blocks.all
    for policy in get_args(Policy)[::-1]:
        if not counts.get(policy):
            continue
        alone = told[policy]
        earlier += counts[policy] * alone["block"]
        for (phase, side), total in alone["moments"].items():
            # In the backward pass of its last block, later blocks are done with; nothing else depends on the order.
            there = earlier if (phase, side) == ("backward", "last") else standing
            is_moved = phase == "loss" or (phase in ("forward", "backward") and side != "first")
            highest = max(highest, total + (there - layers * alone["block"] if is_moved else 0))
    return math.ceil(highest * max(each["share"] for each in told.values()))


def _on_line(low: Any, high: Any, factor: float) -> Any:
    if isinstance(low, dict):
        return {key: _on_line(value, high[key], factor) for key, value in low.items()}
    return low + factor * (high - low)
