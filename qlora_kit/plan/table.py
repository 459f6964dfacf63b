"""The plan of a recipe: its own step beside 16-bit LoRA and full fine-tuning of the same model, batch and length."""

from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from qlora_kit.base.formats import Quantization
from qlora_kit.base.load import resolve_device
from qlora_kit.plan.devices import available_bytes, device_name, estimated_tokens_per_s, matmul_rate
from qlora_kit.plan.dry_run import Workload, dry_run
from qlora_kit.recipe import Recipe
from qlora_kit.train.activations import Policy
from qlora_kit.train.pace import Pace
from qlora_kit.units import parse_bytes


def plan_methods(recipe: Recipe, config: PretrainedConfig, pace: Pace, tokens: int) -> dict[str, Any]:
    """All that plan.json holds.

    Args:
        recipe: the run.
        config: of the base; its weights are not needed.
        pace: micro-batch, steps and so on.
        tokens: of the longest row.

    Returns:
        The object described under plan.json in the documentation of the run folder. `activations` says what the
        recipe's `auto` became: keep where that fits the budget, otherwise recompute.
    """
    device = resolve_device(recipe.base.device)
    budget = None if recipe.memory.budget is None else parse_bytes(recipe.memory.budget)
    if budget is None and device.type == "cuda":
        budget = available_bytes(device)
    policy, qlora = _fitting(recipe, config, pace, tokens, budget or available_bytes(device))
    work = _workload(recipe, pace, tokens, policy)
    # Like with like: who asks for float32 (a CPU has no fast 16 bits) would train the dense model in float32, too.
    peers = replace(work, quantization=Quantization("none"), dtype=_peer_dtype(recipe))
    methods = {"qlora": qlora, "lora_16bit": dry_run(config, peers), "full_finetune": _full_finetune(config, peers)}
    parameters = methods["qlora"]["parameters"]
    for method in methods.values():
        method.pop("parameters")
    speed = estimated_tokens_per_s(parameters["total"], policy == "recompute", matmul_rate(device, work.dtype))
    return {
        "parameters": parameters,
        "bits_per_quantized_parameter": _bits(work.quantization, config),
        "methods": methods,
        "savings_vs_full": 1 - qlora["peak_bytes"] / methods["full_finetune"]["peak_bytes"],
        "budget": budget,
        "activations": policy,
        "computed_in": str(work.dtype).removeprefix("torch."),
        "compared_in": str(peers.dtype).removeprefix("torch."),
        "micro_batch": pace.micro_batch,
        "accumulation": pace.accumulation,
        "tokens": tokens,
        "planned_on": "fake tensors, CPU operators",
        "device_profile": device_name(device),
        "pace": asdict(pace),
        "steps": pace.steps,
        "tokens_per_s": speed,
        "hours": pace.tokens / speed / 3600,
        "estimates": ["tokens_per_s", "hours"],
    }


def _fitting(
    recipe: Recipe, config: PretrainedConfig, pace: Pace, tokens: int, budget: int
) -> tuple[Policy, dict[str, Any]]:
    """The recipe's own step; under `activations: auto` the fastest policy that fits."""
    asked = recipe.memory.activations
    if asked in ("keep", "recompute"):
        return asked, dry_run(config, _workload(recipe, pace, tokens, asked))
    kept = dry_run(config, _workload(recipe, pace, tokens, "keep"))
    if kept["peak_bytes"] <= budget:
        return "keep", kept
    return "recompute", dry_run(config, _workload(recipe, pace, tokens, "recompute"))


def _workload(recipe: Recipe, pace: Pace, tokens: int, policy: Policy) -> Workload:
    return Workload.of(
        recipe, micro_batch=pace.micro_batch, accumulation=pace.accumulation, tokens=tokens, activations=policy
    )


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
        "loss": "whole logits",
    }
    return {**dry_run(config, full), "assumes": assumes}


def _peer_dtype(recipe: Recipe) -> torch.dtype:
    return torch.float32 if recipe.base.compute_dtype == "float32" else torch.bfloat16


def _bits(quantization: Quantization, config: PretrainedConfig) -> float:
    return quantization.bits_per_parameter(config.get_text_config().hidden_size)
