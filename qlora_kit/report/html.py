"""The report of a run: one HTML page that needs no network, no script and no other file.

Each section is one function that takes the run and gives its markup, or none if the run has no such file. All text of
the run goes through `element`, which escapes it; a content security policy bars the page from loading anything besides.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora_kit.errors import RunError
from qlora_kit.report.curve import curve, finite, smooth, window_for
from qlora_kit.report.folder import RunFolder, read_run
from qlora_kit.report.judge import judge_curve
from qlora_kit.report.markup import Markup, clipped, element, joined
from qlora_kit.report.svg import Series, category_class, line_chart, stacked_bars
from qlora_kit.report.text import (
    Table,
    categories,
    in_words,
    memory_check_sentences,
    memory_check_table,
    memory_table,
    method_names,
    own_method,
    phase_table,
    plan_sentences,
    saving,
    scores_table,
)
from qlora_kit.units import format_bytes, format_count

MOST_SAMPLES = 12
LONGEST_SAMPLE = 4000
"""Characters of a prompt or an answer that are shown; a page stays quick to open."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render(run_folder: str | Path) -> str:
    """The page for `run_folder`, from its files alone.

    Raises:
        RunError: if plan.json or metrics.jsonl is missing, or a file is not what it should be.
    """
    run = read_run(run_folder)
    sections = (_headline, _scores, _samples, _memory, _memory_check, _curves, _data, _recipe, _environment)
    body = joined(section(run) for section in sections)
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{element("title", f"{clipped(run.name, 80)}: training report")}
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def write_report(run_folder: str | Path) -> Path:
    """Write `run_folder`/report.html, which is there whole or not at all, and return its path.

    Raises:
        RunError: as `render` does, or if the folder cannot be written to.
    """
    page = render(run_folder)
    path = Path(run_folder) / "report.html"
    unfinished = path.with_name(f".report.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written: {error.strerror}") from error
    return path


_TRAINED = {"qlora": ("a LoRA adapter for", "adapter"), "full_finetune": ("full fine-tuning of", "as trained")}


def _headline(run: RunFolder) -> Markup:
    peak, source = run.plan["methods"][own_method(run.plan)]["peak_bytes"], "planned"
    if run.memory is not None:
        peak, source = run.memory["measured"]["peak_bytes"], "measured"
    figures = [*_savings(run), _figure(format_bytes(peak), f"peak memory, {source}")]
    tokens = finite(curve(run.rows, "tokens"))
    if tokens:
        steps = run.rows[-1]["step"]
        figures.append(
            _figure(format_count(tokens[-1][1]), f"tokens trained in {steps:,.0f} {'step' if steps == 1 else 'steps'}")
        )
    return element(
        "header",
        element(
            "p", f"Training report: {_TRAINED[own_method(run.plan)][0]} {clipped(run.model, 120)}", class_="eyebrow"
        ),
        element("h1", clipped(run.name, 120)),
        element("div", *figures, class_="figures"),
    )


def _savings(run: RunFolder) -> Iterator[Markup]:
    if own_method(run.plan) == "full_finetune":  # it saves nothing, and what the other would save is said as such
        saved = saving(run.plan, "qlora", "full_finetune")
        if saved is not None and saved > 0:
            yield _figure(f"{saved:.0%}".replace("%", " %"), "less memory is what QLoRA is planned to take")
        return
    for method in ("full_finetune", "lora_16bit"):
        saved = saving(run.plan, "qlora", method)
        if saved is not None:
            share, side = f"{abs(saved):.0%}".replace("%", " %"), "less" if saved >= 0 else "more"
            yield _figure(share, f"{side} memory than {method_names(run.plan)[method]}")


def _figure(number: str, meaning: str) -> Markup:
    return element("div", element("strong", number), element("span", meaning), class_="figure")


def _scores(run: RunFolder) -> Markup:
    if run.scores is None:
        return Markup()
    rows = run.scores.get("rows")
    lead = "Before and after" + ("." if rows is None else f", on {rows:,.0f} held-out rows.")
    return _section(
        "Scores",
        _lead(lead),
        _table(scores_table(run.scores, _TRAINED[own_method(run.plan)][1]), "scores before and after"),
    )


def _samples(run: RunFolder) -> Markup:
    samples = (run.scores or {}).get("samples", [])
    if not samples:
        return Markup()
    shown = [_sample(sample, _TRAINED[own_method(run.plan)][1]) for sample in samples[:MOST_SAMPLES]]
    left = len(samples) - len(shown)
    note = [_lead(f"{left:,} more are in scores.json.")] if left else []
    return _section("Samples", _lead("The same prompts, answered before and after training."), *shown, *note)


def _sample(sample: dict[str, str], trained: str) -> Markup:
    answers = [
        element("div", element("h3", heading), _quote(sample[key]), class_=f"answer {key}")
        for key, heading in (("reference", "Reference"), ("base", "Base"), ("adapter", trained.capitalize()))
        if key in sample
    ]
    prompt = element("div", element("h3", "Prompt"), _quote(sample["prompt"]), class_="prompt")
    return element("article", prompt, element("div", *answers, class_="answers"), class_="sample")


def _quote(text: str) -> Markup:
    # The direction is the text's own, and stays inside: rows may be Arabic, or hold marks that turn a line round.
    if not text.strip():
        return element("p", "(empty)", class_="quote nothing")
    shown = text if len(text) <= LONGEST_SAMPLE else text[:LONGEST_SAMPLE] + "…"
    return element("p", shown, class_="quote", dir="auto")


