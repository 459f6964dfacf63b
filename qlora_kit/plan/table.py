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
from qlora_kit.recipe import Recipe, base_as_held, method_of, with_adapters
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
        The object described under plan.json in the documentation of the run folder. `method` is the recipe's own, whose
        plan the run is held to; `savings_vs_full` is QLoRA's against full fine-tuning, whichever it is.
        `activations`, `micro_batch` and `accumulation` say what the recipe's `auto` became: the fastest that fits the
        budget. `next` says what more memory would buy, and `with_quantized_head` what the smallest would take so,
        where nothing fits.
    """
    device = resolve_device(recipe.base.device)
    budget = None if recipe.memory.budget is None else parse_bytes(recipe.memory.budget)
    if budget is None and device.type == "cuda":
        budget = available_bytes(device)
    room = budget or available_bytes(device)
    solution = _solve(recipe, config, pace, tokens, room)
    setting, policy = solution.setting, solution.setting.activations
    pace = replace(pace, micro_batch=setting.micro_batch, accumulation=setting.accumulation)
    work = _workload(recipe, setting, tokens)
    adapters = _workload(with_adapters(recipe), setting, tokens)
    # Like with like: who asks for float32 (a CPU has no fast 16 bits) would train the dense model in float32, too.
    peers = replace(adapters, quantization=Quantization("none"), dtype=_peer_dtype(recipe, work))
    method, own = method_of(recipe), solution.planned
    methods = {"lora_16bit": dry_run(config, peers)}
    if method == "qlora":
        methods |= {"qlora": own, "full_finetune": _as_the_paper_counts(config, peers)}
    else:
        methods |= {"qlora": dry_run(config, adapters), "full_finetune": {**own, "assumes": _assumed(work, own)}}
    parameters = methods[method]["parameters"]
    for each in methods.values():
        each.pop("parameters")
    speed = None
    if card is None:
        rate, is_recomputed = matmul_rate(device, work.dtype), policy == "recompute"
        speed = estimated_tokens_per_s(parameters["total"], is_recomputed, rate, trains_weights=method != "qlora")
    return {
        "method": method,
        "parameters": parameters,
        "bits_per_quantized_parameter": _bits(adapters.quantization, config),
        "methods": methods,
        "savings_vs_full": 1 - methods["qlora"]["peak_bytes"] / methods["full_finetune"]["peak_bytes"],
        "budget": budget,
        "activations": policy,
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
    choices = settings(
        recipe.memory.activations,
        pace.micro_batch,
        pace.rows_a_step,
        may_split=may_split,
        trains_weights=recipe.train.full_finetune,
    )
    return solve(choices, tokens, room, cache(lambda setting: dry_run(config, _workload(recipe, setting, tokens))))


def _workload(recipe: Recipe, setting: Setting, tokens: int) -> Workload:
    return Workload.of(
        recipe,
        micro_batch=setting.micro_batch,
        accumulation=setting.accumulation,
        tokens=tokens,
        activations=setting.activations,
    )


def _next(solution: Solution) -> dict[str, Any] | None:
    """What more memory would buy."""
    if solution.faster is None:
        return None
    setting, peak = solution.faster
    return {"settings": setting.words(), "peak_bytes": peak, "times_as_fast": round(solution.gain, 2)}


def _quantized_head(recipe: Recipe, config: PretrainedConfig, solution: Solution, tokens: int, room: int) -> int | None:
    """The peak with embedding and head quantised, where that is a way out: nothing fits, and the width allows it."""
    base, width = base_as_held(recipe), config.get_text_config().hidden_size
    is_possible = base.quantization != "none" and not base.quantize_head and width % base.block_size == 0
    if solution.planned["peak_bytes"] <= room or not is_possible:
        return None
    work = replace(_workload(recipe, solution.setting, tokens), quantize_head=True)
    peak: int = dry_run(config, work)["peak_bytes"]
    return peak


def _as_the_paper_counts(config: PretrainedConfig, work: Workload) -> dict[str, Any]:
    """Full fine-tuning as the QLoRA paper counts it, with this recipe's batch and activations: in bf16 12 bytes a
    parameter (2 of weights, 2 of gradients, 8 of moments), in fp32 16."""
    full = replace(
        work,
        lora=None,
        optimizer="adamw_32bit",
        master_weights="none",
        skip=(),
    )
    planned = dry_run(config, full)
    return {**planned, "assumes": {**_assumed(full, planned), "optimizer": "AdamW, fp32 moments"}}


def _assumed(work: Workload, planned: dict[str, Any]) -> dict[str, Any]:
    """What full fine-tuning is planned with, and what that takes of weights, gradients and state."""
    dtype, masters = str(work.dtype).removeprefix("torch."), {"stochastic": "none (stochastic rounding)"}
    kept = "none" if work.dtype == torch.float32 else masters.get(work.master_weights, work.master_weights)
    state = planned["by_category"]["optimizer_state"] / planned["parameters"]["total"]
    return {
        "optimizer": work.optimizer,
        "master_weights": f"{kept}, {dtype} weights and gradients",
        "activations": work.activations,
        "loss": "whole logits",
        "bytes_a_parameter": round(2 * work.dtype.itemsize + state, 1),
    }


def _peer_dtype(recipe: Recipe, work: Workload) -> torch.dtype:
    """What the others are planned in: what the run itself computes in where that is dense."""
    if work.lora is None:
        return work.dtype
    return torch.float32 if recipe.base.compute_dtype == "float32" else torch.bfloat16


def _bits(quantization: Quantization, config: PretrainedConfig) -> float:
    return quantization.bits_per_parameter(config.get_text_config().hidden_size)
