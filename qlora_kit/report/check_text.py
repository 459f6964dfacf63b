"""What was planned beside what was measured, memory.json, as tables of text and as sentences."""

from typing import Any

from qlora_kit.report.methods import categories
from qlora_kit.report.text import TERMINAL_COLUMNS, Table, aligned, in_words, wrapped
from qlora_kit.units import format_bytes


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
    beside += [f"{format_bytes(paged)} of the optimizer's state is paged"] if paged else []
    if beside:
        said.append(f"In addition, {', and '.join(beside)}.")
    if backed := memory.get("file_backed_bytes"):
        said.append(f"Another {format_bytes(backed)} is backed by files, and can be dropped when memory is short.")
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


def _error(recorded: float | None, planned: float, measured: float) -> str:
    if recorded is None and planned and not measured:
        return "-"
    error = recorded if recorded is not None else planned / measured - 1 if measured else 0.0
    return f"{100 * error:+.1f} %" if round(error, 3) else "0.0 %"
