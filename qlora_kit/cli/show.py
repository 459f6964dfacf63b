"""What a person sees: the plan, the progress bar, the samples, the scores, and where everything lies."""

import gc
import importlib
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from qlora_kit.cli.pipe import leave
from qlora_kit.cli.visible import visible
from qlora_kit.report.cards import cards_sentence
from qlora_kit.report.check_text import memory_check_text
from qlora_kit.report.judge import judge_scores
from qlora_kit.report.plan_text import plan_text
from qlora_kit.report.scores_text import score_words
from qlora_kit.units import counted, format_bytes, format_count, format_seconds
from qlora_kit.watch import Watch

if TYPE_CHECKING:
    from qlora_kit.lora import LoraReport
    from qlora_kit.run import Prepared, Result
    from qlora_kit.train.evaluate import Score

FEW_ROWS = 10
"""Held-out rows below which a loss on them is noise: its standard error is a third of the rows' own spread."""
PLAIN_LINES = 10
"""Progress lines of a run whose output is no terminal."""


def quiet_environment() -> None:
    """Silence what other libraries print about themselves, before any is imported; their errors still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # Offline, bitsandbytes warns of an inference kernel that the kit never calls.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def import_libraries() -> None:
    """Import what a run stands on, quietly.

    Nothing of it is garbage, so the collector need not look: imports take 3.6 s instead of 4.5, and a program ends in
    0.2 s instead of 1.2, when nothing has to be looked through once more.
    """
    quiet_environment()
    if "qlora_kit.run" not in sys.modules and gc.isenabled():
        gc.disable()
        try:
            importlib.import_module("qlora_kit.run")
            gc.freeze()
        finally:
            gc.enable()
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


class _Console(Console):
    """Goes on without a word where nobody reads any more: a run of hours is not lost for that."""

    def on_broken_pipe(self) -> None:
        """Called by rich where a line could not be written."""
        self.quiet = True
        leave(self.file)


class Screen(Watch):
    """Shows a run on a terminal, or as plain lines where there is none.

    Args:
        to_stderr: leave standard output alone.
    """

    def __init__(self, to_stderr: bool = False) -> None:
        self.console = _Console(stderr=to_stderr, highlight=False, soft_wrap=True, emoji=False)
        self.signal: int | None = None
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._steps = 0
        self._eval_loss: float | None = None
        self._eval_step = 0
        self._is_training = self._trains_all = False

    def note(self, text: str) -> None:
        """One line that a person should know."""
        self.console.print(f"[yellow]note:[/] {escape(visible(text))}")

    def encoded(self, done: int, total: int) -> None:
        """How far the rows of a large set are."""
        self.console.print(f"[bold]data[/]   {done:,} of {counted(total, 'row')} encoded ...")

    def prepared(self, prepared: "Prepared") -> None:
        """Rows and steps."""
        train, pace = prepared.train.counts, prepared.pace
        left_out, held_out = train.dropped + train.no_trained + train.faults, prepared.eval.counts.rows
        more = f", {left_out} left out" if left_out else ""
        more += f", {train.truncated} cut short" if train.truncated else ""
        more += f", {train.split} split" if train.split else ""
        if prepared.train.rows[0].target is not None:  # a text is learnt by its class, and not by its tokens
            tokens, learnt = f"{format_count(train.tokens)} tokens", "texts"
        else:
            tokens, learnt = f"{format_count(train.trained_tokens)} trained tokens", "trained tokens"
        self.console.print(
            f"[bold]data[/]   {counted(train.rows, 'row')}, {tokens}, "
            f"longest {counted(train.longest, 'token')}{more}; {counted(held_out, 'row')} held out"
        )
        if 0 < held_out < FEW_ROWS:
            self.note(
                f"only {counted(held_out, 'row')} held out: a loss on so few rows means little; give more with "
                "data.eval"
            )
        self.console.print(
            f"[bold]steps[/]  {pace.steps:,} of {pace.rows_a_step} rows ({pace.micro_batch} of the longest at a time), "
            f"{format_count(pace.trained_tokens)} {learnt} in all, learning rate {pace.lr:g} ({pace.lr_reason})"
        )
        self._steps = pace.steps

    def planned(self, plan: Mapping[str, Any]) -> None:
        """The memory table, and the cards that the plan fits on."""
        document = {"schema": 1, **plan}
        self.console.print(f"\n{escape(plan_text(document, cards_sentence(document)))}\n")

    def adapted(self, report: "LoraReport") -> None:
        """What the adapter covers, and the start of the bar."""
        self._is_training = True
        left = f", not on {_leaves(report.unmatched)}" if report.unmatched else ""
        self.console.print(
            f"[bold]lora[/]   {len(report.matched)} layers ({_leaves(report.matched)}){left}; "
            f"{format_count(report.trainable)} of {format_count(report.total)} parameters train ({report.share:.2%}), "
            f"scale {' and '.join(f'{scale:g}' for scale in report.scales)}"
        )
        for note in report.notes:
            self.note(note)
        self._begin_bar("train", self._steps)

    def loaded_whole(self, parameters: int) -> None:
        """That there is no adapter, and the start of the bar."""
        self._is_training = self._trains_all = True
        self.console.print(f"[bold]full[/]   all of {format_count(parameters)} parameters train; no adapter")
        self._begin_bar("train", self._steps)

    def _begin_bar(self, name: str, total: int) -> None:
        """Where there is a terminal: of as many steps, or runs."""
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn(f"[bold]{name}[/] "),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            self._task = self._progress.add_task(name, total=total, status="")
            self._progress.start()

    def row(self, row: Mapping[str, Any]) -> None:
        """One row of metrics on the bar."""
        if row.get("eval_loss") is not None:
            self._eval_loss, self._eval_step = row["eval_loss"], row["step"]
        if row.get("loss") is None:
            if self._progress is None and row["step"] == self._steps and self._eval_loss is not None:
                self.console.print(f"[bold]train[/]  step {self._steps}/{self._steps}  held-out {self._eval_loss:.3f}")
            return
        held_out = "" if self._eval_loss is None else f"  held-out {self._eval_loss:.3f} (step {self._eval_step})"
        status = (
            f"loss {row['loss']:.3f}{held_out}  {row['tokens_per_s']:,.0f} tok/s  {format_bytes(row['peak_bytes'])}"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=row["step"], status=status)
        elif row["step"] % max(1, self._steps // PLAIN_LINES) == 0 or row["step"] == self._steps:
            self.console.print(f"[bold]train[/]  step {row['step']}/{self._steps}  {status}")

    def sampled(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The first of a step's samples, in one line."""
        prompt, answer = (escape(_clip(visible(" ".join(rows[0][key].split())), 60)) for key in ("prompt", "answer"))
        self.console.print(f"[bold]sample[/] step {step}: {prompt} [bold]->[/] {answer}")

    def scored(self, scores: Mapping[str, Any]) -> None:
        """Answers before and after, then the scores."""
        self._end_bar()
        if scores["samples"]:
            table = Table(title="Held-out rows, before and after", title_justify="left", show_lines=True)
            for heading in ("prompt", "wanted", "base", self._trained_name):
                table.add_column(heading, overflow="fold")
            for sample in scores["samples"]:
                texts = (sample[key] for key in ("prompt", "reference", "base", "adapter"))
                table.add_row(*(escape(_clip(visible(text, keep="\n\t"))) for text in texts))
            self.console.print()
            self.console.print(table)
        self.console.print(f"\n[bold]score on {counted(scores['rows'], 'held-out row')}[/]")
        for name, label in (("base", "base"), ("adapter", self._trained_name)):
            told = "  ".join(f"{word} {value}" for word, value in score_words(scores[name]).items())
            self.console.print(f"  {label:15} {told}")
        if worse := judge_scores(scores):
            self.note(f"{worse} A lower train.lr may help.")

    def ended(self, result: "Result", task: str) -> None:
        """Where everything lies, and what to type next."""
        self._end_bar()
        folder = result.folder
        shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        if not result.finished:
            self.console.print(
                f"\nstopped after step {result.step}; the state is saved. Continue with:\n"
                f"  qlora-kit train {_shown(shlex.quote(str(shown / 'recipe.yaml')))} --resume"
            )
            return
        self.console.print(f"\n[bold]memory[/] planned and measured\n{escape(_memory_text(folder))}")
        self.console.print(f"\n[green]done[/] in {format_seconds(result.seconds)}")
        if self._trains_all:
            self.console.print(f"  model    {_shown(shown / 'model')}  (plain transformers weights)")
        else:
            self.console.print(f"  adapter  {_shown(shown / 'adapter')}  (PEFT's format)")
        self.console.print(f"  report   {_shown(shown / 'report.html')}")
        run, merged = (_shown(shlex.quote(str(path))) for path in (shown, shown / "merged"))
        asked = f"classify {run} --text TEXT" if task == "classify" else f"generate {run} --prompt TEXT"
        self.console.print(f"  ask      qlora-kit {asked}")
        if not self._trains_all:
            self.console.print(f"  merge    qlora-kit export {run} --to merged --out {merged}")

    @property
    def _trained_name(self) -> str:
        return "as trained" if self._trains_all else "base + adapter"

    def stop_requested(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Say at once that something happens, and close the bar however the block ends."""
        self.console.print("[dim]reading the model's shape and the rows, planning the memory ...[/]")
        try:
            yield
        finally:
            self._end_bar()

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step at hand; before training, or the second time, at once."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        if not self._is_training:
            self.console.print("\nstopped before training began; nothing was changed")
            raise SystemExit(128 + number)  # not an Exception, which a library might take for its own
        self.console.print("\nstopping after this step; press again to quit immediately")

    def _end_bar(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def score_lines(score: "Score") -> str:
    """A score as text."""
    words = score_words(score.as_json()) | {"loss": f"{score.loss:.4f}" + (" nats a token" if score.perplexity else "")}
    lines = [f"{word:15}  {value}" for word, value in words.items()]
    tokens = "" if "f1" in score.measures else f", {counted(score.tokens, 'trained token')}"
    return "\n".join([*lines, f"{'rows':15}  {score.rows:,}{tokens}"])


def audit_lines(exported: Mapping[str, Any], out: Path) -> str:
    """What an export holds and how it compares with the model as trained."""
    lines = [f"{len(exported['files'])} files in {visible(str(out))}"]
    for name, numbers in exported.get("comparisons", {}).items():
        same = "label" if "texts" in numbers else "top token"
        lines.append(
            f"{name} against the model as trained: "
            f"mean KL {numbers['mean_kl']:.2e}, largest {numbers['max_kl']:.2e} nats; "
            f"same {same} {numbers['top1_agreement']:.2%}; loss {numbers['loss_as_trained']:.4f} -> "
            f"{numbers['loss_export']:.4f}"
        )
    caution = exported.get("quantization", {}).get("caution")
    lines += [f"caution: {caution}"] if caution else []
    return "\n".join(lines)


def _shown(name: Path | str) -> str:
    """A name that is neither rich's markup nor a command to the terminal."""
    return escape(visible(str(name)))


def _memory_text(folder: Path) -> str:
    from qlora_kit.storage import read_json

    return memory_check_text(read_json(folder / "memory.json"))


def _clip(text: str, limit: int = 160) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _leaves(names: Iterable[str]) -> str:
    """The last parts of dotted names, each once."""
    return ", ".join(dict.fromkeys(escape(name.rpartition(".")[2]) for name in names))
