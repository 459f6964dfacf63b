"""The plan of a recipe: its own step beside 16-bit LoRA and full fine-tuning of the same model, batch and length."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from qlora_kit.base.device import resolve_device
from qlora_kit.base.formats import Quantization
from qlora_kit.plan.capacity import capacity_of, with_rank
from qlora_kit.plan.cards import fitting_cards
from qlora_kit.plan.choose import Workloads, choose, needed_on_card
from qlora_kit.plan.depths import count_layers
from qlora_kit.plan.devices import available_bytes, device_name, estimated_tokens_per_s, matmul_rate
from qlora_kit.plan.dry_run import dry_run
from qlora_kit.plan.fake import After
from qlora_kit.plan.floor import LOSS_ROWS, floor_bytes
from qlora_kit.plan.solve import Setting, Solution, run_again
from qlora_kit.plan.workload import Workload
from qlora_kit.recipe import TASKS, Recipe, method_of, with_adapters
from qlora_kit.train.activations import Blocks
from qlora_kit.train.classes import head_for
from qlora_kit.train.pace import Pace
from qlora_kit.units import parse_bytes

STEP = ("forward", "loss", "backward", "optimizer")
"""The phases that the floor speaks of."""


def plan_methods(
    recipe: Recipe,
    config: PretrainedConfig,
    pace: Pace,
    tokens: int,
    card: str | None = None,
    *,
    eval_shapes: Mapping[int, tuple[int, int]] | None = None,
    after: Mapping[str, After] | None = None,
    data_bits: float | None = None,
) -> dict[str, Any]:
    """All that plan.json holds.

    Args:
        recipe: the run.
        config: of the base; its weights are not needed.
        pace: micro-batch, steps and so on.
        tokens: of the longest row.
        card: for which the plan is made, where that is not this machine's device.
        eval_shapes: rows and tokens of the largest batch that is evaluated, by the tokens that may go together, the
            fastest first; None where none is.
        after: what else is done with the trained model, as `dry_run` takes it.
        data_bits: that the rows tell; None where there are none to look at.

    Returns:
        The object described under plan.json in the documentation of the run folder. `method` is the recipe's own, whose
        plan the run is held to; `savings_vs_full` is QLoRA's against full fine-tuning, whichever it is.
        `rank` says what `lora.rank: auto` became, and `capacity` why, where there is an adapter.
        `activations`, `micro_batch` and `accumulation` say what the recipe's `auto` became: the fastest that fits the
        budget. `floor` says how far the step is from the least possible, `next` what more memory would buy, `traded`
        what was given up, `least` the smallest setting that the recipe allows, where that is another, and
        `with_quantized_head` what the smallest would take so, where nothing fits.
    """
    asked, recipe = recipe, with_rank(recipe, config, data_bits)
    device = resolve_device(recipe.base.device)
    on_card = card is not None or device.type == "cuda"
    budget = _budget(recipe, device)
    room = budget or available_bytes(device)
    chosen = choose(Workloads(recipe, config, tokens, on_card, eval_shapes or {}, after or {}), pace, room)
    makes, solution, setting = chosen.makes, chosen.solution, chosen.solution.setting
    work = makes.of(setting)
    is_quantized = makes.quantize_head or recipe.base.quantize_head is True
    adapters = replace(makes, recipe=with_adapters(recipe), quantize_head=is_quantized).of(setting)
    methods = _methods(recipe, config, work, adapters, solution.planned, after)
    own, parameters = methods[method_of(recipe)], solution.planned["parameters"]
    speed = _tokens_per_s(work, setting.blocks, parameters["total"], device) if card is None else None
    held = None if work.lora is None else capacity_of(recipe, asked.lora.rank, parameters["trainable"], data_bits)
    return {
        "method": method_of(recipe),
        "parameters": parameters,
        "bits_per_quantized_parameter": _bits(adapters.quantization, config),
        "rank": recipe.lora.rank,
        "capacity": None if held is None else asdict(held),
        "methods": {name: _public(method) for name, method in methods.items()},
        "savings_vs_full": 1 - methods["qlora"]["peak_bytes"] / methods["full_finetune"]["peak_bytes"],
        "floor": _floor(config, work, own),
        "budget": budget,
        "available_bytes": room if budget is None else None,
        "needs_bytes": chosen.needs_bytes,
        **_settled(recipe, work, setting),
        "eval_tokens": makes.eval_tokens,
        "tokens": tokens,
        "planned_on": "fake tensors, CPU operators",
        "device_profile": card or device_name(device),
        "pace": asdict(_paced(pace, setting, makes.eval_tokens)),
        "steps": pace.steps,
        "tokens_per_s": speed,
        "hours": None if speed is None else pace.tokens / speed / 3600,
        "estimates": ["tokens_per_s", "hours", "next", "traded"],
        "allocator": chosen.added,
        "cards": fitting_cards({name: needed_on_card(method["peak_bytes"]) for name, method in methods.items()}),
        **_other_settings(solution, tokens),
        "with_quantized_head": chosen.with_quantized_head,
    }


def _budget(recipe: Recipe, device: torch.device) -> int | None:
    """The bytes that the run is held to: the recipe's, or what is free on a card; None on a CPU without either."""
    if recipe.memory.budget is not None:
        return parse_bytes(recipe.memory.budget)
    return available_bytes(device) if device.type == "cuda" else None


