"""Several runs beside each other: scores and memory in a table, what the recipes differ in, curves over each other.

Losses are compared within a task: those of answers, of pairs of answers and of classes are different sums.
"""

import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_kit.errors import RunError
from qlora_kit.recipe import yaml12
from qlora_kit.report.bars import category_class, stacked_bars
from qlora_kit.report.curve import curve, finite, smooth, window_for
from qlora_kit.report.facts import report_facts
from qlora_kit.report.folder import RunFolder, read_run
from qlora_kit.report.judge import judge_run
from qlora_kit.report.lines import Series
from qlora_kit.report.markup import Markup, clipped, element
from qlora_kit.report.methods import categories, own_method, own_plan, saving
from qlora_kit.report.page import chart, check_place, figure, lead, legend, page, section, table, wide, write_page
from qlora_kit.report.text import Table, aligned, in_words, wrapped
from qlora_kit.units import format_bytes

LONGEST_NAME = 24
"""Characters of a run's name in a table."""
COLOURS = 7
"""Of curves; the eighth run has the first one's colour in a broken line."""
_OWN = ("output",)
"""Keys in which every run differs."""
_OF_THE_ROWS = ("data.", "base.model")
"""Keys that may change which tokens a held-out loss is the mean of."""


def compare_runs(folders: Sequence[str | Path]) -> list[RunFolder]:
    """Read the runs to be compared.

    Raises:
        RunError: as `read_run`, or a folder is given twice.
    """
    twice = [folder for folder, count in Counter(Path(folder).resolve() for folder in folders).items() if count > 1]
    if twice:
        raise RunError(f"{twice[0]} is given twice; a comparison needs different runs")
    return [read_run(folder) for folder in folders]


def write_comparison(runs: Sequence[RunFolder], out: str | Path) -> Path:
    """Write the page for `runs` to `out` and return its path; an older comparison there is replaced, nothing else.

    Raises:
        RunError: it cannot be written or would overwrite something else, or a recipe cannot be read.
    """
    path = Path(out)
    check_place(path, "comparison")
    write_page(path, render_comparison(runs))
    return path


