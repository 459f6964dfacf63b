"""Memory and scores as tables of text and as sentences, for a terminal of 80 columns and for the page.

Functions that end in `_table` give rows of cells, the header first; those that end in `_text` give lines for a
terminal. `plan`, `memory` and `scores` are the documents plan.json, memory.json and scores.json of a run folder.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from textwrap import wrap
from typing import Any

from qlora_kit.units import counted, format_bytes, format_count, format_seconds

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
TERMINAL_COLUMNS = 80
_SHARES = ("exact_match", "accuracy", "reward_accuracy", "f1")

Table = list[list[str]]


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
        said.append(f"{counted(rows, 'row')} at a time, {counted(times, 'time')} a step")
    if chunk := plan.get("loss_chunk"):
        said.append(f"the loss in chunks of {chunk:,.0f} tokens")
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
        least = f"the least that the mathematics needs ({format_bytes(floor['bytes'])})"
        yield f"The step takes {floor['ratio']:.2f} times {least} with all of it on the device."
    if more := plan.get("next"):
        wanted = format_bytes(more["peak_bytes"])
        yield f"With {wanted}: {more['settings']}, about {more['times_as_fast']:.2f} times as fast (estimate)."


_ALLOCATOR = {"context_bytes": "the driver's context", "library_bytes": "libraries", "rounding_bytes": "rounding"}


def _beside_the_peak(method: dict[str, Any], allocator: dict[str, Any]) -> Iterator[str]:
    """What comes on top of the peak on a card, and what lies or may go elsewhere."""
    added = [f"{format_bytes(allocator[key])} for {name}" for key, name in _ALLOCATOR.items() if allocator.get(key)]
    if added:
        yield f"On the card CUDA adds about {', '.join(added)} (estimates, not in the peak)."
    if paged := method.get("paged_bytes"):
        yield f"Of the optimizer's state {format_bytes(paged)} are paged: they may move to the host's memory."
    if host := method.get("host_peak_bytes"):
        what = "offloaded activations, copies for checkpoints, what loading holds"
        yield f"The host's memory holds up to {format_bytes(host)}: {what}."


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


def memory_check_table(memory: dict[str, Any]) -> Table:
    """Planned beside measured bytes with the relative error (planned less measured, over measured)."""
    planned, measured = memory["planned"], memory["measured"]
    rows = [
        (category, planned["by_category"].get(category, 0), measured["by_category"].get(category, 0))
        for category in categories((planned, measured))
    ]
    rows.append(("peak", planned["peak_bytes"], measured["peak_bytes"]))
    errors = memory.get("error", {})
    return [
        ["", "planned", "measured", "error"],
        *(
            [in_words(name), format_bytes(plan), format_bytes(real), _error(errors.get(name), plan, real)]
            for name, plan, real in rows
        ),
    ]


def phase_check_table(memory: dict[str, Any]) -> Table:
    """The same by phase; only a header if no phase was measured."""
    planned, measured = (memory[kind].get("peak_by_phase", {}) for kind in ("planned", "measured"))
    return [
        ["", "planned", "measured", "error"],
        *(
            [
                in_words(name),
                format_bytes(planned[name]) if name in planned else "-",
                format_bytes(measured[name]) if name in measured else "-",
                _error(None, planned[name], measured[name]) if name in planned and name in measured else "-",
            ]
            for name in (dict.fromkeys([*planned, *measured]) if measured else ())
        ),
    ]


def memory_check_sentences(memory: dict[str, Any]) -> list[str]:
    """How the planned peak compares, what the device itself counted, what is paged, and what files back."""
    said = []
    error = peak_error(memory)
    if error is not None:
        side = f"{abs(error):.1%}".replace("%", " %") + (" above" if error > 0 else " below")
        said.append(f"The planned peak is {side if round(error, 3) else 'equal to'} the measured one.")
    if counter := memory.get("device_counter"):
        start = counter.get("start_bytes") or 0
        over = f", {format_bytes(counter['peak_bytes'] - start)} over its start" if start else ""
        peak = format_bytes(counter["peak_bytes"])
        said.append(f"The device's own counter ({counter['name']}) peaked at {peak}{over}.")
    host, paged = (memory["measured"].get(key) or memory.get(key) for key in ("host_peak_bytes", "paged_bytes"))
    beside = [f"the host held up to {format_bytes(host)}"] if host else []
    beside += [f"{format_bytes(paged)} of the optimizer's state are paged"] if paged else []
    if beside:
        said.append(f"Beside it {', and '.join(beside)}.")
    if backed := memory.get("file_backed_bytes"):
        said.append(f"Besides, {format_bytes(backed)} are backed by files, and can be dropped when memory is short.")
    return said


def peak_error(memory: dict[str, Any]) -> float | None:
    """Planned less measured peak, over measured: as recorded, else worked out; None if nothing was measured."""
    planned, measured = (memory[kind]["peak_bytes"] for kind in ("planned", "measured"))
    error: float | None = memory.get("error", {}).get("peak")
    return planned / measured - 1 if error is None and measured else error


def memory_check_text(memory: dict[str, Any]) -> str:
    """Planned beside measured as an aligned table, with the largest allocations and what the device counted."""
    table = aligned(memory_check_table(memory), rules_before=("peak",))
    largest = [f"  {format_bytes(each['bytes'])} {where_made(each)}" for each in (memory.get("largest") or [])[:3]]
    named = ["Largest at the peak:", *(line[:TERMINAL_COLUMNS] for line in largest)] if largest else []
    return "\n".join([table, "", *wrapped(memory_check_sentences(memory)), *named]).strip("\n")


def where_made(allocation: dict[str, Any]) -> str:
    """Module, operator, shape and dtype of one of memory.json's `largest`, as far as they are known."""
    shape = "x".join(f"{size:.0f}" for size in allocation.get("shape") or ())
    made = [str(allocation[key]) for key in ("module", "operator") if allocation.get(key)]
    return ", ".join([*made, f"{shape} {allocation.get('dtype') or ''}".strip()]).rstrip(", ") or "unknown"