def _paced(pace: Pace, setting: Setting, eval_tokens: int | None) -> Pace:
    """The pace in the batches that were chosen."""
    chosen = replace(pace, micro_batch=setting.micro_batch, accumulation=setting.accumulation)
    return chosen if eval_tokens is None else replace(chosen, eval_tokens=eval_tokens)


def _settled(recipe: Recipe, work: Workload, setting: Setting) -> dict[str, Any]:
    """What the recipe's `auto` became, and in what the run and those it is compared with compute."""
    return {
        "layout": work.layout,
        "activations": setting.blocks.words,
        "blocks": setting.blocks._asdict(),
        "loss_chunk": work.loss_chunk,
        "quantize_head": work.quantize_head,
        "computed_in": str(work.dtype).removeprefix("torch."),
        "compared_in": str(_peer_dtype(recipe, work)).removeprefix("torch."),
        "micro_batch": setting.micro_batch,
        "accumulation": setting.accumulation,
    }


def _tokens_per_s(work: Workload, blocks: Blocks, parameters: int, device: torch.device) -> float:
    """An estimate for this machine's device."""
    rate = matmul_rate(device, work.dtype)
    passes = TASKS[work.task].more_passes
    return estimated_tokens_per_s(parameters, run_again(blocks), rate, trains_weights=work.lora is None, passes=passes)


def _methods(
    recipe: Recipe,
    config: PretrainedConfig,
    work: Workload,
    adapters: Workload,
    own: dict[str, Any],
    after: Mapping[str, After] | None,
) -> dict[str, dict[str, Any]]:
    """The recipe's own plan, and the other two methods' of the same model, batch, length, activations and loss.

    Like with like: who asks for float32 (a CPU has no fast 16 bits) would train the dense model in float32, too.
    """
    dtype = _peer_dtype(recipe, work)
    peers = replace(adapters, quantization=Quantization("none"), dtype=dtype, quantize_head=False)
    if peers.lora is not None and peers.lora.init == "loftq":  # there is nothing that it could make up for
        peers = replace(peers, lora=peers.lora.model_copy(update={"init": "default"}))
    dense = dry_run(config, peers, after)
    if method_of(recipe) == "qlora":
        return {"qlora": own, "lora_16bit": dense, "full_finetune": _as_the_paper_counts(config, peers, after)}
    full = {**own, "assumes": _assumed(work, own)}
    return {"qlora": dry_run(config, adapters, after), "lora_16bit": dense, "full_finetune": full}


def _public(method: dict[str, Any]) -> dict[str, Any]:
    """A method as plan.json has it, without what only the solver reads."""
    hidden = ("parameters", "layers", "moments", "block_bytes", "added_bytes", "needs_bytes")
    return {key: value for key, value in method.items() if key not in hidden}


