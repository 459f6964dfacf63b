"""Scores before and after training, scores.json, as a table of text and in words."""

from collections.abc import Mapping
from typing import Any

from qlora_kit.report.text import Table, aligned, in_words

_SHARES = ("exact_match", "accuracy", "reward_accuracy", "f1")


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