def render_comparison(runs: Sequence[RunFolder], top: Markup | None = None) -> str:
    """The page for `runs`, with what belongs `top` under its headline.

    Raises:
        RunError: a recipe cannot be read.
    """
    names = run_names(runs)
    head = element(
        "header",
        element("p", "Training runs compared", class_="eyebrow"),
        element("h1", f"{len(runs)} runs"),
        element("div", *_best_of(runs, names), class_="figures"),
    )
    verdicts = [
        element(
            "div",
            element("dt", _sign(index), name),
            element("dd", judge_run(run)),
        )
        for index, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    return page(
        "comparison",
        clipped(f"{', '.join(names)}: compared", 120),
        head,
        top or Markup(),
        section("Scores and memory", wide(table(runs_table(runs), "scores and memory of each run", kind="runs"))),
        _differences(runs),
        section("Training", element("dl", *verdicts, class_="verdicts"), *_charts(runs, names)),
        _memory(runs, names),
    )


def comparison_text(runs: Sequence[RunFolder]) -> str:
    """The tables of the page for a terminal."""
    differences = differences_table(runs)
    parts = [aligned(runs_table(runs))]
    if differences[1:]:
        parts.append(aligned([[clipped(cell, LONGEST_NAME) for cell in row] for row in differences]))
    return "\n\n".join([*parts, "\n".join(wrapped([on_recipes(runs)]))])


def on_recipes(runs: Sequence[RunFolder]) -> str:
    """Whether recipes differ, and whether their losses may be compared."""
    differences, tasks = recipe_differences(runs), _tasks(runs)
    if not differences:
        return "The recipes are the same."
    said = "Only what differs is shown; the rest of the recipes is the same."
    if len(tasks) > 1:
        said += (
            f" The losses of {', '.join(tasks[:-1])} and {tasks[-1]} measure different things: compare each only "
            "with its own kind."
        )
    if any(key.startswith(_OF_THE_ROWS) for key in differences):
        said += " The held-out tokens may differ: compare losses with care."
    return said


def comparison_facts(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """`runs`, each as `report_facts` gives it, and `differences`: by key of the recipe the value of each run."""
    return {"runs": [report_facts(run) for run in runs], "differences": recipe_differences(runs)}


def run_names(runs: Sequence[RunFolder]) -> list[str]:
    """The runs' names, with the folder above where two are the same, cut where they are long."""
    counts = Counter(run.name for run in runs)
    full = [run.name if counts[run.name] == 1 else f"{run.path.resolve().parent.name}/{run.name}" for run in runs]
    return [clipped(name, LONGEST_NAME) for name in full]


def runs_table(runs: Sequence[RunFolder]) -> Table:
    """One row a run; a column that no run knows is left out."""
    headings = _COLUMNS if len(_tasks(runs)) == 1 else (("task", lambda run: run.task), *_COLUMNS)
    columns = [(heading, [cell(run) for run in runs]) for heading, cell in headings]
    known = [(heading, cells) for heading, cells in columns if any(cell is not None for cell in cells)]
    return [
        ["", *(heading for heading, _ in known)],
        *([name, *(cells[index] or "-" for _, cells in known)] for index, name in enumerate(run_names(runs))),
    ]


def differences_table(runs: Sequence[RunFolder]) -> Table:
    """What the recipes differ in, one row a key; one row a run where there are more runs than keys."""
    names, differences = run_names(runs), recipe_differences(runs)
    cells = [["", *names], *([key, *_without_common_folder(values)] for key, values in differences.items())]
    return [list(row) for row in zip(*cells, strict=True)] if 0 < len(differences) < len(runs) else cells


def _without_common_folder(values: Sequence[str | None]) -> list[str]:
    """Paths from the folder on where they part; other values as they are, and "-" for none.

    >>> _without_common_folder(["/home/a/rows.jsonl", "/home/a/b/rows.jsonl", "auto", None])
    ['…/rows.jsonl', '…/b/rows.jsonl', 'auto', '-']
    """
    folders = [posixpath.dirname(value) for value in values if value is not None and value.startswith("/")]
    common = posixpath.commonpath(folders) if folders else ""
    return [
        f"…/{posixpath.relpath(value, common)}" if value is not None and value.startswith("/") else value or "-"
        for value in values
    ]


def recipe_differences(runs: Sequence[RunFolder]) -> dict[str, list[str | None]]:
    """By key, where not all runs have the same value: the values in YAML; None where a recipe does not have it.

    Raises:
        RunError: a recipe is not YAML.
    """
    recipes = [_values(run) for run in runs]
    keys = [key for key in dict.fromkeys(key for recipe in recipes for key in recipe) if key not in _OWN]
    values = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    return {key: each for key, each in values.items() if len(set(each)) > 1}


def _values(run: RunFolder) -> dict[str, str]:
    """`section.key` and value of a recipe as it is written."""
    try:
        root = yaml12.parse(run.recipe or "")
    except yaml12.Unreadable as error:
        raise RunError(f"{run.path / 'recipe.yaml'}:{error.line}: {error}") from error
    found = {}
    for key, node in root.value if isinstance(root, yaml.MappingNode) else ():
        inner = node.value if isinstance(node, yaml.MappingNode) else [(None, node)]
        for name, value in inner:
            path = yaml12.written(key).strip("'") + ("" if name is None else "." + yaml12.written(name).strip("'"))
            found[path] = yaml12.written(value).strip("'")
    return found


def _score(name: str, kind: str = "adapter") -> Callable[[RunFolder], str | None]:
    def cell(run: RunFolder) -> str | None:
        value = (run.scores or {}).get(kind, {}).get(name)
        if value is None:
            return None
        return f"{100 * value:.1f} %" if name != "loss" else f"{value:.3f}" if abs(value) < 1e4 else f"{value:.2e}"

    return cell


def _count(number: float | None) -> str | None:
    return None if number is None else f"{number:,.0f}"


def _steps(run: RunFolder) -> str | None:
    steps = [step for step, _ in curve(run.rows, "loss")]
    return f"{steps[-1]:,.0f}" if steps else None


def _speed(run: RunFolder) -> str | None:
    speed = report_facts(run)["tokens_per_s"]
    return None if speed is None else f"{speed:,.0f}"


def _measured(run: RunFolder) -> str | None:
    return None if run.memory is None else format_bytes(run.memory["measured"]["peak_bytes"])


def _saving(run: RunFolder) -> str | None:
    saved = saving(run.plan, own_method(run.plan), "full_finetune")
    return None if saved is None else f"{100 * saved:.0f} %"


_COLUMNS: tuple[tuple[str, Callable[[RunFolder], str | None]], ...] = (
    ("loss", _score("loss")),
    ("exact", _score("exact_match")),
    ("accuracy", _score("accuracy")),
    ("of rows", lambda run: _count((run.scores or {}).get("rows"))),
    ("steps", _steps),
    ("tok/s", _speed),
    ("planned", lambda run: format_bytes(own_plan(run.plan)["peak_bytes"])),
    ("measured", _measured),
    ("vs full", _saving),
)
"""Heading and cell; the scores are the adapter's on held-out rows, the saving is the planned one."""


def _tasks(runs: Sequence[RunFolder]) -> list[str]:
    return list(dict.fromkeys(run.task for run in runs))


def _alike(runs: Sequence[RunFolder]) -> list[tuple[str, list[int]]]:
    """The numbers of runs whose losses may be compared, after the words that name them; "" where all may."""
    tasks = _tasks(runs)
    if len(tasks) == 1:
        return [("", list(range(len(runs))))]
    return [(f" of {task}", [index for index, run in enumerate(runs) if run.task == task]) for task in tasks]


def _best_of(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Markup]:
    """The headline: which run of a task has the lowest loss, which the most exact matches, and the smallest peak."""
    everyone = list(range(len(runs)))
    losses = [
        (f"lowest held-out loss{of}", _known_score("loss", 1), _score("loss"), among)
        for of, among in _alike(runs)
        if among == everyone or len(among) > 1
    ]
    said = []
    for meaning, value, cell, among in (
        *losses,
        ("most exact matches", _known_score("exact_match", -1), _score("exact_match"), everyone),
        ("smallest measured peak", known_peak, _measured, everyone),
    ):
        ranked = [(rank, index) for index in among if (rank := value(runs[index])) is not None]
        if ranked:
            _, best = min(ranked)
            said.append(figure(cell(runs[best]) or "-", f"{meaning}: {names[best]}"))
    return said


def _known_score(name: str, sign: int) -> Callable[[RunFolder], float | None]:
    """The adapter's score, so turned that less is better."""

    def value(run: RunFolder) -> float | None:
        score: float | None = (run.scores or {}).get("adapter", {}).get(name)
        return None if score is None else sign * score

    return value


def known_peak(run: RunFolder) -> float | None:
    """Bytes that the run took at most; None where that was not measured."""
    peak: float | None = None if run.memory is None else run.memory["measured"]["peak_bytes"]
    return peak


def _memory(runs: Sequence[RunFolder], names: Sequence[str]) -> Markup:
    """Measured bytes by category, one bar a run; those of runs that were not measured as planned."""
    methods = {
        name if run.memory else clipped(f"{name} (planned)", LONGEST_NAME): (
            run.memory["measured"] if run.memory else own_plan(run.plan)
        )
        for name, run in zip(names, runs, strict=True)
    }
    order = [
        name for name in categories(methods.values()) if any(one["by_category"].get(name) for one in methods.values())
    ]
    bars = {name: {each: one["by_category"].get(each, 0) for each in order} for name, one in methods.items()}
    return section(
        "Memory at the peak",
        legend(((in_words(name), category_class(name)) for name in order), "swatch"),
        stacked_bars(bars, title="Memory at the peak of each run, by category"),
    )


def _differences(runs: Sequence[RunFolder]) -> Markup:
    cells = differences_table(runs)
    shown = [[clipped(cell, 60) for cell in row] for row in cells]
    drawn = [wide(table(shown, "what the recipes differ in", kind="runs words"))] if shown[1:] else []
    return section("Recipes", lead(on_recipes(runs)), *drawn)


def _charts(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Markup]:
    losses = [
        chart(_curves(runs, names, key, among), title=title.format(of), y_label=f"{kind} {runs[among[0]].loss_words}")
        for of, among in _alike(runs)
        for key, kind, title in (
            ("eval_loss", "evaluation", "Evaluation loss{} over steps"),
            ("loss", "training", "Training loss{} over steps, smoothed"),
        )
    ]
    speed = chart(
        _curves(runs, names, "tokens_per_s", range(len(runs))),
        title="Throughput over steps, smoothed",
        y_label="tokens per second",
        height=150,
        from_zero=True,
    )
    return [*losses, speed]


def _curves(runs: Sequence[RunFolder], names: Sequence[str], key: str, among: Iterable[int]) -> list[Series]:
    """One smoothed curve for each run `among` them that has any; evaluations are few and stay as they are."""
    series = []
    for index in among:
        points = curve(runs[index].rows, key)
        if finite(points):
            is_eval = key == "eval_loss"
            drawn = points if is_eval else smooth(points, window_for(len(points)))
            series.append(Series(names[index], drawn, style_of(index), marked=is_eval))
    return series


def style_of(index: int) -> str:
    """The class of the curve of that number."""
    return f"run-{index % COLOURS}" + (" broken" if index >= COLOURS else "")


def _sign(index: int) -> Markup:
    return element("i", class_=f"key {style_of(index)}")
