"""The numbers of a report as one JSON object, for other programs."""

from statistics import median
from typing import Any

from qlora_kit.report.cards import card_groups
from qlora_kit.report.check_text import peak_error
from qlora_kit.report.curve import curve, finite
from qlora_kit.report.folder import RunFolder
from qlora_kit.report.judge import best_evaluation, judge_run
from qlora_kit.report.methods import METHODS, own_method, saving

_OF_A_METHOD = ("peak_bytes", "by_category", "peak_by_phase", "host_peak_bytes", "paged_bytes")


def report_facts(run: RunFolder) -> dict[str, Any]:
    """What the report of `run` says.

    Returns:
        `run` (its folder), `model`, `method` (its own), `steps`, `tokens_per_s` (median), `savings` (of QLoRA, as
        shares, by the method compared with), `planned` (by method) and `measured` (of the run, or null) in bytes,
        `error` (relative: `peak`, and by category and phase what is known), `scores` (base and adapter, or null),
        `best_evaluation` (step, loss and whether its parameters are kept, or null), `left_step` (of what it leaves),
        `fits` (cards by method) and `verdict`, the sentences on the run and its curve.
    """
    methods = {name: _numbers(run.plan["methods"][name]) for name in METHODS if name in run.plan["methods"]}
    steps = [step for step, _ in curve(run.rows, "loss")]
    return {
        "run": str(run.path),
        "model": run.model,
        "method": own_method(run.plan),
        "steps": steps[-1] if steps else 0,
        "tokens_per_s": median_speed(run),
        "savings": {name: saved for name in METHODS if (saved := saving(run.plan, "qlora", name)) is not None},
        "planned": methods,
        "measured": None if run.memory is None else _numbers(run.memory["measured"]),
        "error": None if run.memory is None else _errors(run.memory),
        "scores": None if run.scores is None else {kind: run.scores[kind] for kind in ("base", "adapter")},
        "best_evaluation": _best(run),
        "left_step": run.left_step,
        "fits": _fits(run.plan),
        "verdict": judge_run(run),
    }


def _numbers(method: dict[str, Any]) -> dict[str, Any]:
    return {key: method[key] for key in _OF_A_METHOD if key in method}


def median_speed(run: RunFolder) -> float | None:
    """Tokens per second, the step in the middle; None where no step tells it."""
    speeds = [speed for _, speed in finite(curve(run.rows, "tokens_per_s"))]
    return median(speeds) if speeds else None


def _errors(memory: dict[str, Any]) -> dict[str, Any]:
    """Planned less measured over measured, of what was measured to be above zero."""
    planned, measured = memory["planned"], memory["measured"]

    def relative(key: str) -> dict[str, float]:
        plan, real = planned.get(key, {}), measured.get(key, {})
        return {name: plan[name] / real[name] - 1 for name in plan if real.get(name)}

    return {
        "peak": peak_error(memory),
        "by_category": relative("by_category"),
        "by_phase": relative("peak_by_phase"),
    }


def _best(run: RunFolder) -> dict[str, Any] | None:
    best = best_evaluation(run.rows)
    if best is None:
        return None
    return {"step": best.step, "loss": best.loss, "is_kept": best.step in run.kept_steps}


def _fits(plan: dict[str, Any]) -> dict[str, list[str]]:
    groups = card_groups(plan)
    known = [method for method in METHODS if any(method in group.fits for group in groups)]
    return {method: [name for group in groups if group.fits.get(method) for name in group.names] for method in known}
