"""Reports: from the files of a run folder to text, SVG and one self-contained HTML page. Nothing here needs torch."""

from qlora_kit.report.area import timeline
from qlora_kit.report.bars import PhaseBar, phase_bars, stacked_bars
from qlora_kit.report.cards import card_groups, cards_sentence
from qlora_kit.report.check_text import memory_check_table, memory_check_text
from qlora_kit.report.compare import (
    compare_runs,
    comparison_facts,
    comparison_text,
    render_comparison,
    write_comparison,
)
from qlora_kit.report.facts import report_facts
from qlora_kit.report.folder import RunFolder, read_run
from qlora_kit.report.html import render, write_report
from qlora_kit.report.judge import GradientWatch, LossWatch, judge_curve
from qlora_kit.report.lines import Series, line_chart
from qlora_kit.report.plan_text import memory_table, plan_text
from qlora_kit.report.rates import rates_text
from qlora_kit.report.scores_text import scores_table, scores_text
from qlora_kit.report.sweep import SWEEP, read_outcomes, read_sweep, sweep_facts, sweep_text, write_sweep

__all__ = [
    "SWEEP",
    "GradientWatch",
    "LossWatch",
    "PhaseBar",
    "RunFolder",
    "Series",
    "card_groups",
    "cards_sentence",
    "compare_runs",
    "comparison_facts",
    "comparison_text",
    "judge_curve",
    "line_chart",
    "memory_check_table",
    "memory_check_text",
    "memory_table",
    "phase_bars",
    "plan_text",
    "rates_text",
    "read_outcomes",
    "read_run",
    "read_sweep",
    "render",
    "render_comparison",
    "report_facts",
    "scores_table",
    "scores_text",
    "stacked_bars",
    "sweep_facts",
    "sweep_text",
    "timeline",
    "write_comparison",
    "write_report",
    "write_sweep",
]
