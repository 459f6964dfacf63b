"""Reports: from the files of a run folder to text, SVG and one self-contained HTML page. Nothing here needs torch."""

from qlora_kit.report.folder import RunFolder, read_run
from qlora_kit.report.html import render, write_report
from qlora_kit.report.judge import judge_curve
from qlora_kit.report.svg import Series, line_chart, stacked_bars
from qlora_kit.report.text import (
    memory_check_table,
    memory_check_text,
    memory_table,
    plan_text,
    scores_table,
    scores_text,
)

__all__ = [
    "RunFolder",
    "Series",
    "judge_curve",
    "line_chart",
    "memory_check_table",
    "memory_check_text",
    "memory_table",
    "plan_text",
    "read_run",
    "render",
    "scores_table",
    "scores_text",
    "stacked_bars",
    "write_report",
]
