"""What the recipe leaves open, made definite: the solver's setting, and how embedding, head and logits are held.

Where no setting fits, logits are taken in smaller chunks, and last, if the recipe allows it, head and embedding are
quantised. On a card the allocator's share is reserved first and looked at afterwards, for the setting that was chosen.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from qlora_kit.base.architecture import build_model
from qlora_kit.base.attention import reads_apart
from qlora_kit.errors import ModelError
from qlora_kit.memory.limit import CUDA_RESERVE_BYTES
from qlora_kit.plan.depths import count_layers
from qlora_kit.plan.dry_run import added_by_allocator, dry_rest, dry_step, together
from qlora_kit.plan.fake import After
from qlora_kit.plan.solve import Choices, Setting, Solution, solve
from qlora_kit.plan.workload import Workload
from qlora_kit.recipe import Recipe, base_as_held, layout_of
from qlora_kit.train.classes import head_for
from qlora_kit.train.head import FEWEST_TOKENS, automatic_chunk
from qlora_kit.train.pace import Pace
from qlora_kit.units import MIB

LIBRARY_BYTES = 32 * MIB
"""Workspace of cuBLAS, from PyTorch's allocator: 8 MiB on most cards and 32 on Hopper."""
ALLOCATOR_SHARE = 0.1
"""Of the tensors' peak, what a card's allocator is reserved while settings are compared: replays of 7B steps have shown
5 to 13 % (benchmarks/LOG.md)."""
SMALLEST_CHUNK = FEWEST_TOKENS
"""Tokens whose logits stand at one time, where memory is short."""


def needed_on_card(peak_bytes: int) -> int:
    """Bytes that tensors with such a peak want of a card, before its allocator is played through: an estimate."""
    return round(peak_bytes * (1 + ALLOCATOR_SHARE)) + LIBRARY_BYTES


@dataclass(frozen=True, slots=True)
class Workloads:
    """Makes the workload of a setting under one recipe, and runs it dry, each only once.

    Attributes:
        recipe: the run.
        config: of the base.
        tokens: of the longest row.
        on_card: whether the device is a card.
        eval_shapes: rows and tokens of the largest batch that is evaluated, by the tokens that may go together.
        after: what else is done with the trained model, as `dry_run` takes it.
        quantize_head: whether embedding and head are quantised, too.
        loss_chunk: tokens whose logits stand at one time.
        eval_tokens: of held-out rows that go together at most; None where there are none.
    """

    recipe: Recipe
    config: PretrainedConfig
    tokens: int
    on_card: bool
    eval_shapes: Mapping[int, tuple[int, int]]
    after: Mapping[str, After]
    quantize_head: bool = False
    loss_chunk: int | None = None
    eval_tokens: int | None = None
    _runs: dict[Setting | None, dict[str, Any]] = field(default_factory=dict, compare=False)

    def ways(self) -> Iterator["Workloads"]:
        """What the recipe leaves open of the head, the fastest first: smaller chunks of logits, then fewer bits."""
        asked, head = self.recipe.memory.loss_chunk, base_as_held(self.recipe).quantize_head
        usual = automatic_chunk(self.config.get_text_config().vocab_size)
        chunks = [asked] if asked != "auto" else sorted({usual, min(SMALLEST_CHUNK, usual)}, reverse=True)
        if head is not True:
            yield from (replace(self, quantize_head=False, loss_chunk=chunk, _runs={}) for chunk in chunks)
        if head is True or (head == "auto" and may_quantize_head(self.recipe, self.config)):
            # Without an adapter it is read by slices of its rows, however small the chunks.
            matter = chunks if _may_adapt_head(self.recipe) else chunks[:1]
            yield from (replace(self, quantize_head=True, loss_chunk=chunk, _runs={}) for chunk in matter)

    def of(self, setting: Setting) -> Workload:
        """The step, and what comes with it, under a setting."""
        work = Workload.of(
            self.recipe,
            micro_batch=setting.micro_batch,
            accumulation=setting.accumulation,
            tokens=self.tokens,
            activations=setting.blocks.policy or setting.blocks,
            loss_chunk=self.loss_chunk,
        )
        shape = None if self.eval_tokens is None else self.eval_shapes[self.eval_tokens]
        layout = layout_of(self.recipe, reads_apart=reads_apart(self.recipe.base.attention, self.config))
        return replace(work, on_card=self.on_card, layout=layout, eval_shape=shape, quantize_head=self.quantize_head)

    def plan(self, setting: Setting) -> dict[str, Any]:
        """The dry run of a setting, with `needs_bytes`: its peak, and on a card what is reserved beside it."""
        planned = together(self._step(setting), self._rest(setting))
        return planned | {"needs_bytes": self._needs(planned["peak_bytes"])}

    def has_room(self, choices: Choices, room: int) -> bool:
        """Whether the step of one of the extremes fits, by half of the dry run."""
        smallest, fastest = choices.smallest(), choices.fastest(self.tokens)
        extremes = [smallest] if smallest.accumulation == fastest.accumulation else [smallest, fastest]
        return any(self._needs(self._step(setting)["peak_bytes"]) <= room for setting in extremes)

    def evaluating_within(self, room: int, setting: Setting) -> "Workloads":
        """The largest batches of held-out rows that fit, by the other half; those that need least where none does."""
        tried = []
        for tokens in self.eval_shapes:
            made = replace(self, eval_tokens=tokens, _runs={})
            needs = self._needs(made._rest(setting)["peak_by_phase"]["evaluate"])
            if needs <= room:
                return made
            tried.append((needs, made))
        return min(tried, key=lambda each: each[0], default=(0, self))[1]

    def _step(self, setting: Setting) -> dict[str, Any]:
        if setting not in self._runs:
            self._runs[setting] = dry_step(self.config, self.of(setting))
        return self._runs[setting]

    def _rest(self, setting: Setting) -> dict[str, Any]:
        if None not in self._runs:
            self._runs[None] = dry_rest(self.config, self.of(setting), self.after)
        return self._runs[None]

    def _needs(self, peak: int) -> int:
        return needed_on_card(peak) if self.on_card else peak


