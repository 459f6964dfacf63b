"""A plan, plan.json, as tables of text and as sentences.

Functions that end in `_table` give rows of cells, the header first; those that end in `_text` give lines for a
terminal.
"""

from collections.abc import Iterator
from typing import Any

from qlora_kit.report.methods import METHODS, categories, method_names, own_method, own_plan, saving
from qlora_kit.report.text import Table, aligned, in_words, wrapped
from qlora_kit.units import counted, format_bytes, format_count, format_seconds

_ALLOCATOR = {"context_bytes": "the driver's context", "library_bytes": "libraries", "rounding_bytes": "rounding"}


def memory_table(plan: dict[str, Any]) -> Table:
    """Bytes at the peak, category by method; then the peak, and what each method saves against full fine-tuning."""
    methods, names = {name: plan["methods"][name] for name in METHODS if name in plan["methods"]}, method_names(plan)
    savings = [saving(plan, name, "full_finetune") for name in methods]
    return [
        ["", *(names[name] for name in methods)],
        *(
            [in_words(category), *(format_bytes(method["by_category"].get(category, 0)) for method in methods.values())]
            for category in categories(methods.values())
        ),
        ["peak", *(format_bytes(method["peak_bytes"]) for method in methods.values())],
        ["saving vs full", *("-" if saved is None else f"{saved:.0%}".replace("%", " %") for saved in savings)],
    ]


def phase_table(plan: dict[str, Any]) -> Table:
    """The peak of each phase by method; only a header if the plan has none."""
    phases = {name: plan["methods"][name].get("peak_by_phase", {}) for name in METHODS if name in plan["methods"]}
    names = dict.fromkeys(name for peaks in phases.values() for name in peaks)
    return [
        ["", *(method_names(plan)[name] for name in phases)],
        *(
            [in_words(name), *(format_bytes(peaks[name]) if name in peaks else "-" for peaks in phases.values())]
            for name in names
        ),
    ]


def plan_text(plan: dict[str, Any], *more: str) -> str:
    """The plan as an aligned table with its sentences and `more` of them; the last line says what QLoRA saves, or
    would save.
    """
    table = aligned(memory_table(plan), rules_before=("peak",))
    saved = saving(plan, "qlora", "full_finetune")
    last = [] if saved is None else [_needs(1 - saved, own_method(plan))]
    after = wrapped(filter(None, [phases_sentence(plan), *more]))
    return "\n".join([*wrapped(plan_sentences(plan)), "", table, "", *after, *last]).strip("\n")


def phases_sentence(plan: dict[str, Any]) -> str:
    """The peak of each phase of this recipe; "" if it has fewer than two."""
    peaks = own_plan(plan).get("peak_by_phase", {})
    said = ", ".join(f"{in_words(name)} {format_bytes(count)}" for name, count in peaks.items())
    return f"Peak by phase: {said}." if len(peaks) > 1 else ""


def plan_sentences(plan: dict[str, Any]) -> list[str]:
    """What the plan says besides its bytes: parameters, setting, budget, host, duration, and what others assume."""
    return [
        *_parameters(plan),
        *setting_sentences(plan),
        *_capacity(plan),
        *_rate(plan),
        *_room(plan),
        *_beside_the_peak(own_plan(plan), plan.get("allocator") or {}),
        *_duration(plan),
        *_compared(plan),
    ]


def _parameters(plan: dict[str, Any]) -> Iterator[str]:
    if counts := plan.get("parameters"):
        trained = counts["trainable"] / counts["total"] if counts["total"] else 0
        said = f"{format_count(counts['total'])} parameters, {format_count(counts['trainable'])} trained"
        said += " (all)" if trained == 1 else f" ({100 * trained:.2g} %)"
        if counts["quantized"] and (bits := plan.get("bits_per_quantized_parameter")):
            said += f", {format_count(counts['quantized'])} quantised to {bits:.4g} bits"
        yield f"{said}."


def setting_sentences(plan: dict[str, Any]) -> Iterator[str]:
    """What the recipe's `auto` became: activations by block, rows at a time, tokens of logits at a time."""
    done = {"keep": "kept", "selective": "kept in part", "recompute": "recomputed", "offload": "offloaded"}
    blocks = {name: count for name, count in (plan.get("blocks") or {}).items() if count}
    said = []
    if len(blocks) > 1:
        counts = (f"{done.get(name, name)} in {count:,.0f}" for name, count in blocks.items())
        said.append(f"activations {', '.join(counts)} blocks")
    elif policy := plan.get("activations"):
        said.append(f"activations {done.get(policy, policy)}")
    if rows := plan.get("micro_batch"):
        times = plan.get("accumulation") or 1
        said.append(f"{counted(rows, 'row')} at a time, {counted(times, 'time')} per step")
    if chunk := plan.get("loss_chunk"):
        said.append(f"the loss in chunks of {chunk:,.0f} tokens")
    if tokens := plan.get("eval_tokens"):
        said.append(f"held-out rows {'one at a time' if tokens == 1 else f'of {tokens:,.0f} tokens at a time'}")
    if said:
        yield f"Setting: {'; '.join(said)}."


