"""The plan of a recipe: its own step beside 16-bit LoRA and full fine-tuning of the same model, batch and length."""

from dataclasses import asdict, replace
from functools import cache
from typing import Any

import torch
from transformers import PretrainedConfig

from qlora_kit.base.formats import Quantization
from qlora_kit.base.load import resolve_device
from qlora_kit.plan.devices import available_bytes, device_name, estimated_tokens_per_s, matmul_rate
from qlora_kit.plan.dry_run import Workload, dry_run
from qlora_kit.plan.solve import Setting, Solution, settings, solve
from qlora_kit.recipe import Recipe
from qlora_kit.train.head import automatic_chunk
from qlora_kit.train.pace import Pace
from qlora_kit.units import parse_bytes


def plan_methods(
    recipe: Recipe, config: PretrainedConfig, pace: Pace, tokens: int, card: str | None = None
) -> dict[str, Any]:
    """All that plan.json holds.

    Args:
        recipe: the run.
        config: of the base; its weights are not needed.
        pace: micro-batch, steps and so on.
        tokens: of the longest row.
        card: for which the plan is made, where that is not this machine's device.

    Returns:
        The object described under plan.json in the documentation of the run folder. `activations`, `micro_batch` and
        `accumulation` say what the recipe's `auto` became: the fastest that fits the budget. `next` says what more
        memory would buy, and `with_quantized_head` what the smallest would take so, where nothing fits.
    """
    device = resolve_device(recipe.base.device)
    budget = None if recipe.memory.budget is None else parse_bytes(recipe.memory.budget)
    if budget is None and device.type == "cuda":
        budget = available_bytes(device)
    room = budget or available_bytes(device)
    solution = _solve(recipe, config, pace, tokens, room)
    setting, qlora = solution.setting, solution.planned
    policy = setting.activations
    pace = replace(pace, micro_batch=setting.micro_batch, accumulation=setting.accumulation)
    work = _workload(recipe, config, setting, tokens)
    # Like with like: who asks for float32 (a CPU has no fast 16 bits) would train the dense model in float32, too.
    peers = replace(work, quantization=Quantization("none"), dtype=_peer_dtype(recipe))
    methods = {"qlora": qlora, "lora_16bit": dry_run(config, peers), "full_finetune": _full_finetune(config, peers)}
    parameters = methods["qlora"]["parameters"]
    for method in methods.values():
        method.pop("parameters")
    speed = None
    if card is None:
        speed = estimated_tokens_per_s(parameters["total"], policy == "recompute", matmul_rate(device, work.dtype))
    return {
        "parameters": parameters,
        "bits_per_quantized_parameter": _bits(work.quantization, config),
        "methods": methods,
        "savings_vs_full": 1 - qlora["peak_bytes"] / methods["full_finetune"]["peak_bytes"],
        "budget": budget,
        "activations": policy,
        "loss_chunk": work.loss_chunk,
        "computed_in": str(work.dtype).removeprefix("torch."),
        "compared_in": str(peers.dtype).removeprefix("torch."),
        "micro_batch": pace.micro_batch,
        "accumulation": pace.accumulation,
        "tokens": tokens,
        "planned_on": "fake tensors, CPU operators",
        "device_profile": card or device_name(device),
        "pace": asdict(pace),
        "steps": pace.steps,
        "tokens_per_s": speed,
        "hours": None if speed is None else pace.tokens / speed / 3600,
        "estimates": ["tokens_per_s", "hours", "next"],
        "next": _next(solution),
        "with_quantized_head": _quantized_head(recipe, config, solution, tokens, room),
    }


def _solve(recipe: Recipe, config: PretrainedConfig, pace: Pace, tokens: int, room: int) -> Solution:
    """The recipe's own step; where it leaves a choice, the fastest that fits."""
    # Fewer rows at a time want more micro-batches: both must be the kit's to choose.
    may_split = recipe.train.micro_batch == "auto" and recipe.train.accumulation == "auto"
    choices = settings(recipe.memory.activations, pace.micro_batch, pace.rows_a_step, may_split=may_split)
    plan = cache(lambda setting: dry_run(config, _workload(recipe, config, setting, tokens)))
    return solve(choices, tokens, room, plan)


def _workload(recipe: Recipe, config: PretrainedConfig, setting: Setting, tokens: int) -> Workload:
    asked = recipe.memory.loss_chunk
    return Workload.of(
        recipe,
        micro_batch=setting.micro_batch,
        accumulation=setting.accumulation,
        tokens=tokens,
        activations=setting.activations,
        loss_chunk=automatic_chunk(config.get_text_config().vocab_size) if asked == "auto" else asked,
    )


def _next(solution: Solution) -> dict[str, Any] | None:
    """What more memory would buy."""
    if solution.faster is None:
        return None
    setting, peak = solution.faster
    return {"settings": setting.words(), "peak_bytes": peak, "times_as_fast": round(solution.gain, 2)}


def _quantized_head(recipe: Recipe, config: PretrainedConfig, solution: Solution, tokens: int, room: int) -> int | None:
    """The peak with embedding and head quantised, where that is a way out: nothing fits, and the width allows it."""
    base, width = recipe.base, config.get_text_config().hidden_size
    is_possible = base.quantization != "none" and not base.quantize_head and width % base.block_size == 0
    if solution.planned["peak_bytes"] <= room or not is_possible:
        return None
    work = replace(_workload(recipe, config, solution.setting, tokens), quantize_head=True)
    peak: int = dry_run(config, work)["peak_bytes"]
    return peak


def _full_finetune(config: PretrainedConfig, work: Workload) -> dict[str, Any]:
    """Full fine-tuning as the QLoRA paper counts it, with this recipe's batch and activations: in bf16 12 bytes a
    parameter (2 of weights, 2 of gradients, 8 of moments), in fp32 16."""
    full = replace(
        work,
        lora=None,
        optimizer="adamw_32bit",
        master_weights="none",
        skip=(),
    )
    assumes = {
        "optimizer": "AdamW, fp32 moments",
        "master_weights": f"none, {str(work.dtype).removeprefix('torch.')} weights and gradients",
        "activations": work.activations,
        "loss": "whole logits" if work.loss_chunk is None else f"logits of {work.loss_chunk} tokens at a time",
    }
    return {**dry_run(config, full), "assumes": assumes}


def _peer_dtype(recipe: Recipe) -> torch.dtype:
    return torch.float32 if recipe.base.compute_dtype == "float32" else torch.bfloat16


def _bits(quantization: Quantization, config: PretrainedConfig) -> float:
    return quantization.bits_per_parameter(config.get_text_config().hidden_size)