@dataclass(frozen=True, slots=True)
class Chosen:
    """What `auto` became.

    Attributes:
        makes: with head and loss settled.
        solution: the setting and its dry run.
        added: bytes that come on top on a card, by what takes them, estimates all; None elsewhere.
        with_quantized_head: bytes needed with embedding and head quantised, where nothing fits and that takes less.
    """

    makes: Workloads
    solution: Solution
    added: dict[str, int] | None
    with_quantized_head: int | None

    @property
    def needs_bytes(self) -> int:
        """Of a budget: the peak, and what comes on top inside the allocator."""
        inside = 0 if self.added is None else _inside(self.added)
        needed: int = self.solution.planned["peak_bytes"] + inside
        return needed


def choose(makes: Workloads, pace: Pace, room: int) -> Chosen:
    """The first way to hold the head for which a setting fits, with the fastest; or the last way, with the smallest.

    Args:
        makes: of the recipe.
        pace: rows of a step, and the most at a time.
        room: bytes there are.
    """
    choices = _choices(makes, pace)
    *others, last = makes.ways()
    ways = (*(each for each in others if each.has_room(choices, room)), last)
    for way in (each.evaluating_within(room, choices.smallest()) for each in ways):
        solution = solve(choices, makes.tokens, room, way.plan)
        if solution.fits:
            break
    added = _added_on_card(way, solution.setting) if makes.on_card else None
    missing = 0 if added is None else solution.planned["peak_bytes"] + _inside(added) - room
    if solution.fits and missing > 0:  # once: less room by what the allocator adds beyond what was reserved
        solution = solve(choices, makes.tokens, room - missing, way.plan)
        added = _added_on_card(way, solution.setting)
    chosen = Chosen(way, solution, added, None)
    if not solution.fits and not way.quantize_head and may_quantize_head(way.recipe, way.config):
        small = replace(way, quantize_head=True, _runs={}).plan(solution.setting)["needs_bytes"]
        chosen = replace(chosen, with_quantized_head=small if small < chosen.needs_bytes else None)
    return chosen


def may_quantize_head(recipe: Recipe, config: PretrainedConfig) -> bool:
    """Whether `base.quantize_head` is possible: by the format, the width, and the kind of head."""
    base = base_as_held(recipe)
    with torch.device("meta"):
        model = build_model(config, torch.bfloat16, "eager", head_for(recipe.train.task))
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    fits = base.quantization == "int8" or embedding.weight.shape[1] % base.block_size == 0
    return base.quantization != "none" and fits and (head is None or type(head) is nn.Linear)


def _may_adapt_head(recipe: Recipe) -> bool:
    """Whether the recipe may put something on the output head."""
    lora = recipe.lora
    reaches = lora.targets not in ("all-linear", "attention", "mlp", "experts")
    return not recipe.train.full_finetune and bool(reaches or lora.added_tokens or lora.also_train)


def _choices(makes: Workloads, pace: Pace) -> Choices:
    recipe, layers = makes.recipe, count_layers(makes.config, head_for(makes.recipe.train.task))
    if layers == 0 and recipe.memory.activations in ("recompute", "offload"):
        raise ModelError(
            f"a {makes.config.model_type} has no blocks that can be recomputed; set memory.activations=keep, not "
            f"{recipe.memory.activations}"
        )
    if recipe.train.full_finetune and recipe.memory.activations == "selective":
        raise ModelError(
            "memory.activations=selective keeps products with frozen weights, and train.full_finetune has none; set "
            "memory.activations=keep or recompute"
        )
    # Fewer rows at a time want more micro-batches: both must be the kit's to choose.
    may_split = recipe.train.micro_batch == "auto" and recipe.train.accumulation == "auto"
    return Choices.of(
        recipe.memory.activations,
        pace.micro_batch,
        pace.rows_a_step,
        layers=layers,
        may_split=may_split,
        has_host=makes.on_card,
        trains_weights=recipe.train.full_finetune,
    )


def _added_on_card(makes: Workloads, setting: Setting) -> dict[str, int]:
    """Its allocator's rounding and fragmentation, from a replay of the run's requests; libraries' workspaces; and
    outside the allocator the context and loaded kernels."""
    return {
        "rounding_bytes": added_by_allocator(makes.config, makes.of(setting)),
        "library_bytes": LIBRARY_BYTES,
        "context_bytes": CUDA_RESERVE_BYTES,
    }


def _inside(added: dict[str, int]) -> int:
    return added["rounding_bytes"] + added["library_bytes"]
