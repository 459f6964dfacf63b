"""The methods of a plan, plan.json: what they are called, which one the run is, and what one saves against another."""

from collections.abc import Iterable
from typing import Any

CATEGORIES = (
    "base_weights",
    "quantization_state",
    "adapters",
    "gradients",
    "optimizer_state",
    "activations",
    "workspace",
    "other",
)

METHODS = {"qlora": "QLoRA (this recipe)", "lora_16bit": "LoRA 16-bit", "full_finetune": "full fine-tuning"}


def method_names(plan: dict[str, Any]) -> dict[str, str]:
    """What the methods are called: a recipe that computes in float32 is compared with what trains in float32."""
    names = METHODS | ({"lora_16bit": "LoRA 32-bit"} if plan.get("compared_in") == "float32" else {})
    if own_method(plan) == "full_finetune":
        names |= {"qlora": "QLoRA", "full_finetune": "full fine-tuning (this recipe)"}
    return names


def own_method(plan: dict[str, Any]) -> str:
    """Which of the plan's methods the run itself is; plans of earlier versions are all of QLoRA."""
    is_full = plan.get("method") == "full_finetune" and "full_finetune" in plan["methods"]
    return "full_finetune" if is_full else "qlora"


def own_plan(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan of the run itself."""
    method: dict[str, Any] = plan["methods"][own_method(plan)]
    return method


def saving(plan: dict[str, Any], method: str, against: str) -> float | None:
    """The share of `against`'s peak that `method` does without; None if that is `method` itself or is not planned.

    It is negative if `method` needs more.
    """
    methods = plan["methods"]
    if method == against or against not in methods or not methods[against]["peak_bytes"]:
        return None
    recorded = plan.get("savings_vs_full")
    if recorded is not None and (method, against) == ("qlora", "full_finetune"):
        return recorded
    return 1 - methods[method]["peak_bytes"] / methods[against]["peak_bytes"]


def categories(methods: Iterable[dict[str, Any]]) -> list[str]:
    """The categories of `methods`: the known ones in their order, then any others."""
    extra = {name for method in methods for name in method["by_category"]} - set(CATEGORIES) - {"schema"}
    return [*CATEGORIES, *sorted(extra)]