def _capacity(plan: dict[str, Any]) -> Iterator[str]:
    """What the adapter holds beside what there is to learn, and whether that is too much for it."""
    for said in ((plan.get("capacity") or {}).get(key) for key in ("reason", "warning")):
        if said:
            yield f"{said[:1].upper()}{said[1:]}."


def _rate(plan: dict[str, Any]) -> Iterator[str]:
    """The learning rate, and where it comes from."""
    pace = plan.get("pace") or {}
    if "lr" in pace and pace.get("lr_reason"):
        yield f"Learning rate: {pace['lr']:g} ({pace['lr_reason']})."


def _room(plan: dict[str, Any]) -> Iterator[str]:
    """The budget, the least that is possible, and what more would buy."""
    if budget := plan.get("budget"):
        spare = budget - own_plan(plan)["peak_bytes"]
        verdict = f"{format_bytes(spare)} to spare" if spare >= 0 else f"the plan is {format_bytes(-spare)} above it"
        if spare >= 0 and plan.get("allocator"):
            verdict += ", of which a tenth of the peak is left to the card's allocator"
        name = plan.get("device_profile") or ""
        yield f"Budget {format_bytes(budget)}{'' if name.startswith('CPU') or not name else f' ({name})'}: {verdict}."
    if floor := plan.get("floor"):
        # Plans of earlier versions counted those of 256 tokens, and did not say so.
        how = f"with nothing offloaded and logits of {counted(floor.get('logits_tokens', 256), 'token')} at once"
        least = f"the least that its mathematics needs ({format_bytes(floor['bytes'])})"
        yield f"The step takes {floor['ratio']:.2f} times {least}, {how}."
    if more := plan.get("next"):
        wanted = format_bytes(more["peak_bytes"])
        yield f"With {wanted}: {more['settings']}, about {more['times_as_fast']:.2f} times as fast (estimate)."


def _beside_the_peak(method: dict[str, Any], allocator: dict[str, Any]) -> Iterator[str]:
    """What comes on top of the peak on a card, and what lies or may go elsewhere."""
    added = [f"{format_bytes(allocator[key])} for {name}" for key, name in _ALLOCATOR.items() if allocator.get(key)]
    if added:
        yield f"On the card CUDA adds about {', '.join(added)} (estimates, not in the peak)."
    if paged := method.get("paged_bytes"):
        yield f"{format_bytes(paged)} of the optimizer's state is paged: it may move to host memory."
    if host := method.get("host_peak_bytes"):
        what = "offloaded activations, copies for checkpoints, what loading holds"
        yield f"Host memory holds up to {format_bytes(host)}: {what}."


def _duration(plan: dict[str, Any]) -> Iterator[str]:
    if plan.get("steps") and plan.get("hours") and plan.get("tokens_per_s"):
        duration = format_seconds(3600 * plan["hours"])
        here = f" ({plan['device_profile']})" if plan.get("device_profile") else ""
        speed = f"{counted(plan['steps'], 'step')} at {counted(plan['tokens_per_s'], 'token')}/s"
        yield f"Estimate for this machine{here}: {speed}, {duration}."


def _compared(plan: dict[str, Any]) -> Iterator[str]:
    own, others = plan.get("computed_in"), plan.get("compared_in")
    if own != others:
        yield f"QLoRA computes in {own} on this device, which takes more; the others are planned in {others}."
    if assumed := plan["methods"].get("full_finetune", {}).get("assumes"):
        who = "Full fine-tuning assumes" if own_method(plan) == "qlora" else "This run trains every weight, with"
        yield f"{who} {', '.join(f'{in_words(key)} {assumed[key]}' for key in assumed)}."


def _needs(share: float, own: str) -> str:
    difference = f"{abs(1 - share):.0%}".replace("%", " %") + (" less" if share <= 1 else " more")
    if own == "full_finetune":
        return f"This run is full fine-tuning; QLoRA would need {share:.2f} times its memory: {difference}."
    return f"QLoRA needs {share:.2f} times the memory of full fine-tuning: {difference}."