def _memory(run: RunFolder) -> Markup:
    names = method_names(run.plan)
    methods = {name: run.plan["methods"][name] for name in names if name in run.plan["methods"]}
    order = categories(methods.values())
    bars = stacked_bars(
        {names[name]: _ordered(method, order) for name, method in methods.items()},
        title="Planned memory at the peak, by category",
        budget=run.plan.get("budget"),
    )
    phases = phase_table(run.plan)
    place = [str(run.plan[key]) for key in ("planned_on", "device_profile") if run.plan.get(key)]
    lead = "Bytes at the peak of a training step, as planned" + (f" ({', '.join(place)})." if place else ".")
    return _section(
        "Memory",
        _lead(lead),
        bars,
        _table(memory_table(run.plan), "planned memory by category and method", order),
        *map(_note, plan_sentences(run.plan)),
        *([element("h3", "Peak by phase"), _table(phases, "planned peak by phase and method")] if phases[1:] else []),
    )


def _ordered(method: dict[str, Any], order: Iterable[str]) -> dict[str, float]:
    return {category: method["by_category"].get(category, 0) for category in order}


def _memory_check(run: RunFolder) -> Markup:
    if run.memory is None:
        return Markup()
    kinds = {kind: run.memory[kind] for kind in ("planned", "measured")}
    order = categories(kinds.values())
    bars = stacked_bars(
        {kind: _ordered(method, order) for kind, method in kinds.items()},
        title="Planned and measured memory at the peak, by category",
    )
    verdict, *notes = memory_check_sentences(run.memory) or [""]
    return _section(
        "Planned and measured",
        _lead(verdict),
        bars,
        _table(memory_check_table(run.memory), "planned and measured memory by category", order),
        *map(_note, notes),
    )


def _curves(run: RunFolder) -> Markup:
    drawn = [
        _chart(_loss_series(run.rows), title="Loss over steps", y_label="loss, nats"),
        _chart(_speed_series(run.rows), title="Throughput over steps", y_label="tokens per second", from_zero=True),
    ]
    return _section("Training", _lead(judge_curve(run.rows)), *drawn)


def _loss_series(rows: list[dict[str, Any]]) -> list[Series]:
    trained, evaluated = curve(rows, "loss"), curve(rows, "eval_loss")
    window = window_for(len(trained))
    if window == 1:
        series = [Series("training", trained, "train")]
    else:
        smoothed = Series(f"training, median of {window} steps", smooth(trained, window), "train")
        series = [Series("training", trained, "train-raw", faint=True), smoothed]
    return [one for one in (*series, Series("evaluation", evaluated, "eval", marked=True)) if one.points]


def _speed_series(rows: list[dict[str, Any]]) -> list[Series]:
    speed = curve(rows, "tokens_per_s")
    window = window_for(len(speed))
    if window == 1:
        return [Series("each step", speed, "speed")] if speed else []
    smoothed = Series(f"median of {window} steps", smooth(speed, window), "speed")
    return [Series("each step", speed, "speed-raw", faint=True), smoothed]


def _chart(series: list[Series], *, title: str, y_label: str, from_zero: bool = False) -> Markup:
    if not series:
        return Markup()
    legend = [element("li", element("i", class_=f"key {one.style}"), one.name) for one in series]
    chart = line_chart(
        series, title=title, x_label="step", y_label=y_label, height=150 if from_zero else 260, from_zero=from_zero
    )
    return element("figure", element("ul", *legend, class_="legend"), chart)


def _data(run: RunFolder) -> Markup:
    parts = {name: run.data[name] for name in ("train", "eval") if name in run.data} if run.data else {}
    if not parts:
        return Markup()
    counted = list(dict.fromkeys(key for part in parts.values() for key in part))
    table = [
        ["", *({"train": "training", "eval": "evaluation"}[name] for name in parts)],
        *([in_words(key), *(clipped(_plain(part.get(key)), 24) for part in parts.values())] for key in counted),
    ]
    return _section("Data", _table(table, "rows and tokens"))


def _recipe(run: RunFolder) -> Markup:
    return _section("Recipe", element("pre", run.recipe.rstrip())) if run.recipe else Markup()


def _environment(run: RunFolder) -> Markup:
    known = [key for key in run.env or {} if key != "schema"]
    if run.env is None or not known:
        return Markup()
    pairs = [element("div", element("dt", in_words(key)), element("dd", _plain(run.env[key]))) for key in known]
    return _section("Environment", element("dl", *pairs))


def _plain(value: Any) -> str:
    """A value of a flat JSON object, as a person writes it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if isinstance(value, float) else str(value)


def _section(heading: str, *content: str) -> Markup:
    return element("section", element("h2", heading), *content)


def _lead(sentence: str) -> Markup:
    return element("p", sentence, class_="lead")


def _note(sentence: str) -> Markup:
    return element("p", sentence, class_="note")


def _table(table: Table, caption: str, coloured: Iterable[str] = ()) -> Markup:
    """`table` with its first row and column as headings; rows named after one of `coloured` show its colour."""
    swatches = {in_words(name): element("i", class_=f"swatch {category_class(name)}") for name in coloured}
    head, *rows = table
    body = [
        element(
            "tr",
            element("th", swatches.get(name, Markup()), name, scope="row"),
            *(element("td", cell) for cell in cells),
            class_="total" if name == "peak" else "coloured" if name in swatches else "plain",
        )
        for name, *cells in rows
    ]
    return element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *(element("th", name, scope="col") for name in head))),
        element("tbody", *body),
    )