def scores_table(scores: dict[str, Any], trained: str = "adapter") -> Table:
    """Each score of the base beside that of what was `trained`, and the change; not how many rows and tokens."""
    base, adapter = scores["base"], scores["adapter"]
    names = [name for name in (base | adapter) if name not in ("schema", "rows", "tokens")]
    return [
        ["", "base", trained, "change"],
        *([in_words(name), *_score_cells(name, base.get(name), adapter.get(name))] for name in names),
    ]


def score_words(score: Mapping[str, Any]) -> dict[str, str]:
    """What is known of one model on held-out rows, by name in words: `loss`, `perplexity`, `exact match` and so on."""
    told = {in_words(name): value for name, value in score.items() if name not in ("schema", "rows", "tokens")}
    shares = [in_words(name) for name in _SHARES]
    forms = {"perplexity": ",.2f"} | dict.fromkeys(shares, ".1%")
    return {name: format(value, forms.get(name, ".3f")) for name, value in told.items()}


def scores_text(scores: dict[str, Any]) -> str:
    """Scores before and after as an aligned table, under a line that says on how many rows."""
    rows = scores.get("rows")
    heading = ["Scores" if rows is None else f"Scores on {rows:,.0f} held-out rows"]
    return "\n".join([*heading, "", aligned(scores_table(scores))])


def categories(methods: Iterable[dict[str, Any]]) -> list[str]:
    """The categories of `methods`: the known ones in their order, then any others."""
    extra = {name for method in methods for name in method["by_category"]} - set(CATEGORIES) - {"schema"}
    return [*CATEGORIES, *sorted(extra)]


def in_words(name: str) -> str:
    """A key of a JSON file as words: `exact_match` is `exact match`."""
    return name.replace("_", " ")


def wrapped(sentences: Iterable[str]) -> list[str]:
    """Sentences as lines of a terminal."""
    # A number stays on one line with its unit.
    joined = (re.sub(r"(?<=\d) (?=[KMGT]?i?B\b)", "\N{NO-BREAK SPACE}", sentence) for sentence in sentences)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for each in joined for line in wrap(each, TERMINAL_COLUMNS)]


def aligned(table: Table, rules_before: tuple[str, ...] = ()) -> str:
    """`table` as lines: the first column to the left, the others to the right, a rule under the header.

    A rule stands also above each row whose first cell is in `rules_before`.
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rule = "  ".join("-" * width for width in widths)
    lines = []
    for index, (name, *cells) in enumerate(table):
        if index == 1 or name in rules_before:
            lines.append(rule)
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *numbers]))
    return "\n".join(lines)


def _needs(share: float, own: str) -> str:
    difference = f"{abs(1 - share):.0%}".replace("%", " %") + (" less" if share <= 1 else " more")
    if own == "full_finetune":
        return f"This run is full fine-tuning; QLoRA would need {share:.2f} of it: {difference}."
    return f"QLoRA needs {share:.2f} of full fine-tuning: {difference}."


def _error(recorded: float | None, planned: float, measured: float) -> str:
    if recorded is None and planned and not measured:
        return "-"
    error = recorded if recorded is not None else planned / measured - 1 if measured else 0.0
    return f"{100 * error:+.1f} %" if round(error, 3) else "0.0 %"


def _score_cells(name: str, base: float | None, adapter: float | None) -> list[str]:
    scale, digits, unit = (100, 1, " %") if name in _SHARES else (1, 3, "")
    cells = ["-" if value is None else _number(scale * value, digits) + unit for value in (base, adapter)]
    if base is None or adapter is None:
        return [*cells, "-"]
    points = " points" if name in _SHARES else ""
    return [*cells, _number(scale * (adapter - base), digits, sign="+") + points]


def _number(value: float, digits: int, sign: str = "") -> str:
    # A model that has come apart has perplexities of thirty digits.
    return f"{value:{sign},.{digits}f}" if abs(value) < 1e6 else f"{value:{sign}.3g}"
