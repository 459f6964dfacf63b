"""The report of a run: one page, each section of which is made by one function from the run.

A section is empty if the run has no such file. Those on memory have a file of their own.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qlora_kit.report.curve import curve, finite, smooth, window_for
from qlora_kit.report.folder import REWARDS, RunFolder, read_run
from qlora_kit.report.judge import judge_run
from qlora_kit.report.lines import Series
from qlora_kit.report.markup import Markup, clipped, element
from qlora_kit.report.memory_sections import memory_sections
from qlora_kit.report.methods import method_names, own_method, own_plan, saving
from qlora_kit.report.page import chart, check_place, figure, lead, page, section, table, wide, write_page
from qlora_kit.report.scores_text import scores_table
from qlora_kit.report.text import in_words
from qlora_kit.units import format_bytes, format_count

MOST_SAMPLES = 12
LONGEST_SAMPLE = 4000
"""Characters of a prompt or an answer that are shown; a page stays quick to open."""


def render(run_folder: str | Path) -> str:
    """The page for `run_folder`, from its files alone.

    Raises:
        RunError: if plan.json or metrics.jsonl is missing, or a file is not what it should be.
    """
    run = read_run(run_folder)
    before = [make(run) for make in (_headline, _scores, _samples)]
    after = [make(run) for make in (_curves, _on_the_way, _data, _recipe, _environment)]
    return page("report", f"{clipped(run.name, 80)}: training report", *before, *memory_sections(run), *after)


def write_report(run_folder: str | Path, out: str | Path | None = None) -> Path:
    """Write `run_folder`/report.html, which is there whole or not at all, and return its path.

    Args:
        run_folder: of the run.
        out: write the page there instead; what is there already must be a report, too.

    Raises:
        RunError: as `render` does, or if the page cannot be written or would overwrite something else.
    """
    path = Path(run_folder) / "report.html" if out is None else Path(out)
    text = render(run_folder)
    if out is not None:
        check_place(path, "report")
    write_page(path, text)
    return path


class _Words(NamedTuple):
    """What was trained: before the model's name, and beside the base's."""

    of: str
    name: str


_TRAINED = {
    "qlora": _Words("a LoRA adapter for", "adapter"),
    "full_finetune": _Words("full fine-tuning of", "as trained"),
}


def _headline(run: RunFolder) -> Markup:
    peak, source = own_plan(run.plan)["peak_bytes"], "planned"
    if run.memory is not None:
        peak, source = run.memory["measured"]["peak_bytes"], "measured"
    figures = [*_savings(run), figure(format_bytes(peak), f"peak memory, {source}")]
    tokens = finite(curve(run.rows, "tokens"))
    if tokens:
        steps = run.rows[-1]["step"]
        figures.append(
            figure(format_count(tokens[-1][1]), f"tokens trained in {steps:,.0f} {'step' if steps == 1 else 'steps'}")
        )
    return element(
        "header",
        element(
            "p", f"Training report: {_TRAINED[own_method(run.plan)][0]} {clipped(run.model, 120)}", class_="eyebrow"
        ),
        element("h1", clipped(run.name, 120)),
        element("div", *figures, class_="figures"),
    )


def _words(run: RunFolder) -> _Words:
    return _TRAINED[own_method(run.plan)]


def _savings(run: RunFolder) -> Iterator[Markup]:
    if own_method(run.plan) == "full_finetune":  # it saves nothing, and what the other would save is said as such
        saved = saving(run.plan, "qlora", "full_finetune")
        if saved is not None and saved > 0:
            yield figure(f"{saved:.0%}".replace("%", " %"), "less memory planned for QLoRA")
        return
    for method in ("full_finetune", "lora_16bit"):
        saved = saving(run.plan, "qlora", method)
        if saved is not None:
            share, side = f"{abs(saved):.0%}".replace("%", " %"), "less" if saved >= 0 else "more"
            yield figure(share, f"{side} memory than {method_names(run.plan)[method]}")


def _scores(run: RunFolder) -> Markup:
    if run.scores is None:
        return Markup()
    rows = run.scores.get("rows")
    said = "Before and after" + ("." if rows is None else f", on {rows:,.0f} held-out rows.")
    return section(
        "Scores",
        lead(said),
        table(scores_table(run.scores, _words(run).name), "scores before and after"),
    )


def _samples(run: RunFolder) -> Markup:
    samples = (run.scores or {}).get("samples", [])
    if not samples:
        return Markup()
    shown = [_sample(sample, _words(run).name) for sample in samples[:MOST_SAMPLES]]
    left = len(samples) - len(shown)
    rest = [lead(f"{left:,} more are in scores.json.")] if left else []
    return section("Samples", lead("The same prompts, answered before and after training."), *shown, *rest)


def _on_the_way(run: RunFolder) -> Markup:
    """Answers to the same prompts, first and last; those between are in samples.jsonl."""
    if not run.samples:
        return Markup()
    first, last = (end["step"] for end in (run.samples[0], run.samples[-1]))
    ends = [[each for each in run.samples if each["step"] == step] for step in (first, last)]
    cells = [
        ["prompt", "reference", f"step {first:,.0f}", f"step {last:,.0f}"],
        *(
            [_short(text) for text in (a["prompt"], a.get("reference", ""), a["answer"], b["answer"])]
            for a, b in zip(*ends, strict=False)
        ),
    ]
    said = "The same held-out prompts, answered while the model was trained; all answers are in samples.jsonl."
    return section("Samples on the way", lead(said), wide(table(cells, "answers at two steps")))


def _short(text: str) -> str:
    return clipped(" ".join(text.split()), 200) or "(empty)"


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


def _curves(run: RunFolder) -> Markup:
    loss = chart(_both_series(run.rows, "loss"), title="Loss over steps", y_label=run.loss_words)
    rewards = (
        chart(_both_series(run.rows, key), title=f"{in_words(key)} over steps", y_label=label, height=150)
        for key, label in REWARDS.items()
    )
    speed = _speed_series(run.rows)
    pace = chart(speed, title="Throughput over steps", y_label="tokens per second", height=150, from_zero=True)
    return section("Training", lead(judge_run(run)), loss, *rewards, pace)


def _both_series(rows: list[dict[str, Any]], key: str) -> list[Series]:
    """What steps and evaluations say of `key`."""
    trained, evaluated = curve(rows, key), curve(rows, f"eval_{key}")
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


def _data(run: RunFolder) -> Markup:
    parts = {name: run.data[name] for name in ("train", "eval") if name in run.data} if run.data else {}
    if not parts:
        return Markup()
    counted = list(dict.fromkeys(key for part in parts.values() for key in part))
    cells = [
        ["", *({"train": "training", "eval": "evaluation"}[name] for name in parts)],
        *([in_words(key), *(clipped(_plain(part.get(key)), 24) for part in parts.values())] for key in counted),
    ]
    return section("Data", table(cells, "rows and tokens"))


def _recipe(run: RunFolder) -> Markup:
    return section("Recipe", element("pre", run.recipe.rstrip())) if run.recipe else Markup()


def _environment(run: RunFolder) -> Markup:
    known = [key for key in run.env or {} if key != "schema"]
    if run.env is None or not known:
        return Markup()
    pairs = [element("div", element("dt", in_words(key)), element("dd", _plain(run.env[key]))) for key in known]
    return section("Environment", element("dl", *pairs))


def _plain(value: Any) -> str:
    """A value of a flat JSON object, as a person writes it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if isinstance(value, float) else str(value)
