"""The sections of a report that tell of memory: planned, measured beside it, over time, by allocation, by card."""

from collections.abc import Iterable, Mapping
from typing import Any

from qlora_kit.report.area import timeline
from qlora_kit.report.bars import PhaseBar, category_class, phase_bars, stacked_bars
from qlora_kit.report.cards import COUNTED, card_groups, cards_sentence
from qlora_kit.report.check_text import memory_check_sentences, memory_check_table, phase_check_table, where_made
from qlora_kit.report.folder import RunFolder
from qlora_kit.report.markup import Markup, clipped, element, joined
from qlora_kit.report.methods import categories, method_names, own_plan
from qlora_kit.report.page import lead, legend, note, part, section, table
from qlora_kit.report.plan_text import memory_table, phase_table, plan_sentences
from qlora_kit.report.text import in_words
from qlora_kit.units import format_bytes

SAMPLED = 0.97
"""Share of a phase's peak that a moment of the timeline must reach for its make-up to be shown as the peak's."""


_SHORT = {"qlora": "QLoRA", "lora_16bit": "LoRA", "full_finetune": "full"}


def memory_sections(run: RunFolder) -> list[Markup]:
    """All of them, each empty where the run does not say what it needs."""
    return [make(run) for make in (_planned, _check, _timeline, _largest, _cards)]


def _planned(run: RunFolder) -> Markup:
    names = method_names(run.plan)
    methods = {name: run.plan["methods"][name] for name in names if name in run.plan["methods"]}
    order = categories(methods.values())
    bars = stacked_bars(
        {names[name]: _ordered(method["by_category"], order) for name, method in methods.items()},
        title="Planned memory at the peak, by category",
        budget=run.plan.get("budget"),
    )
    place = [str(run.plan[key]) for key in ("planned_on", "device_profile") if run.plan.get(key)]
    said = "Bytes at the peak of the run, as planned" + (f" ({', '.join(place)})." if place else ".")
    return section(
        "Memory",
        lead(said),
        bars,
        table(memory_table(run.plan), "planned memory by category and method", order),
        *map(note, plan_sentences(run.plan)),
        _planned_phases(run),
    )


def _planned_phases(run: RunFolder) -> Markup:
    phases = phase_table(run.plan)
    if not phases[1:]:
        return Markup()
    own = own_plan(run.plan).get("peak_by_phase", {})
    bars = phase_bars({name: PhaseBar({"": count}) for name, count in own.items()}, title="Planned peak by phase")
    return part("Planned peak of each phase, this recipe", bars, table(phases, "planned peak by phase and method"))


def _ordered(counts: Mapping[str, float], order: Iterable[str]) -> dict[str, float]:
    return {category: counts.get(category, 0) for category in order}


def _check(run: RunFolder) -> Markup:
    if run.memory is None:
        return Markup()
    kinds = {kind: run.memory[kind] for kind in ("planned", "measured")}
    order = categories(kinds.values())
    bars = stacked_bars(
        {kind: _ordered(method["by_category"], order) for kind, method in kinds.items()},
        title="Planned and measured memory at the peak, by category",
    )
    verdict, *notes = memory_check_sentences(run.memory) or [""]
    return section(
        "Planned and measured",
        lead(verdict),
        bars,
        table(memory_check_table(run.memory), "planned and measured memory by category", order),
        *map(note, notes),
        _measured_phases(run.memory),
    )


def _measured_phases(memory: dict[str, Any]) -> Markup:
    rows = phase_check_table(memory)
    if not rows[1:]:
        return Markup()
    planned, measured = (memory[kind].get("peak_by_phase", {}) for kind in ("planned", "measured"))
    names = [name for name in dict.fromkeys([*planned, *measured]) if name in measured]
    bars = {name: PhaseBar(_make_up(memory, name, measured[name]), planned.get(name)) for name in names}
    return part(
        "Measured peak of each phase; a stroke marks the plan",
        phase_bars(bars, title="Measured peak by phase, by category"),
        table(rows, "planned and measured peak by phase"),
    )


def _make_up(memory: dict[str, Any], phase: str, peak: float) -> dict[str, float]:
    """The bytes of a phase's fullest moment by category; {"": peak} where no moment comes near the peak."""
    moments = [moment["bytes"] for moment in memory.get("timeline") or [] if moment.get("phase") == phase]
    fullest: dict[str, float] = max(moments, key=lambda counts: sum(counts.values()), default={})
    if not SAMPLED * peak <= sum(fullest.values()) <= 1.001 * peak:
        return {"": peak}
    return {category: fullest.get(category, 0) for category in categories([{"by_category": fullest}])}


def _timeline(run: RunFolder) -> Markup:
    moments = (run.memory or {}).get("timeline") or []
    if not moments:
        return Markup()
    held = [
        name
        for name in categories({"by_category": moment["bytes"]} for moment in moments)
        if any(moment["bytes"].get(name) for moment in moments)
    ]
    peak = max(moments, key=lambda moment: sum(moment["bytes"].values()))
    full = format_bytes(sum(peak["bytes"].values()))
    where = f", was in the {in_words(str(peak['phase']))} phase" if peak.get("phase") else " is the highest point"
    return section(
        "Timeline",
        lead(f"What was alive, moment by moment; the peak, {full}{where}."),
        element(
            "figure",
            legend(((in_words(name), category_class(name)) for name in held), "swatch"),
            timeline(moments, title="Memory over the moments of the run, by category"),
        ),
    )


def _largest(run: RunFolder) -> Markup:
    largest = (run.memory or {}).get("largest") or []
    if not largest:
        return Markup()
    rows = [["made by", "bytes"], *(_allocation(each) for each in largest[:10])]
    return section(
        "Largest allocations",
        lead("The largest allocations at the peak, besides the weights loaded before, and the module that made each."),
        table(rows, "the largest allocations alive at the peak", kind="listing"),
    )


def _allocation(each: dict[str, Any]) -> list[str]:
    module, category = clipped(str(each.get("module") or ""), 120), str(each.get("category") or "other")
    phase = f", {in_words(str(each['phase']))}" if each.get("phase") else ""
    made = clipped(where_made(each | {"module": ""}) + phase, 120)
    swatch = element("i", class_=f"swatch {category_class(category)}")
    return [
        joined([element("code", module or "outside of any module"), element("small", made)]),
        joined([format_bytes(each["bytes"]), element("small", swatch, clipped(in_words(category), 30))]),
    ]


def _cards(run: RunFolder) -> Markup:
    groups = card_groups(run.plan)
    if not groups:
        return Markup()
    names = {name: words for name, words in _SHORT.items() if any(name in group.fits for group in groups)}
    rows = [["cards", "usable", *names.values()]]
    for group in groups:
        fits = (_fits(group.fits.get(method)) for method in names)
        rows.append([clipped(", ".join(group.names), 300), format_bytes(group.usable_bytes), *fits])
    return section(
        "Which card it fits on",
        lead(f"{cards_sentence(run.plan)} {COUNTED}"),
        table(rows, "cards and the methods that fit on them", kind="cards"),
    )


def _fits(fits: bool | None) -> Markup:
    return element("span", "-" if fits is None else "fits" if fits else "no", class_="yes" if fits else "no")