def _other_settings(solution: Solution, tokens: int) -> dict[str, Any]:
    """What could have been chosen instead; None for each where there is no such setting."""
    return {
        "next": _other(solution, solution.more, tokens),
        "traded": _other(solution, solution.fastest, tokens),
        "least": _other(solution, solution.least, tokens),
    }


def _other(solution: Solution, other: tuple[Setting, int] | None, tokens: int) -> dict[str, Any] | None:
    """Another setting beside the chosen one: what it would take, and how many times as fast it would be."""
    if other is None:
        return None
    setting, peak = other
    gain = solution.setting.cost(tokens) / setting.cost(tokens)
    return {"settings": setting.words(), "peak_bytes": peak, "times_as_fast": round(gain, 2)}


def _floor(config: PretrainedConfig, work: Workload, planned: dict[str, Any]) -> dict[str, float] | None:
    """The least that such a step needs, and how many times that its peak is; None where no formula says it."""
    if not work.quantization.is_4bit or work.task == "classify":
        return None
    least = floor_bytes(
        config,
        planned["parameters"],
        tokens=work.tokens,
        micro_batch=work.micro_batch * TASKS[work.task].sequences,
        accumulation=work.accumulation,
        quantization=work.quantization,
        optimizer=work.optimizer,
        has_masters=work.master_weights == "fp32",
        dense_width=work.dtype.itemsize,
    )
    step = max(planned["peak_by_phase"][phase] for phase in STEP)
    at_once = min(LOSS_ROWS, work.tokens * work.micro_batch * TASKS[work.task].sequences)
    return None if least is None else {"bytes": least, "ratio": round(step / least, 4), "logits_tokens": at_once}


def _as_the_paper_counts(config: PretrainedConfig, work: Workload, after: Mapping[str, After] | None) -> dict[str, Any]:
    """Full fine-tuning as the QLoRA paper counts it, with this recipe's batch and activations: in bf16 12 bytes a
    parameter (2 of weights, 2 of gradients, 8 of moments), in fp32 16. Products with trained weights are not kept.

    A task that holds to the model that training starts from wants it a second time, frozen: here there is no adapter to
    switch off."""
    blocks = Blocks.of(work.activations, count_layers(config, head_for(work.task)))
    blocks = blocks._replace(recompute=blocks.recompute + blocks.selective, selective=0)
    full = replace(work, lora=None, optimizer="adamw_32bit", master_weights="none", skip=(), activations=blocks)
    planned = dry_run(config, full, after)
    return {**planned, "assumes": {**_assumed(full, planned), "optimizer": "AdamW, fp32 moments"}}


def _assumed(work: Workload, planned: dict[str, Any]) -> dict[str, Any]:
    """What full fine-tuning is planned with, and what that takes of weights, gradients and state."""
    dtype, masters = str(work.dtype).removeprefix("torch."), {"stochastic": "none (stochastic rounding)"}
    kept = "none" if work.dtype == torch.float32 else masters.get(work.master_weights, work.master_weights)
    state = planned["by_category"]["optimizer_state"] / planned["parameters"]["total"]
    activations = work.activations
    second = work.lora is None and TASKS[work.task].holds_to_start
    reference = {"reference": "the base a second time, frozen"} if second else {}
    return {
        "optimizer": work.optimizer,
        "master_weights": f"{kept}, {dtype} weights and gradients",
        "activations": activations.words if isinstance(activations, Blocks) else activations,
        "loss": "whole logits" if work.loss_chunk is None else f"logits of {work.loss_chunk} tokens at a time",
        **reference,
        "bytes_a_parameter": round((3 if second else 2) * work.dtype.itemsize + state, 1),
    }


def _peer_dtype(recipe: Recipe, work: Workload) -> torch.dtype:
    """What the others are planned in: what the run itself computes in where that is dense."""
    if work.lora is None:
        return work.dtype
    return torch.float32 if recipe.base.compute_dtype == "float32" else torch.bfloat16


def _bits(quantization: Quantization, config: PretrainedConfig) -> float:
    return quantization.bits_per_parameter(config.get_text_config().hidden_size)
